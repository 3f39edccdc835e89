"""The largest elements only. Pure."""

from __future__ import annotations

import math
import struct

import numpy as np
import numpy.typing as npt

from shared.errors import DecodeError
from shared.updates import packing
from shared.updates.codec import Codec, Floats

_COUNT = struct.Struct("<I")


class Top(Codec):
    """The ``share`` of a segment's elements that is largest, and where they are; those are written by ``values``, as
    one row. Places are coded as the distances between them, by their frequencies.

    A priori: what is left out is the smallest, so at most the rest of the share of all squares; of what is sent, what
    its codec loses of it.
    """

    def __init__(self, name: str, share: float, values: Codec) -> None:
        self.name, self._share, self._values = name, share, values
        self.bound = math.sqrt(1 - share * (1 - min(1.0, values.bound) ** 2))

    def _encode(self, values: Floats) -> bytes:
        flat = values.reshape(-1)
        places = _largest(flat, math.ceil(self._share * flat.size))
        if not len(places):
            return _COUNT.pack(0)
        gaps = np.diff(places, prepend=-1) - 1
        sent = self._values.encode(flat[places].reshape(1, -1))
        return _COUNT.pack(len(places)) + packing.join(packing.pack(gaps), sent)

    def _decode(self, data: memoryview, rows: int, columns: int) -> Floats:
        values = np.zeros(rows * columns, np.float32)
        if data.nbytes < _COUNT.size:
            raise DecodeError("a segment without its count")
        (count,) = _COUNT.unpack_from(data)
        if count > values.size:
            raise DecodeError("more elements than the segment has", code="too_large")
        if not count:
            if data.nbytes != _COUNT.size:
                raise DecodeError("elements of which there are none")
            return values
        first, second = packing.split(data[_COUNT.size :], 2)
        gaps = packing.unpack(first, count)
        if gaps.min() < 0:
            raise DecodeError("elements that are not in order, or twice")
        places = np.cumsum(gaps, dtype=np.int64)
        places += np.arange(count)
        if places[-1] >= values.size:
            raise DecodeError("an element outside of its segment")
        values[places] = self._values.decode(second, 1, count).reshape(-1)
        return values


def _largest(flat: Floats, count: int) -> npt.NDArray[np.intp]:
    """Where the largest ``count`` elements are, in order; of equals the first; none that is 0."""
    sizes = np.abs(flat)
    least = np.partition(sizes, len(sizes) - count)[len(sizes) - count]
    chosen = sizes > least
    if least > 0:
        equal = np.flatnonzero(sizes == least)
        chosen[equal[: count - int(chosen.sum())]] = True
    return np.flatnonzero(chosen)
