"""How many fetches run at once from one upstream, and who goes first: client traffic before preheating."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from shared.clock import Clock

AT_FIRST, MOST = 8, 32
"""Fetches at once from one upstream: where adapting begins, and the bound."""
LITTLE = 500_000
"""Bytes a second of one fetch that are so few that packets get lost, most likely."""
WINDOW, HOLD, FORGET = 1.0, 60.0, 120.0
"""Seconds over which a number of fetches is judged, until more are tried again, and after which an upstream that was
not used begins anew."""
BETTER = 1.1
"""More connections are kept only where they bring a tenth more."""
STEADY = 1.25
"""A rate that grew by more is still growing by itself, and one that fell by more says nothing."""
MORE, MANY = 4 / 3, 4
"""Times as many connections that are tried, and where each brings little. A new one gets next to nothing for seconds
where others fill the link, so each that is tried in vain costs something."""
FILLED = 0.8
"""Of the most that an upstream ever brought: at this rate, a slow connection is slow because others are fast."""
Rank = Callable[[], int]


class Slots:
    """How many fetches run at once from one upstream: adapted to what brings more, bounded, the most urgent first.

    A third more are tried when all are in use, others wait, and the rate is steady (a download that begins grows by
    itself); four times as many, and at once, where each brings little. They are kept where they bring a tenth more, and
    given up where they do not, each when it has done what it was asked for.
    """

    def __init__(self, clock: Clock) -> None:
        self.limit = AT_FIRST
        self.used = 0
        self.each = 0.0
        """Bytes a second that one fetch brought lately; 0 while that is not known."""
        self._clock = clock
        self._waiting: list[tuple[Rank, asyncio.Future[None]]] = []
        self._since = clock.monotonic()
        self._bytes = 0
        self._full = False
        self._rate = 0.0
        """Bytes a second in the last window."""
        self._best = 0.0
        """The most in two windows, one after the other."""
        self._enough = AT_FIRST
        """The most that was worth it."""
        self._trial: float | None = None
        """The rate before more were tried, until they are judged."""
        self._settling = False
        """Whether connections are too new to judge by what they bring."""
        self._next_trial = 0.0

    def __repr__(self) -> str:
        return f"<Slots {self.used}/{self.limit}, {len(self._waiting)} waiting>"

    @property
    def spare(self) -> bool:
        """Whether a slot is free."""
        return self.used < self.limit and not self._waiting

    @property
    def filled(self) -> bool:
        """Whether all fetches together bring about as much as they ever did."""
        return 0 < FILLED * self._best <= self._rate

    @property
    def shares(self) -> int:
        """In how many parts the work of the fetch that has just begun is best done: for the slots that are free now,
        and one that will soon be. 1 where as many others wait anyway."""
        return 1 if len(self._waiting) >= self.limit else max(0, self.limit - self.used) + 2

    async def acquire(self, rank: Rank) -> None:
        """Wait for a slot. ``rank`` says how urgent it is, at any time: the least goes first, then the oldest."""
        if not self.used:
            self._begin()
        if self.used < self.limit and not self._waiting:
            self.used += 1
            return
        self._full = True
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((rank, future))
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.release()  # it was given just as we gave up
            raise

    def release(self) -> None:
        """Give a slot back."""
        self.used -= 1
        self._pass_on()

    def _begin(self) -> None:
        """After a time without any fetch, which is no time to judge."""
        now = self._clock.monotonic()
        if now - self._since >= FORGET:  # what was learned is about another hour's link
            self.limit = self._enough = AT_FIRST
            self._trial, self._next_trial = None, 0.0
            self.each = self._rate = self._best = 0.0
        self._since, self._bytes = now, 0

    def count(self, size: int) -> None:
        """Bytes that came; once a window, judge the limit by them."""
        now = self._clock.monotonic()
        elapsed = now - self._since
        self._bytes += size
        if elapsed < WINDOW:
            return
        rate, before = self._bytes / elapsed, self._rate
        self._rate, self.each = rate, rate / max(1, self.used)
        self._best = max(self._best, min(rate, before))
        if self._full:
            self._adapt(rate, before, now)
            self._pass_on()
        self._since, self._bytes, self._full = now, 0, bool(self._waiting)

    def _adapt(self, rate: float, before: float, now: float) -> None:
        """One step of the search."""
        if self._settling:
            self._settling = False
        elif self._trial is not None:
            if rate >= self._trial * BETTER:
                self._enough = self.limit
            else:
                self._next_trial = now + HOLD
                self.limit = self._enough
            self._trial = None
        elif now >= self._next_trial:
            little = max(rate, before) < LITTLE * self.used
            if little or before / STEADY <= rate <= before * STEADY:
                self._trial, self._settling = rate, True
                self.limit = min(MOST, round(self.limit * (MANY if little else MORE)))

    def _pass_on(self) -> None:
        while self._waiting and self.used < self.limit:
            first = min(self._waiting, key=lambda waiting: waiting[0]())
            self._waiting.remove(first)
            if not first[1].done():
                self.used += 1
                first[1].set_result(None)
