"""What a path of a manifest is as bytes: a layout with its ETag, type, name and lifetime. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import quote

from shared.digest import Digest, digest_fields, hex_of
from shared.ids import is_revision
from shared.layout import Layout, Slice
from shared.manifest import Manifest
from shared.paths import FilePath, TaskPath

IMMUTABLE = "public, max-age=31536000, immutable"
REVALIDATE = "public, no-cache"
"""A ref can move: caches outside ours may keep the answer, but ask before they use it."""

BINARY = "application/octet-stream"
TYPES = {
    ".json": "application/json",
    ".txt": "text/plain",
    ".md": "text/markdown",
}
"""Types by suffix. Everything else is bytes: what a browser would run comes from whoever publishes."""


@dataclass(frozen=True, slots=True)
class Representation:
    """Bytes to be sent: everything but the conditions of one request."""

    layout: Layout
    content_type: str
    cache_control: str
    filename: str = ""
    revision: Digest | None = None
    """The revision that a task or file is of; None for a shard."""

    @property
    def etag(self) -> str:
        """The strong entity tag without quotes: the SHA-256 of the whole."""
        return self.layout.sha256

    def headers(self) -> dict[str, str]:
        """The fields that 200, 206 and 304 carry alike (RFC 9110 §15.4.5)."""
        fields = {
            "ETag": f'"{self.etag}"',
            "Cache-Control": self.cache_control,
            **digest_fields(self.etag),
            "Accept-Ranges": "bytes",
        }
        if self.revision:
            fields["Nearshard-Revision"] = self.revision
        return fields


_QUOTING = str.maketrans("", "", '"\\')


def disposition(filename: str) -> str:
    """The Content-Disposition of an answer that is to be kept under a name (RFC 6266 §4.3)."""
    plain = filename.encode("ascii", "ignore").decode().translate(_QUOTING)
    extended = "" if plain == filename else f"; filename*=UTF-8''{quote(filename, safe='')}"
    return f'attachment; filename="{plain}"{extended}'


def of_blob(digest: Digest, size: int) -> Representation:
    """One shard, whole."""
    layout = Layout(size, hex_of(digest), (Slice(digest, 0, size),))
    return Representation(layout, BINARY, IMMUTABLE)


def of_path(path: TaskPath | FilePath, manifest: Manifest) -> Representation:
    """A task or a file of a manifest. Raises NotFound."""
    if isinstance(path, TaskPath):
        task = manifest.task(path.task_id.task)
        layout, filename = task.layout, task.filename
    else:
        layout, filename = manifest.file(path.path), PurePosixPath(path.path).name
    return Representation(
        layout,
        TYPES.get(PurePosixPath(filename).suffix, BINARY),
        IMMUTABLE if is_revision(path.ref) else REVALIDATE,
        filename,
        manifest.revision,
    )
