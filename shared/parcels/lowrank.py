"""Changes of low rank, as of a merged LoRA: a base moved by the product of two small factors. Pure.

The factors are sent as integers so small that every sum of their products is exact in float64, in whatever order and
with whatever instructions a machine adds; scaling is by powers of two, and what is left is one addition and one
rounding an element, which IEEE 754 defines. So the moved base is the same bits everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shared.errors import DecodeError
from shared.parcels import streams
from shared.parcels.container import Piece
from shared.parcels.kinds import KINDS, Bytes, Kind, exponent_bias, exponents, floats

Floats = npt.NDArray[np.float64]
Factor = npt.NDArray[np.int32]

MAX_RANK = 128
MAX_SHIFT = 256
_EXACT = 1 << 53
_BLOCK = 1 << 18
"""Elements that are made at a time."""
_INTEGER = KINDS["I32"]
_MOVABLE = frozenset({"F64", "F32", "F16", "BF16"})


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
        """Whether sums of products are exact."""
        largest = [int(np.abs(factor.astype(np.int64)).max(initial=0)) for factor in (self.left, self.right)]
        return bool(largest[0] * largest[1] * self.left.shape[1] < _EXACT)


def moved(stream: memoryview, kind: Kind, pieces: Sequence[Piece], bases: Sequence[Bytes]) -> list[Bytes]:
    """The bases of pieces, those that have a rank moved by the factors in ``stream``. Raises DecodeError."""
    integers = streams.unpack(stream, sum(_size(piece, kind) for piece in pieces), _INTEGER).astype(
        np.int32, copy=False
    )
    found, at = [], 0
    for piece, base in zip(pieces, bases, strict=True):
        size = _size(piece, kind)
        found.append(move(base, kind, _factors(integers[at : at + size], piece, kind)) if size else base)
        at += size
    return found


def _size(piece: Piece, kind: Kind) -> int:
    """Integers in a piece's factors; no more than elements in it, so that memory is bounded."""
    if not piece.rank:
        return 0
    count = piece.shape(kind).count
    size = piece.rank * (count // piece.columns + piece.columns)
    if kind.name not in _MOVABLE or count % piece.columns or piece.first % piece.columns or size > count:
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


def move(base: Bytes, kind: Kind, factors: Factors) -> Bytes:
    """``base`` plus the product of the factors, rounded; what is not finite stays as it was."""
    made = np.empty_like(base)
    right = factors.right.T.astype(np.float64)
    columns = right.shape[1]
    step = max(1, _BLOCK // columns)
    for row in range(0, factors.left.shape[0], step):
        changes = factors.left[row : row + step].astype(np.float64) @ right
        changes *= 2.0**-factors.shift
        place = slice(row * columns * kind.width, (row + len(changes)) * columns * kind.width)
        made[place] = _plus(base[place], kind, changes.reshape(-1))
    return made


def _plus(base: Bytes, kind: Kind, changes: Floats) -> Bytes:
    with np.errstate(all="ignore"):
        changes += floats(base, kind)
        if kind.name != "F64":
            narrow = changes.astype(np.float32)
            if kind.name == "F16":
                narrow = narrow.astype(np.float16)
            elif kind.name == "BF16":
                bits = narrow.view(np.uint32)
                narrow_bits = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
                made = narrow_bits.astype("<u2").view(kind.integer)
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
_PRECISIONS = (-1, 1, 3, 5)


def looks_low(target: Bytes, base: Bytes, kind: Kind, columns: int) -> bool:
    """Whether a matrix's change seems to be of low rank: a cheap look at some of its rows and columns."""
    if kind.name not in _MOVABLE:
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
    if not _ordinary(change, rounding):
        return False
    energy, noise = np.linalg.svd(change, compute_uv=False) ** 2, np.mean(rounding**2)
    low = _SAMPLE // 3
    rest = (len(rows) - low) * (len(across) - low) * noise  # that of the noise which is left
    return bool(energy.sum() > 1.5 * noise * change.size and energy[low:].sum() < 1.5 * rest + energy.sum() * 1e-9)


def factored(target: Bytes, base: Bytes, kind: Kind, columns: int) -> Factors | None:
    """The factors that bring a matrix nearest to ``target``, in as many bits as they are worth; None: of no use."""
    if kind.name not in _MOVABLE:
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
    threshold = 1.2 * noise * sum(np.sqrt(change.shape))
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
    systems = (weights @ squares).reshape(-1, rank, rank)
    traces: Floats = np.trace(systems, axis1=1, axis2=2)
    systems += np.eye(rank) * (traces[:, None, None] * 1e-14 + 1e-300)
    sides = (weights * change) @ right
    found: Floats = np.linalg.solve(systems, sides[:, :, None])[:, :, 0]
    return found


def _quantised(change: Floats, noise: Floats, weights: Floats | None, left: Floats, right: Floats) -> Factors | None:
    """The factors as integers, of the precision that costs the fewest bits with what is left then."""
    spread = float(np.sqrt(np.sum(left * left) / len(left) + np.sum(right * right) / len(right)))
    unit = float(np.median(noise))
    some = slice(None, None, max(1, len(change) // 256))
    best: tuple[float, Factors] | None = None
    for precision in _PRECISIONS:
        bits = int(np.round(np.log2(spread / unit))) + precision
        if not 0 < bits < MAX_SHIFT // 2:
            continue
        scale = 2.0**bits
        rounded = np.rint(right * scale)
        again: Floats = left if weights is None else _solved(change, weights, rounded / scale)
        factors = [np.rint(again * scale), rounded]
        if max(float(np.abs(factor).max()) for factor in factors) >= 2.0**31:
            continue
        made = Factors(factors[0].astype(np.int32), factors[1].astype(np.int32), 2 * bits)
        if not made.exact():
            continue
        rest = np.abs(change[some] - factors[0][some] @ rounded.T / scale**2) / (noise[some] * np.sqrt(12))
        cost = float(np.mean(np.log2(1 + 2 * rest))) * change.size
        cost += sum(float(np.sum(np.log2(1 + np.abs(factor)))) for factor in factors)
        if best is None or cost < best[0]:
            best = cost, made
    return best[1] if best else None
