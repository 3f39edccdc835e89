"""A uniform quantiser whose integers are coded by their frequencies. Pure."""

from __future__ import annotations

import math
import struct

import numpy as np
import numpy.typing as npt

from shared.errors import DecodeError
from shared.updates import packing
from shared.updates.codec import LARGEST, Codec, Floats, norm

_STEP = struct.Struct("<f")
_MOST = (1 << 15) - 1
_RARE = 20
"""One in so many may be written apart, before all get more bits."""


class Step(Codec):
    """Multiples of a step, which is so many times the segment's RMS, in four bits (where that is too few for many, in
    eight); what is larger is written apart, and its place has an integer that nothing else has.

    For the bytes that it takes it loses less than blocks do: what is far from zero costs more of them, and what is near
    to it next to none. A priori: none is off by more than half a step, so all together by half of ``step`` times their
    norm.
    """

    def __init__(self, name: str, step: float) -> None:
        self.name, self._step = name, step
        self.bound = step / 2

    def _encode(self, values: Floats) -> bytes:
        step = np.float32(min(float(LARGEST), self._step * norm(values) / math.sqrt(values.size)))
        if step == 0:
            return _STEP.pack(0)
        quotients = values.reshape(-1) / step
        np.rint(quotients, out=quotients)
        np.clip(quotients, -_MOST, _MOST, out=quotients)
        return _STEP.pack(step) + _pack(quotients.astype(np.int16))

    def _decode(self, data: memoryview, rows: int, columns: int) -> Floats:
        if data.nbytes < _STEP.size:
            raise DecodeError("a segment without its step")
        (step,) = _STEP.unpack_from(data)
        rest = data[_STEP.size :]
        if not step and not rest.nbytes:
            return np.zeros(rows * columns, np.float32)
        values = _unpack(rest, rows * columns)
        values *= np.float32(step)
        return np.clip(values, -LARGEST, LARGEST, out=values)  # the largest ones may be rounded to what is no float32


def _pack(integers: npt.NDArray[np.int16]) -> bytes:
    far = np.abs(integers) > 7
    bits = 4 if int(far.sum()) * _RARE <= len(integers) else 8
    if bits == 8:
        far = np.abs(integers) > 127
    small = np.where(far, -(1 << bits - 1), integers).astype(np.int8).view(np.uint8)
    squeezed = packing.squeeze(packing.nibbles(small) if bits == 4 else small)
    return bytes([bits]) + packing.join(packing.pack(integers[far]), squeezed)


def _unpack(data: memoryview, count: int) -> Floats:
    bits = data[0] if data.nbytes else 0
    if bits not in (4, 8):
        raise DecodeError("steps of a width that there is not")
    first, second = packing.split(data[1:], 2)
    if bits == 4:
        small = packing.from_nibbles(packing.unsqueeze(second, -(-count // 2)), count)
    else:
        small = packing.unsqueeze(second, count).view(np.int8)
    values = small.astype(np.float32)
    far = np.flatnonzero(small == -(1 << bits - 1))
    values[far] = packing.unpack(first, len(far))
    return values
