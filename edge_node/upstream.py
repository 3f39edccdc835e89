"""Where a node fills from: ordered sources, those that failed lately tried last."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import aiohttp

from edge_node.account import Account
from edge_node.peers import AS_IS, HOP, ONLY_IF_CACHED, Peers
from edge_node.reach import Reach
from edge_node.shard_key import ShardKey, digest_in, model_in, path_of
from edge_node.slots import Rank, Slots
from shared.clock import Clock
from shared.deltas import WANTED_FOR
from shared.errors import IntegrityError, NearshardError, NotFound, UpstreamError
from shared.link import Link, Throttle
from shared.manifest import MAX_SHARD
from shared.metrics import Metrics
from shared.outcome import Outcome
from shared.web.session import FIRST_BYTE, Body, Sessions, open_blob, translated

PENALTY, PENALTY_MAX, WRONG_BYTES = 1.0, 30.0, 60.0
"""Seconds a source is tried last: after one failure (doubled by each further one), at most, after wrong bytes."""


PART, PART_LEAST, PART_SECONDS = 8 << 20, 1 << 20, 3.0
"""Bytes of a shard that one stream from an origin is asked for: at first, at least; later what it brings in so many
seconds."""
TROUBLE = 60.0
"""Seconds that a source which was late with parts is asked for whole shards only: one that has to fetch them itself is
late with what is not at the front."""


ASK = 2.0
"""Seconds that a peer has to say whether it holds a shard."""
SILENT = 2.0
"""Seconds without a byte of any shard after which one that is late means that none would come."""


class NotBlamed(UpstreamError):
    """A fetch that ended for a reason that is not the source's."""


class NotAsked(NotBlamed):
    """A source that was not asked: meanwhile it let somebody else wait in vain."""

    code = "upstream_timeout"


@dataclass
class Source:
    """One upstream and how it did lately."""

    url: str
    outcome: Outcome
    slots: Slots
    throttle: Throttle
    failures: int = 0
    avoid_until: float = 0.0
    delay: float = 0.0
    """Seconds from a question to the beginning of its answer, smoothed; 0 while none is known."""
    whole_until: float = 0.0
    """Until when it is asked for whole shards only."""
    heard_at: float = float("-inf")
    """When it last sent bytes of any shard."""
    late_at: float = float("-inf")
    """When it last let its time run out, and had been silent altogether."""

    @property
    def tier(self) -> str:
        """What it is: ``peer``, ``parent`` or ``origin``."""
        return self.outcome.value.removeprefix("fill-")


class Wanted(Protocol):
    """What is asked for: a shard, its bytes where they are known, how far to go, and a revision that it is of."""

    key: ShardKey
    size: int | None
    reach: Reach
    wanted_for: str


