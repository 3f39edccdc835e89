"""Changes of low rank, as of a merged LoRA: a base moved by the product of two small factors. Pure.

The factors are sent as integers so small that every sum of their products is exact in float64, in whatever order and
with whatever instructions a machine adds; scaling is by powers of two, and what is left is one addition and one
rounding an element, which IEEE 754 defines. So the moved base is the same bits everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from shared.errors import DecodeError
from shared.parcels import streams
from shared.parcels.container import Piece
from shared.parcels.grouping import DOWN, HINTS
from shared.parcels.kinds import KINDS, Bytes, Kind, exponent_bias, exponents, floats

Floats = npt.NDArray[np.float64]
Factor = npt.NDArray[np.int32]

MAX_RANK = 128
MAX_SHIFT = 256
_EXACT = 1 << 53
_BLOCK = 1 << 15
"""Elements that are made at a time."""
_INTEGER = KINDS["I32"]
MOVABLE = frozenset({"F64", "F32", "F16", "BF16", "U8"})
"""Kinds of numbers that can be moved by factors."""
_MERGED = frozenset({"F64", "F32", "F16", "BF16"})
"""Those that a LoRA is merged into."""


class Factors(NamedTuple):
    """Of a matrix of rows and columns: ``left`` (rows, rank) and ``right`` (columns, rank), in units of two to the
    power of minus ``shift`` together."""

    left: Factor
    right: Factor
    shift: int

    def integers(self) -> Factor:
        """As they are sent: one column of a factor after the other."""
        return np.concatenate([self.left.T.reshape(-1), self.right.T.reshape(-1)])

    def exact(self) -> bool:
        """Whether sums of products are exact: none can be as large as the largest ones of each rank together."""
        left, right = (np.abs(factor.astype(np.int64)).max(axis=0, initial=0).tolist() for factor in self[:2])
        return bool(sum(a * b for a, b in zip(left, right, strict=True)) < _EXACT)


class Moved(NamedTuple):
    """A base that was moved: its bytes, and for each element a hint (``grouping.HINTS``) at what rounding took away."""

    base: Bytes
    hints: Bytes


def moved(
    stream: memoryview, kind: Kind, pieces: Sequence[Piece], bases: Sequence[Bytes]
) -> tuple[list[Bytes], list[Bytes]]:
    """The bases of pieces, those that have a rank moved by the factors in ``stream``; and the hints of all. Raises
    DecodeError."""
    integers = streams.unpack(stream, sum(_size(piece, kind) for piece in pieces), _INTEGER).astype(
        np.int32, copy=False
    )
    found, at = list[Moved](), 0
    for piece, base in zip(pieces, bases, strict=True):
        size = _size(piece, kind)
        if size:
            found.append(move(base, kind, _factors(integers[at : at + size], piece, kind)))
        else:
            found.append(Moved(base, np.zeros(len(base) // kind.width, np.uint8)))
        at += size
    return [move.base for move in found], [move.hints for move in found]


def _size(piece: Piece, kind: Kind) -> int:
    """Integers in a piece's factors; no more than elements in it, so that memory is bounded."""
    if not piece.rank:
        return 0
    count = piece.shape(kind).count
    size = piece.rank * (count // piece.columns + piece.columns)
    if kind.name not in MOVABLE or count % piece.columns or piece.first % piece.columns or size > count:
        raise DecodeError("factors of what is no matrix")
    if piece.rank > MAX_RANK or piece.shift > MAX_SHIFT:
        raise DecodeError("factors that are too large")
    return size


def _factors(integers: Factor, piece: Piece, kind: Kind) -> Factors:
    rows = piece.shape(kind).count // piece.columns
    left, right = np.split(integers, [piece.rank * rows])
    factors = Factors(left.reshape(piece.rank, rows).T, right.reshape(piece.rank, -1).T, piece.shift)
    if not factors.exact():
        raise DecodeError("factors whose product is not exact")
    return factors


def move(base: Bytes, kind: Kind, factors: Factors) -> Moved:
    """``base`` plus the product of the factors, rounded; what is not finite stays as it was. Numbers of more than 16
    bits have no hints: so small a part of them does not matter. Those of fewer are calculated in float32."""
    moving = np.flatnonzero(factors.left.any(axis=1))
    if len(moving) > 0.75 * len(factors.left):
        return _move(base, kind, factors)
    # Else it is the embeddings of words that do not occur, say.
    rows = base.reshape(len(factors.left), -1).copy()
    hints = np.zeros((len(rows), len(factors.right)), np.uint8)
    part = _move(rows[moving].reshape(-1), kind, factors._replace(left=factors.left[moving]))
    rows[moving] = part.base.reshape(len(moving), -1)
    hints[moving] = part.hints.reshape(len(moving), -1)
    return Moved(rows.reshape(-1), hints.reshape(-1))


def _move(base: Bytes, kind: Kind, factors: Factors) -> Moved:
    columns = len(factors.right)
    made, hints = np.empty_like(base), np.zeros(len(base) // kind.width, np.uint8)
    right = np.ascontiguousarray(factors.right.T, np.float64)
    step = max(1, _BLOCK // columns)
    for row in range(0, len(factors.left), step):
        changes = factors.left[row : row + step].astype(np.float64) @ right
        changes *= 2.0**-factors.shift
        elements = slice(row * columns, (row + len(changes)) * columns)
        place = slice(elements.start * kind.width, elements.stop * kind.width)
        wanted: npt.NDArray[np.floating[Any]] = changes.reshape(-1)
        if kind.width <= 2:
            wanted = wanted.astype(np.float32)
        made[place] = _plus(base[place], kind, wanted)
        if kind.width <= 2:
            hints[elements] = _hints(wanted, made[place], kind)
    return Moved(made, hints)


def _hints(wanted: npt.NDArray[np.floating[Any]], made: Bytes, kind: Kind) -> Bytes:
    """How far ``wanted``, which is overwritten, was rounded to what was made."""
    with np.errstate(all="ignore"):
        if kind.fraction is None:
            wanted -= np.rint(wanted)
            wanted *= 2 * HINTS
        else:
            wanted -= floats(made, kind)
            every = np.arange(1 << 8 * kind.width - 1 - kind.fraction)
            wanted *= np.ldexp(np.float32(2 * HINTS), exponent_bias(kind) - every).take(exponents(made, kind))
    wanted[~np.isfinite(wanted)] = 0
    np.clip(wanted, 1 - HINTS, HINTS - 1, out=wanted)
    hints: Bytes = np.abs(wanted).astype(np.uint8)
    hints |= (wanted < 0).view(np.uint8) * np.uint8(DOWN)
    return hints


def _plus(base: Bytes, kind: Kind, changes: npt.NDArray[np.floating[Any]]) -> Bytes:
    """``base`` plus ``changes``, which becomes the sum before it is rounded: for integers, it stays as it is."""
    if kind.fraction is None:
        whole = np.clip(np.rint(changes), -_EXACT, _EXACT).astype(np.int64)
        sums: Bytes = (base.view(kind.integer) + whole.astype(kind.integer)).view(np.uint8)
        return sums
    with np.errstate(all="ignore"):
        changes += floats(base, kind)
        if kind.name != "F64":
            narrow = changes.astype(np.float32, copy=False)
            if kind.name == "F16":
                narrow = narrow.astype(np.float16)
            elif kind.name == "BF16":
                bits = narrow.view(np.uint32)
                rounded = bits >> np.uint32(16)
                rounded &= np.uint32(1)
                rounded += np.uint32(0x7FFF)
                rounded += bits
                made = rounded.view("<u2")[1::2].view(kind.integer)
                return np.where(np.isfinite(narrow), made, base.view(kind.integer)).view(np.uint8)
            finite, made = np.isfinite(narrow), narrow.view(kind.integer)
        else:
            finite, made = np.isfinite(changes), changes.view(kind.integer)
    # The bits of a NaN that is computed are not the same on all machines.
    return np.where(finite, made, base.view(kind.integer)).view(np.uint8)


# What follows is for who encodes. It need not be the same everywhere: its result is sent.

_SAMPLE = 96
_RANKS = (20, 72)
_WEIGHTED = 32
"""The rank up to which the factors are fitted by weight: it takes its square for each element."""
_PRECISIONS = (2, 1, 0, -1, -2, -3, -4)
"""Bits of the factors below the noise, best first: more of them than these cost more than they explain."""


def looks_low(target: Bytes, base: Bytes, kind: Kind, columns: int) -> bool:
    """Whether a matrix's change seems to be of low rank: a cheap look at some of its rows and columns."""
    if kind.name not in _MERGED:
        return False
    count = len(target) // kind.width
    rows = np.linspace(0, count // columns - 1, min(_SAMPLE, count // columns)).astype(np.int64)
    across = np.linspace(0, columns - 1, min(_SAMPLE, columns)).astype(np.int64)
    places = rows[:, None] * columns + across
    chosen = [
        np.ascontiguousarray(data.view(kind.integer)[places]).reshape(-1).view(np.uint8) for data in (target, base)
    ]
    change = _change(chosen[0], chosen[1], kind).reshape(places.shape)
    rounding = _rounding(chosen[0], kind)
    if not _ordinary(change, rounding) or np.mean(change.any(axis=1)) < 0.9:
        return False
    energy, noise = np.linalg.svd(change, compute_uv=False) ** 2, np.mean(rounding**2)
    low = _SAMPLE // 3
    rest = (len(rows) - low) * (len(across) - low) * noise  # that of the noise which is left
    return bool(energy.sum() > 1.5 * noise * change.size and energy[low:].sum() < 1.5 * rest + energy.sum() * 1e-9)


def factored(target: Bytes, base: Bytes, kind: Kind, columns: int) -> Factors | None:
    """The factors that bring a matrix nearest to ``target``, in as many bits as they are worth; None: of no use."""
    if kind.name not in _MERGED:
        return None
    change = _change(target, base, kind).reshape(-1, columns)
    noise = _rounding(target, kind).reshape(change.shape)
    if not _ordinary(change, noise):
        return None
    basis = _basis(change, float(np.sqrt(np.mean(noise * noise))))
    if basis is None:
        return None
    noise += np.sqrt(np.mean(change * change)) * 2.0**-25  # what merged it rounded its product to float32
    weights = (noise.min() / noise) ** 2 if basis.shape[1] <= _WEIGHTED else None
    left, right = _fitted(change, weights, basis)
    return _quantised(change, noise, weights, left, right)


def _ordinary(change: Floats, noise: Floats) -> bool:
    """Whether something changed, and sums of squares neither overflow nor vanish."""
    return bool(2.0**-400 < np.abs(change).max() < 2.0**400 and noise.max() < 2.0**400)


def _change(target: Bytes, base: Bytes, kind: Kind) -> Floats:
    with np.errstate(all="ignore"):
        change = floats(target, kind).astype(np.float64)
        change -= floats(base, kind)
    change[~np.isfinite(change)] = 0
    return change


def _rounding(target: Bytes, kind: Kind) -> Floats:
    """The standard error of each element's rounding."""
    units = exponents(target, kind).astype(np.int32)
    return np.ldexp(np.sqrt(1 / 12), units - exponent_bias(kind))


def _basis(change: Floats, noise: float) -> Floats | None:
    """An orthonormal basis (columns, rank) of the rows of ``change``, without what is as small as the noise."""
    # What a weaker one explains of the noise takes fewer bits than its factors.
    threshold = 5 * noise * np.sqrt(sum(change.shape))
    start = np.random.default_rng(0).standard_normal((change.shape[1], _RANKS[-1]))
    for width in _RANKS:
        if width > min(change.shape):
            return None
        across = np.linalg.qr(change @ start[:, :width])[0]
        across = np.linalg.qr(change @ np.linalg.qr(change.T @ across)[0])[0]
        _, values, basis = np.linalg.svd(across.T @ change, full_matrices=False)
        rank = int(np.sum(values > threshold))
        if 0 < rank < min(width - 4, MAX_RANK + 1):
            found: Floats = basis[:rank].T
            return found if rank * sum(change.shape) < change.size // 2 else None
        if not rank:
            return None
    return None


def _fitted(change: Floats, weights: Floats | None, right: Floats) -> tuple[Floats, Floats]:
    """Factors whose product is nearest to ``change``: elements of which more is known count for more."""
    left = change @ right
    if weights is not None:
        right = np.linalg.qr(_solved(change.T, weights.T, np.linalg.qr(left)[0]))[0]
        left = _solved(change, weights, right)
    u, values, v = _product_svd(left, right)
    return u * np.sqrt(values), v * np.sqrt(values)


def _product_svd(left: Floats, right: Floats) -> tuple[Floats, Floats, Floats]:
    a, b = np.linalg.qr(left), np.linalg.qr(right)
    u, values, v = np.linalg.svd(a.R @ b.R.T)
    return a.Q @ u, values, b.Q @ v.T


def _solved(change: Floats, weights: Floats, right: Floats) -> Floats:
    """For each row of ``change`` the combination of the columns of ``right`` that is nearest, by weight."""
    rank = right.shape[1]
    squares = (right[:, :, None] * right[:, None, :]).reshape(-1, rank * rank)
    systems: npt.NDArray[np.floating[Any]] = (weights @ squares).reshape(-1, rank, rank)
    ridge = np.trace(systems, axis1=1, axis2=2) * 1e-14 + 1e-300
    systems += np.eye(rank) * ridge[:, None, None]
    sides = (weights * change) @ right
    found: Floats = np.linalg.solve(systems, sides[:, :, None])[:, :, 0]
    return found


def _quantised(change: Floats, noise: Floats, weights: Floats | None, left: Floats, right: Floats) -> Factors | None:
    """The factors as integers, as precise as the noise lets them be and their product is exact."""
    spread = float(np.sqrt(np.sum(left * left) / len(left) + np.sum(right * right) / len(right)))
    for precision in _PRECISIONS:
        bits = int(np.round(np.log2(spread / np.median(noise)))) + precision
        if not 0 < bits < MAX_SHIFT // 2:
            continue
        scale = 2.0**bits
        rounded = np.rint(right * scale)
        again: Floats = left if weights is None else _solved(change, weights, rounded / scale)
        factors = [np.rint(again * scale), rounded]
        if max(float(np.abs(factor).max()) for factor in factors) < 2.0**31:
            made = Factors(factors[0].astype(np.int32), factors[1].astype(np.int32), 2 * bits)
            if made.exact():
                return made
    return None
