"""How a tensor of an update is cut: by its shape alone, so that the segments of all sites are the same. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

MAX_ELEMENTS = 1 << 20
"""Elements of a segment, at most: 4 MiB as float32."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of a tensor's elements, in row-major order: ``count`` after the ``first``, as ``rows`` of ``columns``."""

    first: int
    count: int
    rows: int
    columns: int


class _Segments(Sequence[Segment]):
    """Made when they are asked for: a shape may claim more of them than there is memory."""

    def __init__(self, rows: int, columns: int) -> None:
        self._rows, self._columns = rows, columns
        self._step = min(rows, max(1, MAX_ELEMENTS // columns)) if rows * columns else 1
        self._parts = -(-columns // MAX_ELEMENTS)

    def __len__(self) -> int:
        return -(-self._rows // self._step) * self._parts

    @overload
    def __getitem__(self, number: int) -> Segment: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Segment]: ...
    def __getitem__(self, number: int | slice) -> Segment | Sequence[Segment]:
        if isinstance(number, slice):
            return [self[place] for place in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError("no such segment")
        group, part = divmod(number % len(self), self._parts)
        row, column = group * self._step, part * MAX_ELEMENTS
        rows, columns = min(self._step, self._rows - row), min(MAX_ELEMENTS, self._columns - column)
        return Segment(row * self._columns + column, rows * columns, rows, columns)


def segments(shape: Sequence[int]) -> Sequence[Segment]:
    """The segments of a tensor of this shape, in order; together they are all of its elements, each once.

    A row is what the last axis has, a tensor of one axis or none is one row. Segments have whole rows and at most
    ``MAX_ELEMENTS`` elements; a longer row is cut into parts, each of which counts as a row.
    """
    count = math.prod(shape)
    if not count:
        return _Segments(0, 0)
    columns = shape[-1] if len(shape) > 1 else count
    return _Segments(count // columns, columns)
