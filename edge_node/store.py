"""Where a node keeps shards: a memory tier and a disk tier, each under its Ledger.

The disk's tree, with every path made here::

    blobs/<2 hex>/<64 hex>                         a public shard, whole and verified: it got this name by rename
                                                   after its hash was right
    models/<org>/<name>/blobs/<2 hex>/<64 hex>     the same, of a private model
    tmp/<64 hex>.<number>                          a fill under way; emptied at start

After a restart the names and sizes under ``blobs/`` are the index. A file that cannot be trusted any more (wrong
size, read error) is dropped and fetched again; it costs a fill, never a wrong byte.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from structlog.typing import FilteringBoundLogger

from edge_node.ledger import Ledger, State
from edge_node.shard_key import ShardKey, digest_in, model_in, shard_key
from shared.clock import Clock
from shared.digest import from_hash, hex_of
from shared.errors import BadId, LocalError
from shared.ids import parse_model
from shared.metrics import Metrics
from shared.web.send import FileRegion, Piece
from shared.web.session import SHORT

REST = 30.0
"""Seconds that a disk which refused a write is left alone."""
TOUCH = 600.0
"""Seconds between two notes on disk that an entry was used: LRU order across restarts, without a write a read."""
LARGE = 1 << 20
"""Bytes from which on a shard in memory has pages of its own. The heap would not give them back: freed blocks of
megabytes make the allocator keep more and more of them, once in each of its threads' arenas."""
BLOBS, MODELS = "blobs", "models"
_HEX = re.compile(r"[0-9a-f]{64}")


def room(size: int) -> memoryview:
    """Bytes to write to. Large ones cost nothing until they are written, and are given back with their last view."""
    if size < LARGE:
        return memoryview(bytearray(size))
    return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


class MemoryTier:
    """Shards as bytes."""

    def __init__(self, budget: int, metrics: Metrics) -> None:
        self.ledger = Ledger(budget)
        self._data: dict[ShardKey, memoryview] = {}
        self._metrics = metrics

    def __contains__(self, key: ShardKey) -> bool:
        return key in self._data

    def peek(self, key: ShardKey) -> memoryview | None:
        """An entry's bytes, for use before the next await; counts as a use of it."""
        view = self._data.get(key)
        if view is not None:
            self.ledger.touch(key)
        return view

    def view(self, key: ShardKey) -> memoryview:
        """An entry's bytes, pinned by the caller in the ledger. Raises KeyError."""
        return self._data[key]

    def reserve(self, key: ShardKey, size: int) -> bool:
        """Make room, evicting what was used longest ago."""
        victims = self.ledger.reserve(key, size)
        for victim in victims or ():
            del self._data[victim]
        self._metrics.evictions.labels("memory").inc(len(victims or ()))
        self._metrics.cached.labels("memory").set(self.ledger.used)
        return victims is not None

    def commit(self, key: ShardKey, data: memoryview) -> None:
        """Verified bytes of an entry that has its room."""
        self._data[key] = data
        self.ledger.commit(key)

    def release(self, key: ShardKey) -> None:
        """Give room back."""
        self.ledger.release(key)
        self._metrics.cached.labels("memory").set(self.ledger.used)

    def drop(self, key: ShardKey) -> None:
        """Forget an entry."""
        if key in self._data:
            del self._data[key]
            self.ledger.drop(key)


