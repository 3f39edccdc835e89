"""Shards made of fewer bytes than they have: parcels are fetched in their place, and decoded upon what is here already.

Which way a shard comes is decided by bytes alone, its whole included. What is made counts when its digest is right;
whatever goes wrong on the way, that one shard is fetched whole. Decoding is done in threads, with a few shards in
memory at most.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from nearshard.assembly import Place, read_run
from nearshard.landing import MemoryLanding
from nearshard.transfer import Lands, Sources, Transfer
from shared.deltas import rebuild, ways
from shared.digest import Digest
from shared.errors import DiskError, NearshardError
from shared.layout import Slice
from shared.manifest import Delta, Manifest

PARCELS = 64 << 20
"""Bytes of parcels in memory: on their way, or waiting to be decoded."""
DECODING = 32 << 20
"""Bytes of shards that are being made, and that these are made upon; what takes more is decoded alone. Decoding takes
some times as many."""

Find = Callable[[Digest], Sequence[Place]]
"""Where a whole shard is on this disk, as far as is known: its bytes need not be right any more."""


@dataclass
class Tally:
    """What one call moved."""

    sources: Sources = field(default_factory=Sources)
    refused: int = 0
    """Shards that came whole because a delta was wrong, or could not be had or used."""


@dataclass(frozen=True, slots=True)
class Way:
    """How to have a shard without fetching it."""

    deltas: tuple[Delta, ...]
    """To be decoded in order."""
    parcels: Mapping[Digest, int]
    """What is fetched for that, with sizes."""
    whole: int
    """Bytes to move where this way fails."""

    @property
    def cost(self) -> int:
        """Bytes to move."""
        return sum(self.parcels.values())


def choose(
    manifest: Manifest, wanted: Mapping[Digest, int], find: Find, *, compressed: bool = True
) -> tuple[dict[Digest, Way], int]:
    """The ways of those shards that need not be fetched whole, and the bytes to move in all. Takes processor time.

    ``wanted``: the shards to have, and how many bytes of each are not here yet. Where ``find`` says that one of them
    is, it is not right. ``compressed``: whether shards may come compressed, upon nothing that is here.
    """

    def held(digest: Digest) -> bool:
        return digest not in wanted and bool(find(digest))

    chosen, total = dict[Digest, Way](), 0
    for digest, deltas in ways(manifest, wanted, held, compressed=compressed).items():
        parcels = {delta.parcel: manifest.size_of(delta.parcel) for delta in deltas}
        way = Way(deltas, parcels, wanted[digest])
        if deltas and way.cost < way.whole:
            chosen[digest] = way
        total += min(way.cost, way.whole) if deltas else way.whole
    return chosen, total


class Rebuilding:
    """The shards of one revision that are wanted, each on its way."""

    def __init__(
        self, transfer: Transfer, manifest: Manifest, chosen: Mapping[Digest, Way], find: Find, tally: Tally
    ) -> None:
        """``chosen``: by ``choose``; all others are fetched whole."""
        self._transfer, self._manifest, self._chosen, self._find = transfer, manifest, chosen, find
        self._tally = tally
        self._parcels, self._decoding = _Room(PARCELS), _Room(DECODING)

    async def land(self, digest: Digest, lands: Lands) -> None:
        """Have a shard where it lands. Raises as ``Transfer.fetch``."""
        made = await self._made(digest)
        if made is None:
            await self._transfer.land(digest, lands)
        else:
            await asyncio.to_thread(lands.put, digest, made)

    async def fetch(self, digest: Digest) -> memoryview:
        """A shard, or a parcel, in memory. Raises as ``Transfer.fetch``."""
        made = await self._made(digest)
        if made is None:
            landing = MemoryLanding(digest, self._manifest.size_of(digest))
            await self._transfer.fetch(landing)
            made = landing.data
        return made

    async def _made(self, digest: Digest) -> memoryview | None:
        """A shard, made on the way that was chosen; None where it is to be fetched whole."""
        if (way := self._chosen.get(digest)) is None:
            return None
        landings = {name: MemoryLanding(name, size) for name, size in way.parcels.items()}
        async with self._parcels.take(way.cost):
            try:
                for landing in landings.values():
                    await self._transfer.fetch(landing)
                return await self._decode(way, {name: landing.data for name, landing in landings.items()})
            except NearshardError:  # also where nobody can be reached: then the whole says so
                self._tally.refused += 1
                had = sum(landing.reached for landing in landings.values())
                self._transfer.meter.expect(way.whole - (way.cost - had))
                return None

    async def _decode(self, way: Way, parcels: Mapping[Digest, memoryview]) -> memoryview:
        """Raises DecodeError, IntegrityError, DiskError."""
        size = self._manifest.size_of
        upon = {part.digest for delta in way.deltas for part in delta.base}
        async with self._decoding.take(sum(map(size, upon | {delta.target for delta in way.deltas}))):
            return await asyncio.to_thread(rebuild, self._manifest, way.deltas, parcels, self._read)

    def _read(self, piece: Slice, into: memoryview) -> None:
        """A part of a shard that is on this disk, as it is there. Raises DiskError."""
        for place in self._find(piece.digest):
            with suppress(DiskError):
                return read_run(place, piece.offset, into)
        raise DiskError(f"{piece.digest} is not here any more")


class _Room:
    """Bytes of memory. Who asks for more than there are is given all of them."""

    def __init__(self, size: int) -> None:
        self._size = self._free = size
        self._change = asyncio.Condition()

    @asynccontextmanager
    async def take(self, size: int) -> AsyncIterator[None]:
        """Wait until so many are free, and have them in the block."""
        taken = min(size, self._size)
        async with self._change:
            await self._change.wait_for(lambda: self._free >= taken)
            self._free -= taken
        try:
            yield
        finally:
            self._free += taken
            async with self._change:
                self._change.notify_all()
