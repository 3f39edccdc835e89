"""Time in a test's hands."""

from __future__ import annotations

import asyncio

from shared.clock import SystemClock


class HandClock(SystemClock):
    """Stands still until it is moved, both of its faces together."""

    def __init__(self, time: float = 0.0) -> None:
        self.now = 1000.0
        self.since_1970 = time

    def monotonic(self) -> float:
        """Where it stands."""
        return self.now

    def time(self) -> float:
        """The same, for people."""
        return self.since_1970 + self.now - 1000.0


class SleepClock(HandClock):
    """Moves when it is slept: each sleep takes its time, and ``late`` seconds more."""

    def __init__(self, time: float = 0.0, *, late: float = 0.0) -> None:
        super().__init__(time)
        self.slept = 0.0
        self._late = late

    async def sleep(self, seconds: float) -> None:
        """Let others run."""
        self.slept += seconds
        self.now += seconds + self._late
        await asyncio.sleep(0)
