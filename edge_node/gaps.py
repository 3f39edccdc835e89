"""What is missing of a shard while it is filled. Pure.

Several streams fill one shard, each its own gap from the front, so that what has come may have holes. Readers get what
has come without a hole from the first byte on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(eq=False, slots=True)
class Gap:
    """Bytes ``start`` to ``stop`` are missing; ``start`` moves up as they come, ``stop`` down where help is had."""

    start: int
    stop: int
    opened: tuple[float, int] | None = None
    """When a stream for it began, in seconds, and at which byte."""

    def left(self, now: float, after: float) -> float:
        """Seconds until it is closed if it goes on as it did; 0 in its first ``after`` seconds: nobody can tell."""
        if self.opened is None or now - self.opened[0] < after or self.start >= self.stop:
            return 0.0
        came = self.start - self.opened[1]
        return (self.stop - self.start) * (now - self.opened[0]) / came if came else float("inf")


class Gaps:
    """All that is missing of ``size`` bytes, in order."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._gaps = [Gap(0, size)]

    def __repr__(self) -> str:
        return f"<Gaps of {self._size}: {', '.join(f'{gap.start}-{gap.stop}' for gap in self._open())}>"

    @property
    def reached(self) -> int:
        """Bytes that are there from the first on, without a hole."""
        return next((gap.start for gap in self._open()), self._size)

    @property
    def missing(self) -> int:
        """Bytes that are not there."""
        return sum(gap.stop - gap.start for gap in self._open())

    def cut(self, most: int) -> list[Gap]:
        """All of it as gaps of about ``most`` bytes, for as many streams; gaps given earlier are no longer in use."""
        whole: list[Gap] = []
        for gap in self._open():
            if whole and whole[-1].stop == gap.start:
                whole[-1].stop = gap.stop
            else:
                whole.append(Gap(gap.start, gap.stop))
        self._gaps = [part for gap in whole for part in _parts(gap, most)]
        return list(self._gaps)

    def split(self, gap: Gap, length: int) -> Gap | None:
        """What is behind the first ``length`` bytes of a gap, as a gap of its own; None where that is less than half of
        it again."""
        if gap.stop - gap.start < length + length // 2:
            return None
        return self._split(gap, gap.start + length)

    def help(self, now: float, after: float, seconds: float, least: int, rate: float = 0.0) -> Gap | None:
        """The end of the gap that will take longest, if that is over ``seconds`` and it has twice ``least`` bytes: for
        a stream of its own, that brings ``rate`` bytes a second (0: as many), so that both are done at the same time.
        None where no help is worth it. Streams are judged ``after`` seconds."""
        slowest = max(self._open(), key=lambda gap: gap.left(now, after), default=None)
        if slowest is None:
            return None
        left, length = slowest.left(now, after), slowest.stop - slowest.start
        if left <= seconds or length < 2 * least:
            return None
        own = length / left
        share = own / (own + max(own, rate)) if own else 0.5
        return self._split(slowest, slowest.start + min(length // 2, int(length * share)))

    def _split(self, gap: Gap, where: int) -> Gap:
        second = Gap(where, gap.stop)
        gap.stop = where
        self._gaps.insert(self._gaps.index(gap) + 1, second)
        return second

    def _open(self) -> Iterator[Gap]:
        return (gap for gap in self._gaps if gap.start < gap.stop)


def _parts(gap: Gap, most: int) -> Iterator[Gap]:
    """Equal parts: a last one that is small would be a request for little."""
    length = gap.stop - gap.start
    count = max(1, round(length / most))
    for number in range(count):
        yield Gap(gap.start + length * number // count, gap.start + length * (number + 1) // count)
