"""The cache of a node: memory, disk and fills as one thing that opens shards.

``open`` decides and takes hold in one step, with no await between: what it gives is pinned (or joined) until it
is closed, so nothing is evicted under a reader.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO, Protocol

from edge_node.fill import Fill, Fills
from edge_node.ledger import State
from edge_node.reach import Reach
from edge_node.shard_key import ShardKey
from edge_node.store import DiskBuffer, DiskTier, MemoryTier, room
from edge_node.upstream import Place
from shared.errors import DiskFull, LocalError, NearshardError
from shared.outcome import Outcome
from shared.web.send import FileRegion, Piece

PROMOTE = 8
"""A shard moves up from disk to memory when it takes at most this fraction (1/8) of the memory budget."""


class Reader(Protocol):
    """An open shard. ``close`` when done, exactly once."""

    @property
    def outcome(self) -> Outcome:
        """How the shard is had."""
        ...

    @property
    def rebuilding(self) -> bool:
        """Whether it is being made, so that its first byte comes with its last."""
        ...

    async def size(self) -> int:
        """Bytes of the whole shard; raises as ``read``."""
        ...

    async def verified(self) -> None:
        """Until all of it is there and its digest was right; raises as ``read``."""
        ...

    def read(self, offset: int, length: int) -> AsyncIterator[Piece]:
        """These bytes in order; raises UpstreamError, IntegrityError or NotFound where they cannot be had."""
        ...

    def close(self) -> None:
        """Let go."""
        ...


@dataclass
class MemoryReader:
    """A shard in memory."""

    memory: MemoryTier
    key: ShardKey
    view: memoryview
    outcome: Outcome = Outcome.HIT_MEMORY
    rebuilding: bool = False

    async def size(self) -> int:
        """As held."""
        return len(self.view)

    async def verified(self) -> None:
        """Before it was kept."""

    async def read(self, offset: int, length: int) -> AsyncIterator[Piece]:
        """Views, without a copy."""
        yield self.view[offset : offset + length]

    def close(self) -> None:
        """Unpin."""
        self.memory.ledger.unpin(self.key)


@dataclass
class DiskReader:
    """A shard on disk."""

    disk: DiskTier
    key: ShardKey
    file: BinaryIO
    outcome: Outcome = Outcome.HIT_DISK
    rebuilding: bool = False

    async def size(self) -> int:
        """As committed."""
        return os.fstat(self.file.fileno()).st_size

    async def verified(self) -> None:
        """Before it was kept."""

    async def read(self, offset: int, length: int) -> AsyncIterator[Piece]:
        """A region, for sendfile."""
        yield FileRegion(self.file, offset, length, self.broken)

    def broken(self) -> None:
        """The disk failed to give it: it is fetched anew when it is asked for."""
        self.disk.damaged(self.key)

    def close(self) -> None:
        """Close and unpin."""
        self.file.close()
        self.disk.ledger.unpin(self.key)


@dataclass
class FillReader:
    """A shard that is being fetched; ``joined``: by somebody else's request."""

    fill: Fill
    joined: bool

    @property
    def outcome(self) -> Outcome:
        """How the shard is had."""
        return Outcome.COLLAPSED if self.joined else self.fill.outcome

    @property
    def rebuilding(self) -> bool:
        """As the fill is."""
        return self.fill.rebuilding

    async def size(self) -> int:
        """As the first source that answers says."""
        return await self.fill.wait_size()

    async def verified(self) -> None:
        """When the fill has it all."""
        await self.fill.wait_verified()

    def read(self, offset: int, length: int) -> AsyncIterator[Piece]:
        """Follow the fill."""
        return self.fill.read(offset, length)

    def close(self) -> None:
        """Leave the fill; it goes on."""
        self.fill.leave()


