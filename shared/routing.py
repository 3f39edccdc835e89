"""Which nodes serve a key for a client: pure, from one immutable snapshot of the members.

``Routing`` is what a router asks for each request, and a client that routes by itself. It goes through the regions,
nearest first, and in each along the ring from the key's place:

1. a node that may serve is a choice: the first one is the key's owner, unless it was passed over
2. one that has its share of requests already (``shared.loads``), or that is new and not yet given this key, comes after
   the others of its region: it has, or will have, what is asked for
3. one that is draining, then one that was ejected (``shared.health``), comes after all regions

So every node is there once, in an order in which a retry never meets a node again, and the list is empty only where
there is no node. Where more than half of a region would be passed over as ejected, all of it is used: that many nodes
are not ill at once, it is the view of them that is (panic).

What does not depend on the key is made ready when members or their states change, and what does not depend on loads is
kept for each key (``_Walk``), so that a choice costs a few microseconds however many nodes there are: it looks at the
nodes it names and at those that it passes over.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from enum import StrEnum

from shared.health import Health
from shared.loads import Group, Load, Loads
from shared.nearness import Away, Nearness
from shared.node import Node, State
from shared.ring import MEMBER, Ring, place_of

SLOW_START = 30.0
"""Seconds in which a node that joined is given more and more keys."""
FIRST_KEYS = 0.1
"""The share of its keys that it is given at once."""
ORDER_LIFETIME = 10.0
"""Seconds that an order of regions is used before it is made again from what nodes have measured since."""
AHEAD = 4
"""Nodes that are looked for at once: a choice seldom needs more."""
WALKS = 20_000
"""Kept at most: some 500 bytes each."""
_DICE = 0xFFFF
"""Bits of a key's place, the least ones, that no place on a ring depends on: they say whether it is among the first."""


class Snapshot:
    """The members at one epoch, with a ring for each region. The rings of regions that have not changed since
    ``former`` are the same."""

    def __init__(self, nodes: Iterable[Node], epoch: int, former: Snapshot | None = None) -> None:
        self.epoch = epoch
        self.nodes: Mapping[str, Node] = {node.id: node for node in sorted(nodes, key=lambda n: n.id)}
        weights: dict[str, dict[str, int]] = defaultdict(dict)
        for node in self.nodes.values():
            weights[node.region][node.id] = node.weight
        known = former.rings if former else {}
        self.rings: Mapping[str, Ring] = {
            region: known[region] if region in known and known[region].members == members else Ring(members)
            for region, members in sorted(weights.items())
        }

    def __repr__(self) -> str:
        return f"<Snapshot {self.epoch}: {len(self.nodes)} nodes in {len(self.rings)} regions>"


class Verdict(StrEnum):
    """Why a node is where it is among the choices."""

    OWNER = "owner"
    """In the order of the ring."""
    PANIC = "panic"
    """The same, although it was ejected: so was more than half of its region."""
    STARTING = "starting"
    LOADED = "loaded"
    DRAINING = "draining"
    EJECTED = "ejected"


REASONS: Mapping[Verdict, str] = {
    Verdict.OWNER: "next on the ring",
    Verdict.PANIC: "next on the ring; more than half of the region is ejected, so all of it is used",
    Verdict.STARTING: "joined lately, and is given this key later",
    Verdict.LOADED: "has its share of the region's requests",
    Verdict.DRAINING: "is draining",
    Verdict.EJECTED: "was ejected as unhealthy",
}


@dataclass(frozen=True, slots=True)
class Choice:
    """A node that may be asked, and why it is at its place."""

    node: Node
    verdict: Verdict


class _Member:
    """A node with all that a choice needs of it, made ready."""

    __slots__ = ("joined", "load", "loaded", "passed", "starting", "taken", "young")

    def __init__(self, node: Node, load: Load, joined: float, verdict: Verdict) -> None:
        self.load, self.joined, self.young = load, joined, False
        self.taken = Choice(node, verdict)
        self.loaded = Choice(node, Verdict.LOADED)
        self.starting = Choice(node, Verdict.STARTING)
        self.passed = verdict in (Verdict.DRAINING, Verdict.EJECTED)


class _Walk:
    """The usable members of a region in the order of the ring from a key's place on, as far as anybody has looked."""

    __slots__ = ("at", "members", "place")

    def __init__(self, place: int, at: int) -> None:
        self.place = place
        self.at = at
        """The word of the ring to look at next."""
        self.members: list[_Member] = []


