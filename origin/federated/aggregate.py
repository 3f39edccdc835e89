"""The updates of a round made one: read a segment at a time, whatever the number of sites and the size of the model.

Updates are scaled down to one norm, then a rule of ``origin.federated.rules`` makes each element of the result from the
sites' values. What comes out does not depend on the order in which sites are given. Pure, but that it reads the
documents that it is given, and writes a scratch file where it gets one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, Protocol, TypeVar

from origin.federated import rules
from origin.federated.rules import Combined, Rule
from shared.errors import NonFinite
from shared.updates.segments import MAX_ELEMENTS, Segment, segments

if TYPE_CHECKING:
    from origin.federated.rules import Floats, Matrix

BUDGET = 384 << 20
"""Bytes that decoded values may take."""
WORKERS = 2
"""Threads: numpy and the codecs work beside each other."""
STRIPE = 1 << 14
"""Elements that are worked on at a time: those of some ten sites fit into a processor's cache."""
SAMPLE = 4
"""Of so many stripes of a segment the first is looked at for ``SiteStatistics.trimmed``."""
_FLOAT = 4
_BESIDE = 3
"""Arrays of a segment's size that are needed beside one a site: the result, and what a codec has in hand."""
_LEAST = 1 << 10
"""Elements of each site that are held together, however small the budget: fewer would take for ever."""
Shape = Sequence[int]
_T = TypeVar("_T")


class Readable(Protocol):
    """Of ``shared.updates``' Update, what is needed here."""

    def read(self, name: str, number: int, /) -> Floats:
        """One segment's values (rows, columns), new and finite. Raises DecodeError, NonFinite."""


@dataclass(frozen=True, slots=True)
class Contribution:
    """What one site gives to a round."""

    site: str
    weight: float
    """Above 0; only ratios count."""
    norm: float
    """The L2 norm of the update, as ``measure`` found it: nobody else is to be believed."""
    update: Readable = field(repr=False)


@dataclass(frozen=True, slots=True)
class SiteStatistics:
    """How one site's update fared. Robust rules cannot tell an attacker from an honest site with other data: this is
    for people to look at over rounds, not to be acted on by itself."""

    site: str
    share: float
    """Of all weights, from 0 to 1."""
    norm: float
    """L2, as it came."""
    scale: float
    """What it was multiplied by to clip it; 1 where it was small enough."""
    distance: float
    """L2, of the clipped update to the result."""
    trimmed: float
    """The share of its elements that the rule left out: beyond the range of those that were averaged, measured on a
    sample of the elements. For krum 1 or 0; for nnm the share of the sites whose neighbour it is not."""


class Block(NamedTuple):
    """A part of the result."""

    name: str
    segment: Segment
    values: Floats
    """(rows, columns), finite."""


@dataclass(slots=True)
class _Site:
    given: Contribution
    share: float
    scale: float
    lock: Lock = field(default_factory=Lock)
    """An update is one file with one place that is read at."""
    inner: float = 0.0
    """The inner product of its clipped update and the result."""
    outside: int = 0
    """Elements of the sample that were left out."""
    left_out: float | None = None
    """What ``SiteStatistics.trimmed`` is where the rule takes updates as wholes."""

    def read(self, name: str, number: int) -> Floats:
        with self.lock:
            return self.given.update.read(name, number).reshape(-1)


class _Place(NamedTuple):
    """One segment."""

    name: str
    number: int
    segment: Segment


@dataclass(slots=True)
class _Seen:
    """What is noted of a segment for the statistics: the square of the result's norm, elements of the sample; for each
    site its inner product with the result, and elements that were left out."""

    square: float
    sampled: int
    inner: list[float]
    outside: list[int]


def measure(update: Readable, tensors: Mapping[str, Shape]) -> float:
    """The L2 norm of all of an update, read once. Raises what reading does, and NonFinite."""
    import numpy as np

    square = 0.0
    for place in _places(tensors):
        wide = update.read(place.name, place.number).reshape(-1).astype(np.float64)
        square += float(wide @ wide)
    if not math.isfinite(square):
        raise NonFinite("an update with values that are not finite")
    return math.sqrt(square)


