"""A parcel's bytes from it and its base. Pure."""

from __future__ import annotations

import numpy as np

from shared.errors import DecodeError
from shared.parcels import lowrank, methods
from shared.parcels.container import Contents, Part, Piece, read
from shared.parcels.kinds import Bytes


def decode(parcel: memoryview, base: memoryview, size: int) -> bytes:
    """The ``size`` bytes of a parcel. Raises DecodeError."""
    contents = read(parcel, base.nbytes, size)
    out, origin = np.empty(size, np.uint8), np.frombuffer(base, np.uint8)
    for part, members in zip(contents.parts, _members(contents), strict=True):
        data = _decoded(
            part,
            [piece for piece, _, _ in members],
            [origin[below : below + piece.length] for piece, _, below in members],
        )
        done = 0
        for piece, at, _ in members:
            out[at : at + piece.length] = data[done : done + piece.length]
            done += piece.length
    return out.tobytes()


def _members(contents: Contents) -> list[list[tuple[Piece, int, int]]]:
    """The pieces of each part, and where their bytes begin, and those of their bases."""
    members: list[list[tuple[Piece, int, int]]] = [[] for _ in contents.parts]
    at = below = 0
    for piece in contents.pieces:
        below += piece.skipped
        members[piece.part].append((piece, at, below))
        at += piece.length
        below += piece.length if contents.parts[piece.part].based else 0
    if not all(members):
        raise DecodeError("a part without pieces")
    return members


def _decoded(part: Part, pieces: list[Piece], bases: list[Bytes]) -> Bytes:
    shapes = [piece.shape(part.kind) for piece in pieces]
    streams = [memoryview(stream) for stream in part.streams]
    base = None
    if any(piece.rank for piece in pieces):
        if not part.based or not streams:
            raise DecodeError("factors without a base, or without themselves")
        bases = lowrank.moved(streams.pop(), part.kind, pieces, bases)
    if part.based:
        base = bases[0] if len(bases) == 1 else np.concatenate(bases)
    return methods.decode(part.method, streams, base, part.kind, shapes)
