"""Factors of low rank for what training changed in a matrix: a part of it, as far as it saves bytes. Pure.

The gradients of a batch have few directions, and steps follow each other; so a good part of what fine-tuning changes is
of low rank, though all of it is not. For who encodes only: it need not be the same everywhere, as its result is sent.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from shared.parcels.kinds import Bytes, Kind, floats, units
from shared.parcels.lowrank import MAX_SHIFT, MOVABLE, Factors

Floats = npt.NDArray[np.floating[Any]]

_WIDTHS = (12, 64)
"""Ranks that are looked for: a few first, and more of them where these are worth it."""
_SAMPLE = 512
"""Elements that tell how large units in the last place are."""
_LOSS = 0.72
"""Bits that an element takes more for a share of one that the error adds to its square, about."""
_GAUSSIAN = 2.05
"""Bits of a number from a normal distribution, above the logarithm of its standard deviation in steps."""
_LEAST = 0.3
"""Bits that a number takes at least, about."""


def fitted(target: Bytes, base: Bytes, kind: Kind, columns: int) -> Factors | None:
    """The factors that save most, their own bytes counted; None: of no use."""
    if kind.name not in MOVABLE:
        return None
    with np.errstate(all="ignore"):
        change = (floats(target, kind) - floats(base, kind)).astype(np.float32, copy=False).reshape(-1, columns)
        largest = float(np.abs(change).max())
    every, count = np.flatnonzero(change.any(axis=1)), len(change)
    # Nothing, or what is no number, or whose squares are none.
    if not 2.0**-40 < largest < 2.0**30 or len(every) < 2 * _WIDTHS[0]:
        return None
    change = change[every] if len(every) < count else change
    places = every[np.linspace(0, len(every) - 1, min(_SAMPLE, len(every))).astype(np.int64)]
    across = np.random.default_rng(0).integers(0, columns, len(places))
    steps = units(base.view(kind.integer)[places * columns + across].view(np.uint8), kind)
    for width in _WIDTHS:
        left, values, right = _leading(change, min(width, *(size // 2 for size in change.shape)))
        rank, step = _worth(change, values, steps)
        if not rank:
            return None
    roots = np.sqrt(values[:rank])
    left, right = left[:, :rank] * roots, right[:, :rank] * roots
    left[~_rows(change, left, right, step, float(np.exp(np.mean(np.log(steps)))))] = 0
    shift = max(0, int(np.round(-np.log2(step))))
    rounded = [np.rint(factor.astype(np.float64) * 2.0**shift) for factor in (left, right)]
    if 2 * shift > MAX_SHIFT or max(float(np.abs(factor).max()) for factor in rounded) >= 2.0**31:
        return None
    whole = np.zeros((count, rank), np.int32)
    whole[every] = rounded[0]
    made = Factors(whole, rounded[1].astype(np.int32), 2 * shift)
    return made if made.exact() and made.left.any() else None


def _leading(change: Floats, width: int) -> tuple[Floats, Floats, Floats]:
    """The largest singular values, and their vectors as columns (Halko, Martinsson and Tropp 2011)."""
    start = np.random.default_rng(0).standard_normal((change.shape[1], width), dtype=np.float32)
    across = _orthonormal(change @ start)
    across = _orthonormal(change @ _orthonormal(change.T @ across))
    within = across.T @ change
    squares, vectors = _squares(within.T)
    values = np.sqrt(squares)
    turned = vectors.astype(np.float32)
    right: Floats = np.matmul(within.T, turned / values.astype(np.float32))
    return across @ turned, values, right


def _orthonormal(found: Floats) -> Floats:
    """A basis of what the columns of ``found`` span: by their products, which takes a fraction of a QR's time."""
    squares, vectors = _squares(found)
    basis: Floats = found @ (vectors / np.sqrt(squares)).astype(np.float32)
    return basis


def _squares(found: Floats) -> tuple[Floats, Floats]:
    """The squares of singular values, largest first, without those that are next to nothing; and the vectors."""
    products: npt.NDArray[np.float64] = (found.T @ found).astype(np.float64)
    squares, vectors = np.linalg.eigh(products)
    kept = squares > squares[-1] * 1e-9
    return squares[kept][::-1], vectors[:, kept][:, ::-1]


def _worth(change: Floats, values: Floats, steps: Floats) -> tuple[int, float]:
    """The rank that saves most, 0 for none, and the step of both factors that goes with it."""
    rows, columns = change.shape
    energy = float(np.sum(np.square(change), dtype=np.float64))
    ranks = np.arange(len(values) + 1)
    left = np.maximum(energy - np.concatenate([[0], np.cumsum(values**2)]), energy * 1e-9) / change.size
    bits = 0.5 * np.log2(left[:, None] / steps**2 + 1 / 12).mean(axis=1)
    # So much of the square of what is left may the rounding of the factors add: as many of their bits as it is worth.
    share = ranks * (1 / rows + 1 / columns)
    sums = np.concatenate([[1], np.cumsum(values)])
    step = np.sqrt(12 * share * left / (sums * (1 / rows + 1 / columns)))
    cost = np.zeros(len(ranks))
    for rank in ranks[1:].tolist():
        cost[rank] = sum(
            size * np.maximum(_LEAST, 0.5 * np.log2(values[:rank] / size) - np.log2(step[rank]) + _GAUSSIAN).sum()
            for size in (rows, columns)
        )
    saved = (bits[0] - bits - _LOSS * share) * change.size - cost
    best = int(np.argmax(saved))
    return best, float(step[best])


def _rows(change: Floats, left: Floats, right: Floats, step: float, unit: float) -> npt.NDArray[np.bool_]:
    """The rows that their own factors are worth it for: not those that hardly changed."""
    columns = change.shape[1]
    before = np.square(change).mean(axis=1)
    after = np.maximum(before - np.square(left * np.linalg.norm(right, axis=0)).sum(axis=1) / columns, 0)
    gain = 0.5 * np.log2((before / unit**2 + 1 / 12) / (after / unit**2 + 1 / 12)) * columns
    cost = np.maximum(_LEAST, np.log2(np.maximum(np.abs(left) / step, 1e-9)) + _GAUSSIAN).sum(axis=1)
    found: npt.NDArray[np.bool_] = gain > cost
    return found
