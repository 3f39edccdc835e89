"""Runs: shards that follow one another in a task or a file, fetched from an origin as one long answer.

One connection with much to send fills a link best: it never waits for a question between two shards, shares the link
with no others, and what it brings comes in the order in which readers want it. So fills that know their place in a task
or a file wait here, and a run brings them one after the other; each checks and commits its own shard as ever. A shard
that has no neighbour to come with is no run: its fill fetches for itself.

Where packets get lost, or a window is too small for the link, one connection is not enough. So a second one is tried
for a moment (``Trial``), and where that brings more there are no runs: fills fetch for themselves, many at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from edge_node.slots import BETTER, HOLD, LITTLE, STEADY, WINDOW
from edge_node.upstream import TROUBLE, Place, Source, Turn, Upstreams, Wanted
from shared.clock import Clock
from shared.errors import NearshardError
from shared.tasks import end

MANY_FOR = 600.0
"""Seconds without runs from an origin of which many connections bring more."""
LEFT_FROM = 4
"""Shards of a run from which on the last one is left to the next run: it may be tried with another connection, and has
time, as the run is far from there."""


class Taker(Wanted, Protocol):
    """A fill that a run may bring, all of it."""

    @property
    def at(self) -> Place | None:
        """Its place in a task or a file."""
        ...

    @property
    def missing(self) -> int | None:
        """Bytes that are to come."""
        ...

    hasten: Callable[[], None] | None
    """Called once it is needed now."""

    def rank(self) -> int:
        """As for a slot."""
        ...

    async def begin(self) -> None:
        """Have a place for the bytes. Raises UpstreamError."""
        ...

    async def give(self, data: memoryview) -> None:
        """The next bytes. Raises UpstreamError."""
        ...


@dataclass(eq=False)
class Waiting:
    """A fill that waits: its future is True once all has come, False where it has to fetch for itself."""

    taker: Taker
    at: Place
    size: int
    future: asyncio.Future[bool]

    @property
    def whole(self) -> bool:
        """Whether nothing of it has come."""
        return self.taker.missing == self.size


@dataclass(eq=False)
class Run:
    """One long answer under way."""

    line: list[Waiting]
    """Whom it still brings, in order, without a gap."""
    since: float
    path: str = ""
    answered: bool = False
    ended: bool = False
    """Whether it is to end at once."""

    def __post_init__(self) -> None:
        self.path = self.line[0].at.path

    def rank(self) -> int:
        """As urgent as the most urgent."""
        return min((waiting.taker.rank() for waiting in self.line), default=2)


class Trial:
    """Whether another connection brings more than one, by what all of them bring. Pure.

    It is tried once the rate is steady, judged in the second window after that, and tried again after a time.
    """

    def __init__(self) -> None:
        self.many = False
        """What was found."""
        self._base: float | None = None
        """The rate before another one was tried, until that is judged."""
        self._windows, self._next = 0, 0.0
        self._rate = 0.0
        """Bytes a second in the last window; 0 while none is over."""
        self._since, self._had = 0.0, 0

    def begin(self, had: int, now: float) -> None:
        """After a time that says nothing. ``had``: bytes that ever came."""
        self._base, self._rate, self._since, self._had = None, 0.0, now, had

    def due(self, had: int, now: float) -> bool:
        """Whether it is time to try another connection."""
        elapsed = now - self._since
        if elapsed < WINDOW:
            return False
        before, self._rate = self._rate, (had - self._had) / elapsed
        self._since, self._had = now, had
        if self._base is not None:
            self._windows += 1
            if self._windows == 2:
                self.many, self._base = self._rate >= self._base * BETTER, None
            return False
        if not before:
            return False
        self.many = max(before, self._rate) < LITTLE
        if self.many or now < self._next or not before / STEADY <= self._rate <= before * STEADY:
            return False
        self._base, self._windows, self._next = max(before, self._rate), 0, now + HOLD
        return True


class Runs:
    """The runs of a node from its origins."""

    def __init__(self, upstreams: Upstreams, clock: Clock) -> None:
        self._upstreams, self._clock = upstreams, clock
        self._lines: dict[str, Line] = {}

    async def bring(self, source: Source, taker: Taker) -> bool:
        """Have a whole shard brought by a run; whether it was. Raises what the run failed with."""
        if source.url not in self._lines:
            self._lines[source.url] = Line(self._upstreams, source, self._clock)
        return await self._lines[source.url].bring(taker)

    async def close(self) -> None:
        """End them all."""
        for line in self._lines.values():
            await line.close()


class Line:
    """The runs from one origin, and who waits for them."""

    def __init__(self, upstreams: Upstreams, source: Source, clock: Clock) -> None:
        self._upstreams, self._source, self._clock = upstreams, source, clock
        self._waiting: dict[Place, Waiting] = {}
        self._runs: list[Run] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._trial = Trial()
        self._not_before = 0.0

    async def bring(self, taker: Taker) -> bool:
        """See ``Runs.bring``."""
        at, size = taker.at, taker.missing
        if at is None or not size or at in self._waiting or self._clock.monotonic() < self._not_before:
            return False
        loop = asyncio.get_running_loop()
        waiting = self._waiting[at] = Waiting(taker, at, size, loop.create_future())
        taker.hasten = self._look
        loop.call_soon(self._look)  # when those that were started with it are here
        try:
            return await waiting.future
        finally:
            taker.hasten = None
            if self._waiting.get(at) is waiting:
                del self._waiting[at]

    async def close(self) -> None:
        """End its runs; fills are ended by their owner."""
        await end(self._tasks)

    def _look(self, after: str = "") -> None:
        """Begin what is due: a run that somebody needs now, else the next one of each task or file that has none.
        ``after``: where one has just ended, and its connection is good for a single shard too."""
        busy = {run.path for run in self._runs}
        for waiting in sorted(self._waiting.values(), key=lambda waiting: (waiting.taker.rank(), waiting.at)):
            path = waiting.at.path
            if waiting.at not in self._waiting or (path in busy and waiting.taker.rank()):
                continue
            line = self._take_line(waiting)
            if len(line) > 1 or path == after:
                self._start(line)
                busy.add(path)
            else:
                self._by_itself(waiting)

    def _take_line(self, first: Waiting) -> list[Waiting]:
        """This one, and those that follow it without a gap: they wait no longer."""
        line, at = [], first.at
        while following := self._waiting.get(at):
            line.append(following)
            at = Place(at.path, at.start + following.size)
        if len(line) >= LEFT_FROM:
            del line[-1]
        for waiting in line:
            del self._waiting[waiting.at]
        return line

    def _start(self, line: list[Waiting]) -> None:
        if not self._runs:
            self._trial.begin(self._source.received, self._clock.monotonic())
        run = Run(line, self._clock.monotonic())
        self._runs.append(run)
        task = asyncio.create_task(self._run(run), name=f"run of {run.path}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, run: Run) -> None:
        try:
            async with self._upstreams.turn(self._source, run.rank) as turn:
                await self._bring_line(run, turn)
        except NearshardError as error:
            self._failed(run, error)
        finally:
            self._runs.remove(run)
            for waiting in run.line:
                self._leave(waiting)
            self._look(run.path)

    async def _bring_line(self, run: Run, turn: Turn) -> None:
        first, last = run.line[0], run.line[-1]
        async with self._upstreams.open_run(turn, first.taker, first.at, last.at.start + last.size) as body:
            run.answered = True
            async for chunk in body.chunks:
                await self._hand_out(run, memoryview(chunk))
                self._judge(run)
                if run.ended or not run.line:
                    return

    async def _hand_out(self, run: Run, data: memoryview) -> None:
        """Bytes to those whose they are."""
        while data and run.line:
            waiting = run.line[0]
            if waiting.whole:
                await waiting.taker.begin()
            part = data[: waiting.taker.missing or 0]
            await self._upstreams.take(self._source, waiting.taker.key, len(part))
            await waiting.taker.give(part)
            data = data[len(part) :]
            if not waiting.taker.missing:
                run.line.pop(0)
                if not waiting.future.done():
                    waiting.future.set_result(True)

    def _failed(self, run: Run, error: NearshardError) -> None:
        """An error is that of the shard that the run was at, or of all where the origin was silent. From one that does
        not give tasks and files, or is late with them, fills fetch shards."""
        silent = error.error_code == "upstream_timeout" and self._source.heard_at < run.since
        if not run.answered and not silent:
            self._stop(TROUBLE)
            return
        for waiting in run.line[:1] if run.answered else run.line:
            if not waiting.future.done():
                waiting.future.set_exception(error)

    def _leave(self, waiting: Waiting) -> None:
        """A run ended before it: it waits for the next one, or fetches for itself what is missing."""
        if waiting.future.done():
            return
        if waiting.whole and self._clock.monotonic() >= self._not_before and waiting.at not in self._waiting:
            self._waiting[waiting.at] = waiting
        else:
            self._by_itself(waiting)

    def _by_itself(self, waiting: Waiting) -> None:
        self._waiting.pop(waiting.at, None)
        if not waiting.future.done():
            waiting.future.set_result(False)

    def _judge(self, run: Run) -> None:
        """Try another connection beside the only run, for the last shard of those that wait; go by what it brings."""
        had, now = self._source.received, self._clock.monotonic()
        last = max(self._waiting.values(), key=lambda waiting: waiting.at, default=None)
        if len(self._runs) > 1:
            self._trial.begin(had, now)  # several are needed: nothing can be told of one
        elif self._trial.due(had, now):
            if last is None:
                self._trial.begin(had, now)
            else:
                self._by_itself(last)
        elif self._trial.many:
            self._trial, run.ended = Trial(), True
            self._stop(MANY_FOR)

    def _stop(self, seconds: float) -> None:
        """No runs for a time: those that wait fetch for themselves."""
        self._not_before = self._clock.monotonic() + seconds
        for waiting in list(self._waiting.values()):
            self._by_itself(waiting)
