"""What another hub says of a model: its answer to ``/api/models/...``, as far as a mirror needs it. Pure.

Nothing of it is believed further than it has to be: names become paths only when they are safe ones, and what a file's
bytes are is checked where the hub names their SHA-256 (files in LFS; for the others it gives a size).
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from shared import codec
from shared.errors import DecodeError, IntegrityError, ManifestInvalid, UpstreamError
from shared.ids import is_commit
from shared.manifest import check_paths

MAX_DOCUMENT = 32 << 20
"""Bytes of an answer about one model: a hundred thousand files."""
EXCLUDED: Sequence[str] = (
    "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.joblib", "*.dill",
    "pytorch_model*.bin", "*/pytorch_model*.bin", "training_args.bin", "*/training_args.bin",
    ".git/*", ".cache/*", ".huggingface/*", "__pycache__/*",
)  # fmt: skip
"""What is not fetched: files that run code when they are loaded, and what is no part of a model."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,254}")


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file: its size in bytes, and its SHA-256 (64 hex digits) where the hub names it, else empty."""

    path: str
    size: int
    sha256: str = ""


@dataclass(frozen=True)
class HubRevision:
    """One state of a model at a hub. ``name``: as the hub spells it; ``restricted``: not for everybody there."""

    name: str
    commit: str
    files: tuple[HubFile, ...]
    restricted: bool = False

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def is_repo(text: str) -> bool:
    """Whether hubs may have a model of this name; old ones have no organisation."""
    return _REPO.fullmatch(text) is not None


def is_revision_name(text: str) -> bool:
    """Whether hubs may have a branch, tag or commit of this name."""
    return _REVISION.fullmatch(text) is not None and ".." not in text and "//" not in text


def info_path(model: str, revision: str) -> str:
    """Where a hub says what a revision has."""
    return f"/api/models/{model}/revision/{quote(revision, safe='')}?blobs=true"


def bytes_path(found: HubRevision, path: str) -> str:
    """Where a hub has a file's bytes."""
    return f"/{found.name}/resolve/{found.commit}/{quote(path)}"


def parse_revision(data: bytes) -> HubRevision:
    """What a hub answered. Raises UpstreamError for what cannot be mirrored."""
    try:
        document = codec.decode_json(data, MAX_DOCUMENT)
        name, commit = document["id"], document["sha"]
        if not (isinstance(name, str) and is_repo(name) and isinstance(commit, str) and is_commit(commit)):
            raise UpstreamError("the hub names a model or commit that is none")
        files = tuple(_file(entry) for entry in document["siblings"])
        check_paths([file.path for file in files])
    except (DecodeError, ManifestInvalid, KeyError, TypeError, AttributeError) as error:
        raise UpstreamError(f"the hub's answer cannot be used: {error}") from error
    return HubRevision(name, commit, files, bool(document.get("private")) or bool(document.get("gated")))


def _file(entry: Mapping[str, Any]) -> HubFile:
    lfs = entry.get("lfs") or {}
    path, size, sha256 = entry["rfilename"], lfs.get("size", entry.get("size")), lfs.get("sha256", "")
    if type(path) is not str or type(size) is not int or size < 0:
        raise TypeError("a file without a name and a size")
    if sha256 and not (isinstance(sha256, str) and _SHA256.fullmatch(sha256)):
        raise TypeError("a SHA-256 that is none")
    return HubFile(path, size, sha256)


def without(found: HubRevision, exclude: Iterable[str]) -> HubRevision:
    """Without the files that globs over paths name. Raises UpstreamError where nothing is left."""
    patterns = list(exclude)
    files = [file for file in found.files if not any(fnmatch.fnmatchcase(file.path, glob) for glob in patterns)]
    if not files:
        raise UpstreamError(f"{found.name} has no file that may be taken: pickles run code when they are loaded")
    return HubRevision(found.name, found.commit, tuple(files), found.restricted)


def check_bytes(file: HubFile, size: int, sha256: str) -> None:
    """Whether bytes are those that the hub named. Raises IntegrityError."""
    if size != file.size:
        raise IntegrityError(f"{file.path}: {size} bytes, and not the {file.size} that the hub named")
    if file.sha256 and sha256 != file.sha256:
        raise IntegrityError(f"{file.path}: not the bytes whose SHA-256 the hub named")
