"""The numbers in tensors as integers: the same width, in the order of their values, exactly. Pure.

numpy has no bfloat16 and no 8-bit floats, and NaN is not one value; so no number is ever read as a float, but for an
estimate of how much it changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Integers: TypeAlias = npt.NDArray[np.signedinteger[Any]]
Bytes: TypeAlias = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Kind:
    """How an element is written: ``width`` in bytes, and for a float ``fraction``, bits of its fraction."""

    name: str
    width: int
    fraction: int | None = None

    @property
    def integer(self) -> np.dtype[np.signedinteger[Any]]:
        """The type of its integers, little-endian as in the file."""
        return np.dtype(f"<i{self.width}")


BYTES = Kind("U8", 1)
KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        BYTES,
        Kind("I16", 2),
        Kind("I32", 4),
        Kind("I64", 8),
        Kind("F8_E5M2", 1, 2),
        Kind("F8_E4M3", 1, 3),
        Kind("BF16", 2, 7),
        Kind("F16", 2, 10),
        Kind("F32", 4, 23),
        Kind("F64", 8, 52),
    )
}
_ALIKE = {
    "U16": "I16",
    "U32": "I32",
    "U64": "I64",
    "C64": "F32",
    "F8_E5M2FNUZ": "F8_E5M2",
    "F8_E4M3FNUZ": "F8_E4M3",
}


def kind_of(dtype: str, length: int) -> Kind:
    """The kind for ``length`` bytes of a type as safetensors names it; BYTES for what is not known or not whole."""
    kind = KINDS.get(_ALIKE.get(dtype, dtype), BYTES)
    return BYTES if length % kind.width else kind


def ordered(data: Bytes, kind: Kind) -> Integers:
    """The elements of ``data`` as integers that grow with their values. A view of it, or new."""
    return _flipped(data.view(kind.integer), kind)


def unordered(values: Integers, kind: Kind) -> Bytes:
    """The bytes again."""
    return _flipped(values, kind).view(np.uint8)


def _flipped(values: Integers, kind: Kind) -> Integers:
    """The bits below the sign flipped where it is set: a float is sign and magnitude. Its own inverse."""
    if kind.fraction is None:
        return values
    mask = values >> (8 * kind.width - 1)
    mask &= np.iinfo(values.dtype).max
    mask ^= values
    return mask


def exponents(data: Bytes, kind: Kind) -> npt.NDArray[np.int16]:
    """The exponent field of each float in ``data``; subnormals have the least that others have. New."""
    assert kind.fraction is not None
    if kind.width == 1:
        top, shift = data.astype(np.uint16), kind.fraction
    else:  # the last two bytes of an element have its sign and all of its exponent
        halves = kind.width // 2
        top, shift = data.view("<u2")[halves - 1 :: halves], kind.fraction - 8 * kind.width + 16
    fields = top >> np.uint16(shift)
    fields &= np.uint16((1 << (8 * kind.width - 1 - kind.fraction)) - 1)
    found: npt.NDArray[np.int16] = np.maximum(fields, 1, out=fields).view(np.int16)
    return found


def exponent_bias(kind: Kind) -> int:
    """What an exponent field is above the binary logarithm of the unit in the last place."""
    assert kind.fraction is not None
    return (1 << (8 * kind.width - 2 - kind.fraction)) - 1 + kind.fraction


def units(data: Bytes, kind: Kind) -> npt.NDArray[np.float64]:
    """The unit in the last place of each element: one for an integer. New."""
    if kind.fraction is None:
        return np.ones(len(data) // kind.width)
    found: npt.NDArray[np.float64] = np.ldexp(1.0, exponents(data, kind).astype(np.int32) - exponent_bias(kind))
    return found


def floats(data: Bytes, kind: Kind) -> npt.NDArray[np.floating[Any]]:
    """The values, exactly: as float64 for F64 and wide integers, else as float32. New."""
    bits = data.view(kind.integer)
    if kind.fraction is None:
        return bits.astype(np.float32 if kind.width < 4 else np.float64)
    if kind.name == "F64":
        return bits.view("<f8").copy()
    if kind.name == "F16":
        return _widened(bits)
    if kind.name == "F32":
        return bits.view("<f4").copy()
    if kind.name == "BF16":
        return (bits.astype(np.int32) << 16).view(np.float32)
    if kind.name == "F8_E5M2":  # the upper half of an F16
        return _widened(bits.astype(np.int16) << 8)
    # F8_E4M3: bits of the fraction and exponent at a float32's place; its bias is 7, a float32's 127.
    magnitudes = ((bits.astype(np.int32) & 0x7F) << 20).view(np.float32) * np.float32(2.0**120)
    signed: npt.NDArray[np.float32] = np.copysign(magnitudes, bits)
    return signed


def _widened(bits: Integers) -> npt.NDArray[np.float32]:
    with np.errstate(invalid="ignore"):  # NaNs that signal
        return bits.view("<f2").astype(np.float32)
