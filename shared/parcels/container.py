"""How a parcel is written: the length of its header in four bytes, the header, the streams. Pure.

The header is a msgpack map: the version, the size of the base, parts (method, kind, whether upon a base, the length of
each stream) and pieces in the order of their bytes (part, bytes, skipped, columns, first element, rank, shift, and of
each run of decay the factor and the steps; what is left off at the end is 0, 1, 0, 0 and 0, and no runs).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from shared import codec
from shared.errors import DecodeError
from shared.parcels.decay import MAX_RUNS, Run
from shared.parcels.kinds import KINDS, Kind
from shared.parcels.methods import Method, Shape

VERSION = 2
MAX_HEADER = 1 << 20
MAX_PIECES = 1 << 14
MAX_PARTS = 256
MAX_PLACE = 1 << 48
_LENGTH = struct.Struct("<I")
_LEFT_OFF = (0, 1, 0, 0, 0)
_FULL = 2 + len(_LEFT_OFF)


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of ``length`` bytes as it is written, ``skipped``: after how many bytes of the base that nobody used; with
    a ``rank``, upon its base and the product of two factors of that rank, in units of two to the power of minus
    ``shift``; with ``decay``, upon what the base has decayed to."""

    part: int
    length: int
    skipped: int = 0
    columns: int = 1
    first: int = 0
    rank: int = 0
    shift: int = 0
    decay: tuple[Run, ...] = ()

    def shape(self, kind: Kind) -> Shape:
        """Where its elements are. Raises DecodeError: no whole number of them."""
        count, rest = divmod(self.length, kind.width)
        if rest:
            raise DecodeError("a piece that ends within an element")
        return Shape(count, self.columns, self.first)


@dataclass(frozen=True, slots=True)
class Part:
    """Pieces that are written together."""

    method: Method
    kind: Kind
    based: bool
    streams: Sequence[bytes | memoryview] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Contents:
    """A parcel, read."""

    base: int
    parts: Sequence[Part]
    pieces: Sequence[Piece]


def write(contents: Contents) -> bytes:
    """The bytes of a parcel."""
    parts = [
        [int(part.method), part.kind.name, int(part.based), *(len(stream) for stream in part.streams)]
        for part in contents.parts
    ]
    pieces = [_short(piece) for piece in contents.pieces]
    header = codec.encode({"v": VERSION, "base": contents.base, "parts": parts, "pieces": pieces})
    return b"".join(
        [_LENGTH.pack(len(header)), header, *(stream for part in contents.parts for stream in part.streams)]
    )


def _short(piece: Piece) -> list[int]:
    rest = [piece.skipped, piece.columns, piece.first, piece.rank, piece.shift]
    while rest and not piece.decay and rest[-1] == _LEFT_OFF[len(rest) - 1]:
        rest.pop()
    return [piece.part, piece.length, *rest, *(number for run in piece.decay for number in run)]


def read(parcel: memoryview, base: int, size: int) -> Contents:
    """What is in a parcel for ``size`` bytes upon ``base`` bytes. Raises DecodeError."""
    if parcel.nbytes < _LENGTH.size:
        raise DecodeError("a parcel without a header")
    (length,) = _LENGTH.unpack_from(parcel)
    end = _LENGTH.size + length
    if length > MAX_HEADER or end > parcel.nbytes:
        raise DecodeError("a parcel with a header that is too long")
    header = codec.decode(parcel[_LENGTH.size : end].tobytes(), MAX_HEADER)
    if not isinstance(header, dict) or header.keys() != {"v", "base", "parts", "pieces"}:
        raise DecodeError("not the header of a parcel")
    if header["v"] != VERSION:
        raise DecodeError("a parcel of another version")
    if header["base"] != base:
        raise DecodeError("a parcel for a base of another size")
    parts = []
    for row in _rows(header["parts"], MAX_PARTS):
        part, end = _part(row, parcel, end)
        parts.append(part)
    if end != parcel.nbytes:
        raise DecodeError("a parcel with more than its streams")
    pieces = [_piece(row, parts) for row in _rows(header["pieces"], MAX_PIECES)]
    if sum(piece.length for piece in pieces) != size:
        raise DecodeError("a parcel of another size")
    if sum(piece.skipped + piece.length * parts[piece.part].based for piece in pieces) > base:
        raise DecodeError("a parcel for a larger base")
    return Contents(base, parts, pieces)


def _rows(value: Any, most: int) -> list[list[Any]]:
    if not isinstance(value, list) or len(value) > most or not all(isinstance(row, list) for row in value):
        raise DecodeError("no list, or a list that is too long, in a parcel's header")
    return value


def _number(value: Any, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise DecodeError("a number in a parcel's header that cannot be")
    return value


def _part(row: list[Any], parcel: memoryview, at: int) -> tuple[Part, int]:
    if not 3 <= len(row) <= 3 + 4:
        raise DecodeError("a part of another length")
    method, name, based, *lengths = row
    if not isinstance(name, str) or name not in KINDS or type(based) is not int or based not in (0, 1):
        raise DecodeError("a part of a kind that is not known")
    found = []
    for length in lengths:
        found.append(parcel[at : at + _number(length, parcel.nbytes - at)])
        at += length
    return Part(Method(_number(method, max(Method))), KINDS[name], bool(based), found), at


def _piece(row: list[Any], parts: Sequence[Part]) -> Piece:
    if not 2 <= len(row) <= _FULL + 2 * MAX_RUNS or not parts:
        raise DecodeError("a piece of another length")
    part, length, *rest = [_number(value, MAX_PLACE) for value in row[:_FULL]]
    steps = [_number(value, MAX_PLACE) for value in row[_FULL:]]
    if len(steps) % 2:
        raise DecodeError("half a run of decay")
    decay = tuple(map(Run, steps[::2], steps[1::2]))
    skipped, columns, first, rank, shift = [*rest, *_LEFT_OFF[len(rest) :]]
    piece = Piece(_number(part, len(parts) - 1), length, skipped, columns, first, rank, shift, decay)
    if not piece.length or not piece.columns:
        raise DecodeError("a piece of nothing")
    return piece
