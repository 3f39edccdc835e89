"""The consistent-hash ring of a region: which nodes own a key, best first.

A ring is immutable: a change of members makes a new one. Members are placed in the order of their names, so
everyone who knows the same members has the same ring.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

from uhashring import HashRing

VNODES = 160
"""Points on the ring per unit of weight: 10 nodes are then loaded within about 15 % of each other."""


class Ring:
    """Members by weight (a small whole number: capacity in units that the deployment chooses)."""

    def __init__(self, members: Mapping[str, int]) -> None:
        self.members = dict(sorted(members.items()))
        self._ring = HashRing({name: {"weight": weight} for name, weight in self.members.items()}, vnodes=VNODES)

    def __repr__(self) -> str:
        return f"<Ring {self.members}>"

    def owners(self, key: str, count: int | None = None) -> list[str]:
        """Members in the order in which they own ``key``, each once; at most ``count`` of them.

        Empty for an empty ring (the library's own answer there is a None).
        """
        if not self.members:
            return []
        return [node["nodename"] for node in islice(self._ring.range(key, unique=True), count)]
