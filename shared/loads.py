"""How busy nodes are, as one router or client knows it, and who has more than its share. Pure.

A node's load is what was sent there lately by us, and those of the requests that it says it is answering which that
does not explain: long ones, and those of other routers.

- "Lately" fades with a time constant of a heartbeat, the same for all nodes. It would be nearer at hand to count what
  was sent since the node's own last report, but nodes report at different moments: one that reported two seconds ago
  would look far busier than one that has just done, and short requests, long done, would be sent astray for it.
- What a node says is up to a heartbeat old, so it is taken slowly. Taken at once, a busy node is left alone until it
  is idle and says so, and then gets everything: in ``loadtests/simulate_ring.py`` two routers swung a node to 2.6 times
  the mean that way. What we sent we know at once, and its bound holds for any number of routers, each for its part.

Bounded loads (Mirrokni, Thorup, Zadimoghaddam: Consistent Hashing with Bounded Loads): a node is passed over where it
has 1.25 times the mean of its region, by weight. A region that has nearly nothing to do keeps keys on their owners.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

BOUND = 1.25
"""A node's load, of the mean of its region."""
FLOOR = 8.0
"""Requests per unit of weight that are no reason to leave an owner."""
FADE = 2.0
"""Seconds in which what was sent counts for a third (1/e): a heartbeat."""
SLOW = 5.0
"""Seconds in which a difference in what a node says is taken to two thirds (1 - 1/e)."""
STEP = 0.05
"""Seconds between two times that fading is reckoned."""
_LARGE = 1e12


class Load:
    """One node's."""

    __slots__ = ("excess", "gap", "group", "reported_at", "sent", "weight")

    def __init__(self) -> None:
        self.sent = 0.0
        """In units of ``Loads.one``."""
        self.gap = 0.0
        """Requests that it says it is answering, less those that we sent, smoothed."""
        self.excess = 0.0
        """The same, where there are more."""
        self.reported_at = -math.inf
        self.weight = 1
        self.group: Group | None = None
        """The nodes that it shares work with; None while it is to get none."""


class Group:
    """The sums of nodes that share work."""

    __slots__ = ("excess", "sent", "weight")

    def __init__(self) -> None:
        self.excess = 0.0
        self.sent = 0.0
        self.weight = 0


class Loads:
    """The loads of all nodes. Time is the caller's, in seconds that only grow."""

    def __init__(self, bound: float = BOUND) -> None:
        """``bound``: the load, of the mean of its region, above which a node is passed over."""
        self._bound = bound
        self._loads: dict[str, Load] = {}
        self._start = self._until = -math.inf
        self.one = 1.0
        """What one request that is sent now adds to ``sent``: growing it is fading all others."""

    def __repr__(self) -> str:
        return f"<Loads of {len(self._loads)} nodes>"

    def of(self, node: str) -> Load:
        """A node's load; new ones begin idle."""
        load = self._loads.get(node)
        if load is None:
            load = self._loads[node] = Load()
        return load

    def value(self, load: Load) -> float:
        """Requests."""
        return load.excess + load.sent / self.one

    def group(self, weights: Mapping[str, int]) -> Group:
        """Let these nodes (by weight) share work from now on: their mean is what each is measured by."""
        group = Group()
        for node, weight in weights.items():
            load = self.of(node)
            load.group, load.weight = group, weight
            group.excess += load.excess
            group.sent += load.sent
            group.weight += weight
        return group

    def alone(self, node: str) -> None:
        """A node that is to get no work: it counts in no mean."""
        self.of(node).group = None

    def keep(self, nodes: Mapping[str, object]) -> None:
        """Forget all others."""
        for gone in self._loads.keys() - nodes.keys():
            del self._loads[gone]

    def report(self, node: str, in_flight: int, now: float) -> None:
        """What a node told last, now; tell it again and again. The first report is taken at once."""
        self.advance(now)
        load = self.of(node)
        gap = in_flight - load.sent / self.one
        load.gap += (gap - load.gap) * (1 - math.exp((load.reported_at - now) / SLOW))
        load.reported_at = now
        excess = max(0.0, load.gap)
        if load.group is not None:
            load.group.excess += excess - load.excess
        load.excess = excess

    def send(self, node: str, now: float) -> None:
        """A client was sent there."""
        self.advance(now)
        load = self._loads.get(node) or self.of(node)
        load.sent += self.one
        if load.group is not None:
            load.group.sent += self.one

    def share(self, group: Group) -> float:
        """The requests per unit of weight that are a node's share of its group's, by now.

        Not all nodes of a group have theirs, or more: their mean would be above itself.
        """
        if not group.weight:
            return FLOOR
        share = self._bound * (group.excess + group.sent / self.one) / group.weight
        return share if share > FLOOR else FLOOR

    def advance(self, now: float) -> None:
        """Let what was sent fade until ``now``. Call it before asking."""
        if now < self._until:
            return
        if self._start == -math.inf:
            self._start = now
        self.one = math.exp(min((now - self._start) / FADE, 600.0))
        self._until = now + STEP
        if self.one > _LARGE:
            self._scale(self.one)
            self._start, self.one = now, 1.0

    def _scale(self, by: float) -> None:
        """Write all down in smaller units, long before they outgrow a float."""
        groups = {}
        for load in self._loads.values():
            load.sent /= by
            if load.group is not None:
                groups[id(load.group)] = load.group
        for group in groups.values():
            group.sent /= by
