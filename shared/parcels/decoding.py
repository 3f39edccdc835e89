"""A parcel's bytes from it and its base. Pure."""

from __future__ import annotations

import numpy as np

from shared.errors import DecodeError
from shared.parcels import lowrank, methods
from shared.parcels.container import Contents, Part, Piece, read
from shared.parcels.decay import decayed
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
    if any(piece.rank or piece.decay for piece in pieces) and not part.based:
        raise DecodeError("what moves a base, without one")
    base = hints = None
    bases = [decayed(base, part.kind, p.decay) if p.decay else base for p, base in zip(pieces, bases, strict=True)]
    if any(piece.rank for piece in pieces):
        if not streams:
            raise DecodeError("factors without themselves")
        bases, found = lowrank.moved(streams.pop(), part.kind, pieces, bases)
        hints = methods.together(found)
    if part.based:
        base = methods.together(bases)
    return methods.decode(part.method, streams, base, part.kind, shapes, hints)
