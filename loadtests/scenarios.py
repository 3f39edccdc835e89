"""What a regional load is: regions, what people ask for, how many there are when, and what happens meanwhile. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Literal
from urllib.parse import urlsplit

MOST_USERS, MOST_SECONDS = 1000, 3600
"""What one machine's load may be: it is to find out about a network, not to bring one down."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
SKEW = 1.0
"""Exponent of the popularity: the second most popular thing is asked for half as often as the first."""

Kind = Literal["release", "cut", "mend", "lose"]


class BadOption(ValueError):
    """An option that cannot be run with; says what to give instead."""


@dataclass(frozen=True)
class Region:
    """An office and its link: round trip in milliseconds, 10^6 bits a second and loss as a fraction, each way.

    ``weight``: its share of the users, beside the other regions' weights.
    """

    name: str
    rtt_ms: float
    mbit: float
    loss: float = 0.0
    weight: int = 1


REGIONS = (
    Region("office", rtt_ms=60, mbit=40, weight=3),
    Region("branch", rtt_ms=120, mbit=20, loss=0.001, weight=2),
    Region("mobile", rtt_ms=150, mbit=20, loss=0.005, weight=1),
)


@dataclass(frozen=True)
class Event:
    """What happens ``at`` a fraction of the time: a model has a new version, or a region's link or node fails."""

    at: float
    kind: Kind
    region: str = ""

    @property
    def text(self) -> str:
        """For people."""
        return {
            "release": "a new version is released",
            "cut": f"the link of {self.region} is cut",
            "mend": f"the link of {self.region} is back",
            "lose": f"the node of {self.region} is killed",
        }[self.kind]


@dataclass(frozen=True)
class Scenario:
    """A course of load. ``users``: (fraction of the time, fraction of the users), straight lines between."""

    title: str
    users: Sequence[tuple[float, float]]
    events: Sequence[Event] = ()

    def users_at(self, fraction: float, most: int) -> int:
        """Users at a fraction of the time, of ``most``; one at least."""
        before = self.users[0]
        for point in self.users:
            if point[0] >= fraction:
                span = point[0] - before[0]
                part = (fraction - before[0]) / span if span else 1.0
                return max(1, round(most * (before[1] + part * (point[1] - before[1]))))
            before = point
        return max(1, round(most * before[1]))


_RELEASE = (Event(0.40, "release"),)
_FLAPS = (
    Event(0.55, "cut", "mobile"),
    Event(0.60, "mend", "mobile"),
    Event(0.64, "cut", "mobile"),
    Event(0.70, "mend", "mobile"),
)
_LOSS = (Event(0.80, "lose", "branch"),)
_STEADY = ((0.0, 0.5), (1.0, 0.5))
_RUSH = ((0.0, 0.1), (0.10, 0.2), (0.20, 1.0), (0.35, 1.0), (0.45, 0.5), (1.0, 0.5))

SCENARIOS: Mapping[str, Scenario] = {
    "day": Scenario(
        "a day: the office-morning rush, a release to all sites, a mobile region that flaps, one region lost",
        _RUSH,
        (*_RELEASE, *_FLAPS, *_LOSS),
    ),
    "rush": Scenario("the office-morning rush", _RUSH),
    "release": Scenario("a release to all sites", _STEADY, _RELEASE),
    "flap": Scenario("a mobile region that flaps", _STEADY, _FLAPS),
    "lost": Scenario("one region lost", _STEADY, _LOSS),
}


class Popularity:
    """Which of some things is asked for: by Zipf's law, the first one most."""

    def __init__(self, things: Sequence[str], rng: Random, skew: float = SKEW) -> None:
        """``things``: most popular first, one at least."""
        self._things, self._rng = things, rng
        weights = [1 / rank**skew for rank in range(1, len(things) + 1)]
        self._up_to = [total / sum(weights) for total in accumulate(weights)]

    def choose(self) -> str:
        """One of them."""
        return self._things[min(bisect_left(self._up_to, self._rng.random()), len(self._things) - 1)]


# What a user of the load tests may ask for


def check_number(value: float, least: float, most: float, what: str) -> None:
    """Raises BadOption where it is not between the bounds, which count as inside."""
    if not least <= value <= most:
        raise BadOption(f"{what} is {value:g}; give a number from {least:g} to {most:g}")


def check_url(url: str, *, beyond_loopback: bool) -> str:
    """A service's URL, without a slash at its end. Raises BadOption for anything but http:// and https://, and for what
    is not on this machine unless that was asked for."""
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname
    except ValueError:
        raise BadOption("--url is no URL; give http://host:port of a router, an edge or an origin") from None
    if parts.scheme not in ("http", "https") or not host or port == 0:
        raise BadOption("--url is http://host:port or https://host:port of a router, an edge or an origin")
    if parts.query or parts.fragment or parts.username is not None:
        raise BadOption("--url is a host and a port only, with no user, query or fragment")
    if host not in LOOPBACK and not beyond_loopback:
        raise BadOption(f"{host} is not this machine: add --beyond-loopback if you may put load on it")
    return url.rstrip("/")


def parse_region(text: str) -> Region:
    """``NAME:RTT_MS:MBIT[:LOSS[:WEIGHT]]``, as ``lagos:180:10:0.01:2``. Raises BadOption."""
    name, *numbers = text.split(":")
    form = "a region is NAME:RTT_MS:MBIT[:LOSS[:WEIGHT]], like lagos:180:10:0.01:2"
    if not name.isascii() or not name.isidentifier() or not 2 <= len(numbers) <= 4:
        raise BadOption(form)
    try:
        rtt, mbit, loss = (float(number) for number in [*numbers, "0"][:3])
        weight = int(numbers[3]) if len(numbers) == 4 else 1
    except ValueError:
        raise BadOption(form) from None
    check_number(rtt, 0.1, 2000, f"the round trip of {name}, in ms,")
    check_number(mbit, 0.1, 400, f"the rate of {name}, in Mbit/s,")
    check_number(loss, 0, 0.5, f"the loss of {name}, a fraction,")
    check_number(weight, 1, 1000, f"the weight of {name}")
    return Region(name, rtt, mbit, loss, weight)


def usable_events(events: Iterable[Event], regions: Sequence[Region]) -> list[Event]:
    """Those that are of no region, or of one that there is."""
    names = {region.name for region in regions}
    return [event for event in events if not event.region or event.region in names]
