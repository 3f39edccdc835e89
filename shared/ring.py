"""The consistent-hash ring of a region: which nodes own a key, best first.

A ring is immutable: a change of members makes a new one. Members are placed in the order of their names, so
everyone who knows the same members has the same ring.
"""

from __future__ import annotations

import hashlib
from bisect import bisect
from collections.abc import Mapping

from uhashring import HashRing

VNODES = 1024
"""Points on the ring per unit of weight: each of ten nodes then has between 9 and 11 % of the keys, seldom more."""


class Ring:
    """Members by weight (a small whole number: capacity in units that the deployment chooses)."""

    def __init__(self, members: Mapping[str, int]) -> None:
        self.members = dict(sorted(members.items()))
        nodes = {name: {"weight": weight} for name, weight in self.members.items()}
        points = HashRing(nodes, vnodes=VNODES, hash_fn=_hash).ring
        self._points = sorted(points)
        self._names = [points[point] for point in self._points]

    def __repr__(self) -> str:
        return f"<Ring {self.members}>"

    def owners(self, key: str, count: int | None = None) -> list[str]:
        """Members in the order in which they own ``key``, each once; at most ``count`` of them.

        Empty for an empty ring. The walk is ours: the library's copies the whole ring for each key.
        """
        wanted = len(self.members) if count is None else min(count, len(self.members))
        found: dict[str, None] = {}
        start = bisect(self._points, _hash(key))
        for index in range(start, start + len(self._points)):
            if len(found) == wanted:
                break
            found[self._names[index % len(self._names)]] = None
        return list(found)


def _hash(key: str) -> int:
    """Eight bytes of BLAKE2b: quicker than the library's MD5, and a ring has a thousand points a node."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
