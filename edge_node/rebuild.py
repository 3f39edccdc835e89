"""Making a shard from fewer bytes than it has: parcels from above, decoded upon what is held here or next door.

A fill that would go above asks here first. The parcels come as shards of their own, each by a fill that others may
join, so that the link carries each once. Bases are read where they are: on this node, pinned meanwhile, or by range
from the peer that owns them, which is asked only for what it holds. What comes out counts when its digest is right.
Whatever goes wrong is counted and told to the log once, and the fill goes on with the whole shard.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from structlog.typing import FilteringBoundLogger

from edge_node.cache import Cache, FillReader, MemoryReader, Reader
from edge_node.fill import Fill
from edge_node.recipes import Recipe, Recipes
from edge_node.shard_key import ShardKey, model_in
from edge_node.store import room
from edge_node.upstream import Source, Upstreams
from shared import parcel
from shared.catalog import Catalog
from shared.digest import Digest, digest_of
from shared.errors import DecodeError, IntegrityError, LocalError, NearshardError, NotFound, UpstreamError
from shared.ids import TaskId, as_revision, is_revision, parse_task_id
from shared.layout import Slice
from shared.manifest import Delta
from shared.metrics import Metrics
from shared.outcome import Outcome
from shared.web.send import FileRegion, reading
from shared.web.trusted import Trusted

AT_ONCE = 2
"""Shards that are decoded at a time: each takes its bases, its parcel and what is made of them in memory."""
LEARN = 2.0
"""Seconds that a fill waits for the manifest in which there may be a delta."""
LEAST_GAIN = 0.1
"""The share of a shard that its compressed form must save on a link that is neither capped nor metered: readers of it
wait for its end, where they follow the shard itself from the first byte."""
LEAST_SAVED = 4 << 10
"""Bytes that it must save there: what a request more, and its answer's head, take a few times."""


Read = Callable[[TaskId, str], Awaitable[None]]
"""Reads the manifest of a revision, for shards of a private model (empty: for public ones). Raises NearshardError."""


def reader_of(catalog: Catalog, trusted: Trusted, recipes: Recipes) -> Read:
    """What reads manifests for a Rebuilder."""

    async def read(of: TaskId, private: str) -> None:
        if private == of.model or (not private and await trusted.is_public(of.model)):
            recipes.learn((await catalog.resolve(of.model, of.ref)).manifest, private)

    return read


class NotRebuilt(Exception):
    """A shard cannot be made of its parts; ``result`` is what is counted."""

    def __init__(self, result: str, reason: str) -> None:
        super().__init__(reason)
        self.result = result


@dataclass
class _Parts:
    """What a recipe takes, open: here, on its way, or at peers. Closed with its stack."""

    stack: ExitStack
    open: dict[ShardKey, Reader] = field(default_factory=dict)
    at_peers: Mapping[ShardKey, Source] = field(default_factory=dict)
    made: dict[Digest, memoryview] = field(default_factory=dict)
    """What was decoded on the way."""

    def add(self, key: ShardKey, reader: Reader) -> None:
        """Keep a part open until the end."""
        self.open[key] = reader
        self.stack.callback(reader.close)


