"""Time as a parameter: the only module that asks the operating system what time it is."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """What the services know of time."""

    def monotonic(self) -> float:
        """Seconds that only grow; for durations and deadlines."""
        ...

    def time(self) -> float:
        """Seconds since 1970; for people and for what is kept on disk."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        ...


class SystemClock:
    """The machine's clock."""

    def monotonic(self) -> float:
        """Seconds that only grow."""
        return time.monotonic()

    def time(self) -> float:
        """Seconds since 1970."""
        return time.time()

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await asyncio.sleep(seconds)
