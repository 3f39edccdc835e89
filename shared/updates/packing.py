"""What codecs have in common below: streams in a row, integers and scales in few bytes. Pure.

A stream begins with how it is written, so that the shortest way can be taken for each. How much comes out is always
known before from the segment's shape.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from shared.errors import DecodeError
from shared.parcels import streams
from shared.parcels.kinds import KINDS, Bytes
from shared.updates.codec import Floats

Codes = npt.NDArray[np.uint16]
Integers = npt.NDArray[np.signedinteger[Any]]

_LENGTH = struct.Struct("<I")
_LEVEL = 1
"""Of zstd: what is left after quantising has next to no repetitions, and higher levels look for nothing else."""

_SHORT = 1 << 12
"""Bytes of integers that may be less by zstd than with the tables of pcodec."""


class _Way(IntEnum):
    RAW = 0
    ZSTD = 1
    PCODEC = 2


_KINDS = {1: KINDS["U8"], 2: KINDS["I16"], 4: KINDS["I32"]}


def join(*parts: bytes) -> bytes:
    """Streams, each but the last with its length before it."""
    return b"".join([_LENGTH.pack(len(part)) + part for part in parts[:-1]] + [parts[-1]])


def split(data: memoryview, count: int) -> list[memoryview]:
    """The ``count`` streams that were joined. Raises DecodeError."""
    found = []
    for _ in range(count - 1):
        if data.nbytes < _LENGTH.size:
            raise DecodeError("a segment that ends before its streams")
        (length,) = _LENGTH.unpack_from(data)
        data = data[_LENGTH.size :]
        if length > data.nbytes:
            raise DecodeError("a stream that is longer than its segment")
        found.append(data[:length])
        data = data[length:]
    return [*found, data]


def squeeze(data: Bytes) -> bytes:
    """Bytes, by zstd if that is less. At most one byte more than they are."""
    packed = streams.squeeze(data, _LEVEL) if data.nbytes else b""
    if data.nbytes and len(packed) < data.nbytes:
        return bytes([_Way.ZSTD]) + packed
    return bytes([_Way.RAW]) + data.tobytes()


def unsqueeze(stream: memoryview, size: int) -> Bytes:
    """The ``size`` bytes that were squeezed. Raises DecodeError; ``too_large``: more of them are claimed."""
    way, rest = _way(stream)
    if way == _Way.RAW:
        if rest.nbytes != size:
            raise DecodeError("bytes of another number")
        return np.frombuffer(rest, np.uint8)
    if way != _Way.ZSTD:
        raise DecodeError("bytes in a way that is not known")
    data = expand(rest, size)
    if data.nbytes != size:
        raise DecodeError("fewer bytes than there are")
    return data


def expand(frame: memoryview, most: int) -> Bytes:
    """The bytes, ``most`` of them at most, in a frame of zstd that says how many. Raises DecodeError; ``too_large``:
    it claims more."""
    try:
        claimed = zstandard.frame_content_size(frame)
    except zstandard.ZstdError as error:
        raise DecodeError("not a frame of zstd") from error
    if claimed > most:
        raise DecodeError(f"a frame of zstd that claims {claimed} bytes where {most} fit", code="too_large")
    return streams.unsqueeze(frame, claimed)


def _way(stream: memoryview) -> tuple[int, memoryview]:
    if not stream.nbytes:
        raise DecodeError("a stream of nothing")
    return stream[0], stream[1:]


def pack(values: Integers) -> bytes:
    """Integers (at most 32 bits each) in the fewest bytes that their range allows, by their frequencies."""
    most = int(max(values.max(initial=0), ~values.min(initial=0)))
    width = 1 if most < 1 << 7 else 2 if most < 1 << 15 else 4
    narrow = np.ascontiguousarray(values, _KINDS[width].integer)
    packed = bytes([_Way.PCODEC]) + streams.pack(narrow)
    if narrow.nbytes <= max(_SHORT, len(packed)):
        packed = min(packed, squeeze(narrow.view(np.uint8)), key=len)
    return bytes([width]) + packed


def unpack(stream: memoryview, count: int) -> Integers:
    """The ``count`` integers that were packed. Raises DecodeError."""
    width, rest = _way(stream)
    if width not in _KINDS:
        raise DecodeError("integers of a width that there is not")
    way, packed = _way(rest)
    if way == _Way.PCODEC:
        return streams.unpack(packed, count, _KINDS[width])
    return unsqueeze(rest, count * width).view(_KINDS[width].integer)


def nibbles(integers: Bytes) -> Bytes:
    """The lower halves of bytes, two in one."""
    if len(integers) % 2:
        integers = np.append(integers, np.uint8(0))
    packed: Bytes = (integers[0::2] & np.uint8(15)) | (integers[1::2] << np.uint8(4))
    return packed


def from_nibbles(packed: Bytes, count: int) -> npt.NDArray[np.int8]:
    """The ``count`` integers again, with their signs."""
    both = np.empty((len(packed), 2), np.uint8)
    np.left_shift(packed, np.uint8(4), out=both[:, 0])
    np.bitwise_and(packed, np.uint8(0xF0), out=both[:, 1])
    integers = both.reshape(-1).view(np.int8)
    integers >>= 4
    return integers[:count]


# Scales are float32 with four bits of fraction: their upper twelve bits without the sign.
_CUT = 19
_MOST = (1 << 31 - _CUT) - (1 << 23 - _CUT) - 1
ROUNDING = 2.0**-4
"""How much larger a scale can come out that was rounded up, as a share of it."""


def up(values: Floats) -> Codes:
    """Codes of the least scales that are no less than ``values`` (which are none below 0), but for the very largest."""
    codes = (values.view(np.uint32) + np.uint32((1 << _CUT) - 1)) >> np.uint32(_CUT)
    return _codes(codes)


def near(values: Floats) -> Codes:
    """Codes of the scales that are nearest to ``values`` (which are none below 0)."""
    codes = (values.view(np.uint32) + np.uint32(1 << _CUT - 1)) >> np.uint32(_CUT)
    return _codes(codes)


def _codes(upper: npt.NDArray[np.uint32]) -> Codes:
    codes: Codes = np.minimum(upper, _MOST).astype(np.uint16)
    return codes


def scales(codes: Codes) -> Floats:
    """The scales that codes stand for."""
    return (codes.astype(np.uint32) << np.uint32(_CUT)).view(np.float32)


def pack_codes(codes: Codes) -> bytes:
    """Codes of scales, written."""
    return pack(codes.astype(np.int16))


def unpack_codes(stream: memoryview, count: int) -> Codes:
    """The ``count`` codes. Raises DecodeError."""
    codes = unpack(stream, count)
    if count and not 0 <= codes.min() <= codes.max() <= _MOST:
        raise DecodeError("a scale that is no number")
    return codes.astype(np.uint16)
