"""Files being put together on disk: each beside its target under a temporary name, and there by rename.

Nothing is under a final name before all of its bytes are, verified.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nearshard.room import check_room
from shared.digest import Digest
from shared.errors import DiskError, DiskFull, IntegrityError, LocalError
from shared.layout import Layout

BLOCK = 1 << 20


class TargetExists(LocalError):
    """A target is there already, with other bytes; nothing was touched."""

    code = "exists"


@dataclass
class _Part:
    layout: Layout
    temporary: Path
    descriptor: int


@dataclass(frozen=True)
class _Place:
    """Where a run of a shard goes."""

    descriptor: int
    position: int
    offset: int
    length: int


class Assembly:
    """Targets (path to layout) that are assembled from shards in any order. A context manager.

    All methods block on the disk: call them from a thread. Raises DiskError (DiskFull before anything is touched
    where they would not fit), TargetExists.
    """

    def __init__(self, targets: Mapping[Path, Layout], *, force: bool) -> None:
        self._parts: dict[Path, _Part] = {}
        self._places: dict[Digest, list[_Place]] = defaultdict(list)
        self.kept: list[Path] = []
        """Targets that had the right bytes already."""
        try:
            wanted = {target: layout for target, layout in targets.items() if self._wants(target, layout, force=force)}
            check_room({target: layout.size for target, layout in wanted.items()})
            for target, layout in wanted.items():
                self._add(target, layout)
        except OSError as error:
            self.close()
            raise _disk_error(error) from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Assembly:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def needed(self) -> tuple[Digest, ...]:
        """The shards to fetch, in order of first use."""
        return tuple(self._places)

    def put(self, digest: Digest, data: memoryview) -> None:
        """Write a verified shard wherever it belongs."""
        try:
            for place in self._places[digest]:
                view, position = data[place.offset : place.offset + place.length], place.position
                while view:
                    written = os.pwrite(place.descriptor, view, position)
                    view, position = view[written:], position + written
        except OSError as error:
            raise _disk_error(error) from error

    def finish(self) -> None:
        """Check each file's SHA-256, make it durable, and give it its name."""
        try:
            for target, part in self._parts.items():
                if _sha256(part.descriptor) != part.layout.sha256:
                    raise IntegrityError(f"{target.name}: the whole does not match its digest")
                os.fsync(part.descriptor)
            for target, part in self._parts.items():
                part.temporary.replace(target)
        except OSError as error:
            raise _disk_error(error) from error

    def close(self) -> None:
        """Remove what was not finished. Safe to call again."""
        for part in self._parts.values():
            with suppress(OSError):
                os.close(part.descriptor)
            part.temporary.unlink(missing_ok=True)
        self._parts.clear()

    def _wants(self, target: Path, layout: Layout, *, force: bool) -> bool:
        if target.is_dir():
            raise TargetExists(f"{target}: is a directory")
        if target.exists() and not force:
            if not _same(target, layout):
                raise TargetExists(f"{target}: is there already, with other bytes; --force replaces it")
            self.kept.append(target)
            return False
        return True

    def _add(self, target: Path, layout: Layout) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(4)}.part")
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._parts[target] = _Part(layout, temporary, descriptor)
        if layout.size:
            os.truncate(descriptor, layout.size)
        position = 0
        for piece in layout.slices:
            self._places[piece.digest].append(_Place(descriptor, position, piece.offset, piece.length))
            position += piece.length


def _same(path: Path, layout: Layout) -> bool:
    if path.stat().st_size != layout.size:
        return False
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return _sha256(descriptor) == layout.sha256
    finally:
        os.close(descriptor)


def _sha256(descriptor: int) -> str:
    digest, position = hashlib.sha256(), 0
    while block := os.pread(descriptor, BLOCK, position):
        digest.update(block)
        position += len(block)
    return digest.hexdigest()


def _disk_error(error: OSError) -> DiskError:
    kind = DiskFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else DiskError
    return kind(f"{error.filename or 'the disk'}: {error.strerror}")
