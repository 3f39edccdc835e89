"""Floats as they are, or their upper halves: byte planes, and zstd. Pure."""

from __future__ import annotations

import numpy as np

from shared.updates.codec import Codec, Floats
from shared.updates.packing import squeeze, unsqueeze


class Fp32(Codec):
    """Without loss. First the lowest byte of each element, then the second ones, and so on."""

    name = "fp32"
    bound = 0.0

    def _encode(self, values: Floats) -> bytes:
        planes = values.astype("<f4", copy=False).reshape(-1).view(np.uint8).reshape(-1, 4).T
        return squeeze(np.ascontiguousarray(planes).reshape(-1))

    def _decode(self, data: memoryview, rows: int, columns: int) -> Floats:
        planes = unsqueeze(data, 4 * rows * columns).reshape(4, -1)
        return np.ascontiguousarray(planes.T).reshape(-1).view("<f4")


class Bf16(Codec):
    """Rounded to bfloat16, to the nearest and ties to even; what is too large for it, to its largest."""

    name = "bf16"
    bound = 2.0**-8

    def _encode(self, values: Floats) -> bytes:
        bits = values.reshape(-1).view(np.uint32)
        upper = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
        upper >>= np.uint32(16)
        upper -= (upper & np.uint32(0x7FFF)) == np.uint32(0x7F80)
        planes = upper.astype("<u2").view(np.uint8).reshape(-1, 2).T
        return squeeze(np.ascontiguousarray(planes).reshape(-1))

    def _decode(self, data: memoryview, rows: int, columns: int) -> Floats:
        planes = unsqueeze(data, 2 * rows * columns).reshape(2, -1)
        upper = np.ascontiguousarray(planes.T).reshape(-1).view("<u2").astype(np.uint32)
        return (upper << np.uint32(16)).view(np.float32)
