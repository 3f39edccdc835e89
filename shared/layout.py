"""Slices and layouts: the one idea that the data path rests on.

A slice is a run of bytes of one shard. A layout is an ordered list of slices whose bytes, joined, are a
file or a task. Whatever is sent, it is sent as the slices of a layout cut to a span.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

from shared.digest import Digest


@dataclass(frozen=True, slots=True)
class Slice:
    """``length`` bytes of shard ``digest`` from ``offset`` on. Never empty."""

    digest: Digest
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes ``start`` up to but not including ``stop`` of a representation."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        """How many bytes."""
        return self.stop - self.start


@dataclass(frozen=True)
class Layout:
    """Slices in order; ``size`` in bytes and ``sha256`` (64 hex) are of the joined whole.

    ``pieces``: 32 bytes of SHA-256 for each piece of the whole; empty for one piece or none (``piece_count``).
    """

    size: int
    sha256: str
    slices: tuple[Slice, ...]
    pieces: bytes = field(default=b"", repr=False)

    @cached_property
    def _starts(self) -> list[int]:
        """Where each slice starts in the whole."""
        return list(itertools.accumulate((s.length for s in self.slices[:-1]), initial=0))

    @property
    def whole(self) -> Span:
        """The span of all bytes."""
        return Span(0, self.size)

    def cut(self, span: Span) -> Iterator[Slice]:
        """The slices whose bytes, joined, are ``span`` of the whole; ``0 <= start <= stop <= size``.

        Costs O(log n) to find the first and O(1) for each slice given.
        """
        if not 0 <= span.start <= span.stop <= self.size:
            raise ValueError(f"{span} is not within {self.size} bytes")
        position = span.start
        index = bisect_right(self._starts, position) - 1
        while position < span.stop:
            piece, begin = self.slices[index], self._starts[index]
            skip = position - begin
            take = min(piece.length - skip, span.stop - position)
            yield Slice(piece.digest, piece.offset + skip, take)
            position += take
            index += 1

    def shards(self) -> tuple[Digest, ...]:
        """The digests of the shards that hold this, each once, in order of first use."""
        return tuple(dict.fromkeys(s.digest for s in self.slices))


def piece_count(size: int, length: int) -> int:
    """How many pieces of ``length`` bytes, the last one shorter, ``size`` bytes are hashed in.

    None where one would hold them all: its hash is that of the whole.
    """
    return -(-size // length) if size > length else 0


def join(slices: Iterable[Slice]) -> tuple[Slice, ...]:
    """The same bytes in as few slices as possible: neighbours that continue each other become one."""
    joined: list[Slice] = []
    for piece in slices:
        if not piece.length:
            continue
        last = joined[-1] if joined else None
        if last and last.digest == piece.digest and last.offset + last.length == piece.offset:
            joined[-1] = Slice(last.digest, last.offset, last.length + piece.length)
        else:
            joined.append(piece)
    return tuple(joined)