class _Region:
    """A region with all that a choice needs of it, made ready."""

    __slots__ = ("group", "made_from", "members", "name", "panic", "passed", "ring", "usable")

    def __init__(self, name: str, ring: Ring, members: list[_Member], group: Group, *, panic: bool) -> None:
        self.name, self.ring, self.members, self.group, self.panic = name, ring, members, group, panic
        self.made_from: tuple[Ring, list[str], Set[str], Set[str]] | None = None
        self.passed = sum(member.passed for member in members)
        self.usable = len(members) - self.passed

    def choose(self, walk: _Walk, count: int, loads: Loads, now: float, found: list[Choice]) -> None:
        """Add nodes for a key that may be asked now, then those that come after the others of their region."""
        share, one = loads.share(self.group), loads.one
        later: list[Choice] = []
        looked = 0
        while looked < self.usable:
            if looked == len(walk.members):
                self._look_further(walk)
            for member in walk.members[looked:] if looked else walk.members:
                load = member.load
                if member.young and not _given(walk.place, now - member.joined):
                    later.append(member.starting)
                elif load.excess + load.sent / one >= share * load.weight:
                    later.append(member.loaded)
                else:
                    found.append(member.taken)
                    if len(found) == count:
                        return
            looked = len(walk.members)
        found += later

    def _look_further(self, walk: _Walk) -> None:
        """Find the next few members; there are some."""
        words, size = self.ring.words, len(self.ring.words)
        seen = set(walk.members)
        wanted = min(len(seen) + AHEAD, self.usable)
        while len(walk.members) < wanted:
            member = self.members[words[walk.at % size] & MEMBER]
            walk.at += 1
            if not member.passed and member not in seen:
                seen.add(member)
                walk.members.append(member)

    def passed_over(self, place: int, verdict: Verdict) -> Iterable[Choice]:
        """The nodes that are out of the choice for this reason, in the order of the ring."""
        numbers = [number for number, member in enumerate(self.members) if member.taken.verdict is verdict]
        if not numbers:
            return ()
        order = {name: rank for rank, name in enumerate(self.ring.owners_at(place))} if len(numbers) > 1 else {}
        choices = [self.members[number].taken for number in numbers]
        return sorted(choices, key=lambda choice: order.get(choice.node.id, 0))


def _given(place: int, age: float) -> bool:
    """Whether a node that joined ``age`` seconds ago is given a key already. What it was given once it keeps."""
    return (place & _DICE) <= _DICE * (FIRST_KEYS + (1 - FIRST_KEYS) * age / SLOW_START)