class Cache:
    """What a node holds, and how it gets the rest."""

    def __init__(self, memory: MemoryTier, disk: DiskTier, fills: Fills) -> None:
        self.memory, self.disk, self.fills = memory, disk, fills
        self._promotions: set[asyncio.Task[None]] = set()

    def peek(self, key: ShardKey, reach: Reach = Reach.ANYWHERE) -> Outcome:
        """How a read of this shard would be served now."""
        if key in self.memory:
            return Outcome.HIT_MEMORY
        if key in self.disk.ledger:
            return Outcome.HIT_DISK
        if self.fills.get(key, reach):
            return Outcome.COLLAPSED
        return self.fills.predict(key, reach)

    def known_size(self, key: ShardKey) -> int | None:
        """Bytes of a shard that is held."""
        for tier in (self.memory, self.disk):
            if key in tier.ledger:
                return tier.ledger.size(key)
        return None

    def open_held(self, key: ShardKey) -> MemoryReader | DiskReader | None:
        """Open a shard that is held whole, from memory or from disk; None for any other.

        Raises LocalError (``busy``) where this process cannot open more files.
        """
        if key in self.memory:
            self.memory.ledger.pin(key)
            return MemoryReader(self.memory, key, self.memory.view(key))
        if file := self.disk.open(key):
            self._promote(key)
            return DiskReader(self.disk, key, file)
        return None

    def look(self, key: ShardKey) -> MemoryReader | DiskReader | None:
        """The same, without counting as a use."""
        if key in self.memory:
            self.memory.ledger.hold(key)
            return MemoryReader(self.memory, key, self.memory.view(key))
        if file := self.disk.look(key):
            return DiskReader(self.disk, key, file)
        return None

    def open(
        self,
        key: ShardKey,
        size: int | None,
        reach: Reach = Reach.ANYWHERE,
        *,
        wanted_for: str = "",
        at: Place | None = None,
    ) -> Reader:
        """Open a shard: from memory, from disk, by joining its fill, or by starting one.

        ``size`` from a manifest, or None where only a source can say it. ``wanted_for``: a revision that it is of, as
        ``model@revision``, where one is known. ``at``: its place in a task or a file, if it is whole there.
        """
        if held := self.open_held(key):
            return held
        fill = self.fills.get(key, reach)
        joined = fill is not None
        if fill is None:
            fill = self.fills.start(key, size, reach, wanted_for=wanted_for, at=at)
        fill.join()
        return FillReader(fill, joined)

    def open_part(self, key: ShardKey, size: int, whole: Fill) -> Reader:
        """Open what another shard is made of, for the fill of that one."""
        if held := self.look(key):
            return held
        fill = self.fills.get(key, Reach.PART)
        joined = fill is not None
        if fill is None:
            fill = self.fills.start(key, size, Reach.PART, background=whole.background)
        fill.join_for(whole)
        return FillReader(fill, joined)

    async def fetch(self, key: ShardKey, size: int | None) -> None:
        """Have a shard on this node, in the background: clients go first. Raises what a fill ends with."""
        if self.known_size(key) is not None:
            return
        fill = self.fills.get(key, Reach.ANYWHERE)
        if fill is None:
            fill = self.fills.start(key, size, Reach.ANYWHERE, background=True)
        await fill.wait_end()

    async def keep(self, key: ShardKey, data: bytes) -> None:
        """Have a shard whose digest was right on the disk. Raises DiskFull where it cannot take it."""
        if fill := self.fills.get(key, Reach.ANYWHERE):  # it has the shard's place
            with suppress(NearshardError):
                await fill.wait_end()
        if key in self.disk.ledger:
            return
        buffer = self.disk.begin(key, len(data), favoured=False)
        if buffer is None:
            raise DiskFull(f"the cache's disk cannot take a shard of {len(data)} bytes now")
        committed = False
        try:
            await asyncio.to_thread(_write, buffer, data)
            buffer.commit()
            committed = True
        except OSError as error:
            self.disk.refused(error)
            raise DiskFull(f"the cache's disk refused a shard: {error.strerror}") from error
        finally:
            if not committed:
                buffer.discard()
            buffer.close(committed=committed)

    async def read_disk(self, key: ShardKey) -> bytes | None:
        """All of a shard that is on the disk; None where it is not, or cannot be read."""
        file = self.disk.look(key)
        if file is None:
            return None
        reader = DiskReader(self.disk, key, file)
        try:
            return await asyncio.to_thread(file.read)
        except OSError:
            reader.broken()
            return None
        finally:
            reader.close()

    async def close(self) -> None:
        """End what is under way."""
        await self.fills.close()
        await asyncio.gather(*self._promotions, return_exceptions=True)

    def _promote(self, key: ShardKey) -> None:
        """Copy a shard that was read from disk into memory, beside the request that read it."""
        size = self.disk.ledger.size(key)
        if size > self.memory.ledger.budget // PROMOTE or key in self.memory:
            return
        if self.memory.ledger.state(key) is not State.ABSENT or not self.memory.reserve(key, size):
            return
        try:
            file = self.disk.open(key)
        except LocalError:
            file = None
        if file is None:
            self.memory.release(key)
            return
        task = asyncio.create_task(self._copy(DiskReader(self.disk, key, file), size))
        self._promotions.add(task)
        task.add_done_callback(self._promotions.discard)

    async def _copy(self, reader: DiskReader, size: int) -> None:
        try:
            data = room(size)
            if await asyncio.to_thread(os.preadv, reader.file.fileno(), [data], 0) != size:
                raise OSError("shorter than it was")
            self.memory.commit(reader.key, data.toreadonly())
        except (OSError, NearshardError):
            self.memory.release(reader.key)  # the disk tier finds out by itself when it is read
        finally:
            reader.close()


def _write(buffer: DiskBuffer, data: bytes) -> None:
    """Raises OSError."""
    buffer.write(0, data)
    buffer.settle()
