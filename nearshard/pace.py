"""How many streams at once, and which of them are too slow to wait for. No I/O.

- ``Width``: begins with ``FIRST`` streams and adds some while that brings a tenth more; what brought nothing is taken
  back and tried again a while later, since links change.
- ``Pace``: a source that sends a stream at an eighth of what another source gives is left, once it had ``PATIENCE``
  seconds to show better: the rest of the shard comes from the other one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

FIRST, MOST = 4, 16
"""Streams at first, and at most."""
GAIN = 1.1
"""How much faster it has to be for more streams to stay."""
WINDOW = 0.5
"""Seconds between two looks at the rate."""
HOLD = 20
"""Looks after which more streams are tried again."""
PATIENCE = 3.0
TELLING = 1 << 20
"""Bytes of a stream from which its rate says something: what was in a buffer came at once."""
SLOWER = 8.0
"""A stream this many times slower than another source's is too slow."""


class Width:
    """The number of streams; tell it of the bytes that came."""

    def __init__(self, fixed: int | None = None) -> None:
        """``fixed``: always so many."""
        self.streams = fixed or FIRST
        self._fixed = fixed is not None
        self._before = self.streams
        """Streams before the last step up."""
        self._best = 0.0
        self._hold = 0
        self._trying = False
        """Whether the last step was one up."""

    def look(self, rate: float) -> int:
        """Of the last window came ``rate`` bytes a second, with ``streams`` streams busy all along; how many now."""
        if self._fixed:
            return self.streams
        self._hold = max(0, self._hold - 1)
        if self._hold:
            return self.streams
        if self._trying and rate <= self._best * GAIN:
            self.streams, self._hold, self._trying = self._before, HOLD, False
        else:
            self._best, self._before, self._trying = rate, self.streams, True
            self.streams = min(MOST, self.streams + max(1, self.streams // 2))
        return self.streams


@dataclass(slots=True)
class _Stream:
    base: str
    kind: str
    since: float
    size: int = 0


class Pace:
    """The rates of streams, by the source they come from. ``now`` is in seconds that only grow.

    A stream is compared with others of its ``kind``: a node that has a shard and one that fetches it over a WAN first
    are no measure for each other.
    """

    def __init__(self) -> None:
        self._streams: dict[int, _Stream] = {}
        self._rates: dict[str, dict[str, float]] = defaultdict(dict)
        """Bytes a second of one stream, by kind and source, as it was last measured."""
        self._next = 0

    def begin(self, base: str, kind: str, now: float) -> int:
        """A stream from ``base``; its number."""
        self._next += 1
        self._streams[self._next] = _Stream(base, kind, now)
        return self._next

    def add(self, number: int, size: int, now: float) -> bool:
        """So many bytes came. Whether the stream is too slow to go on with: another source is much faster."""
        stream = self._streams[number]
        stream.size += size
        if now - stream.since < PATIENCE:
            return False
        self._measure(stream, now)
        stream.since, stream.size = now, 0
        return self._slow(stream.base, self._rates[stream.kind])

    def end(self, number: int, now: float) -> None:
        """The stream ended, as it should or not."""
        stream = self._streams.pop(number)
        if stream.size >= TELLING and now > stream.since:
            self._measure(stream, now)

    def slow(self, base: str) -> bool:
        """Whether a source gives so much less than another one that nobody would choose it."""
        return any(self._slow(base, rates) for rates in self._rates.values())

    def _measure(self, stream: _Stream, now: float) -> None:
        self._rates[stream.kind][stream.base] = stream.size / (now - stream.since)

    def _slow(self, base: str, rates: Mapping[str, float]) -> bool:
        return base in rates and rates[base] * SLOWER < max(rates.values())
