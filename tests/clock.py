"""Time in a test's hands."""

from __future__ import annotations

from shared.clock import SystemClock


class HandClock(SystemClock):
    """Stands still until it is moved or slept, both of its faces together."""

    def __init__(self, time: float = 0.0, *, late: float = 0.0) -> None:
        """``late``: seconds that each sleep takes longer than it should."""
        self.now = 1000.0
        self.since_1970 = time
        self.slept = 0.0
        """Seconds that were slept."""
        self._late = late

    def monotonic(self) -> float:
        """Where it stands."""
        return self.now

    def time(self) -> float:
        """The same, for people."""
        return self.since_1970 + self.now - 1000.0

    async def sleep(self, seconds: float) -> None:
        """Moves it at once."""
        self.now += seconds + self._late
        self.slept += seconds
