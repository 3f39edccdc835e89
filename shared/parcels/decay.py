"""Weights that training only decayed: a base as so many steps of decoupled weight decay leave it, exactly. Pure.

AdamW (Loshchilov and Hutter 2019) multiplies every weight by ``1 - rate * decay`` in each step, also those whose
gradient is zero, as the embeddings of words that do not occur. In float32 that factor is one minus a few units of two
to the power of -24: so a few pairs of such a number and of steps tell what became of all of them. A step takes whole
units in the last place off, as many as the step before unless the weight falls below a threshold; so steps are taken
many at a time, and what comes out is what the multiplications would have made, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shared.errors import DecodeError
from shared.parcels.kinds import Bytes, Kind

Magnitudes = npt.NDArray[np.int32]

MAX_FACTOR = 255
MAX_RUNS = 32
MAX_WORK = 1 << 26
"""Of the steps of all runs, each times the square of its factor: so few thresholds can be crossed."""
_BLOCK = 1 << 15
"""Elements at a time, so that they stay in a processor's cache."""
_ONE = 1 << 23
"""The least significand, in units in the last place."""
_LEAST, _MOST = 32 << 23, 255 << 23
"""Magnitudes from here to there decay: far from zero, where units do not shrink any more, and finite."""


class Run(NamedTuple):
    """Steps one after the other that each take ``factor`` units of two to the power of -24 off, of one."""

    factor: int
    steps: int


