"""When something that is done again and again is due: at an interval, spread, inside hours, sooner after a failure.

For ``nearshard sync`` and for what an edge node is subscribed to. Clock and randomness are given.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from shared.clock import Clock
from shared.link import local_time, open_for, opens_in

SPREAD = 0.1
"""Of the interval, by which one comes earlier or later: a thousand sites that began together do not stay together."""
AFTER_OPENING = 600.0
"""Seconds after the beginning of its hours over which those who waited for it are spread, at the most."""
BACKOFF = 30.0
"""Seconds from a first failure to the next try; doubled by each further one, up to the interval."""
_INTERVAL = re.compile(r"([0-9]{1,9})(s|m|h|d|)")
_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


def parse_interval(text: str) -> float:
    """Seconds, from text like ``90s``, ``30m``, ``1h`` or ``7d``. Raises ValueError."""
    match = _INTERVAL.fullmatch(text)
    seconds = int(match[1]) * _SECONDS[match[2]] if match else 0.0
    if not 1 <= seconds <= 366 * 86_400:
        raise ValueError(f"{text!r} is no interval like 30m, 1h or 7d")
    return seconds


class Schedule:
    """Of one thing. Times are of the clock's ``time()``: a machine that slept is late, and knows it."""

    def __init__(self, every: float, hours: Sequence[str], clock: Clock, rng: random.Random) -> None:
        """``every``: seconds. ``hours``: local times of day like ``22:00-06:00`` in which it may be done at all; none:
        always. It is due at once, or when the hours begin."""
        self.every, self.hours = every, tuple(hours)
        self._clock, self._rng = clock, rng
        self.failures = 0
        """In a row."""
        self.due = self._inside(clock.time())

    def __repr__(self) -> str:
        return f"<Schedule, due in {self.wait():.0f} s>"

    def wait(self) -> float:
        """Seconds until it is due; 0 where it is."""
        return max(0.0, self.due - self._clock.time())

    def left(self) -> float:
        """Seconds that it may go on now; 0 outside of the hours."""
        return open_for(self.hours, local_time(self._clock))

    def hurry(self) -> None:
        """Something is known to have changed: it is due now, or when the hours begin."""
        self.due = min(self.due, self._inside(self._clock.time()))

    def done(self) -> None:
        """It was done: due again after the interval."""
        self.failures = 0
        self.due = self._inside(self._clock.time() + self.every * self._rng.uniform(1 - SPREAD, 1 + SPREAD))

    def failed(self) -> None:
        """It was not: due again soon, and later each time."""
        self.failures += 1
        pause = min(self.every, BACKOFF * 2 ** min(self.failures - 1, 20))
        self.due = self._inside(self._clock.time() + pause * self._rng.uniform(0.5, 1))

    def closed(self) -> None:
        """Its hours ended before it was done: it goes on when they begin again."""
        self.due = self._inside(self._clock.time())

    def _inside(self, moment: float) -> float:
        """A moment that is inside of the hours: this one, or one soon after their beginning."""
        late = opens_in(self.hours, local_time(self._clock, moment))
        if not late:
            return moment
        length = open_for(self.hours, local_time(self._clock, moment + late))
        return moment + late + self._rng.uniform(0, min(AFTER_OPENING, self.every, length / 2))