class Routing:
    """The choice of nodes for keys. ``now`` is in seconds that only grow, of the same clock everywhere."""

    def __init__(self, nearness: Nearness, loads: Loads, health: Health) -> None:
        self._nearness, self.loads, self.health = nearness, loads, health
        self.snapshot = Snapshot([], 0)
        self._states: Mapping[str, State] = {}
        self._regions: dict[str, _Region] = {}
        self._passed = False
        self._growing_until = -math.inf
        self._orders: dict[str, tuple[float, list[_Region]]] = {}
        self._walks: dict[tuple[_Region, str], _Walk] = {}
        self._made_from: tuple[Snapshot, Set[str], int] | None = None

    def __repr__(self) -> str:
        return f"<Routing by {self.snapshot}>"

    @property
    def panics(self) -> list[str]:
        """Regions all of whose nodes are used because too many were ejected."""
        return [region.name for region in self._regions.values() if region.panic]

    def update(
        self, snapshot: Snapshot, states: Mapping[str, State], joined: Callable[[str], float], now: float
    ) -> None:
        """Take what is known now; cheap where only loads have changed. ``joined``: when a node did."""
        draining = set()
        for node in snapshot.nodes:
            if (state := states.get(node)) is not None:
                self.loads.report(node, state.in_flight, now)
                if state.draining:
                    draining.add(node)
        self._states = states
        ejected = self.health.ejected(now)
        made_from = (snapshot, draining, self.health.changes)
        if made_from != self._made_from:
            self._made_from = made_from
            self._rebuild(snapshot, draining, ejected.keys(), joined)
        if now < self._growing_until:
            self._spare(now)

    def _rebuild(
        self, snapshot: Snapshot, draining: Set[str], ejected: Set[str], joined: Callable[[str], float]
    ) -> None:
        self.snapshot = snapshot
        self.loads.keep(snapshot.nodes)
        self.health.keep(snapshot.nodes)
        before, self._regions = self._regions, {}
        for name, ring in snapshot.rings.items():
            urls = [snapshot.nodes[node].url for node in ring.names]
            made_from = (ring, urls, draining & ring.members.keys(), ejected & ring.members.keys())
            region = before.get(name)
            if region is None or region.made_from != made_from:
                region = self._region(name, ring, draining, ejected, joined)
                region.made_from = made_from
            self._regions[name] = region
        self._passed = any(region.passed for region in self._regions.values())
        newest = max((member.joined for region in self._regions.values() for member in region.members), default=0.0)
        self._growing_until = newest + SLOW_START
        self._orders.clear()
        self._walks.clear()

    def _region(
        self, name: str, ring: Ring, draining: Set[str], ejected: Set[str], joined: Callable[[str], float]
    ) -> _Region:
        active = [node for node in ring.names if node not in draining]
        panic = 2 * len(ejected & set(active)) > len(active)
        members = []
        for node in ring.names:
            verdict = Verdict.OWNER
            if node in draining:
                verdict = Verdict.DRAINING
            elif node in ejected:
                verdict = Verdict.PANIC if panic else Verdict.EJECTED
            members.append(_Member(self.snapshot.nodes[node], self.loads.of(node), joined(node), verdict))
            self.loads.alone(node)
        group = self.loads.group({m.taken.node.id: m.taken.node.weight for m in members if not m.passed})
        return _Region(name, ring, members, group, panic=panic)

    def _spare(self, now: float) -> None:
        """Say which nodes are in slow start. Where most of a region is new there is nobody to spare them for."""
        for region in self._regions.values():
            usable = [member for member in region.members if not member.passed]
            young = {id(member) for member in usable if now - member.joined < SLOW_START}
            spared = 2 * len(young) <= len(usable)
            for member in usable:
                member.young = spared and id(member) in young

    def choose(self, region: str, key: str, count: int, now: float) -> list[Choice]:
        """At most ``count`` nodes to ask for ``key``, best first, for a client in ``region``."""
        self.loads.advance(now)
        found: list[Choice] = []
        kept = self._orders.get(region)
        regions = kept[1] if kept and now < kept[0] else self._order(region, now)
        for near in regions:
            if near.usable:
                walk = self._walks.get((near, key)) or self._begin(near, key)
                near.choose(walk, count, self.loads, now, found)
                if len(found) >= count:
                    return found[:count] if len(found) > count else found
        if self._passed:
            place = place_of(key)
            for verdict in (Verdict.DRAINING, Verdict.EJECTED):
                for near in regions:
                    if near.passed:
                        found += near.passed_over(place, verdict)
        return found[:count]

    def _begin(self, region: _Region, key: str) -> _Walk:
        if len(self._walks) >= WALKS:
            self._walks.clear()
        place = place_of(key)
        walk = self._walks[region, key] = _Walk(place, bisect(region.ring.words, place))
        return walk

    def sent(self, choices: list[Choice], now: float) -> None:
        """A client was sent to the first of ``choices``."""
        if choices:
            self.loads.send(choices[0].node.id, now)

    def order(self, region: str) -> list[Away]:
        """The regions as seen from one of them, nearest first."""
        return self._nearness.order(self._known(region), self.snapshot.rings, self._measured)

    def nearest(self, region: str, now: float) -> list[str]:
        """Their names, as choices go through them."""
        return [near.name for near in self._order(region, now)]

    def passed_over(self) -> Mapping[Verdict, Set[str]]:
        """The nodes that come after all others, whatever the key, by why they do."""
        found: dict[Verdict, set[str]] = {Verdict.DRAINING: set(), Verdict.EJECTED: set()}
        for region in self._regions.values():
            for member in region.members if region.passed else ():
                if member.passed:
                    found[member.taken.verdict].add(member.taken.node.id)
        return found

    def _known(self, region: str) -> str:
        """Clients may name any region: those of which nothing is known are all the same."""
        return region if region in self._regions or region in self._nearness.named else ""

    def _measured(self, region: str) -> list[Mapping[str, float]]:
        """Round trips that the nodes of a region told of."""
        ring = self.snapshot.rings.get(region)
        states = (self._states.get(node) for node in ring.names) if ring else ()
        return [state.rtt for state in states if state is not None and state.rtt]

    def _order(self, region: str, now: float) -> list[_Region]:
        region = self._known(region)
        kept = self._orders.get(region)
        if kept is not None and now < kept[0]:
            return kept[1]
        order = [self._regions[away.region] for away in self.order(region)]
        self._orders[region] = (now + ORDER_LIFETIME, order)
        return order
