"""The consistent-hash ring of a region: which nodes own a key, best first.

A ring is immutable: a change of members makes a new one. Members are placed in the order of their names, so
everyone who knows the same members has the same ring.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import islice

from uhashring import HashRing

VNODES = 1024
"""Points on the ring per unit of weight: each of ten nodes then has between 9 and 11 % of the keys, seldom more."""


class Ring:
    """Members by weight (a small whole number: capacity in units that the deployment chooses)."""

    def __init__(self, members: Mapping[str, int]) -> None:
        self.members = dict(sorted(members.items()))
        nodes = {name: {"weight": weight} for name, weight in self.members.items()}
        self._ring = HashRing(nodes, vnodes=VNODES, hash_fn=_hash)

    def __repr__(self) -> str:
        return f"<Ring {self.members}>"

    def owners(self, key: str, count: int | None = None) -> list[str]:
        """Members in the order in which they own ``key``, each once; at most ``count`` of them.

        Empty for an empty ring (the library's own answer there is a None).
        """
        if not self.members:
            return []
        return [node["nodename"] for node in islice(self._ring.range(key, unique=True), count)]


def _hash(key: str) -> int:
    """Eight bytes of BLAKE2b: quicker than the library's MD5, and a ring has a thousand points a node."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
