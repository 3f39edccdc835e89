"""The ways to write a run of elements, with a base or without one. Pure.

Each has an encoder and a decoder over all runs that are written by it together: the elements of all of them in one
array, as bytes. Decoders know how many bytes come out before they begin.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shared.errors import DecodeError
from shared.parcels import streams
from shared.parcels.kinds import Bytes, Integers, Kind, exponent_bias, exponents, floats, ordered, unordered

ROW = 64
"""Elements that one scale is for, at least: shorter rows are taken together."""
GROUP = 2048
"""Elements that are a group, at least: each has a table of up to a kilobyte."""
GROUPS = 16
"""Groups that there are, about, of tensors as they are trained."""
BLOCK = 1 << 15
LEAST, MOST = -16, 72
"""Keys: the binary logarithm of how much an element is expected to change, in units in its last place."""


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
    method: Method, target: Bytes, base: Bytes | None, kind: Kind, shapes: Sequence[Shape], level: int
) -> list[bytes]:
    """The streams of elements that are written together; ``base``: as many bytes, where there is one."""
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
    keys = _keys(base, kind, scales, rows)
    return [
        streams.squeeze(scales.view(np.uint8), level),
        streams.pack(_gathered(values - origin, keys), _groups(keys)),
    ]


def decode(
    method: Method, parts: Sequence[memoryview], base: Bytes | None, kind: Kind, shapes: Sequence[Shape]
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
    if kind.fraction is None:
        raise DecodeError("integers that are grouped by their exponents")
    rows = _rows(shapes)
    scales = streams.unsqueeze(parts[0], len(rows)).view(np.int8)
    values = _scattered(streams.unpack(parts[1], count, kind), _keys(base, kind, scales, rows))
    values += origin
    return unordered(values, kind)


def _rows(shapes: Sequence[Shape]) -> npt.NDArray[np.int64]:
    return np.fromiter(chain.from_iterable(shape.rows() for shape in shapes), np.int64)


NONE = -128
"""The scale of a row that has not changed."""


def _scales(target: Bytes, base: Bytes, kind: Kind, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int8]:
    """For each row the binary logarithm of how much its elements have changed on average; NONE: not at all.

    It is advice, so that it may be rounded otherwise elsewhere: who decodes gets it sent.
    """
    with np.errstate(all="ignore"):
        changes = floats(target, kind)
        changes -= floats(base, kind)
        np.abs(changes, out=changes)
    changes[~np.isfinite(changes)] = 0
    means = np.add.reduceat(changes, np.cumsum(rows) - rows, dtype=np.float64) / rows
    _, logarithms = np.frexp(means)
    return np.where(means > 0, np.clip(logarithms, NONE + 1, 127), NONE).astype(np.int8)


def _keys(base: Bytes, kind: Kind, scales: npt.NDArray[np.int8], rows: npt.NDArray[np.int64]) -> Bytes:
    """How large each element's change is expected to be: its row's scale, in units of the base's last place."""
    keys = np.repeat(scales.astype(np.int16) + np.int16(exponent_bias(kind) - LEAST + 1), rows)
    keys -= exponents(base, kind)
    np.clip(keys, 1, MOST - LEAST + 1, out=keys)
    small = keys.astype(np.uint8)
    if NONE in scales:
        small[np.repeat(scales == NONE, rows)] = 0
    return small


def _groups(keys: Bytes) -> list[int]:
    """How many elements of each key there are, in order; small groups together with the next one."""
    groups, gathered = list[int](), 0
    for count in np.bincount(keys).tolist():
        gathered += count
        if gathered >= GROUP:
            groups.append(gathered)
            gathered = 0
    return [*groups, gathered] if gathered else groups


class _Block(NamedTuple):
    """Elements that are sorted at a time."""

    place: slice
    order: npt.NDArray[np.intp]
    spans: list[tuple[slice, slice]]
    """Of each key that is in it: where its elements are in the sorted block, and among all in order."""


def _blocks(keys: Bytes) -> Iterator[_Block]:
    """How the elements get into the order of their keys and, of one key, of their places: to sort a block, which fits
    into a processor's cache, takes a quarter of the time."""
    counts = np.bincount(keys, minlength=256)
    following = (np.cumsum(counts) - counts).tolist()
    for begin in range(0, len(keys), BLOCK):
        block = keys[begin : begin + BLOCK]
        spans, at = [], 0
        for key, count in enumerate(np.bincount(block).tolist()):
            if count:
                spans.append((slice(at, at + count), slice(following[key], following[key] + count)))
                at += count
                following[key] += count
        yield _Block(slice(begin, begin + len(block)), np.argsort(block, kind="stable"), spans)


def _gathered(values: Integers, keys: Bytes) -> Integers:
    """``values`` in order of their keys."""
    found = np.empty_like(values)
    for block in _blocks(keys):
        ordered_block = values[block.place][block.order]
        for here, among in block.spans:
            found[among] = ordered_block[here]
    return found


def _scattered(values: Integers, keys: Bytes) -> Integers:
    """``values``, which are in order of their keys, at their places again."""
    found = np.empty_like(values)
    for block in _blocks(keys):
        ordered_block = np.empty(len(block.order), values.dtype)
        for here, among in block.spans:
            ordered_block[here] = values[among]
        found[block.place][block.order] = ordered_block
    return found
