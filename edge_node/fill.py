"""A fill: one fetch of one shard into the cache, however many ask for it.

* It is a task of the node, not of a request: a reader that leaves does not end it.
* Readers follow it at their own pace from its first byte, each by its own position in the same buffer.
* It goes from source to source, and asks each for what is missing only; what it has is hashed as it comes.
* From an origin it comes in one answer with the shards that follow it (``edge_node.runs``). Where there is none, or
  where one connection brings little, as packets get lost, a large shard comes in parts, by several streams at once.
* Where deltas bring a shard in fewer bytes, it is made from them (``edge_node.rebuild``) instead of being taken from
  above; where they do not, it goes on as ever, and readers do not notice.
* No reader gets the last byte of what it asked for before the digest of the whole shard was right. So whatever
  reached a reader from a fill that failed is short of its Content-Length, and nobody can take it for whole.
* Only bytes whose digest is right are committed.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import random
from _hashlib import HASH as Hash
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

from structlog.typing import FilteringBoundLogger

from edge_node.gaps import Gap, Gaps
from edge_node.reach import Reach
from edge_node.runs import Runs
from edge_node.shard_key import ShardKey, digest_in
from edge_node.store import Buffer, DiskBuffer, DiskTier, MemoryBuffer, MemoryTier
from edge_node.upstream import PART_LEAST, NotBlamed, Place, Source, Upstreams
from shared.clock import Clock
from shared.digest import hex_of
from shared.errors import IntegrityError, NearshardError, NotFound, UpstreamError, first_error
from shared.metrics import Metrics
from shared.outcome import Outcome
from shared.tasks import end
from shared.tracing import Kind, span
from shared.web.send import Piece
from shared.web.session import NoRanges

ROUNDS = 2
"""Times that every source is tried before a fill fails."""
BACKOFF = 0.1
"""Seconds before the second round, times a random factor of up to two."""
UNIT = 256 << 10
"""Bytes read back and hashed at a time."""
AGAIN = 2
"""Times that a stream which got no answer is tried again where others get theirs."""
JUDGE, HELP_EVERY, HELP_LEAST = 0.5, 0.25, 128 << 10
"""Seconds that a stream is given before it is judged, at least; seconds between two looks for streams that need help;
bytes that make it worth it."""
HELP_SPARE, HELP_URGENT = 1.0, 4.0
"""Seconds left that make it worth it: where connections are to spare, and where a reader waits and others have their
turn later for it. What is under way on the slow connection then comes twice."""
OVERFLOW, OVERFLOW_WAIT = 4, 10.0
"""Fills that may be held outside every budget at a time, where neither disk nor memory has room; and the seconds
that one waits for its turn before its readers are told to try again."""


class Fill:
    """One fill under way. Made by ``Fills`` only."""

    def __init__(
        self,
        fills: Fills,
        key: ShardKey,
        size: int | None,
        reach: Reach,
        *,
        background: bool,
        wanted_for: str,
        at: Place | None,
    ) -> None:
        self.key = key
        self.at = at
        """Its place in a task or a file, where one is known: its neighbours may come with it (``edge_node.runs``)."""
        self.hasten: Callable[[], None] | None = None
        """Called once a reader needs it now."""
        self.reach = reach
        """How far it goes for its bytes."""
        self.wanted_for = wanted_for or fills.named(key)
        """A revision that it is of, as ``model@revision``; empty where none is known."""
        self.background = background
        """Whether no client waits for it: then it comes after all that clients wait for."""
        self.size = size
        """Bytes of the shard; None until a source has said it."""
        self.outcome = fills.predict(key, reach)
        """Where it comes from: at first as the order of the sources has it, then as it was."""
        self.verified = False
        """Whether all bytes are there, and right."""
        self.over = False
        """Whether nothing more will be done: it is kept, or given up."""
        self.error: NearshardError | None = None
        self._fills = fills
        self._buffer: Buffer | None = None
        self._gaps: Gaps | None = None
        self._front = Gap(0, 0)
        """What a run brings."""
        self._placing = asyncio.Lock()
        """Held while a place for the bytes is looked for: streams that need it wait."""
        self._hash, self._hashed = hashlib.sha256(), 0
        self._hashing = asyncio.Lock()
        self._given = 0
        """The furthest byte that any reader has been given."""
        self._readers = 0
        self.rebuilding = False
        """Whether it is being made from deltas: no byte comes before all do."""
        self._make = fills.make if reach.rebuilds else None
        self._parts: list[Fill] = []
        """Fills that this one waits for: what hastens it hastens them."""
        self._committed = False
        self._overflow = False
        self._retired: list[DiskBuffer] = []
        """Buffers that were left for another one, and that readers may still hold pieces of."""
        self._wanted = asyncio.Event()
        """Set once a reader is not just ahead, but needs this shard now."""
        self._changed = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Fill {self.key[:19]} of {self.size} bytes, {self._gaps}, {self._readers} readers>"

    # Readers

    async def wait_size(self) -> int:
        """Bytes of the shard. Raises what the fill ended with."""
        self._want()
        while self.size is None or self._buffer is None:
            if self.error:
                raise self.error
            await self._changed.wait()
        return self.size

    async def wait_verified(self) -> None:
        """Until all bytes are there, and right. Raises what it ended with."""
        self._want()
        await self.until_verified()

    async def until_verified(self) -> None:
        """The same, for who waits with no reader of its own that needs it now."""
        while not self.verified:
            if self.error:
                raise self.error
            await self._changed.wait()

    async def wait_end(self) -> None:
        """Until it is over. Raises what it ended with."""
        self._want()
        while not self.over:
            await self._changed.wait()
        if self.error:
            raise self.error

    def join(self) -> None:
        """Count a reader in; with no await since it found this fill."""
        self._readers += 1
        self._come_forward()

    def join_for(self, whole: Fill) -> None:
        """Count in a fill that is made of this one: as urgent as that one is."""
        self._readers += 1
        whole._parts.append(self)
        if not whole.background:
            self._come_forward()
        if whole._wanted.is_set():
            self._want()

    def _come_forward(self) -> None:
        """A client waits for it, or will."""
        self.background = False
        for part in self._parts:
            part._come_forward()

    def _want(self) -> None:
        """It is needed now."""
        self._wanted.set()
        if self.hasten:
            self.hasten()
        for part in self._parts:
            part._want()

    def leave(self) -> None:
        """Count a reader out."""
        self._readers -= 1
        self._close_if_idle()

    async def read(self, offset: int, length: int) -> AsyncIterator[Piece]:
        """``length`` bytes from ``offset`` on as they come; the last one only once all are verified.

        Raises what the fill ended with: UpstreamError, IntegrityError or NotFound.
        """
        await self.wait_size()
        position, end = offset, offset + length
        while position < end:
            assert self._buffer is not None
            reached = end if self.verified else min(self._reached, end - 1)
            if position < reached:
                self._given = max(self._given, reached)
                yield self._buffer.piece(position, reached - position)
                position = reached
            elif self.error:
                raise self.error
            else:
                await self._changed.wait()

    def rank(self) -> int:
        """How urgent it is: a reader needs it now, a reader will need it, no client asked for it."""
        return 2 if self.background else int(not self._wanted.is_set())

    # The fetch

    async def run(self) -> None:
        """Fetch, verify, commit. Never raises but for cancellation: readers get the error."""
        with span("fill", Kind.INTERNAL, lambda: {"nearshard.shard": digest_in(self.key)}) as made:
            await self._run()
            if made:
                made.set({"nearshard.outcome": self.outcome.value, "nearshard.size": self.size or 0})
                if self.error:
                    made.fail(self.error.error_code)

    async def _run(self) -> None:
        fills = self._fills
        try:
            await self._fetch()
            assert self._buffer is not None
            self.verified = True
            self._notify()  # readers have no need to wait until the disk is done
            await self._commit(self._buffer)
            fills.metrics.fills.labels("ok").inc()
        except NearshardError as error:
            self._give_up(error)
        except asyncio.CancelledError:
            self._give_up(UpstreamError("the node is shutting down"))
            raise
        except Exception as error:
            fills.log.error("a fill failed", shard=self.key, exc_info=error)
            self._give_up(NearshardError(f"fill failed: {error}"))
        finally:
            self.over = True
            fills.ended(self)
            self._notify()
            self._close_if_idle()

    async def _fetch(self) -> None:
        failure: NearshardError = UpstreamError("no upstream is configured")
        for attempt in range(ROUNDS):
            if attempt:
                await self._fills.clock.sleep(BACKOFF * (1 + self._fills.random.random()))
            again = False
            for source in self._fills.upstreams.ordered(self.key, self.reach):
                if source.outcome is not Outcome.FILL_PEER and await self._rebuild():
                    self.outcome = source.outcome
                    return
                missing = self.missing
                try:
                    await self._take(source)
                    self._fills.upstreams.worked(source)
                    self.outcome = source.outcome
                    return
                except (NotFound, UpstreamError) as error:
                    if error.error_code in ("no_room", "busy"):
                        raise  # not the source's fault
                    self._fills.upstreams.failed(source, error)
                    self._fills.log.warning("source failed", reason=str(error))
                    failure = error
                    late = error.error_code == "upstream_timeout" and self.missing == missing
                    again = again or not (late or isinstance(error, NotFound))
                    if isinstance(error, IntegrityError) and self._given:
                        raise  # readers have some of the wrong bytes: their responses must end short
            if not again:
                break  # nobody has it, or nobody answers: readers have waited long enough
        raise failure

    async def _rebuild(self) -> bool:
        """Once, before a byte has come: make it from deltas, where that moves less (``edge_node.rebuild``)."""
        make, self._make = self._make, None
        if make is None or self.missing != self.size:
            return False
        self.rebuilding = True
        try:
            return await make(self)
        except NotBlamed:
            return False  # the disk did not keep what was made
        finally:
            self.rebuilding = False

    async def place(self, size: int) -> bool:
        """Find a place for the bytes, once; whether that is within the budgets. Raises UpstreamError (``no_room``)."""
        async with self._placing:
            if self._buffer is None:
                self.size = size
                self._buffer = await self._admit(size)
                self._gaps = self._gaps or Gaps(size)
                self._notify()
        return not self._overflow

    async def put_all(self, data: memoryview) -> None:
        """All bytes at once, and right. Raises UpstreamError."""
        assert self._gaps is not None
        gap = self._gaps.cut(len(data))[0]
        while gap.start < gap.stop:
            await self._write(gap.start, data[gap.start : gap.start + UNIT])
            gap.start = min(gap.stop, gap.start + UNIT)
            self._notify()
            await asyncio.sleep(0)  # others have their turn

    @property
    def _reached(self) -> int:
        """Bytes that are there from the first on."""
        return self._gaps.reached if self._gaps else 0

    @property
    def missing(self) -> int | None:
        """Bytes that are not there; None while not even their number is known."""
        return self._gaps.missing if self._gaps else self.size

    async def _take(self, source: Source) -> None:
        """All that is missing from one source, in several streams where that helps; the digest checked at the end."""
        if self._gaps is None and self.size is not None:
            self._gaps = Gaps(self.size)
        try:
            part = self._fills.upstreams.part(source)
            if part and self.at and self.missing == self.size and await self._fills.runs.bring(source, self):
                pass
            elif self._gaps is None or (part is None and self._gaps.missing == self.size):
                await self._stream(source, None)
            else:
                await self._stream_all(source, self._gaps.cut(part or self._gaps.missing))
        except NoRanges:
            self._restart()
            await self._stream(source, None)
        await self._hash_behind()
        if self._hash.hexdigest() != hex_of(digest_in(self.key)):
            self._restart()
            raise IntegrityError(f"{source.url} sent bytes that are not {self.key}")

    async def _stream_all(self, source: Source, gaps: list[Gap]) -> None:
        """Several gaps from one source at once; the first error ends all.

        Where a stream is slow and connections are to spare, another one takes most of what it has to do:
        readers wait for what is missing first, and at the end of a download for what is missing last. Not while the
        link is full: then that only takes from other streams, and what was under way comes twice.
        """
        clock, upstreams = self._fills.clock, self._fills.upstreams

        def share(gap: Gap) -> None:
            """Where nobody waits for a connection, leave a part of a gap to another one."""
            if (shares := source.slots.shares) > 1 and upstreams.part(source) is not None:
                assert self._gaps is not None
                if rest := self._gaps.split(gap, max(PART_LEAST, (gap.stop - gap.start) // shares)):
                    group.create_task(stream(rest))

        async def stream(gap: Gap) -> None:
            for attempt in range(1 + AGAIN):
                since, start = clock.monotonic(), gap.start
                try:
                    await self._stream(source, gap, share)
                    break
                except UpstreamError as error:
                    others = gap.start == start and source.heard_at >= since
                    if error.error_code != "upstream_timeout" or not others:
                        raise
                    if attempt == AGAIN:
                        upstreams.only_whole(source, forever=False)
                        raise NoRanges(f"{source.url} is late with parts") from error
            if not self.missing:
                helping.cancel()

        async def help_slow() -> None:
            while self._gaps:
                await clock.sleep(HELP_EVERY)
                spare = source.slots.spare
                if source.slots.filled:
                    continue
                if (spare or self._wanted.is_set()) and upstreams.part(source) is not None:
                    after = max(JUDGE, 4 * source.delay)
                    seconds = HELP_SPARE if spare else HELP_URGENT
                    rest = self._gaps.help(clock.monotonic(), after, seconds, HELP_LEAST, source.slots.each)
                    if rest is not None:
                        group.create_task(stream(rest))

        try:
            async with asyncio.TaskGroup() as group:
                helping = group.create_task(help_slow())
                for gap in gaps:
                    group.create_task(stream(gap))
        except BaseExceptionGroup as errors:
            raise first_error(errors) from None

    async def _stream(self, source: Source, gap: Gap | None, share: Callable[[Gap], None] | None = None) -> None:
        """One gap from one source; None: the whole shard. ``share`` may make it less, once its turn has come."""
        upstreams = self._fills.upstreams
        async with AsyncExitStack() as stack:
            turn = await stack.enter_async_context(upstreams.turn(source, self.rank))
            if gap and share:
                share(gap)
            start, stop = (gap.start, gap.stop) if gap else (0, None)
            if gap:
                gap.opened = self._fills.clock.monotonic(), gap.start
            try:
                body = await stack.enter_async_context(upstreams.open(turn, self, start, stop))
            except NoRanges:
                upstreams.only_whole(source, forever=True)
                raise
            await self.place(body.size)
            assert self._gaps is not None
            gap = gap or self._gaps.cut(body.size)[0]
            async for chunk in body.chunks:
                await self._fills.upstreams.take(source, self.key, len(chunk))
                await self._put(gap, memoryview(chunk))
                if gap.start >= gap.stop:
                    break  # the rest is with another stream
        await self._hash_behind()

    async def begin(self) -> None:
        """Have a place for bytes that a run brings from the first one on. Raises UpstreamError."""
        assert self.size is not None
        await self.place(self.size)
        assert self._gaps is not None
        self._front = self._gaps.cut(self.size)[0]

    async def give(self, data: memoryview) -> None:
        """The next bytes that a run brings. Raises UpstreamError."""
        await self._put(self._front, data)

    async def _put(self, gap: Gap, data: memoryview) -> None:
        """Bytes that came for the front of a gap."""
        data = data[: max(0, gap.stop - gap.start)]
        await self._write(gap.start, data)
        if gap.start == self._hashed:
            self._hash.update(data)
            self._hashed += len(data)
        gap.start += len(data)
        self._notify()

    async def _hash_behind(self) -> None:
        """Hash what came before its turn: it was written, and what was missing before it has come."""
        async with self._hashing:
            while self._hashed < self._reached:
                assert self._buffer is not None and self.size is not None
                start, stop = self._hashed, self._reached
                try:
                    self._hash = await asyncio.to_thread(_hash_run, self._hash.copy(), self._buffer, start, stop)
                    self._hashed = stop
                except OSError as error:
                    await self._leave_disk(error)

    def _restart(self) -> None:
        """Begin again from the first byte."""
        assert self.size is not None
        self._gaps = Gaps(self.size)
        self._hash, self._hashed = hashlib.sha256(), 0

    async def _admit(self, size: int) -> Buffer:
        """A place for the bytes: disk where this node owns the shard, else memory; disk again where that has no room.

        On the disk of a node that does not own it, a shard stays only while it is read.
        """
        owned = self._fills.upstreams.owned(self.key)
        buffer = None if owned else MemoryBuffer(self._fills.memory, self.key, size)
        if buffer and buffer.kept:
            return buffer
        favoured = self.key in self._fills.favoured
        on_disk = self._fills.disk.begin(self.key, size, favoured=favoured, kept=owned)
        return on_disk or await self._in_memory(size)

    async def _in_memory(self, size: int) -> MemoryBuffer:
        """A place in the memory tier, else one of a few places outside every budget.

        Those few are for shards that somebody reads right now: one that was opened ahead must not keep out the
        one that its reader needs first.
        """
        buffer = MemoryBuffer(self._fills.memory, self.key, size)
        if not buffer.kept:
            await self._wanted.wait()
            try:
                async with asyncio.timeout(OVERFLOW_WAIT):
                    await self._fills.overflow.acquire()
            except TimeoutError:
                raise UpstreamError("no room for a shard", code="no_room") from None
            self._overflow = True
        return buffer

    async def _write(self, offset: int, data: memoryview) -> None:
        assert self._buffer is not None and self.size is not None
        try:
            self._buffer.write(offset, data)
        except OSError as error:  # the disk is full or failing: go on in memory, nothing is fetched again
            await self._leave_disk(error)
            self._buffer.write(offset, data)

    async def _leave_disk(self, error: OSError) -> None:
        """Go on in memory with all that has come; from the first byte where the disk does not give it back."""
        assert self.size is not None
        async with self._placing:
            if not isinstance(old := self._buffer, DiskBuffer):
                return  # another stream was here first
            self._fills.disk.refused(error)
            self._buffer = await self._in_memory(self.size)
            old.discard()
            self._retired.append(old)
            try:
                self._buffer.write(0, old.read(0, self.size))
            except OSError as lost:
                self._restart()
                raise NotBlamed("the disk did not give back what was written") from lost

    async def _commit(self, buffer: Buffer) -> None:
        try:
            await asyncio.to_thread(buffer.settle)
        except OSError as error:  # written but not durable: serve it, and keep nothing of it
            self._fills.disk.refused(error)
            buffer.discard()
            return
        buffer.commit()
        self._committed = True

    def _give_up(self, error: NearshardError) -> None:
        self.error = error
        self._fills.metrics.fills.labels(error.error_code).inc()
        if self._buffer is not None and not self._committed:
            self._buffer.discard()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _close_if_idle(self) -> None:
        if self._readers or not self.over or self._buffer is None:
            return
        self._buffer.close(committed=self._committed)
        for old in self._retired:
            old.close(committed=False)
        if self._overflow:
            self._overflow = False
            self._fills.overflow.release()


def _hash_run(state: Hash, buffer: Buffer, start: int, stop: int) -> Hash:
    """Hash bytes of a buffer (blocking: for a thread). Raises OSError."""
    while start < stop:
        data = buffer.read(start, min(UNIT, stop - start))
        if not data:
            raise OSError(errno.EIO, "what was written is not there")
        state.update(data)
        start += len(data)
    return state


class Fills:
    """The fills of a node: one a shard (a second one where peers with different rings ask). Owns their tasks."""

    def __init__(
        self,
        memory: MemoryTier,
        disk: DiskTier,
        upstreams: Upstreams,
        clock: Clock,
        rng: random.Random,
        metrics: Metrics,
        log: FilteringBoundLogger,
    ) -> None:
        self.memory, self.disk, self.upstreams = memory, disk, upstreams
        self.clock, self.random, self.metrics, self.log = clock, rng, metrics, log
        self.overflow = asyncio.Semaphore(OVERFLOW)
        self.runs = Runs(upstreams, clock)
        self.make: Callable[[Fill], Awaitable[bool]] | None = None
        """Makes a shard from deltas, or does not (``edge_node.rebuild``)."""
        self.named: Callable[[ShardKey], str] = lambda _: ""
        """A revision, as ``model@revision``, that is known to have a delta to a shard."""
        self._under_way: dict[tuple[ShardKey, Reach], Fill] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.favoured: set[ShardKey] = set()
        """Shards of small models, where the operator wants those kept first."""

    def __len__(self) -> int:
        return len(self._under_way)

    def get(self, key: ShardKey, reach: Reach) -> Fill | None:
        """The fill of a shard that is under way, and that one of this reach may wait for."""
        found = (self._under_way.get((key, other)) for other in Reach if other <= reach)
        return next((fill for fill in found if fill), None)

    def predict(self, key: ShardKey, reach: Reach) -> Outcome:
        """Where a fill would come from, if all goes well."""
        ordered = self.upstreams.ordered(key, reach)
        return ordered[0].outcome if ordered else Outcome.FILL_ORIGIN

    def start(
        self,
        key: ShardKey,
        size: int | None,
        reach: Reach,
        *,
        background: bool = False,
        wanted_for: str = "",
        at: Place | None = None,
    ) -> Fill:
        """Begin a fill of a shard that has none. ``size`` in bytes where it is known; ``wanted_for``: a revision that
        it is of, as ``model@revision``; ``at``: its place in a task or a file, where its size is known."""
        if not self.upstreams.peers.owners(digest_in(key)):
            reach = reach.alone  # so that peers who ask the owner join what it has begun for itself
        fill = Fill(self, key, size, reach, background=background, wanted_for=wanted_for, at=at)
        self._under_way[key, reach] = fill
        task = asyncio.create_task(fill.run(), name=f"fill {key[:19]}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return fill

    def ended(self, fill: Fill) -> None:
        """A fill is over: whoever asks next finds the shard in a tier, or starts another."""
        del self._under_way[fill.key, fill.reach]

    async def close(self) -> None:
        """End every fill; their readers are told."""
        await self.runs.close()
        await end(self._tasks)
