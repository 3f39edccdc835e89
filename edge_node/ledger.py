"""Who may take how many bytes: the accounting of one cache tier. Pure.

An entry's life is the table ``MOVES``; any other move is a bug and raises. Room is taken at admission, before
the first byte is written, so a tier never holds more than its budget: fills are counted like entries.

Eviction is segmented LRU (Karedla, Love and Wherry, 1994): an entry begins on probation, and its first use after
that protects it. Room is made from what is on probation, oldest use first, then from what is protected; so
reading a large model once flushes nothing that is used again and again. The protected part has a share of the
budget; what falls out of it is on probation again. Entries that the operator favours go after all others. What is
read, kept on purpose, or being filled is never picked.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from shared.digest import Digest


class State(Enum):
    """Where an entry is in its life."""

    ABSENT = "absent"
    FILLING = "filling"
    READY = "ready"


MOVES: Mapping[tuple[State, State], str] = {
    (State.ABSENT, State.FILLING): "reserve: room was made for it",
    (State.FILLING, State.READY): "commit: its bytes are there and verified",
    (State.FILLING, State.ABSENT): "release: the fill failed or was given up",
    (State.READY, State.ABSENT): "evict, purge, or found damaged",
}


PROTECTED = 0.8
"""The share of the budget that protected entries may take."""


@dataclass
class Entry:
    """One shard in a tier. ``favoured``: evicted after all that are not."""

    size: int
    favoured: bool


@dataclass(frozen=True)
class LedgerStatistics:
    """A snapshot of a tier's accounting; bytes."""

    budget: int
    used: int
    entries: int
    pinned: int


class Ledger:
    """Segmented least-recently-used accounting by bytes."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.used = 0
        self.kept: frozenset[Digest] = frozenset()
        """Shards that the operator keeps: never evicted."""
        self._filling: dict[Digest, Entry] = {}
        self._probation: OrderedDict[Digest, Entry] = OrderedDict()
        self._protected: OrderedDict[Digest, Entry] = OrderedDict()
        self._protected_bytes = 0
        self._pins: Counter[Digest] = Counter()
        """Readers by shard. They outlive an entry that is dropped under them, and hold its successor too."""

    def __repr__(self) -> str:
        return f"<Ledger {self.used}/{self.budget} bytes, {self.statistics().entries} entries>"

    def __contains__(self, digest: Digest) -> bool:
        return digest in self._protected or digest in self._probation

    def __iter__(self) -> Iterator[Digest]:
        """Entries that are READY, the next to be evicted first."""
        return iter([*self._probation, *self._protected])

    def state(self, digest: Digest) -> State:
        """Where an entry is in its life."""
        if digest in self:
            return State.READY
        return State.FILLING if digest in self._filling else State.ABSENT

    def size(self, digest: Digest) -> int:
        """Bytes of an entry that is there. Raises KeyError."""
        return self._find(digest).size

    def reserve(self, digest: Digest, size: int, *, favoured: bool = False) -> list[Digest] | None:
        """Room for a fill: the entries that were evicted for it (the caller drops their bytes now).

        None where it does not fit, and then nothing was evicted.
        """
        self._expect(digest, State.ABSENT, State.FILLING)
        victims = self._victims(self.used + size - self.budget)
        if victims is None:
            return None
        for victim in victims:
            self.drop(victim)
        self._filling[digest] = Entry(size, favoured)
        self.used += size
        return victims

    def commit(self, digest: Digest) -> None:
        """The fill is complete and verified; on probation, and the last to go there."""
        self._expect(digest, State.FILLING, State.READY)
        self._probation[digest] = self._filling.pop(digest)

    def release(self, digest: Digest) -> None:
        """The fill was given up: its room is free again."""
        self._expect(digest, State.FILLING, State.ABSENT)
        self.used -= self._filling.pop(digest).size

    def drop(self, digest: Digest) -> None:
        """An entry is gone: evicted, purged, or damaged."""
        self._expect(digest, State.READY, State.ABSENT)
        entry = self._probation.pop(digest, None)
        if entry is None:
            entry = self._protected.pop(digest)
            self._protected_bytes -= entry.size
        self.used -= entry.size

    def hold(self, digest: Digest) -> None:
        """Pin an entry, or a fill, without using it."""
        self._pins[digest] += 1

    def pin(self, digest: Digest) -> int:
        """Use an entry: it cannot be evicted until ``unpin``. Gives its size; raises KeyError."""
        size = self._find(digest).size
        self._pins[digest] += 1
        self.touch(digest)
        return size

    def touch(self, digest: Digest) -> None:
        """Use an entry: now protected, and the last to go. A fill, or what is absent, is left as it is."""
        if digest in self._protected:
            self._protected.move_to_end(digest)
            return
        entry = self._probation.pop(digest, None)
        if entry is None:
            return
        self._protected[digest] = entry
        self._protected_bytes += entry.size
        while self._protected_bytes > PROTECTED * self.budget:
            demoted, entry = self._protected.popitem(last=False)
            self._protected_bytes -= entry.size
            self._probation[demoted] = entry

    def unpin(self, digest: Digest) -> None:
        """One reader less. An entry that was dropped meanwhile is no matter."""
        self._pins[digest] -= 1
        if self._pins[digest] <= 0:
            del self._pins[digest]

    def statistics(self) -> LedgerStatistics:
        """What is held now."""
        segments = (self._filling, self._probation, self._protected)
        pinned = sum(entry.size for part in segments for digest, entry in part.items() if digest in self._pins)
        return LedgerStatistics(self.budget, self.used, sum(map(len, segments)), pinned)

    def _victims(self, need: int) -> list[Digest] | None:
        """What to evict for ``need`` bytes more; None where that much cannot be had."""
        victims: list[Digest] = []
        for favoured in (False, True):
            for segment in (self._probation, self._protected):
                for digest, entry in segment.items():
                    if need <= 0:
                        return victims
                    if entry.favoured is favoured and digest not in self._pins and digest not in self.kept:
                        victims.append(digest)
                        need -= entry.size
        return victims if need <= 0 else None

    def _find(self, digest: Digest) -> Entry:
        entry = self._protected.get(digest) or self._probation.get(digest)
        return entry or self._filling[digest]

    def _expect(self, digest: Digest, before: State, after: State) -> None:
        if self.state(digest) is not before or (before, after) not in MOVES:
            raise RuntimeError(f"an entry that is {self.state(digest).value} cannot become {after.value}")
