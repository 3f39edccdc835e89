"""How busy nodes are, as one router or client knows it, and who has more than its share. Pure.

A node's load is the number of requests that it said it is answering, and what was sent there lately by us, of which
it may not have told yet. "Lately" fades with a time constant of a heartbeat, the same for all nodes. It would be
nearer at hand to count what was sent since the node's own last report, but nodes report at different moments: one that
reported two seconds ago would look far busier than one that has just done, and short requests, which are long done,
would be sent astray for it.

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
STEP = 0.05
"""Seconds between two times that fading is reckoned."""
_LARGE = 1e12


class Load:
    """One node's."""

    __slots__ = ("group", "reported", "sent", "weight")

    def __init__(self) -> None:
        self.reported = 0.0
        self.sent = 0.0
        """In units of ``Loads.one``."""
        self.weight = 1
        self.group: Group | None = None
        """The nodes that it shares work with; None while it is to get none."""


class Group:
    """The sums of nodes that share work."""

    __slots__ = ("reported", "sent", "weight")

    def __init__(self) -> None:
        self.reported = 0.0
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
        return load.reported + load.sent / self.one

    def group(self, weights: Mapping[str, int]) -> Group:
        """Let these nodes (by weight) share work from now on: their mean is what each is measured by."""
        group = Group()
        for node, weight in weights.items():
            load = self.of(node)
            load.group, load.weight = group, weight
            group.reported += load.reported
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

    def report(self, node: str, in_flight: int) -> None:
        """A node told how many requests it is answering. Telling it again changes nothing."""
        load = self.of(node)
        if load.group is not None:
            load.group.reported += in_flight - load.reported
        load.reported = float(in_flight)

    def send(self, node: str, now: float) -> None:
        """A client was sent there."""
        self.advance(now)
        load = self.of(node)
        load.sent += self.one
        if load.group is not None:
            load.group.sent += self.one

    def share(self, group: Group) -> float:
        """The requests per unit of weight that are a node's share of its group's, by now.

        Not all nodes of a group have theirs, or more: their mean would be above itself.
        """
        if not group.weight:
            return FLOOR
        return max(FLOOR, self._bound * (group.reported + group.sent / self.one) / group.weight)

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