class DiskTier:
    """Shards as files."""

    def __init__(self, root: Path, budget: int, clock: Clock, metrics: Metrics, log: FilteringBoundLogger) -> None:
        self.ledger = Ledger(budget)
        self._root = root
        self._clock = clock
        self._metrics = metrics
        self._log = log
        self._number = 0
        self._rest_until = 0.0
        self._touched: dict[ShardKey, float] = {}

    def recover(self) -> int:
        """Take up what an earlier run left: oldest use first. Gives the number of entries."""
        for folder in (BLOBS, MODELS, "tmp"):
            (self._root / folder).mkdir(parents=True, exist_ok=True, mode=0o700)
        for leftover in (self._root / "tmp").iterdir():
            leftover.unlink()
        found = sorted(self._scan(), key=lambda item: item[2])
        for key, size, _ in found:
            victims = self.ledger.reserve(key, size)
            if victims is None:
                self._unlink(key)
                continue
            self.ledger.commit(key)
            for victim in victims:
                self._unlink(victim)
        self._metrics.cached.labels("disk").set(self.ledger.used)
        return self.ledger.statistics().entries

    def open(self, key: ShardKey) -> BinaryIO | None:
        """A pinned entry's file (the caller closes it, then unpins); None where it is not there or damaged.

        Raises as ``look``.
        """
        if key not in self.ledger:
            return None
        self.ledger.touch(key)
        file = self.look(key)
        if file is not None:
            self._touch(key)
        return file

    def look(self, key: ShardKey) -> BinaryIO | None:
        """The same, without counting as a use. Raises LocalError (``busy``): this process cannot open more files."""
        if key not in self.ledger:
            return None
        size = self.ledger.size(key)
        self.ledger.hold(key)
        try:
            file = self._path(key).open("rb", buffering=0)
            if os.fstat(file.fileno()).st_size != size:
                file.close()
                raise OSError(errno.EIO, "not the size that was committed")
        except OSError as error:
            self.ledger.unpin(key)
            if error.errno in SHORT:
                raise LocalError(f"a cached shard cannot be opened now: {error}", code="busy") from error
            self._log.warning("cached shard is unusable", shard=key, reason=str(error))
            self.drop(key)
            return None
        return file

    def begin(self, key: ShardKey, size: int, *, favoured: bool, kept: bool = True) -> DiskBuffer | None:
        """Room and a temporary file for a fill; None where the disk cannot take it now.

        What is not ``kept`` has its room while it is read, and is no entry.
        """
        if self._clock.monotonic() < self._rest_until or self.ledger.state(key) is not State.ABSENT:
            return None
        victims = self.ledger.reserve(key, size, favoured=favoured)
        if victims is None:
            return None
        for victim in victims:
            self._unlink(victim)
        self._metrics.evictions.labels("disk").inc(len(victims))
        self._metrics.cached.labels("disk").set(self.ledger.used)
        self._number += 1
        path = self._root / "tmp" / f"{hex_of(digest_in(key))}.{self._number}"
        try:
            return DiskBuffer(self, key, path, self._path(key), kept=kept)
        except OSError as error:
            self.refused(error)
            self.ledger.release(key)
            return None

    def refused(self, error: OSError) -> None:
        """The disk is full, read-only or failing: leave it alone for a while."""
        self._log.warning("the disk refused a write; serving without storing", reason=str(error), seconds=REST)
        self._rest_until = self._clock.monotonic() + REST

    def damaged(self, key: ShardKey) -> None:
        """An entry cannot be read: forget it."""
        self._log.warning("cached shard cannot be read", shard=key)
        self.drop(key)

    def drop(self, key: ShardKey) -> None:
        """Forget an entry, and its file."""
        if key in self.ledger:
            self.ledger.drop(key)
            self._unlink(key)
            self._metrics.cached.labels("disk").set(self.ledger.used)

    def _path(self, key: ShardKey) -> Path:
        name, model = hex_of(digest_in(key)), model_in(key)
        folder = self._root / MODELS / model / BLOBS if model else self._root / BLOBS
        return folder / name[:2] / name

    def _unlink(self, key: ShardKey) -> None:
        self._touched.pop(key, None)
        with suppress(OSError):
            self._path(key).unlink()

    def _touch(self, key: ShardKey) -> None:
        now = self._clock.monotonic()
        if now - self._touched.get(key, float("-inf")) > TOUCH:
            self._touched[key] = now
            with suppress(OSError):
                os.utime(self._path(key))

    def _scan(self) -> Iterator[tuple[ShardKey, int, int]]:
        yield from _scan_blobs(self._root / BLOBS, "")
        for blobs in (self._root / MODELS).glob(f"*/*/{BLOBS}"):
            try:
                model = parse_model("/".join(blobs.relative_to(self._root).parts[1:3]))
            except BadId:
                continue  # not of this node's making
            yield from _scan_blobs(blobs, model)


