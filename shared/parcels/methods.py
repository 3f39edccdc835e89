"""The ways to write a run of elements, with a base or without one. Pure.

Each has an encoder and a decoder over all runs that are written by it together: the elements of all of them in one
array, as bytes. Decoders know how many bytes come out before they begin.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import chain, pairwise

import numpy as np
import numpy.typing as npt

from shared.errors import DecodeError
from shared.parcels import streams
from shared.parcels.kinds import Bytes, Integers, Kind, exponent_bias, exponents, floats, ordered, unordered

ROW = 64
"""Elements that one scale is for, at least: shorter rows are taken together."""
GROUP = 2048
"""Elements that are a group, at least: each has a table of up to a kilobyte."""
GROUPS = 24
"""Groups that there are, about, of tensors as they are trained."""
BLOCK = 1 << 15
LEAST, MOST = -32, 144
"""Keys: halves of the binary logarithm of how much an element is expected to change, in units in its last place."""
HINTS, DOWN = 4, 128
"""A hint at what rounding took away of where an element was expected: how many of as many parts of half a unit in the last
place, and DOWN with it if it was rounded up, so that a change downwards is the likelier one."""
HINTED = range(-12 - LEAST, 6 - LEAST)
"""Keys of elements that hints say more about: each has a key for each hint, from the first that is free on."""


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
        head = min(self.count, -self.first % columns)
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
    """The streams of elements that are written together; ``base``: as many bytes, where there is one; ``hints``: of each
    element, where the base was moved (``lowrank.Moved``)."""
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
    origin = ordered(base, kind)
    if method is Method.PACKED:
        return [streams.pack(values - origin)]
    rows = _rows(shapes)
    scales = _scales(target, base, kind, rows)
    order = _Order(_keys(base, kind, scales, rows, hints))
    changes = order.gathered(_turned(values - origin, hints))
    return [streams.squeeze(scales.view(np.uint8), level), streams.pack(changes, order.groups())]


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
    origin = ordered(base, kind)
    if method is Method.PACKED:
        values = streams.unpack(parts[0], count, kind)
        values += origin
        return unordered(values, kind)
    if not groupable(kind):
        raise DecodeError("wide integers in groups")
    rows = _rows(shapes)
    scales = streams.unsqueeze(parts[0], len(rows)).view(np.int8)
    order = _Order(_keys(base, kind, scales, rows, hints))
    values = _turned(order.scattered(streams.unpack(parts[1], count, kind)), hints)
    values += origin
    return unordered(values, kind)


def groupable(kind: Kind) -> bool:
    """Whether elements can be grouped: floats, and quantised ones."""
    return kind.fraction is not None or kind.width == 1


def together(found: Sequence[Bytes]) -> Bytes:
    """Arrays of bytes as one."""
    return found[0] if len(found) == 1 else np.concatenate(found)


def _turned(values: Integers, hints: Bytes | None) -> Integers:
    """Differences, those that are expected to be negative turned around; its own inverse. In place."""
    if hints is not None and hints.any():
        np.negative(values, out=values, where=hints >= DOWN)
    return values


def _rows(shapes: Sequence[Shape]) -> npt.NDArray[np.int64]:
    return np.fromiter(chain.from_iterable(shape.rows() for shape in shapes), np.int64)


NONE = -128
"""The scale of a row that has not changed."""


def _scales(target: Bytes, base: Bytes, kind: Kind, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int8]:
    """For each row the logarithm of how much its elements have changed on average, in halves; NONE: not at all.

    It is advice, so that it may be rounded otherwise elsewhere: who decodes gets it sent.
    """
    with np.errstate(all="ignore"):
        changes = floats(target, kind)
        changes -= floats(base, kind)
        np.abs(changes, out=changes)
    changes[~np.isfinite(changes)] = 0
    means = np.add.reduceat(changes, np.cumsum(rows) - rows, dtype=np.float64) / rows
    parts, logarithms = np.frexp(means)
    halves = 2 * logarithms - (parts < np.sqrt(0.5))
    return np.where(means > 0, np.clip(halves, NONE + 1, 127), NONE).astype(np.int8)


def _keys(
    base: Bytes, kind: Kind, scales: npt.NDArray[np.int8], rows: npt.NDArray[np.int64], hints: Bytes | None
) -> Bytes:
    """How large each element's change is expected to be: its row's scale, in units of the base's last place."""
    bias = 0 if kind.fraction is None else exponent_bias(kind)
    keys = np.repeat(scales.astype(np.int16) + np.int16(2 * bias - LEAST + 1), rows)
    if kind.fraction is not None:
        keys -= exponents(base, kind) * np.int16(2)
    np.clip(keys, 1, MOST - LEAST + 1, out=keys)
    small = keys.astype(np.uint8)
    if hints is not None and hints.any():
        after = np.uint8(MOST - LEAST + 2)
        hinted = (small - np.uint8(HINTED.start)) * np.uint8(HINTS) + (hints & np.uint8(DOWN - 1)) + after
        np.copyto(small, hinted, where=small - np.uint8(HINTED.start) < np.uint8(len(HINTED)))
    if NONE in scales:
        small[np.repeat(scales == NONE, rows)] = 0
    return small


class _Order:
    """Elements in the order of their keys and, of one key, of their places."""

    def __init__(self, keys: Bytes) -> None:
        self._keys = keys
        self._counts = np.bincount(keys, minlength=256)

    def groups(self) -> list[int]:
        """How many elements of each key there are, in order; small groups together with the next one."""
        groups, gathered = list[int](), 0
        for count in self._counts.tolist():
            gathered += count
            if gathered >= GROUP:
                groups.append(gathered)
                gathered = 0
        return [*groups, gathered] if gathered else groups

    def gathered(self, values: Integers) -> Integers:
        """``values`` in this order."""
        found = np.empty_like(values)
        for place, order, spans in self._blocks():
            block = values[place][order]
            for here, among in spans:
                found[among] = block[here]
        return found

    def scattered(self, values: Integers) -> Integers:
        """``values``, which are in this order, at their places again."""
        found = np.empty_like(values)
        for place, order, spans in self._blocks():
            block = np.empty(len(order), values.dtype)
            for here, among in spans:
                block[here] = values[among]
            found[place][order] = block
        return found

    def _blocks(self) -> Iterator[tuple[slice, npt.NDArray[np.intp], list[tuple[slice, slice]]]]:
        """Elements that are sorted at a time: where they are, their order, and for each key where those that have it
        are in the sorted block and among all. To sort what fits into a processor's cache takes a quarter of the time.
        """
        following = (np.cumsum(self._counts) - self._counts).tolist()
        for begin in range(0, len(self._keys), BLOCK):
            block = self._keys[begin : begin + BLOCK]
            order = np.argsort(block, kind="stable")
            ranked = block[order]
            edges = [0, *(np.flatnonzero(ranked[1:] != ranked[:-1]) + 1).tolist(), len(block)]
            spans = []
            for start, stop in pairwise(edges):
                key, count = int(ranked[start]), stop - start
                spans.append((slice(start, stop), slice(following[key], following[key] + count)))
                following[key] += count
            yield slice(begin, begin + len(block)), order, spans
