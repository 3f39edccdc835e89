"""The ways to write a run of elements, with a base or without one. Pure.

Each has an encoder and a decoder over all runs that are written by it together: the elements of all of them in one
array, as bytes. Decoders know how many bytes come out before they begin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from itertools import chain

import numpy as np
import numpy.typing as npt

from shared.errors import DecodeError
from shared.parcels import grouping, streams
from shared.parcels.kinds import Bytes, Kind, ordered, unordered

ROW = 64
"""Elements that one scale is for, at least: shorter rows are taken together."""


class Method(IntEnum):
    """How the elements of a part are written. The numbers are in parcels."""

    RAW = 0
    SQUEEZED = 1
    """The bytes by zstd."""
    PLANES = 2
    """First the first byte of each element, then the second ones, by zstd; with a base, XOR with it before."""
    PACKED = 3
    """As integers by pcodec; with a base, their differences."""
    GROUPED = 4
    """Differences from a base, in the order of how large they are expected to be, by pcodec."""


STREAMS = {Method.RAW: 1, Method.SQUEEZED: 1, Method.PLANES: 1, Method.PACKED: 1, Method.GROUPED: 2}


@dataclass(frozen=True, slots=True)
class Shape:
    """Where the elements of a run are in their tensor: ``count`` after the ``first``, of rows of ``columns``."""

    count: int
    columns: int = 1
    first: int = 0

    def rows(self) -> list[int]:
        """How many elements of the run each row has; short rows are taken together."""
        columns = self.columns * -(-ROW // self.columns)
        head = min(self.count, -(self.first % self.columns) % columns)
        whole, tail = divmod(self.count - head, columns)
        return [head] * (head > 0) + [columns] * whole + [tail] * (tail > 0)


def encode(
    method: Method,
    target: Bytes,
    base: Bytes | None,
    kind: Kind,
    shapes: Sequence[Shape],
    level: int,
    hints: Bytes | None = None,
) -> list[bytes]:
    """The streams of elements that are written together; ``base``: as many bytes, where there is one; ``hints``: of
    each element, where the base was moved (``grouping.HINTS``)."""
    if method is Method.RAW:
        return [target.tobytes()]
    if method is Method.SQUEEZED:
        return [streams.squeeze(target, level)]
    if method is Method.PLANES:
        changed = target if base is None else target ^ base
        return [streams.squeeze(np.ascontiguousarray(changed.reshape(-1, kind.width).T), level)]
    values = ordered(target, kind)
    if base is None:
        return [streams.pack(values)]
    if method is Method.PACKED:
        return [streams.pack(values - ordered(base, kind))]
    scales, changes, groups = grouping.gathered(target, base, kind, _rows(shapes), hints)
    return [streams.squeeze(scales.view(np.uint8), level), streams.pack(changes, groups)]


def decode(
    method: Method,
    parts: Sequence[memoryview],
    base: Bytes | None,
    kind: Kind,
    shapes: Sequence[Shape],
    hints: Bytes | None = None,
) -> Bytes:
    """The bytes that were encoded. Raises DecodeError."""
    count = sum(shape.count for shape in shapes)
    size = count * kind.width
    if len(parts) != STREAMS[method]:
        raise DecodeError("a part with more or fewer streams")
    if method is Method.RAW:
        if parts[0].nbytes != size:
            raise DecodeError("bytes of another number")
        return np.frombuffer(parts[0], np.uint8)
    if method is Method.SQUEEZED:
        return streams.unsqueeze(parts[0], size)
    if method is Method.PLANES:
        planes = streams.unsqueeze(parts[0], size).reshape(kind.width, count)
        changed = np.ascontiguousarray(planes.T).reshape(size)
        return changed if base is None else changed ^ base
    if base is None:
        if method is Method.GROUPED:
            raise DecodeError("grouped without a base")
        return unordered(streams.unpack(parts[0], count, kind), kind)
    if method is Method.PACKED:
        values = streams.unpack(parts[0], count, kind)
        values += ordered(base, kind)
        return unordered(values, kind)
    if not grouping.groupable(kind):
        raise DecodeError("wide integers in groups")
    rows = _rows(shapes)
    scales = streams.unsqueeze(parts[0], len(rows)).view(np.int8)
    unpack = partial(streams.unpack, parts[1], kind=kind)
    return grouping.scattered(scales, unpack, base, kind, rows, hints)


def together(found: Sequence[Bytes]) -> Bytes:
    """Arrays of bytes as one."""
    return found[0] if len(found) == 1 else np.concatenate(found)


def _rows(shapes: Sequence[Shape]) -> npt.NDArray[np.int64]:
    return np.fromiter(chain.from_iterable(shape.rows() for shape in shapes), np.int64)
