"""The consistent-hash ring of a region: which nodes own a key, best first.

A ring is immutable: a change of members makes a new one. Members are placed in the order of their names, so
everyone who knows the same members has the same ring.

It is one sorted array of 64-bit words: 48 bits of a point's place, then 16 bits that number the member. That is 8
bytes a point, where a list of numbers and a list of names take 48, and routers hold the rings of all regions.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect
from collections.abc import Mapping
from struct import Struct

VNODES = 512
"""Points on the ring per unit of weight: each of ten nodes then has between 8.7 and 11.3 % of the keys, seldom more
or less. Loads are evened out by ``shared.loads``, so what is left is room on disks, and half as many points as would
make it half a percent better cost half the memory and the time to rebuild."""
MAX_MEMBERS = 1 << 16
MEMBER = MAX_MEMBERS - 1
"""The bits of a word that number a member."""
_PLACE = (1 << 64) - MAX_MEMBERS
_EIGHT = Struct(">8Q")


class Ring:
    """Members by weight (a small whole number: capacity in units that the deployment chooses); at most 65,536."""

    def __init__(self, members: Mapping[str, int]) -> None:
        self.members = dict(sorted(members.items()))
        self.names = list(self.members)
        if len(self.names) > MAX_MEMBERS:
            raise ValueError(f"a ring has at most {MAX_MEMBERS} members")
        words: list[int] = []
        for number, (name, weight) in enumerate(self.members.items()):
            words += [place | number for place in _places(name, weight)]
        words.sort()
        self.words = array("Q", words)
        """Place and member's number of each point, in order; for whoever walks the ring himself."""

    def __repr__(self) -> str:
        return f"<Ring {self.members}>"

    def owners(self, key: str, count: int | None = None) -> list[str]:
        """Members in the order in which they own ``key``, each once; at most ``count`` of them.

        Empty for an empty ring.
        """
        return self.owners_at(place_of(key), count)

    def owners_at(self, place: int, count: int | None = None) -> list[str]:
        """The same, for a key whose place is known."""
        wanted = len(self.members) if count is None else min(count, len(self.members))
        found: dict[int, None] = {}
        start = bisect(self.words, place)
        for index in range(start, start + len(self.words)):
            if len(found) == wanted:
                break
            found[self.words[index % len(self.words)] & MEMBER] = None
        return [self.names[number] for number in found]

    def shares(self) -> dict[str, float]:
        """What part of all keys each member owns, 0 to 1. Some 60 µs per unit of weight."""
        lengths = [0] * len(self.names)
        before = self.words[-1] - (1 << 64) if self.words else 0
        for word in self.words:
            lengths[word & MEMBER] += word - before
            before = word
        return {name: length / (1 << 64) for name, length in zip(self.names, lengths, strict=True)}


def place_of(key: str) -> int:
    """64 bits that say where a key is on every ring. Its owners are at the next points."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


def _places(name: str, weight: int) -> list[int]:
    """A member's own points: eight to a hash. They do not depend on the other members."""
    places: list[int] = []
    for block in range(VNODES * weight // 8):
        places += _EIGHT.unpack(hashlib.blake2b(f"{name}-{block}".encode()).digest())
    return [place & _PLACE for place in places]
