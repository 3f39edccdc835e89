"""Decoded rows made as long as they were. Pure."""

from __future__ import annotations

import math

import numpy as np

from shared.updates import packing
from shared.updates.codec import LARGEST, Codec, Floats, blocked, unit_of


class Lifted(Codec):
    """What another codec makes, with each row (short rows: several together) scaled to the L2 norm that it had.

    For updates that are sent once: what is left out makes a row shorter, and a shorter step learns less. With feedback
    it must not be used, since what was left out comes later. A priori: what a row makes must not point away from it,
    so the loss is at most the square root of two times the row, and what the scale is rounded.
    """

    def __init__(self, name: str, codec: Codec) -> None:
        self.name, self._codec = name, codec
        self.bound = math.sqrt(1 + (1 + packing.ROUNDING) ** 2)

    def _encode(self, values: Floats) -> bytes:
        data = self._codec.encode(values)
        unit = unit_of(values.shape[1])
        made = _norms(self._codec.decode(data, *values.shape), unit)
        wanted = np.minimum(_norms(values, unit) / np.where(made > 0, made, np.inf), 1e6).astype(np.float32)
        codes = packing.near(wanted)
        return packing.join(packing.pack_codes(codes), data)

    def _decode(self, data: memoryview, rows: int, columns: int) -> Floats:
        unit = unit_of(columns)
        first, second = packing.split(data, 2)
        ratios = packing.scales(packing.unpack_codes(first, -(-rows * columns // unit)))
        blocks = blocked(self._codec.decode(second, rows, columns), unit) * ratios[:, None]
        values = blocks.reshape(-1)[: rows * columns]
        return np.clip(values, -LARGEST, LARGEST, out=values)  # a norm may be more than any of its elements can be


def _norms(values: Floats, unit: int) -> Floats:
    norms: Floats = np.linalg.norm(blocked(values, unit).astype(np.float64), axis=1)
    return norms