class Rebuilder:
    """Makes shards by the recipes that a node knows."""

    def __init__(
        self,
        cache: Cache,
        recipes: Recipes,
        upstreams: Upstreams,
        read: Read,
        metrics: Metrics,
        log: FilteringBoundLogger,
    ) -> None:
        self.recipes = recipes
        self._read_manifest = read
        self._cache, self._upstreams = cache, upstreams
        self._metrics, self._log = metrics, log
        self._turns = asyncio.Semaphore(AT_ONCE)
        self.made = self.failed = self.saved = 0
        """Shards that were made, and that could not be; bytes that did not come from above for it."""

    def status(self) -> Mapping[str, int]:
        """For people and scripts."""
        return {"made": self.made, "failed": self.failed, "saved_bytes": self.saved}

    async def make(self, fill: Fill) -> bool:
        """Give a fill all bytes of its shard, their digest right; False where no way moves fewer, or it did not work.

        Raises UpstreamError where nobody answered, or this node has no room: the whole shard would not come either.
        """
        with ExitStack() as stack:
            parts = _Parts(stack)
            try:
                recipe = await self._begin(fill, parts)
                if recipe is None or not await fill.place(recipe.size):
                    return False  # or it is held outside every budget, where its parts would have no place either
                moved = await self._fetch(recipe, parts, fill)
                async with self._turns:
                    await fill.put_all(await self._decode(recipe, parts))
            except NotRebuilt as error:
                self.failed += 1
                self._metrics.deltas.labels(error.result).inc()
                self._log.warning("a shard comes whole, not from its delta", shard=fill.key, reason=str(error))
                return False
        saved = max(0, recipe.size - moved)
        self.made += 1
        self.saved += saved
        self._upstreams.account.saved(fill.key, saved)
        self._metrics.deltas.labels("made").inc()
        self._metrics.delta_saved.inc(saved)
        self._log.info("made from a delta", shard=fill.key, bytes=recipe.size, moved=moved)
        return True

    # Which way

    async def _begin(self, fill: Fill, parts: _Parts) -> Recipe | None:
        """The recipe to use, with all that is held of it open and pinned. Raises NotRebuilt."""
        key = fill.key
        if fill.wanted_for:
            await self._learn(fill)
        bases = self.recipes.bases(key)
        away = [base for base in bases if self._cache.known_size(base) is None]
        parts.at_peers = await self._upstreams.holders(away)
        recipe = self.recipes.best(key, lambda part: self._cache.known_size(part) is not None or part in parts.at_peers)
        if recipe is None or fill.size not in (None, recipe.size) or not self._worth_it(recipe):
            return None
        for part in recipe.parts:
            if self._cache.known_size(part) is not None:
                parts.add(part, self._look(part))
        return recipe

    def _look(self, key: ShardKey) -> Reader:
        """A part that is held, open. Raises NotRebuilt."""
        try:
            reader = self._cache.look(key)
        except LocalError as error:
            raise NotRebuilt("missing", str(error)) from error
        if reader is None:
            raise NotRebuilt("missing", f"{key} cannot be read from the disk")
        return reader

    async def _learn(self, fill: Fill) -> None:
        """Read the manifest that a fill was asked for by: another node, or a client, has read it, and this one not."""
        private = model_in(fill.key)
        try:
            of = parse_task_id(fill.wanted_for)
            if is_revision(of.ref) and not self.recipes.knows(private, as_revision(of.ref)):
                async with asyncio.timeout(LEARN):
                    await self._read_manifest(of, private)
        except (TimeoutError, NearshardError) as error:
            self._log.debug("no manifest to find a delta in", wanted_for=fill.wanted_for, reason=str(error))

    def _worth_it(self, recipe: Recipe) -> bool:
        gain = recipe.size - recipe.cost
        if recipe.compressed and not self._upstreams.link.dear:
            return gain >= max(LEAST_SAVED, LEAST_GAIN * recipe.size)
        return gain > 0

    # Its parts

    async def _fetch(self, recipe: Recipe, parts: _Parts, fill: Fill) -> int:
        """Have all parts, but for bases that stay with peers; the bytes that came from above for it."""
        begun: dict[ShardKey, FillReader] = {}
        for key, size in recipe.parts.items():
            if key not in parts.open and key not in parts.at_peers:
                reader = self._cache.open_part(key, size, fill)
                parts.add(key, reader)
                if isinstance(reader, FillReader):
                    begun[key] = reader
        for key, reader in begun.items():
            try:
                await reader.fill.until_verified()
            except (NotFound, UpstreamError) as error:
                if error.error_code == "upstream_timeout":
                    raise  # nobody answers: readers have waited long enough
                result = "damaged" if isinstance(error, IntegrityError) else "missing"
                raise NotRebuilt(result, f"no {key}: {error}") from error
        above = (reader for reader in begun.values() if not reader.joined and reader.outcome is not Outcome.FILL_PEER)
        return sum(reader.fill.size or 0 for reader in above)

    # Decoding

    async def _decode(self, recipe: Recipe, parts: _Parts) -> memoryview:
        for number, step in enumerate(recipe.steps):
            try:
                size = recipe.manifest.size_of(step.parcel)
                encoded = await self._read(recipe, parts, [Slice(step.parcel, 0, size)])
                base = await self._read(recipe, parts, step.base)
            except NearshardError as error:
                raise NotRebuilt("missing", f"a part cannot be read any more: {error}") from error
            decoding = asyncio.to_thread(_decode, encoded, base, recipe.manifest.size_of(step.target), step)
            parts.made[step.target] = shard = await decoding
            del encoded, base
            upon = {part.digest for later in recipe.steps[number + 1 :] for part in later.base}
            parts.made = {digest: made for digest, made in parts.made.items() if digest in upon}
        return shard

    async def _read(self, recipe: Recipe, parts: _Parts, slices: Sequence[Slice]) -> memoryview:
        """Bytes of several parts, joined; not copied where they are in memory as they are. Raises NearshardError."""
        if len(slices) == 1 and (view := _view(recipe, parts, slices[0])) is not None:
            return view
        joined, at = room(sum(part.length for part in slices)), 0
        for part in slices:
            await self._copy(recipe, parts, part, joined[at : at + part.length])
            at += part.length
        return joined

    async def _copy(self, recipe: Recipe, parts: _Parts, part: Slice, into: memoryview) -> None:
        key = recipe.key(part.digest)
        if (view := _view(recipe, parts, part)) is not None:
            into[:] = view
        elif key in parts.open:
            async for piece in parts.open[key].read(part.offset, part.length):
                size = piece.length if isinstance(piece, FileRegion) else len(piece)
                await asyncio.to_thread(_put, piece, into[:size])
                into = into[size:]
        else:
            size = recipe.manifest.size_of(part.digest)
            await self._upstreams.read_held(parts.at_peers[key], key, part.offset, size, into)