def _scan_blobs(root: Path, model: str) -> Iterator[tuple[ShardKey, int, int]]:
    """Key, bytes and time of last use of what is below a folder; what is no shard goes."""
    for folder in os.scandir(root):
        if not folder.is_dir(follow_symlinks=False):
            continue
        for item in os.scandir(folder):
            info = item.stat(follow_symlinks=False)
            if _HEX.fullmatch(item.name) and item.name[:2] == folder.name and info.st_size:
                yield shard_key(from_hash(bytes.fromhex(item.name)), model), info.st_size, info.st_mtime_ns
            else:
                Path(item.path).unlink()


class DiskBuffer:
    """A fill's bytes in a temporary file; readers follow it there. ``settle`` names it where it is ``kept``."""

    def __init__(self, tier: DiskTier, key: ShardKey, path: Path, final: Path, *, kept: bool) -> None:
        self.kept = kept
        self._tier, self._digest, self._path, self._final = tier, key, path, final
        final.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file: BinaryIO = path.open("w+b", buffering=0)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Put bytes in their place. Raises OSError; what was written before stays readable."""
        view = memoryview(data)
        while view:
            written = os.pwrite(self._file.fileno(), view, offset)
            offset, view = offset + written, view[written:]

    def read(self, offset: int, length: int) -> bytes:
        """What was written there; fewer bytes at the end of what was written. Raises OSError."""
        return os.pread(self._file.fileno(), length, offset)

    def piece(self, offset: int, length: int) -> Piece:
        """Bytes that are there."""
        return FileRegion(self._file, offset, length)

    def settle(self) -> None:
        """Make the bytes durable and give them their name (blocking: for a thread). Raises OSError."""
        if self.kept:
            os.fsync(self._file.fileno())
            self._path.replace(self._final)

    def commit(self) -> None:
        """The entry is READY; it stays pinned until ``close``, for readers that are still under way."""
        if self.kept:
            self._tier.ledger.commit(self._digest)
            self._tier.ledger.hold(self._digest)

    def discard(self) -> None:
        """Give the room back; readers may still hold the file."""
        with suppress(OSError):
            self._path.unlink()
        self._tier.ledger.release(self._digest)

    def close(self, *, committed: bool) -> None:
        """Nobody reads any more."""
        self._file.close()
        if committed and self.kept:
            self._tier.ledger.unpin(self._digest)
        elif committed:
            self.discard()


class MemoryBuffer:
    """A fill's bytes in memory, where the disk cannot take it.

    With room in the memory tier the shard stays there; without, ``commit`` keeps nothing.
    """

    def __init__(self, tier: MemoryTier, key: ShardKey, size: int) -> None:
        self._tier, self._digest = tier, key
        self.kept = tier.ledger.state(key) is State.ABSENT and tier.reserve(key, size)
        self._view = room(size)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Put bytes in their place."""
        self._view[offset : offset + len(data)] = data

    def read(self, offset: int, length: int) -> memoryview:
        """What was written there."""
        return self._view[offset : offset + length]

    def piece(self, offset: int, length: int) -> Piece:
        """Bytes that are there."""
        return self._view[offset : offset + length]

    def settle(self) -> None:
        """Nothing to make durable."""

    def commit(self) -> None:
        """The entry is READY; pinned until ``close``."""
        if self.kept:
            self._tier.commit(self._digest, self._view.toreadonly())
            self._tier.ledger.hold(self._digest)

    def discard(self) -> None:
        """Give the room back."""
        if self.kept:
            self._tier.release(self._digest)

    def close(self, *, committed: bool) -> None:
        """Nobody reads any more."""
        if committed and self.kept:
            self._tier.ledger.unpin(self._digest)


Buffer = DiskBuffer | MemoryBuffer