class Turn:
    """A fetch's slot. It is passed on before the last bytes are here: the next one asks while they are on their way, or
    each connection would idle for a round trip between two fetches."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._held = True

    def answered(self, seconds: float) -> None:
        """The answer began so long after the question."""
        source = self.source
        source.delay = seconds if not source.delay else 0.8 * source.delay + 0.2 * seconds

    async def watch(self, chunks: AsyncIterator[bytes], left: int) -> AsyncIterator[bytes]:
        """``chunks``, ``left`` bytes in all."""
        async for chunk in chunks:
            left -= len(chunk)
            if left <= self.source.slots.each * self.source.delay:
                self.end()
            yield chunk

    def end(self) -> None:
        """Pass the slot on; once."""
        if self._held:
            self._held = False
            self.source.slots.release()


class Upstreams:
    """Who a node fills from: an owner in its region, then parents, then origins, each in the operator's order."""

    def __init__(
        self,
        sessions: Sessions,
        urls: Sequence[str],
        clock: Clock,
        metrics: Metrics,
        *,
        parents: Sequence[str] = (),
        peers: Peers | None = None,
        node: str = "edge",
        account: Account | None = None,
    ) -> None:
        self.account = Account() if account is None else account
        self._sessions = sessions
        self._clock = clock
        self._above = [self._source(url, Outcome.FILL_PARENT) for url in parents]
        self._above += [self._source(url, Outcome.FILL_ORIGIN) for url in urls]
        self.link = Link(clock)
        self.peers = Peers(node, 1) if peers is None else peers
        self._peer_sources: dict[str, Source] = {}
        self._node = node
        self._metrics = metrics
        self.received = Counter[Outcome]()
        """Body bytes by where they came from."""

    def owned(self, key: ShardKey) -> bool:
        """Whether this node keeps a shard on its disk."""
        return not self.peers.owners(digest_in(key))

    def ordered(self, key: ShardKey, reach: Reach) -> list[Source]:
        """Sources of a shard: the sound ones in order, then those to avoid, the soonest forgiven first."""
        now = self._clock.monotonic()
        owners = self.peers.owners(digest_in(key)) if reach.asks_peers else []
        peers = [self._peer(url) for url in owners]
        return sorted([*peers, *self._above], key=lambda s: max(0.0, s.avoid_until - now))

    def failed(self, source: Source, error: NearshardError) -> None:
        """Count a failure against a source; what is missing there is not its fault."""
        if isinstance(error, NotFound | NotBlamed):
            return
        now = self._clock.monotonic()
        if error.error_code == "upstream_timeout" and now - source.heard_at > SILENT:
            source.late_at = now
        source.failures += 1
        seconds = min(PENALTY_MAX, PENALTY * 2 ** min(source.failures - 1, 8))
        if isinstance(error, IntegrityError):
            seconds = WRONG_BYTES
        source.avoid_until = now + seconds
        self._metrics.upstream_errors.labels(source.url, error.error_code).inc()

    def worked(self, source: Source) -> None:
        """A source gave what was asked for."""
        source.failures, source.avoid_until = 0, 0.0

    async def take(self, source: Source, key: ShardKey, size: int) -> None:
        """Count body bytes of a shard that came from a source, and wait where the link's policy wants it."""
        source.slots.count(size)
        source.heard_at = self._clock.monotonic()
        self.received[source.outcome] += size
        self.account.received(key, source.outcome, size)
        self._metrics.received.labels(source.url, source.tier).inc(size)
        if source.outcome is not Outcome.FILL_PEER:
            await self.link.take(size)
            await source.throttle.take(size, lambda: self.link.policy.upstreams.get(source.url, 0))

    def part(self, source: Source) -> int | None:
        """Bytes that one stream of several is to be asked for; None where one stream should have it all."""
        if source.outcome is not Outcome.FILL_ORIGIN or self._clock.monotonic() < source.whole_until:
            return None
        return max(PART_LEAST, int(source.slots.each * PART_SECONDS)) if source.slots.each else PART

    def only_whole(self, source: Source, *, forever: bool) -> None:
        """A source knows no ranges, or is late with what is not at the front."""
        source.whole_until = float("inf") if forever else self._clock.monotonic() + TROUBLE

    @asynccontextmanager
    async def turn(self, source: Source, rank: Rank) -> AsyncIterator[Turn]:
        """Wait until it is this fetch's turn (``Slots.acquire``). Raises NotAsked.

        Those that wait for their turn at a source that does not answer do not each try it: they would wait for ever.
        """
        since = self._clock.monotonic()
        await source.slots.acquire(rank)
        turn = Turn(source)
        try:
            if source.late_at > since:
                raise NotAsked(f"{source.url} let others wait in vain")
            yield turn
        finally:
            turn.end()

    @asynccontextmanager
    async def open(self, turn: Turn, wanted: Wanted, start: int, stop: int | None) -> AsyncIterator[Body]:
        """A shard's bytes from ``start`` to ``stop`` (None: its end). Raises NotFound, NoRanges or UpstreamError."""
        source = turn.source
        asked = self._clock.monotonic()
        async with open_blob(
            self._sessions.of(source.url),
            source.url + path_of(wanted.key),
            start=start,
            stop=stop,
            size=wanted.size,
            max_size=MAX_SHARD,
            headers={**self._about(source, wanted), **self._own_token(wanted.key)},
            sharing=lambda: source.slots.used,
        ) as body:
            turn.answered(self._clock.monotonic() - asked)
            left = (stop or body.size) - body.start
            yield replace(body, chunks=turn.watch(body.chunks, left))

    def _about(self, source: Source, wanted: Wanted) -> Mapping[str, str]:
        """What another node is told with a question, so that it may use deltas, and waits for nobody in a circle."""
        fields: dict[str, str] = {}
        if source.outcome is not Outcome.FILL_ORIGIN and wanted.wanted_for:
            fields[WANTED_FOR] = wanted.wanted_for
        if source.outcome is not Outcome.FILL_ORIGIN and not model_in(wanted.key):
            fields |= self.account.about(wanted.key)
        if source.outcome is Outcome.FILL_PEER:
            fields[HOP] = self._node
            if not wanted.reach.rebuilds:
                fields[AS_IS] = "1"
        return fields

    def _own_token(self, key: ShardKey) -> Mapping[str, str]:
        """This node's token, for who keeps a private shard from those without one."""
        return self._sessions.token.fields() if model_in(key) else {}

    def _source(self, url: str, outcome: Outcome) -> Source:
        return Source(url, outcome, Slots(self._clock), Throttle(self._clock))

    def _peer(self, url: str) -> Source:
        if url not in self._peer_sources:
            self._peer_sources[url] = self._source(url, Outcome.FILL_PEER)
        return self._peer_sources[url]

    async def holders(self, keys: Iterable[ShardKey]) -> dict[ShardKey, Source]:
        """Peers that hold shards whole, of those that own them: they are asked, and fetch nothing for it."""
        asked = {key: self._peer(url) for key in keys for url in self.peers.owners(digest_in(key))[:1]}
        held = await asyncio.gather(*(self._holds(source, key) for key, source in asked.items()))
        return {key: source for (key, source), holds in zip(asked.items(), held, strict=True) if holds}

    async def _holds(self, source: Source, key: ShardKey) -> bool:
        if source.avoid_until > self._clock.monotonic():
            return False
        url, timeout = source.url + path_of(key), aiohttp.ClientTimeout(total=ASK)
        try:
            with translated(url):
                async with self._sessions.of(source.url).head(
                    url, allow_redirects=False, timeout=timeout, headers=self._if_held(key)
                ) as answer:
                    return answer.status == 200
        except UpstreamError as error:
            self.failed(source, error)  # or each fill would wait for a peer that is frozen
            return False

    async def read_held(self, source: Source, key: ShardKey, start: int, size: int, into: memoryview) -> None:
        """Bytes from ``start`` on of a shard of ``size`` bytes that a peer holds. Raises NotFound, UpstreamError."""
        url, stop = source.url + path_of(key), start + len(into)
        asking = open_blob(
            self._sessions.of(source.url),
            url,
            start=start,
            stop=stop,
            size=size,
            max_size=MAX_SHARD,
            headers=self._if_held(key),
        )
        async with asking as body:
            async for chunk in body.chunks:
                into[: len(chunk)] = chunk
                into = into[len(chunk) :]
                await self.take(source, key, len(chunk))

    def _if_held(self, key: ShardKey) -> Mapping[str, str]:
        return {HOP: self._node, "Cache-Control": ONLY_IF_CACHED, **self._own_token(key)}

    async def blob_size(self, key: ShardKey) -> int:
        """Bytes of a shard, by HEAD. Raises NotFound where no source has it, or UpstreamError."""
        failure: NearshardError = UpstreamError("no upstream is configured")
        for source in self.ordered(key, Reach.AS_IS):
            url = source.url + path_of(key)
            try:
                with translated(url):
                    timeout = aiohttp.ClientTimeout(total=FIRST_BYTE)
                    async with self._sessions.of(source.url).head(
                        url, allow_redirects=False, timeout=timeout, headers=self._own_token(key)
                    ) as answer:
                        if answer.status == 404:
                            raise NotFound("no such shard", code="unknown_blob")
                        size = int(answer.headers.get("Content-Length", "0"))
                        if answer.status != 200 or not 0 < size <= MAX_SHARD:
                            raise UpstreamError(f"{url} answered {answer.status}")
                        return size
            except (NotFound, UpstreamError) as error:
                self.failed(source, error)
                failure = error
        raise failure
