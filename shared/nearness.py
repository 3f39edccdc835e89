"""How far regions are from each other, and in which order a client's region asks them. Pure.

What nodes measured comes first: the median over the nodes of the region, else over those of the other one (a round
trip is as long either way). Where nothing was measured, the great circle between configured coordinates, at 1 ms a 100
km of round trip, which light in fibre takes. A configured cost of the link is added to either, or is all that is known.
Regions of which nothing is known come last, by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

EARTH = 6371.0
"""Kilometres."""
KM_PER_MS = 100.0

Point = tuple[float, float]
"""Latitude and longitude in degrees."""
Rtt = Mapping[str, float]
"""Milliseconds to other regions, as one node measured them."""


@dataclass(frozen=True, slots=True)
class Away:
    """A region as it is seen from another."""

    region: str
    ms: float | None
    """Milliseconds of a round trip, the link's cost included; None where nothing is known."""
    how: str
    """``here``, ``measured``, ``coordinates``, ``link`` (its cost is all that is known) or ``unknown``."""
    link: float = 0.0
    """Milliseconds that the configured cost of the link adds."""

    def as_json(self) -> dict[str, Any]:
        """For people."""
        return {**asdict(self), "ms": self.ms if self.ms is None else round(self.ms, 3)}


class Nearness:
    """What is configured of where regions are.

    ``links``: milliseconds by ``"north>south"``; the other direction has the same cost unless it is given too.
    """

    def __init__(
        self, coordinates: Mapping[str, Point] | None = None, links: Mapping[str, float] | None = None
    ) -> None:
        self._coordinates = dict(coordinates or {})
        self._links: dict[tuple[str, str], float] = {}
        for link, cost in (links or {}).items():
            here, _, there = link.partition(">")
            self._links[here, there] = cost
        for (here, there), cost in list(self._links.items()):
            self._links.setdefault((there, here), cost)
        self.named = frozenset(self._coordinates) | {region for pair in self._links for region in pair}
        """The regions that settings speak of."""

    def order(self, here: str, regions: Iterable[str], measured: Callable[[str], Sequence[Rtt]]) -> list[Away]:
        """``regions`` as seen from ``here``, nearest first. ``measured``: what the nodes of a region told."""
        mine = measured(here)
        found = [self._away(here, there, mine, measured) for there in regions]
        return sorted(found, key=lambda away: (away.how != "here", away.ms is None, away.ms or 0.0, away.region))

    def _away(self, here: str, there: str, mine: Sequence[Rtt], measured: Callable[[str], Sequence[Rtt]]) -> Away:
        if here == there:
            return Away(there, 0.0, "here")
        link = self._links.get((here, there), 0.0)
        times = [rtt[there] for rtt in mine if there in rtt]
        if not times and here:
            times = [rtt[here] for rtt in measured(there) if here in rtt]
        if times:
            return Away(there, median(times) + link, "measured", link)
        if here in self._coordinates and there in self._coordinates:
            length = kilometres(self._coordinates[here], self._coordinates[there])
            return Away(there, length / KM_PER_MS + link, "coordinates", link)
        if (here, there) in self._links:
            return Away(there, link, "link", link)
        return Away(there, None, "unknown")

    def nearest(self, point: Point) -> str | None:
        """The region whose coordinates are nearest to a place; None where no region has any."""
        return min(sorted(self._coordinates), key=lambda name: kilometres(self._coordinates[name], point), default=None)


def kilometres(one: Point, other: Point) -> float:
    """The great circle between two places (haversine)."""
    (lat1, lon1), (lat2, lon2) = (map(math.radians, point) for point in (one, other))
    half = math.sin((lat2 - lat1) / 2) ** 2 + math.cos(lat1) * math.cos(lat2) * math.sin((lon2 - lon1) / 2) ** 2
    return 2 * EARTH * math.asin(math.sqrt(min(1.0, half)))
