"""The read surface: what each path asks for. The same on every tier, parsed in this one place.

Paths are taken as they came over the wire and decoded here, once and strictly: a target that decodes to
anything but its canonical form is ``bad_id``, whatever the HTTP library made of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote

from shared.digest import Digest, parse_digest
from shared.errors import BadId, ManifestInvalid, NotFound
from shared.ids import TaskId, is_commit, parse_model, parse_ref_or_revision, parse_task_id
from shared.manifest import check_path
from shared.trust_names import file_name, parse_file_name

ADMIN, ENROLMENTS = "/admin", "/enrolments"
"""What is below these is not read: operating a node, and changing a router's enrolment."""
BUNDLE = "/bundle"
"""Below an operator's face: a bundle for a node to take in."""
MAX_TARGET = 8000
"""Characters of a path: the longest that a manifest can hold, each byte escaped, fits in a request line."""
_RAW = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=:@/-]|%[0-9A-Fa-f]{2})*")
_HIDDEN_SLASH = re.compile(r"%2f|%5c|%00", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class TaskPath:
    """``/shards/<task_id>``: a task's bytes, its plan, or its metalink."""

    task_id: TaskId

    @property
    def model(self) -> str:
        """The model that it is of."""
        return self.task_id.model

    @property
    def ref(self) -> str:
        """The ref or revision that it is of."""
        return self.task_id.ref

    @property
    def ring_key(self) -> str:
        """What the ring hashes."""
        return self.task_id.ring_key

    def at(self, revision: str) -> str:
        """The path of the same at a revision."""
        return task_path(TaskId(self.task_id.model, self.task_id.task, revision))


@dataclass(frozen=True, slots=True)
class BlobPath:
    """``/blobs/<digest>``: one shard; ``/models/<model>/blobs/<digest>``: one of a private model."""

    digest: Digest
    model: str = ""
    """The private model; empty for a public shard."""


@dataclass(frozen=True, slots=True)
class ModelsPath:
    """``/models``: the names."""


@dataclass(frozen=True, slots=True)
class ModelPath:
    """``/models/<model>``: refs, revisions, tasks and files."""

    model: str


@dataclass(frozen=True, slots=True)
class ManifestPath:
    """``/models/<model>/manifests/<ref, revision or commit>``."""

    model: str
    ref: str


@dataclass(frozen=True, slots=True)
class FilePath:
    """``/models/<model>/files/<ref or revision>/<path>``: an original file."""

    model: str
    ref: str
    path: str

    @property
    def ring_key(self) -> str:
        """What the ring hashes: without the revision, as a task's."""
        return f"{self.model}/{self.path}"

    def at(self, revision: str) -> str:
        """The path of the same at a revision."""
        return file_path(self.model, revision, self.path)


@dataclass(frozen=True, slots=True)
class HubPath(FilePath):
    """``/<model>/resolve/<ref or revision>/<path>``: the same, for Hugging Face's clients and ModelScope's.

    They go on from whatever they have, and look at nothing but its size: they are sent no byte of a shard before its
    digest was right.
    """

    def at(self, revision: str) -> str:
        """The path of the same at a revision."""
        return f"/{self.model}/resolve/{revision}/{quote(self.path)}"


@dataclass(frozen=True, slots=True)
class TrustPath:
    """``/trust/<file>``: a file of the signed metadata."""

    role: str
    version: int
    """0 of the timestamp, the one file that changes."""

    @property
    def file(self) -> str:
        """Its name."""
        return file_name(self.role, self.version)


ReadPath = TaskPath | BlobPath | ModelsPath | ModelPath | ManifestPath | FilePath | TrustPath


def decode_path(raw: str) -> str:
    """The decoded path of a raw request target (RFC 3986 §2.1), query left off.

    Raises BadId for bad or needless trickery: broken escapes, an escaped slash, backslash or NUL, control
    characters, empty or dot segments, bytes that are not UTF-8.
    """
    path = raw.partition("?")[0]
    if len(path) > MAX_TARGET or not _RAW.fullmatch(path) or _HIDDEN_SLASH.search(path):
        raise BadId("a path with characters or escapes that are not allowed")
    try:
        decoded = re.sub(rb"%([0-9A-Fa-f]{2})", lambda m: bytes([int(m[1], 16)]), path.encode()).decode()
    except UnicodeDecodeError:
        raise BadId("a path that is not UTF-8") from None
    root, *segments = decoded.split("/")
    if root or not segments or any(s in ("", ".", "..") for s in segments) or not decoded.isprintable():
        raise BadId("a path with empty, dot or unprintable segments")
    return decoded


def parse_path(raw: str) -> ReadPath:
    """What a raw request target asks for. Raises BadId, or NotFound for a path outside the surface."""
    if raw.partition("?")[0] in ("/shards/", "/blobs/"):
        raise NotFound("no id")
    _, head, *rest = decode_path(raw).split("/")
    if head == "shards" and rest:
        return TaskPath(parse_task_id("/".join(rest)))
    if head == "blobs" and len(rest) == 1:
        return BlobPath(parse_digest(rest[0]))
    if head == "trust" and len(rest) == 1:
        if found := parse_file_name(rest[0]):
            return TrustPath(*found)
        raise NotFound("no metadata is called that", code="unknown_metadata")
    if head == "models":
        if not rest:
            return ModelsPath()
        if len(rest) < 2:
            raise BadId("a model is 'org/name'")
        model = parse_model("/".join(rest[:2]))
        match rest[2:]:
            case []:
                return ModelPath(model)
            case ["manifests", ref]:
                return ManifestPath(model, ref if is_commit(ref) else parse_ref_or_revision(ref))
            case ["blobs", digest]:
                return BlobPath(parse_digest(digest), model)
            case ["files", ref, *path] if path:
                try:
                    return FilePath(model, parse_ref_or_revision(ref), check_path("/".join(path)))
                except ManifestInvalid:
                    raise BadId("not a usable file path") from None
            case _:
                pass
    raise NotFound("no such path")


def blob_path(digest: Digest, model: str = "") -> str:
    """The path of one shard; of a private ``model`` where one is named."""
    return f"/models/{model}/blobs/{digest}" if model else f"/blobs/{digest}"


def trust_path(role: str, version: int) -> str:
    """The path of a file of the signed metadata."""
    return f"/trust/{file_name(role, version)}"


def manifest_path(model: str, ref: str) -> str:
    """The path of a manifest."""
    return f"/models/{model}/manifests/{ref}"


def task_path(task_id: TaskId) -> str:
    """The path of a task."""
    return f"/shards/{task_id}"


def file_path(model: str, ref: str, path: str) -> str:
    """The path of an original file."""
    return f"/models/{model}/files/{ref}/{quote(path)}"