def decayed(base: Bytes, kind: Kind, runs: Sequence[Run]) -> Bytes:
    """Each float32 of ``base`` after all steps. Raises DecodeError: more of them than may be, or other numbers."""
    if kind.name != "F32" or len(runs) > MAX_RUNS:
        raise DecodeError("decay of what cannot decay, or in too many runs")
    if any(not 0 < run.factor <= MAX_FACTOR or not run.steps for run in runs):
        raise DecodeError("decay by a factor that cannot be")
    if sum(run.steps * run.factor**2 for run in runs) > MAX_WORK:
        raise DecodeError("decay in too many steps")
    bits, made = base.view("<i4"), np.empty(len(base) // 4, "<i4")
    for start in range(0, len(bits), _BLOCK):
        block = bits[start : start + _BLOCK]
        magnitudes = block & np.int32(0x7FFFFFFF)
        still = (magnitudes < _LEAST) | (magnitudes >= _MOST)
        magnitudes[still] = _ONE << 4  # anything that can be calculated with
        for run in runs:
            _take(magnitudes, run)
        made[start : start + _BLOCK] = np.where(still, block, (block & np.int32(-(1 << 31))) | magnitudes)
    return made.view(np.uint8)


def _take(magnitudes: Magnitudes, run: Run) -> None:
    """Take all steps of a run, in place."""
    significands = magnitudes.view(np.uint32) & np.uint32(_ONE - 1)
    significands |= np.uint32(_ONE)
    units = _units(significands, run.factor)
    # As the last step finds them, if all take the same. They do if that one does: not by a tie, which goes to the even
    # neighbour, and not to below the least significand, where units are half as large.
    last = significands - units * np.uint32(run.steps - 1)
    same = (last * np.uint32(run.factor) + np.uint32(_ONE - 1)) >> np.uint32(24) == units
    same &= last - units - np.uint32(_ONE + 1) < np.uint32(_ONE)
    crossing = np.flatnonzero(~same)
    after = _crossed(magnitudes[crossing], run) if len(crossing) else None
    units *= np.uint32(run.steps)
    magnitudes -= units.view(np.int32)
    if after is not None:
        magnitudes[crossing] = after


def _units(significands: npt.NDArray[np.uint32], factor: int) -> npt.NDArray[np.uint32]:
    """Units in the last place that a step takes off: at least one."""
    units = significands * np.uint32(factor)
    units += np.uint32(_ONE)
    units >>= np.uint32(24)
    return units


def _crossed(magnitudes: Magnitudes, run: Run) -> Magnitudes:
    """After all steps, where thresholds are crossed: the steps before each at once, the one across by multiplying."""
    among = np.arange(run.factor + 1)
    # For each number of units the least significand that a step surely takes so many from.
    least = np.maximum((2 * among - 1) * _ONE // run.factor, _ONE + among) + 1
    factor = np.float32(1 - run.factor * 2.0**-24)
    left = np.full(len(magnitudes), run.steps, np.int64)
    going = np.arange(len(magnitudes))
    while len(going):
        now = magnitudes[going]
        significands = (now & np.int32(_ONE - 1)) | np.int32(_ONE)
        units = _units(significands.view(np.uint32), run.factor).astype(np.int64)
        above = significands - least[units]
        steps = np.minimum(np.where(above < 0, 0, above // units + 1), left[going])
        now -= (steps * units).astype(np.int32)
        left[going] -= steps
        multiplied = (now.view(np.float32) * factor).view(np.int32)
        magnitudes[going] = np.where(left[going] > 0, multiplied, now)
        left[going] -= 1
        going = going[left[going] > 0]
    return magnitudes


# What follows is for who encodes. It need not be the same everywhere: its result is sent.

_ROWS = 512
"""Rows that are looked at."""
_LIKELY, _ELEMENTS = 16, 1 << 13
"""Rows of them that only decayed, at least; elements of these that are calculated with."""
_FACTORS = (4, 12, 24)
"""The largest factor that is looked for in a schedule, tried in order; of a rate that stays, any is found."""
_RISES = (0.0, 0.1, 1.0)
"""The share of the steps of each factor that come while the rate grows, before those while it falls."""


def found(target: Bytes, base: Bytes, kind: Kind, columns: int) -> tuple[Run, ...]:
    """The steps that some rows of a matrix seem to have decayed by; none where it is of no use."""
    if kind.name != "F32":
        return ()
    new, old = (data.view("<i4").reshape(-1, columns) for data in (target, base))
    rows = np.linspace(0, len(old) - 1, min(_ROWS, len(old))).astype(np.int64)
    signs = new[rows] ^ old[rows]
    before = old[rows] & np.int32(0x7FFFFFFF)
    change = (before - (new[rows] & np.int32(0x7FFFFFFF))).astype(np.int64)
    usable = (before >= _LEAST) & (before < _MOST)
    middle = np.median(change, axis=1, keepdims=True)
    # Of decay alone, a weight of two loses twice the units of a weight of one, and none grows.
    likely = ((signs >= 0) & (change >= 0) & (2 * change >= middle) & (change <= 4 * middle) | ~usable).all(axis=1)
    likely &= middle[:, 0] > 0
    if likely.sum() < _LIKELY:
        return ()
    kept = usable[likely]
    kept &= np.arange(kept.size).reshape(kept.shape) % max(1, kept.size // _ELEMENTS) == 0
    if not kept.any():
        return ()
    wanted = np.ascontiguousarray(new[rows[likely]][kept]).view(np.uint8)
    held = np.ascontiguousarray(old[rows[likely]][kept]).view(np.uint8)
    best: tuple[float, tuple[Run, ...]] = 0.5, ()
    for runs in _guesses(before[likely][kept], change[likely][kept]):
        right = float(np.mean(decayed(held, kind, runs).view("<i4") == wanted.view("<i4")))
        best = max(best, (right, runs), key=lambda guess: guess[0])
    return best[1]


def _guesses(before: Magnitudes, change: npt.NDArray[np.int64]) -> list[tuple[Run, ...]]:
    """Runs that may have made the changes. Which steps were first matters to few weights."""
    significands = (before & np.int32(_ONE - 1)).astype(np.int64) | _ONE
    guesses: list[tuple[Run, ...]] = []
    for most in _FACTORS:
        steps = _solved(significands, change, np.arange(1, most + 1))
        if steps is not None:
            for rise in _RISES:
                up = np.rint(steps * rise).astype(np.int64)
                down = steps - up
                order = [*enumerate(up.tolist(), 1), *reversed([*enumerate(down.tolist(), 1)])]
                guesses.append(tuple(Run(factor, count) for factor, count in order if count))
            break
    else:
        lost = float(np.median(change / significands)) * 2**24  # in all, as if nothing were rounded
        steady = (Run(factor, round(lost / factor)) for factor in range(1, MAX_FACTOR + 1))
        guesses += [(run,) for run in steady if run.steps and _near(run, significands, change)]
    return [runs for runs in guesses if _allowed(runs)]


def _allowed(runs: Sequence[Run]) -> bool:
    return 0 < len(runs) <= MAX_RUNS and sum(run.steps * run.factor**2 for run in runs) <= MAX_WORK


def _near(run: Run, significands: npt.NDArray[np.int64], change: npt.NDArray[np.int64]) -> bool:
    """Whether steps of one factor take what most weights lost."""
    sample = slice(None, None, max(1, len(change) // 256))
    expected = (significands[sample] * run.factor + _ONE >> 24) * run.steps
    return bool(np.mean(expected == change[sample]) > 0.5)


def _solved(
    significands: npt.NDArray[np.int64], change: npt.NDArray[np.int64], factors: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64] | None:
    """Steps by each factor so that they take together what most weights lost."""
    # Between two thresholds of any factor all weights lose the same: one equation for each such interval.
    taken = significands[:, None] * factors + _ONE >> 24
    kinds, which = np.unique(taken, axis=0, return_inverse=True)
    order = np.lexsort((change, which))
    ends = np.cumsum(np.bincount(which))
    middles = change[order][(ends + np.concatenate([[0], ends[:-1]])) // 2]
    solution = np.linalg.lstsq(kinds.astype(np.float64), middles.astype(np.float64))[0]
    steps: npt.NDArray[np.int64] = np.rint(solution).astype(np.int64)
    if len(kinds) < len(factors) or (steps < 0).any() or np.mean(kinds @ steps == middles) < 0.9:
        return None
    return steps
