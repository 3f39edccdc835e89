"""Small integers in blocks or rows, each with a scale of its own. Pure.

References: int8 and int4 blocks as in Dettmers et al. 2022 (8-bit optimizers via block-wise quantization); ternary
thresholds as in Li and Liu 2016 (Ternary Weight Networks); sign and scale as in Karimireddy et al. 2019 (error
feedback fixes SignSGD), per row.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.errors import DecodeError
from shared.parcels.kinds import Bytes
from shared.updates import packing
from shared.updates.codec import LARGEST, Codec, Floats, blocked, unit_of

_CLIP = 3.5
"""RMS of a block beyond which values are clipped: what int4 gains for the others is more than what these lose."""


class Blocks(Codec):
    """Integers of ``bits`` bits in blocks of ``size`` in the order of the elements.

    The largest one stands for the block's absolute maximum, or with ``clipped`` for 3.5 times its RMS. A priori, of a
    block of n values: none is off by more than half a step, and their norm is no less than the maximum; so the loss is
    at most sqrt(n) / 2 steps to as many steps as the largest integer has. Clipped: half a step as before, and a value
    that is clipped loses what is above 3.5 RMS, at most the share 1 - 3.5 / sqrt(n) of itself.
    """

    def __init__(self, name: str, bits: int, size: int, *, clipped: bool = False) -> None:
        self.name = name
        self._bits, self._size, self._clipped = bits, size, clipped
        self._most = (1 << bits - 1) - 1
        self.bound = (1 + packing.ROUNDING) * math.sqrt(size) / (2 * self._most)
        if clipped:
            step = (1 + packing.ROUNDING) * _CLIP / (2 * self._most)
            self.bound = math.hypot(step, 1 - _CLIP / math.sqrt(size))

    def _encode(self, values: Floats) -> bytes:
        blocks = blocked(values, self._size)
        codes = packing.up(self._reach(blocks))
        scales = packing.scales(codes)
        scales[scales == 0] = 1
        quotients = blocks / scales[:, None]
        quotients *= self._most
        np.rint(quotients, out=quotients)
        np.clip(quotients, -self._most, self._most, out=quotients)
        integers = quotients.astype(np.int8).reshape(-1)[: values.size]
        return packing.join(packing.pack_codes(codes), packing.squeeze(self._narrow(integers.view(np.uint8))))

    def _reach(self, blocks: Floats) -> Floats:
        """What the largest integer of each block stands for, at least."""
        largest: Floats = np.maximum(blocks.max(axis=1), -blocks.min(axis=1))
        if not self._clipped:
            return largest
        shrunk = blocks / np.where(largest > 0, largest, 1)[:, None]  # squares of very large or small values are none
        means = np.einsum("ij,ij->i", shrunk, shrunk) / self._size
        reach: Floats = np.minimum(largest * (_CLIP * np.sqrt(means, dtype=np.float64)), LARGEST).astype(np.float32)
        return reach

    def _narrow(self, integers: Bytes) -> Bytes:
        return integers if self._bits == 8 else packing.nibbles(integers)

    def _decode(self, data: memoryview, rows: int, columns: int) -> Floats:
        count = rows * columns
        first, second = packing.split(data, 2)
        codes = packing.unpack_codes(first, -(-count // self._size))
        if self._bits == 8:
            integers = packing.unsqueeze(second, count).view(np.int8)
        else:
            integers = packing.from_nibbles(packing.unsqueeze(second, -(-count // 2)), count)
        if len(integers) and integers.min() < -self._most:
            raise DecodeError("an integer that no encoder makes")
        return _scaled(integers, packing.scales(codes), self._size, self._most)


def _scaled(integers: npt.NDArray[Any], scales: Floats, size: int, most: int) -> Floats:
    """Integers times the scale of their block, of which ``most`` is the whole."""
    values = blocked(integers.astype(np.float32), size)
    values *= np.float32(1 / most)
    values *= scales[:, None]
    return values.reshape(-1)[: len(integers)]


class Ternary(Codec):
    """-1, 0 or 1 times the scale of a block of 256: the mean of those above 0.7 times the mean of all magnitudes.

    A priori the loss is no more than the values: zeros lose themselves, and the mean is nearer to the others than 0.
    """

    name = "ternary"
    bound = 1.0
    _SIZE = 256
    _THRESHOLD = np.float32(0.7)

    def _encode(self, values: Floats) -> bytes:
        blocks = blocked(values, self._SIZE)
        sizes = np.abs(blocks)
        counts = _counts(values.size, self._SIZE)
        chosen = sizes > (self._THRESHOLD * _means(sizes, counts))[:, None]
        sizes *= chosen
        codes = packing.near(_means(sizes, np.maximum(chosen.sum(axis=1), 1)))
        trits = chosen.astype(np.uint8)
        trits += chosen & (blocks < 0)
        fours = trits.reshape(-1)
        packed: Bytes = np.zeros(len(fours) // 4, np.uint8)
        for place in range(4):
            packed |= fours[place::4] << np.uint8(2 * place)
        return packing.join(packing.pack_codes(codes), packing.squeeze(packed))

    def _decode(self, data: memoryview, rows: int, columns: int) -> Floats:
        count = rows * columns
        blocks = -(-count // self._SIZE)
        first, second = packing.split(data, 2)
        scales = packing.scales(packing.unpack_codes(first, blocks))
        packed = packing.unsqueeze(second, blocks * self._SIZE // 4)
        trits = np.empty((len(packed), 4), np.int8)
        for place in range(4):
            trits[:, place] = (packed >> np.uint8(2 * place)) & np.uint8(3)
        if len(trits) and trits.max() > 2:
            raise DecodeError("a trit that is none")
        trits -= 3 * (trits == 2).view(np.int8)
        return _scaled(trits.reshape(-1), scales, self._SIZE, 1)[:count]


class Sign(Codec):
    """The sign of each element, and for each row (short rows: several together) the mean of the magnitudes.

    Rows of zeros take no signs. A priori the loss is no more than the values: by the row, squared, it is the squares'
    sum less the sum's square over their number.
    """

    name = "sign"
    bound = 1.0

    def _encode(self, values: Floats) -> bytes:
        unit = unit_of(values.shape[1])
        blocks = blocked(values, unit)
        codes = packing.near(_means(np.abs(blocks), _counts(values.size, unit)))
        signs = np.packbits(blocks[codes > 0] < 0)
        return packing.join(packing.pack_codes(codes), packing.squeeze(signs))

    def _decode(self, data: memoryview, rows: int, columns: int) -> Floats:
        count, unit = rows * columns, unit_of(columns)
        first, second = packing.split(data, 2)
        codes = packing.unpack_codes(first, -(-count // unit))
        there = codes > 0
        signs = int(there.sum()) * unit
        bits = np.unpackbits(packing.unsqueeze(second, -(-signs // 8)), count=signs)
        values = np.zeros((len(codes), unit), np.float32)
        values[there] = (1 - 2 * bits.view(np.int8)).reshape(-1, unit)
        values *= packing.scales(codes)[:, None]
        return values.reshape(-1)[:count]


def _counts(count: int, size: int) -> npt.NDArray[np.int64]:
    """How many elements each block has: the last one may have fewer."""
    counts = np.full(-(-count // size), size)
    counts[-1:] -= -count % size
    return counts


def _means(sizes: Floats, counts: npt.NDArray[np.int64]) -> Floats:
    """The mean of each row of ``sizes``, which has so many."""
    means: Floats = (sizes.sum(axis=1, dtype=np.float64) / counts).astype(np.float32)
    return means