class Aggregation:
    """The result, as an iterator over its blocks, tensor after tensor; then the statistics."""

    def __init__(
        self,
        contributions: Sequence[Contribution],
        tensors: Mapping[str, Shape],
        rule: Rule,
        clip: float | None = None,
        *,
        budget: int = BUDGET,
        workers: int = WORKERS,
        scratch: BinaryIO | None = None,
    ) -> None:
        """``tensors``: names and shapes of what the updates have; ``clip``: the norm that they are scaled down to, by
        default the median of theirs.

        ``budget``: bytes for decoded values. Where one segment of all sites is more, they are written to ``scratch``
        (a file, open for reading and writing; a segment of each site at a time) and read from there in parts; without
        one, each part is decoded anew. ``workers``: threads. Raises TooFewSites.
        """
        finite = sorted((one for one in contributions if math.isfinite(one.norm)), key=lambda one: one.site)
        self.refused = tuple(sorted(one.site for one in contributions if not math.isfinite(one.norm)))
        """Sites that were left out, because they have values that are not finite."""
        self.f = rule.f(len(finite))
        """Hostile sites that the rule is set for."""
        self.rule, self.clip = rule, rules.clip_norm([one.norm for one in finite]) if clip is None else clip
        self._tensors, self._scratch = tensors, scratch
        weight = math.fsum(one.weight for one in finite)
        self._sites = [_Site(one, one.weight / weight, rules.scale(one.norm, self.clip)) for one in finite]
        segment = MAX_ELEMENTS * _FLOAT
        self._fits = max(_LEAST, (budget - _BESIDE * segment) // (len(finite) * _FLOAT))
        """Elements of each site that the budget has room for."""
        self._workers = max(1, min(workers, budget // ((len(finite) + _BESIDE) * segment)))
        self._square, self._sampled = 0.0, 0
        self._distances: list[float] | None = None
        self._chosen = self._sites
        self._near: Sequence[Sequence[int]] = ()

    def __iter__(self) -> Iterator[Block]:
        """The blocks. Raises what reading the updates does, and NonFinite where the result is not finite, as sums of
        huge values are not."""
        self._square, self._sampled = 0.0, 0
        for site in self._sites:
            site.inner, site.outside = 0.0, 0
        if self.rule.name == "krum":
            self._choose()
        elif self.rule.name == "nnm":
            self._mix()
        combine = self._combiner()
        for place, (values, seen) in self._each(lambda place: self._block(place, combine)):
            self._note(seen)
            yield Block(place.name, place.segment, values)

    def statistics(self) -> tuple[SiteStatistics, ...]:
        """Of each site that was taken, by name, once all blocks were had."""
        distances = self._distances or [
            _distance((site.scale * site.given.norm) ** 2, site.inner, self._square) for site in self._sites
        ]
        return tuple(
            SiteStatistics(site.given.site, site.share, site.given.norm, site.scale, distance, self._left_out(site))
            for site, distance in zip(self._sites, distances, strict=True)
        )

    def _left_out(self, site: _Site) -> float:
        if site.left_out is not None:
            return site.left_out
        return site.outside / self._sampled if self._sampled else 0.0

    # Segments

    def _each(self, work: Callable[[_Place], _T]) -> Iterator[tuple[_Place, _T]]:
        """``work`` for all segments, by threads, a few ahead; what it returns in order."""
        waiting: deque[tuple[_Place, Future[_T]]] = deque()
        with ThreadPoolExecutor(self._workers) as pool:
            try:
                for place in _places(self._tensors):
                    waiting.append((place, pool.submit(work, place)))
                    if len(waiting) > self._workers:
                        first, done = waiting.popleft()
                        yield first, done.result()
                while waiting:
                    first, done = waiting.popleft()
                    yield first, done.result()
            finally:
                for _, left in waiting:
                    left.cancel()

    def _parts(self, place: _Place) -> Iterator[tuple[int, list[Floats]]]:
        """A segment in parts that the budget has room for: where each begins, and the values of the chosen sites, as
        they came."""
        count = place.segment.count
        if count <= self._fits:
            yield 0, [site.read(place.name, place.number) for site in self._chosen]
            return
        if self._scratch is not None:
            self._spill(place, self._scratch)
        step = self._fits // 2  # a part is let go of only once the next one is there
        for first in range(0, count, step):
            last = min(count, first + step)
            if self._scratch is not None:
                yield first, [self._spilled(place, number, first, last) for number in range(len(self._chosen))]
            else:
                yield first, [site.read(place.name, place.number)[first:last].copy() for site in self._chosen]

    def _spill(self, place: _Place, scratch: BinaryIO) -> None:
        scratch.seek(0)
        for site in self._chosen:
            scratch.write(site.read(place.name, place.number).data)

    def _spilled(self, place: _Place, number: int, first: int, last: int) -> Floats:
        import numpy as np

        assert self._scratch is not None
        self._scratch.seek((number * place.segment.count + first) * _FLOAT)
        return np.frombuffer(self._scratch.read((last - first) * _FLOAT), np.float32)

    def _stripes(self, place: _Place) -> Iterator[tuple[int, list[Floats]]]:
        """A segment in stripes: where each begins, and the values of the chosen sites."""
        for first, values in self._parts(place):
            for start in range(0, len(values[0]), STRIPE):
                yield first + start, [array[start : start + STRIPE] for array in values]

    # What becomes of a segment

    def _combiner(self) -> Callable[[Sequence[Floats]], Combined]:
        """The rule, for a stripe of the chosen sites' values."""
        sites = self._chosen
        whole = math.fsum(site.share for site in sites)
        shares = [site.share / whole for site in sites]
        if self.rule.name in ("mean", "krum"):
            return lambda values: rules.mean(values, shares)
        if self.rule.name == "nnm":
            return lambda values: rules.mixed_mean(values, self.f, self._near, shares)
        equal = self.rule.name == "median" or len(set(shares)) == 1
        return lambda values: rules.trimmed_mean(values, self.f, None if equal else shares)

    def _block(self, place: _Place, combine: Callable[[Sequence[Floats]], Combined]) -> tuple[Floats, _Seen]:
        import numpy as np

        sites = self._chosen
        result = np.empty(place.segment.count, np.float32)
        seen = _Seen(0.0, 0, [0.0] * len(sites), [0] * len(sites))
        with np.errstate(over="ignore", invalid="ignore"):  # found below
            for first, raw in self._stripes(place):
                values = [_scaled(array, site.scale) for array, site in zip(raw, sites, strict=True)]
                combined = combine(values)
                result[first : first + len(combined.values)] = combined.values
                _look(seen, values, combined, first // STRIPE % SAMPLE == 0)
        if not np.isfinite(result).all():
            raise NonFinite(f"{place.name}: the aggregate of these updates is not finite")
        return result.reshape(place.segment.rows, place.segment.columns), seen

    def _note(self, seen: _Seen) -> None:
        self._square += seen.square
        self._sampled += seen.sampled
        for site, inner, outside in zip(self._chosen, seen.inner, seen.outside, strict=True):
            site.inner += inner
            site.outside += outside

    # What depends on how far updates are from one another

    def _choose(self) -> None:
        """The sites that multi-Krum averages."""
        import numpy as np

        products = self._inner_products()
        chosen = rules.krum(_squares(products), self.f)
        shares = np.zeros(len(self._sites))
        shares[chosen] = [self._sites[number].share for number in chosen]
        shares /= shares.sum()
        inner = products @ shares
        own = np.diag(products)
        self._distances = [_distance(a, b, float(shares @ inner)) for a, b in zip(own, inner, strict=True)]
        self._chosen = [self._sites[number] for number in chosen]
        for number, site in enumerate(self._sites):
            site.left_out = float(number not in chosen)

    def _mix(self) -> None:
        """Who is averaged in place of each site, by nearest-neighbour mixing."""
        self._near = rules.neighbours(_squares(self._inner_products()), self.f)
        for number, site in enumerate(self._sites):
            site.left_out = sum(number not in near for near in self._near) / len(self._sites)

    def _inner_products(self) -> Matrix:
        """Of each two clipped updates. Reads everything once more."""
        import numpy as np

        self._chosen = self._sites
        products: Matrix = np.zeros((len(self._sites), len(self._sites)))
        for _, found in self._each(self._products):
            products += found
        scales = np.array([site.scale for site in self._sites])
        return products * np.outer(scales, scales)

    def _products(self, place: _Place) -> Matrix:
        import numpy as np

        found: Matrix = np.zeros((len(self._sites), len(self._sites)))
        for _, values in self._stripes(place):
            stacked = np.stack(values)
            found += stacked @ stacked.T
        return found


def _places(tensors: Mapping[str, Shape]) -> Iterator[_Place]:
    for name, shape in tensors.items():
        for number, segment in enumerate(segments(shape)):
            yield _Place(name, number, segment)


def _squares(products: Matrix) -> Matrix:
    """Of the distances between each two vectors, by their inner products."""
    import numpy as np

    own = np.diag(products)
    squares: Matrix = np.maximum(0.0, own[:, None] + own[None, :] - 2 * products)
    return squares


def _scaled(values: Floats, scale: float) -> Floats:
    import numpy as np

    return values if scale == 1.0 else values * np.float32(scale)


def _look(seen: _Seen, values: Sequence[Floats], combined: Combined, sample: bool) -> None:
    """Note what the statistics need of one stripe."""
    import numpy as np

    result = combined.values
    # einsum, not BLAS, which would use threads of its own beside ours.
    seen.square += float(np.einsum("i,i->", result, result))
    for number, array in enumerate(values):
        seen.inner[number] += float(np.einsum("i,i->", array, result))
    if not sample:
        return
    seen.sampled += len(result)
    if combined.kept:
        low, high = combined.kept[0], combined.kept[0]
        for array in combined.kept[1:]:
            low, high = np.minimum(low, array), np.maximum(high, array)
        for number, array in enumerate(values):
            seen.outside[number] += int(np.count_nonzero((array < low) | (array > high)))


def _distance(square: float, inner: float, other: float) -> float:
    """Of two vectors, by the squares of their norms and their inner product. What rounding leaves below 0 is 0."""
    return math.sqrt(max(0.0, square - 2 * inner + other))
