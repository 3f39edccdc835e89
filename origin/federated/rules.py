"""How the updates of several sites are made one, on arrays. Pure.

A rule gets one array a site, all of one shape and in one order of the sites, whatever order they came in: float sums
depend on it. ``f`` is the number of hostile sites that a rule is set for. What it says in each docstring holds for any
``f`` of the sites, sending anything, and nobody has to know which ones.

numpy is imported where it is used: who only reads a rule's name does not wait for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, cast

from shared.errors import ConfigError, LocalError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats: TypeAlias = npt.NDArray[np.float32]
    Matrix: TypeAlias = npt.NDArray[np.float64]

RuleName = Literal["nnm", "trimmed", "median", "krum", "mean"]
MOST_EXAMPLES = 2.0
"""Times the median of all sites' examples: what a site's own count weighs at most."""
_RULE = re.compile(r"(?:nnm|trimmed|krum)(?::[1-9][0-9]{0,3})?|median|mean")

FINE = ("fp32", "bf16", "int8", "int4*", "lowrank:*")
"""Globs of the codecs that go with any rule."""


class TooFewSites(LocalError):
    """Fewer updates than the rule needs to keep what it promises."""

    code = "too_few_sites"


@dataclass(frozen=True, slots=True)
class Rule:
    """One of the rules, and how many hostile sites it is set for (None: by the number of sites).

    ``nnm`` (nearest-neighbour mixing, Allouah et al. 2023): in place of each update the mean of the ``n - f`` that are
    nearest to it, itself among them; of these means the trimmed mean. Sites whose data differ much are near to one
    another then, and what few of them know is left out no more. Where ``D`` is the largest distance between two honest
    updates, the mean in place of an honest one is no further from it than ``D``, and every element of the result lies
    between the smallest and the largest value of those means.

    ``trimmed``: of each element, the f largest and the f smallest values are left out, and the rest averaged. Every
    element of the result lies between the smallest and the largest value of the honest sites, whatever the weights;
    with equal ones, and ``h`` the honest sites' values in order, between the means of the ``n - 2f`` first and of the
    ``n - 2f`` last of ``h``.

    ``median``: the same with all but the middle one or two left out, so up to ``f = (n - 1) // 2``. Has no weights.

    ``krum`` (multi-Krum): the ``n - f`` updates that are nearest to their ``n - f - 2`` nearest others, averaged. The
    result is no further than ``(1 + sqrt((n - f - 2) / (n - 2f - 1))) * D`` from each honest update, where ``D`` is the
    largest distance between two of them.

    ``mean``: all, averaged by weight. No bound of its own: hostile sites that have a share ``q`` of the weights make up
    at most ``q`` times the clip norm of the result.
    """

    name: RuleName = "nnm"
    hostile: int | None = None

    def __str__(self) -> str:
        return self.name if self.hostile is None else f"{self.name}:{self.hostile}"

    def f(self, sites: int) -> int:
        """The number of hostile sites that it is set for, among ``sites``. Raises TooFewSites."""
        if sites < 1:
            raise TooFewSites("there is no update to aggregate")
        if self.name == "mean":
            return 0
        if self.name == "median":
            return (sites - 1) // 2
        f = max(1, (sites - 1) // (3 if self.name == "nnm" else 4)) if self.hostile is None else self.hostile
        least = 2 * f + (3 if self.name == "krum" else 1)
        if sites < least:
            raise TooFewSites(f"{self.name} against {f} hostile sites needs {least} updates, there are {sites}")
        return f

    def kept(self, sites: int) -> int:
        """Values that are averaged for one element of the result; means of neighbours, for nnm. Raises TooFewSites."""
        return sites - self.f(sites) * (1 if self.name == "krum" else 2)

    def codecs(self, sites: int) -> tuple[str, ...]:
        """Globs of the codecs that go with it, among so many sites. What leaves values out moves the result towards
        what the majority sends; where that is two values or mostly zeros, by more than feedback can mend. Raises
        TooFewSites."""
        f = self.f(sites)
        if self.name in ("mean", "krum", "nnm"):
            return ("*",)
        if self.name == "trimmed" and f == 1:
            return (*FINE, "step:*", "ternary*", "sign*")
        return (*FINE, "step:0.*", "step:1")


def parse_rule(text: str) -> Rule:
    """``nnm``, ``nnm:2``, ``trimmed``, ``trimmed:2``, ``krum``, ``krum:2``, ``median``, ``mean``.

    Raises ConfigError.
    """
    if _RULE.fullmatch(text) is None:
        raise ConfigError(
            f"{text!r} is no rule: nnm, trimmed, krum, any of them with :F (hostile sites), median or mean"
        )
    name, _, hostile = text.partition(":")
    return Rule(cast("RuleName", name), int(hostile) if hostile else None)


# Before the rule


def clip_norm(norms: Sequence[float]) -> float:
    """The norm that updates are scaled down to: the median. While fewer than half of the sites are hostile, it is not
    above the largest and not below the smallest norm of an honest one."""
    import numpy as np

    return float(np.median(norms))


def scale(norm: float, clip: float) -> float:
    """The factor from 0 to 1 that brings an update of this L2 norm down to ``clip``."""
    return clip / norm if norm > clip else 1.0


def weights(examples: Sequence[int], ages: Sequence[int], *, by_examples: bool, late: float) -> list[float]:
    """The weight of each site, of which only ratios count: equal, or by the examples that it says it has, which count
    up to twice the median of all; times ``late`` for each round that its update is old."""
    import numpy as np

    most = MOST_EXAMPLES * float(np.median(examples)) if examples else 0.0
    bases = [min(float(count), most) if by_examples else 1.0 for count in examples]
    return [base * late**age for base, age in zip(bases, ages, strict=True)]


# The rules


class Combined(NamedTuple):
    """What became of one array a site."""

    values: Floats
    kept: Sequence[Floats]
    """For each element, the values that were averaged, in no order: at least one array; none where all were."""


def mean(values: Sequence[Floats], shares: Sequence[float]) -> Combined:
    """The sum of the arrays, each times its share. The shares are together 1."""
    import numpy as np

    return Combined(total([array * np.float32(share) for array, share in zip(values, shares, strict=True)]), [])


def trimmed_mean(values: Sequence[Floats], f: int, shares: Sequence[float] | None = None) -> Combined:
    """For each element, the mean of the values that are left without the ``f`` smallest and largest; weighted by the
    shares of their sites (positive), if they are given."""
    import numpy as np

    if shares is not None:
        return _weighted(values, f, shares)
    lanes = list(values)
    for low, high, keeps_low, keeps_high in exchanges(len(lanes), f):
        a, b = lanes[low], lanes[high]
        if keeps_low:
            lanes[low] = np.minimum(a, b)
        if keeps_high:
            lanes[high] = np.maximum(a, b)
    kept = lanes[f : len(lanes) - f]
    return Combined(total(kept) * np.float32(1 / len(kept)), kept)


def _weighted(values: Sequence[Floats], f: int, shares: Sequence[float]) -> Combined:
    """Weights go the way of their values. Of equal values, the later one is taken for the larger."""
    import numpy as np

    lanes = list(values)
    carried = [np.full_like(values[0], share).view(np.int32) for share in shares]
    for low, high, *_ in exchanges(len(lanes), f):
        a, b = lanes[low], lanes[high]
        lanes[low], lanes[high] = np.minimum(a, b), np.maximum(a, b)
        # The bits in which the weights differ, where they are to be swapped: ten times faster than np.where.
        swapped = (carried[low] ^ carried[high]) & -(a > b).astype(np.int32)
        carried[low], carried[high] = carried[low] ^ swapped, carried[high] ^ swapped
    middle = slice(f, len(lanes) - f)
    kept, by = lanes[middle], [bits.view(np.float32) for bits in carried[middle]]
    weight = total(by)
    return Combined(total([array * (share / weight) for array, share in zip(kept, by, strict=True)]), kept)


def krum(squares: Matrix, f: int) -> list[int]:
    """Which updates multi-Krum chooses, given the squares of the distances between each two of them. Of equally good
    ones the first."""
    import numpy as np

    sites = len(squares)
    others = np.sort(squares + np.diag(np.full(sites, np.inf)), axis=1)
    scores = others[:, : sites - f - 2].sum(axis=1)
    return sorted(np.argsort(scores, kind="stable")[: sites - f].tolist())


def neighbours(squares: Matrix, f: int) -> list[list[int]]:
    """Which updates nearest-neighbour mixing averages in place of each, given the squares of the distances between each
    two of them: itself, and of equally near ones the first."""
    import numpy as np

    sites = len(squares)
    nearest = np.argsort(squares - np.diag(np.full(sites, np.inf)), axis=1, kind="stable")
    chosen: list[list[int]] = np.sort(nearest[:, : sites - f], axis=1).tolist()
    return chosen


def mixed_mean(values: Sequence[Floats], f: int, near: Sequence[Sequence[int]], shares: Sequence[float]) -> Combined:
    """The trimmed mean of the means, by share, of what is ``near`` each (``neighbours``)."""
    import numpy as np

    by_share = [array * np.float32(share) for array, share in zip(values, shares, strict=True)]
    mixed = [
        total([by_share[one] for one in chosen]) * np.float32(1 / sum(shares[one] for one in chosen)) for chosen in near
    ]
    return Combined(trimmed_mean(mixed, f).values, [])


def total(arrays: Sequence[Floats]) -> Floats:
    """The sum, by pairs: its rounding error grows with the logarithm of their number."""
    todo = list(arrays)
    while len(todo) > 1:
        odd = todo[len(todo) & ~1 :]
        todo = [a + b for a, b in zip(todo[::2], todo[1::2], strict=False)] + odd
    return todo[0]


# Selection without a sort


class Exchange(NamedTuple):
    """Of the values of two lanes the smaller one goes to ``low``, the larger one to ``high``, where it is needed."""

    low: int
    high: int
    keeps_low: bool
    keeps_high: bool


@cache
def exchanges(lanes: int, f: int) -> tuple[Exchange, ...]:
    """What brings the ``f`` smallest values to the first lanes, the ``f`` largest to the last (and leaves wrong ones
    there: nobody needs them) and the others, in no order, between them.

    A sorting network without what does not matter to that, done on whole arrays: some times faster than to sort or to
    partition the few values of each element. Of two networks the shorter one: Batcher's is better where much is
    left out, repeated tournaments where little is.
    """
    networks = (_needed(pairs, lanes, f) for pairs in (_batcher(lanes), _tournaments(lanes, f)))
    return min(networks, key=lambda steps: sum(step.keeps_low + step.keeps_high for step in steps))


def _needed(pairs: Iterator[tuple[int, int]], lanes: int, f: int) -> tuple[Exchange, ...]:
    """Those steps of a network that decide who is left out, or make a value that is not."""
    needed = [f <= lane < lanes - f for lane in range(lanes)]
    group: list[object] = [(lane >= f) + (lane >= lanes - f) for lane in range(lanes)]
    found = []
    for low, high in reversed(list(pairs)):
        if group[low] == group[high]:
            continue  # whichever way round, both have the same fate
        found.append(Exchange(low, high, needed[low], needed[high]))
        needed[low] = needed[high] = True
        group[low], group[high] = object(), object()
    return tuple(reversed(found))


def _batcher(lanes: int) -> Iterator[tuple[int, int]]:
    """Batcher's merge exchange (Knuth, The Art of Computer Programming, volume 3, algorithm 5.2.2M): sorts."""
    top = 1 << max(0, (lanes - 1).bit_length() - 1)
    width = top
    while lanes > 1 and width:
        last, offset, distance = top, 0, width
        while True:
            for lane in range(lanes - distance):
                if lane & width == offset:
                    yield lane, lane + distance
            if last == width:
                break
            last, offset, distance = last >> 1, width, last - width
        width >>= 1


def _tournaments(lanes: int, f: int) -> Iterator[tuple[int, int]]:
    """The smallest to the first lane and the largest to the last, ``f`` times: one comparison of each two, then the
    smaller ones among each other, and the larger ones."""
    for done in range(f):
        left = range(done, lanes - done)
        half = len(left) // 2
        yield from zip(left[:half], reversed(left), strict=False)
        yield from _knockout(list(left[: len(left) - half]))
        yield from ((low, high) for high, low in _knockout(list(reversed(left[half:]))))


def _knockout(players: list[int]) -> Iterator[tuple[int, int]]:
    """(winner's place, loser's place), until the first of the players is the winner."""
    while len(players) > 1:
        half = len(players) // 2
        yield from zip(players[:half], reversed(players), strict=False)
        players = players[: len(players) - half]
