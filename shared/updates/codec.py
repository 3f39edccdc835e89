"""What every codec of updates is: floats of a segment to few bytes, and back. Pure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from shared.errors import DecodeError, NonFinite
from shared.updates.segments import MAX_ELEMENTS

Floats: TypeAlias = npt.NDArray[np.float32]
LARGEST = np.float32(np.finfo(np.float32).max)
SHORT = 64
"""Elements of a row that is worth a scale of its own: shorter ones are taken together."""


class Codec(ABC):
    """A way to write one segment. Has no state: the same values give the same bytes."""

    name: str
    """As in documents and settings, in its canonical spelling."""
    bound: float
    """What is known before anything is encoded: the L2 norm of what is lost is at most this times that of the values.
    (And ``SLACK`` an element, which is seen only where the values are almost 0.)"""

    def encode(self, values: Floats) -> bytes:
        """``values`` (rows, columns), written. Raises NonFinite."""
        if not np.isfinite(values).all():
            raise NonFinite("an update with values that are not finite numbers; the training has diverged")
        with np.errstate(over="ignore", invalid="ignore"):  # some try what may overflow, and look at what came of it
            return self._encode(np.ascontiguousarray(values, np.float32))

    def decode(self, data: bytes | memoryview, rows: int, columns: int) -> Floats:
        """The values (rows, columns) that were written: new, finite. Takes memory for these, whatever ``data`` claims.
        Raises DecodeError (``too_large``: it claims more), NonFinite."""
        if not 0 < rows * columns <= MAX_ELEMENTS:
            raise DecodeError("a segment of a size that there is not")
        with np.errstate(over="ignore", invalid="ignore"):  # what comes of that is not finite, so it is found
            values = self._decode(memoryview(data), rows, columns)
        if not np.isfinite(values).all():
            raise NonFinite("what was decoded is not finite")
        return values.reshape(rows, columns)

    @abstractmethod
    def _encode(self, values: Floats) -> bytes: ...

    @abstractmethod
    def _decode(self, data: memoryview, rows: int, columns: int) -> Floats: ...


SLACK = 2.0**-130
"""The least scale that there is: smaller values may be lost."""


def unit_of(columns: int) -> int:
    """Elements that have a scale together where each row has one: a row, or several short ones."""
    return columns * -(-SHORT // columns)


def blocked(values: Floats, size: int) -> Floats:
    """``values`` as blocks (blocks, size) in their order, zeros after the last one. New, or a view."""
    flat = values.reshape(-1)
    missing = -len(flat) % size
    return (np.concatenate([flat, np.zeros(missing, np.float32)]) if missing else flat).reshape(-1, size)


def norm(values: npt.NDArray[np.floating[Any]]) -> float:
    """The L2 norm, also of values whose squares are no float32."""
    most = float(np.abs(values).max(initial=0))
    if 1e-15 < most < 1e13:
        return float(np.linalg.norm(values))
    return float(np.linalg.norm(values.astype(np.float64)))
