"""The data path of an edge node. One request, read from top to bottom:

1. parse      the path, once and strictly (``shared.paths``, before this file is reached)
2. resolve    ref to revision to layout (``shared.catalog``), or a digest to its size
3. decide     304, 206 or 200, and which span (``shared.conditional``)
4. open       the slices of that span, the next ones ahead in a bounded window: memory, disk, or a fill
5. send       what each gives, in order: bytes from memory, sendfile from disk, a fill as it arrives

Nothing here waits for a whole shard, and nothing is held but the window.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from aiohttp import web

from edge_node.account import MODEL, About
from edge_node.cache import Cache, Reader
from edge_node.canary import Canary
from edge_node.peers import AS_IS, HOP, ONLY_IF_CACHED
from edge_node.reach import Reach
from edge_node.recipes import Recipes
from edge_node.shard_key import ShardKey, shard_key
from edge_node.short_path import ShortPath
from edge_node.upstream import Place, Upstreams
from shared import plan, representation
from shared.catalog import Catalog
from shared.clock import Clock
from shared.conditional import Decision, NotModified, Whole, evaluate
from shared.deltas import REBUILDING, WANTED_FOR
from shared.digest import Digest, hex_of
from shared.errors import BadId, NearshardError, RequestError
from shared.ids import is_revision, parse_task_id
from shared.layout import Slice
from shared.manifest import Manifest
from shared.metrics import Metrics
from shared.outcome import HITS, Outcome, cache_status, dearest
from shared.paths import BlobPath, FilePath, HubPath, ModelPath, ModelsPath, TaskPath, TrustPath, file_path
from shared.rollout import Subject, at_address
from shared.web.access import private_model, token_text
from shared.web.reads import Listing, Resolved
from shared.web.send import Piece, conditions, decide, send
from shared.web.trusted import Trusted

AHEAD, AHEAD_BYTES, AHEAD_METERED = 64, 256 << 20, 32 << 20
"""Slices, and bytes of them, that are open at once: their fills run while earlier ones are sent. A link where packets
get lost gives each connection little, so it takes many; where none do, they are asked for as one (``edge_node.runs``).
Less where the link is metered, as what is open goes on when the client leaves. What is filled in memory takes a quarter
of it at most."""

PATIENCE = 5.0
"""Seconds that an answer's head waits for its first shard to be verified. Clients of the Hugging Face Hub take 10 s
without a head for a failure; after it, they ask again for what is missing."""


class Wanted(NamedTuple):
    """A slice to send: the shard as the cache calls it, the bytes of it all, and which of them."""

    key: ShardKey
    size: int
    offset: int
    length: int
    at: Place | None
    """Its place in what was asked for, where it is whole there."""


@dataclass(slots=True)
class _Answer:
    """One answer with bytes, for the account."""

    outcome: Outcome | None = None
    """How they are had; None while there are none."""
    whole: bool = False
    """Whether it has all of something."""
    sent: int = 0

    def begin(self, request: web.Request, decision: Decision, outcome: Outcome) -> None:
        """What is to be sent is known."""
        if request.method == "GET" and not isinstance(decision, NotModified):
            self.outcome, self.whole = outcome, isinstance(decision, Whole)


class Delivery:
    """The read surface of an edge node."""

    def __init__(
        self,
        cache: Cache,
        catalog: Catalog,
        trusted: Trusted,
        upstreams: Upstreams,
        recipes: Recipes,
        rebuilt: Callable[[], Mapping[str, int]],
        metrics: Metrics,
        *,
        node: str,
        region: str,
        url: str,
        origins: list[str],
        server: str,
        clock: Clock,
        known_public: Callable[[str], bool],
        small_model: int = 0,
        subscribed: Callable[[], Sequence[Mapping[str, object]]] = tuple,
        traced: bool = False,
    ) -> None:
        """``known_public``: whether a model is known to be for all. ``rebuilt``: what deltas brought, for status.
        ``subscribed``: how its subscriptions are. ``traced``: whether traces are recorded here."""
        self._recipes, self._rebuilt = recipes, rebuilt
        self._account, self._clock = upstreams.account, clock
        self._cache, self._catalog, self._trusted, self._upstreams = cache, catalog, trusted, upstreams
        self._node, self._region, self._url, self._origins = node, region, url, origins
        self._small_model, self._subscribed = small_model, subscribed
        self.in_flight = 0
        """Requests for bytes being answered: this node's load, in its heartbeats."""
        self._counts = dict.fromkeys(Outcome, 0)
        self._sent = dict.fromkeys(Outcome, 0)
        self._shown = dict.fromkeys(Outcome, (0, 0))
        """What the metrics were told of counts and bytes."""
        self._metrics = metrics
        metrics.before_render.append(self._tell_metrics)
        self.canary = Canary(clock, trusted.on_trial)
        self.short_path = ShortPath(
            cache,
            node,
            server,
            clock,
            self._count,
            lambda: upstreams.peers.epoch,
            lambda model: known_public(model) and not self.canary.watches(model),  # which is counted here
            self._account,
            traced=traced,
        )

    async def bytes(self, request: web.Request, path: TaskPath | BlobPath | FilePath) -> web.StreamResponse:
        """Steps 2 to 5 for a task, a file or a shard. Raises RequestError or UpstreamError."""
        self.in_flight += 1
        try:
            with self._answering(request, path) as answer:
                if isinstance(path, BlobPath):
                    return await self._blob(request, path.digest, shard_key(path.digest, path.model), answer)
                return await self._layout(request, path, answer)
        finally:
            self.in_flight -= 1

    @contextmanager
    def _answering(self, request: web.Request, path: TaskPath | BlobPath | FilePath) -> Iterator[_Answer]:
        """Count what is answered in the block to a client; a peer counts itself what it sends on. A client that goes
        away is no error, and gives no time."""
        answer, began = _Answer(), self._clock.monotonic()
        seconds, error = None, False
        try:
            yield answer
            seconds = self._clock.monotonic() - began if answer.whole else None
        except NearshardError as failed:
            error = failed.status >= 500
            raise
        finally:
            if HOP not in request.headers and (answer.outcome or error):
                usage = self._account.pending(self._about(request, path))
                usage.answered(answer.sent, seconds, hit=answer.outcome in HITS and not error)
                usage.errors += error

    @staticmethod
    def _about(request: web.Request, path: TaskPath | BlobPath | FilePath) -> About:
        if isinstance(path, BlobPath):
            return About.shard(shard_key(path.digest, path.model), _said(request))
        return About(path.model, private=bool(private_model(request)))

    async def _layout(self, request: web.Request, path: TaskPath | FilePath, answer: _Answer) -> web.StreamResponse:
        """A task or a file: many slices, their sizes known from the manifest."""
        found = await self._catalog.resolve(path.model, path.ref, self.who(request))
        private = private_model(request)
        self._favour(found.manifest, private)
        self._recipes.learn(found.manifest, private)
        shown = representation.of_path(path, found.manifest)
        decision, span = decide(request, shown)
        slices = [] if isinstance(decision, NotModified) else list(shown.layout.cut(span))
        reach = _reach(request)
        outcomes = [self._cache.peek(shard_key(piece.digest, private), reach) for piece in slices]
        outcome = dearest(outcomes or [Outcome.HIT_MEMORY])
        vary = {"Vary": "Accept"}
        fields = {"Cache-Status": cache_status(self._node, outcome), **found.fields, **vary}
        if is_revision(path.ref) and request.method == "GET" and not private and not token_text(request):
            self.short_path.learn(request.raw_path, path.model, shown, vary)
        wanted = self._wanted(slices, span.start, _same(path, found.manifest.revision), found.manifest, private)
        verified = isinstance(path, HubPath)
        whole = request.method == "GET" and isinstance(decision, Whole)
        answer.begin(request, decision, outcome)
        with self.canary.counted(path.model, found.manifest.revision, whole=whole):
            async with aclosing(self._pieces(wanted, reach, answer, verified=verified)) as pieces:
                return await send(request, shown, decision, span, pieces, fields)

    def _wanted(
        self, slices: Sequence[Slice], start: int, path: str, manifest: Manifest, private: str
    ) -> Iterator[Wanted]:
        """What is to be sent: ``slices`` from byte ``start`` on of what an origin has at ``path``."""
        for piece in slices:
            size = manifest.shards[piece.digest]
            at = Place(path, start) if piece.length == size else None
            yield Wanted(shard_key(piece.digest, private), size, piece.offset, piece.length, at)
            start += piece.length

    def _favour(self, manifest: Manifest, private: str) -> None:
        """Remember the shards of a small model: they are evicted after all others."""
        if self._small_model and sum(manifest.shards.values()) <= self._small_model:
            self._cache.fills.favoured.update(shard_key(digest, private) for digest in manifest.shards)

    async def _blob(self, request: web.Request, digest: Digest, key: ShardKey, answer: _Answer) -> web.StreamResponse:
        """A shard by name: its size is known where it is held, else a source says it."""
        if isinstance(evaluate(conditions(request), hex_of(digest), None), NotModified):
            shown = representation.of_blob(digest, 0)  # whoever has the digest has the bytes: nothing to look up
            return await send(request, shown, NotModified(), shown.layout.whole, _nothing(), {})
        reach = _reach(request)
        held = self._cache.known_size(key) is not None
        if not held and ONLY_IF_CACHED in request.headers.get("Cache-Control", "").lower():
            raise RequestError(f"{key} is not held here", code="not_cached")
        held = held or self._cache.fills.get(key, reach) is not None
        if request.method == "HEAD" and not held:
            shown = representation.of_blob(digest, await self._upstreams.blob_size(key))
            return await send(request, shown, Whole(), shown.layout.whole, _nothing(), {})
        self._account.claim(key, "" if held else _said(request))
        reader = self._cache.open(key, None, reach, wanted_for=_wanted_for(request))
        try:
            shown = representation.of_blob(digest, await reader.size())
            decision, span = decide(request, shown)
            answer.begin(request, decision, reader.outcome)
            fields = {"Cache-Status": cache_status(self._node, reader.outcome)}
            if reader.rebuilding:
                fields[REBUILDING] = "1"
            async with aclosing(self._counted(reader, span.start, span.length, answer)) as pieces:
                return await send(request, shown, decision, span, pieces, fields)
        finally:
            reader.close()

    async def _pieces(
        self, slices: Iterator[Wanted], reach: Reach, answer: _Answer, *, verified: bool
    ) -> AsyncGenerator[Piece]:
        """The bytes of ``slices`` in order. Up to AHEAD that are not held are opened early, so that their fills run;
        what is held is opened when it is its turn, so that a reader costs one descriptor. ``verified``: no byte of a
        shard before its digest was right; where that takes long, an empty piece says that the head may go."""
        window: deque[tuple[Wanted, Reader | None]] = deque()
        ahead = 0.0  # of the window
        try:
            while True:
                while len(window) < AHEAD and ahead < 1 and (piece := next(slices, None)):
                    ahead += self._share(piece)
                    held = self._cache.known_size(piece.key) is not None
                    window.append((piece, None if held else self._open(piece, reach)))
                if not window:
                    return
                piece, early = window.popleft()
                reader = early or self._open(piece, reach)
                try:
                    if verified and not await _soon(reader):
                        yield memoryview(b"")
                        await reader.verified()
                    async for part in self._counted(reader, piece.offset, piece.length, answer):
                        yield part
                finally:
                    reader.close()
                ahead -= self._share(piece)
        finally:
            for _, early in window:
                if early:
                    early.close()

    def _share(self, piece: Wanted) -> float:
        """Of the window: what is filled in memory would keep everything else out of a small one."""
        on_disk = self._upstreams.owned(piece.key)
        most = AHEAD_METERED if self._upstreams.link.policy.metered else AHEAD_BYTES
        room = most if on_disk else min(most, self._cache.memory.ledger.budget // 4)
        return piece.size / max(1, room)

    def _open(self, piece: Wanted, reach: Reach) -> Reader:
        return self._cache.open(piece.key, piece.size, reach, at=piece.at)

    async def _counted(self, reader: Reader, offset: int, length: int, answer: _Answer) -> AsyncGenerator[Piece]:
        """What a reader gives, and a note of how it was had."""
        async for part in reader.read(offset, length):
            yield part
            answer.sent += len(part) if isinstance(part, memoryview) else part.length
        self._count(reader.outcome, length)

    def _count(self, outcome: Outcome, size: int) -> None:
        self._counts[outcome] += 1
        self._sent[outcome] += size

    def _tell_metrics(self) -> None:
        for outcome, (count, size) in self._shown.items():
            self._metrics.outcomes.labels(outcome.value).inc(self._counts[outcome] - count)
            self._metrics.sent.labels(outcome.value).inc(self._sent[outcome] - size)
            self._shown[outcome] = self._counts[outcome], self._sent[outcome]

    # The rest of the read surface

    def who(self, request: web.Request) -> Subject:
        """By this node's region and the client's address."""
        return at_address(request.remote, self._region)

    async def resolve(self, model: str, ref: str, who: Subject) -> Resolved:
        """A manifest, from the catalog."""
        found = await self._catalog.resolve(model, ref, who)
        self._recipes.learn(found.manifest, "" if self._trusted.known_public(model) else model)
        return found

    async def refs(self, model: str) -> Mapping[str, Digest]:
        """As the signed metadata has them."""
        return {name: target.revision for name, target in (await self._trusted.refs(model)).items()}

    async def listing(self, path: ModelPath | ModelsPath) -> Listing:
        """A listing, from the catalog."""
        return await self._catalog.listing(path)

    async def trust(self, path: TrustPath) -> Listing:
        """A file of the signed metadata, as it was verified here."""
        return await self._trusted.file(path)

    def sources(self, request: web.Request, path: TaskPath) -> plan.Sources:
        """This node, then the origins."""
        urls = [self._url, *self._origins]
        return lambda _: urls

    def bases(self, request: web.Request, path: TaskPath | FilePath) -> Sequence[str]:
        """This node alone: aria2 would take from an origin at the same time, over the link that this node spares."""
        return [self._url]

    async def status(self) -> Mapping[str, Any]:
        """What this node holds and how it has served."""
        return {
            "service": "edge",
            "node": self._node,
            "region": self._region,
            "url": self._url,
            "in_flight": self.in_flight,
            "fills": len(self._cache.fills),
            "peers": len(self._upstreams.peers),
            "memory": vars(self._cache.memory.ledger.statistics()),
            "disk": vars(self._cache.disk.ledger.statistics()),
            "upstream_bytes": self._upstreams.received.total() - self._upstreams.received[Outcome.FILL_PEER],
            "peer_bytes": self._upstreams.received[Outcome.FILL_PEER],
            "deltas": self._rebuilt(),
            "trust": self._trusted.status(),
            "usage": self._usage(),
            "trials": [asdict(trial) for trial in self.canary.trials()],
            "subscriptions": list(self._subscribed()),
            "outcomes": {outcome.value: count for outcome, count in self._counts.items()},
            "sent_bytes": {outcome.value: size for outcome, size in self._sent.items()},
        }

    def _usage(self) -> Mapping[str, Any]:
        """Today's, per model; what is private has no name here."""
        day, models = self._account.today()
        return {"day": day, "models": {model: usage.counts() for model, usage in models.items()}}

    def not_ready(self) -> str:
        """Ready once it listens: the disk cache was taken up before that."""
        return ""


def _same(path: TaskPath | FilePath, revision: str) -> str:
    """Where an origin has the same for ever, whichever way it was asked for."""
    return path.at(revision) if isinstance(path, TaskPath) else file_path(path.model, revision, path.path)


def _reach(request: web.Request) -> Reach:
    """How far to go for whoever asks."""
    if HOP not in request.headers:
        return Reach.ANYWHERE
    return Reach.AS_IS if AS_IS in request.headers else Reach.ABOVE


def _said(request: web.Request) -> str:
    """What a request says of the model of a shard; empty where it says nothing."""
    return request.headers.get(MODEL, "") or request.headers.get(WANTED_FOR, "")


def _wanted_for(request: web.Request) -> str:
    """The revision that a shard is asked for by; empty where none is named as it should be."""
    with suppress(BadId):
        return str(parse_task_id(request.headers.get(WANTED_FOR, "")))
    return ""


async def _soon(reader: Reader) -> bool:
    """Whether all of a shard is there and right within PATIENCE. Raises as ``Reader.read``."""
    with suppress(TimeoutError):
        async with asyncio.timeout(PATIENCE):
            await reader.verified()
            return True
    return False


async def _nothing() -> AsyncGenerator[Piece]:
    """The pieces of an answer without a body."""
    no_pieces: tuple[Piece, ...] = ()
    for piece in no_pieces:
        yield piece