def _view(recipe: Recipe, parts: _Parts, part: Slice) -> memoryview | None:
    """Bytes that are in memory already."""
    whole, reader = parts.made.get(part.digest), parts.open.get(recipe.key(part.digest))
    if whole is None and isinstance(reader, MemoryReader):
        whole = reader.view
    return None if whole is None else whole[part.offset : part.offset + part.length]


def _put(piece: memoryview | FileRegion, into: memoryview) -> None:
    """Copy (blocking: for a thread). Raises DiskError."""
    if not isinstance(piece, FileRegion):
        into[:] = piece
        return
    with reading(piece):
        offset = piece.offset
        while into:
            count = os.preadv(piece.file.fileno(), [into], offset)
            if not count:
                raise OSError(errno.EIO, "a cached file is shorter than it was")
            offset, into = offset + count, into[count:]


def _decode(encoded: memoryview, base: memoryview, size: int, step: Delta) -> memoryview:
    """What a delta makes, its digest right (blocking: for a thread). Raises NotRebuilt."""
    try:
        made = memoryview(parcel.decode(encoded, base, size))
    except DecodeError as error:
        raise NotRebuilt("damaged", f"parcel {step.parcel} cannot be decoded: {error}") from error
    except Exception as error:  # a decoder that trips over a parcel must not take the shard away, which comes whole
        raise NotRebuilt("damaged", f"parcel {step.parcel} broke its decoder: {error!r}") from error
    if digest_of(made) != step.target:
        raise NotRebuilt("wrong", f"parcel {step.parcel} makes other bytes than {step.target}")
    return made
