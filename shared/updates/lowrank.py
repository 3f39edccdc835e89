"""Two thin factors in place of a matrix. Pure.

Reference: Vogels et al. 2019 (PowerSGD); here without a start from the round before, with one step of the power method
more, and with the factors quantised.
"""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt

from shared.errors import DecodeError
from shared.updates import packing
from shared.updates.codec import Codec, Floats, norm

Factor = npt.NDArray[np.float64]

_SCALE = struct.Struct("<f")
_WHOLE, _FACTORS = 0, 1
_WORTH = 4
"""Elements for each of a factor's: where there are fewer, the matrix itself is written."""
_SEED = 0


class LowRank(Codec):
    """A matrix (rows, columns) as the product of factors of rank ``rank``, each written by ``factors``; what has too
    few rows or columns for that, or loses less so, by ``whole``.

    The left factor's columns are as long as the singular values, the right one's are stretched by the length of those
    they are multiplied with: so one step for all of a factor's elements does as much harm to each direction. A priori
    the loss is no more than the values: else they are written by ``whole``.
    """

    bound = 1.0

    def __init__(self, name: str, rank: int, factors: Codec, whole: Codec) -> None:
        self.name, self._rank, self._factors, self._whole = name, rank, factors, whole

    def _encode(self, values: Floats) -> bytes:
        rows, columns = values.shape
        scale = np.abs(values).max()
        if self._rank * (rows + columns) * _WORTH <= values.size and scale > 0:
            data = self._factored(values, scale)
            lost = values - self._product(memoryview(data), rows, columns)
            if norm(lost) <= norm(values):  # which also what is not finite is not
                return bytes([_FACTORS]) + data
        return bytes([_WHOLE]) + self._whole.encode(values)

    def _factored(self, values: Floats, scale: np.float32) -> bytes:
        matrix = values / scale
        first = self._factors.encode(_left(matrix, self._rank).T.astype(np.float32))
        left = self._factors.decode(first, self._rank, len(matrix)).T.astype(np.float64)
        right = np.linalg.lstsq(left.T @ left, (matrix.T @ left.astype(np.float32)).T.astype(np.float64), rcond=1e-9)[0]
        second = self._factors.encode((right * _lengths(left)[:, None]).astype(np.float32))
        return _SCALE.pack(scale) + packing.join(first, second)

    def _decode(self, data: memoryview, rows: int, columns: int) -> Floats:
        if not data.nbytes or data[0] not in (_WHOLE, _FACTORS):
            raise DecodeError("a matrix in a way that is not known")
        if data[0] == _WHOLE:
            return self._whole.decode(data[1:], rows, columns)
        if self._rank * (rows + columns) * _WORTH > rows * columns:
            raise DecodeError("factors that are larger than what they make")
        return self._product(data[1:], rows, columns)

    def _product(self, data: memoryview, rows: int, columns: int) -> Floats:
        if data.nbytes < _SCALE.size:
            raise DecodeError("factors without their scale")
        (scale,) = _SCALE.unpack_from(data)
        first, second = packing.split(data[_SCALE.size :], 2)
        left = self._factors.decode(first, self._rank, rows).T.astype(np.float64)
        right = self._factors.decode(second, self._rank, columns).astype(np.float64)
        right /= np.where(lengths := _lengths(left), lengths, 1)[:, None]
        values: Floats = left.astype(np.float32) @ right.astype(np.float32)
        values *= np.float32(scale)
        return values


def _left(matrix: Floats, rank: int) -> Factor:
    """The left singular vectors (rows, rank) times their values, about."""
    start = np.random.default_rng(_SEED).standard_normal((matrix.shape[1], rank), np.float32)
    across = np.linalg.qr(matrix @ start)[0]
    across = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ across)[0])[0]
    turned, lengths, _ = np.linalg.svd(across.T @ matrix, full_matrices=False)
    found: Factor = (across @ turned) * lengths
    return found


def _lengths(left: Factor) -> Factor:
    lengths: Factor = np.sqrt(np.einsum("ij,ij->j", left, left))
    return lengths
