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

from edge_node.shard_key import ShardKey


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
        self.kept: frozenset[ShardKey] = frozenset()
        """Shards that the operator keeps: never evicted."""
        self._filling: dict[ShardKey, Entry] = {}
        self._probation: OrderedDict[ShardKey, Entry] = OrderedDict()
        self._protected: OrderedDict[ShardKey, Entry] = OrderedDict()
        self._protected_bytes = 0
        self._pins: Counter[ShardKey] = Counter()
        """Readers by shard. They outlive an entry that is dropped under them, and hold its successor too."""

    def __repr__(self) -> str:
        return f"<Ledger {self.used}/{self.budget} bytes, {self.statistics().entries} entries>"

    def __contains__(self, key: ShardKey) -> bool:
        return key in self._protected or key in self._probation

    def __iter__(self) -> Iterator[ShardKey]:
        """Entries that are READY, the next to be evicted first."""
        return iter([*self._probation, *self._protected])

    def state(self, key: ShardKey) -> State:
        """Where an entry is in its life."""
        if key in self:
            return State.READY
        return State.FILLING if key in self._filling else State.ABSENT

    def size(self, key: ShardKey) -> int:
        """Bytes of an entry that is there. Raises KeyError."""
        return self._find(key).size

    def reserve(self, key: ShardKey, size: int, *, favoured: bool = False) -> list[ShardKey] | None:
        """Room for a fill: the entries that were evicted for it (the caller drops their bytes now).

        None where it does not fit, and then nothing was evicted.
        """
        self._expect(key, State.ABSENT, State.FILLING)
        victims = self._victims(self.used + size - self.budget)
        if victims is None:
            return None
        for victim in victims:
            self.drop(victim)
        self._filling[key] = Entry(size, favoured)
        self.used += size
        return victims

    def commit(self, key: ShardKey) -> None:
        """The fill is complete and verified; on probation, and the last to go there."""
        self._expect(key, State.FILLING, State.READY)
        self._probation[key] = self._filling.pop(key)

    def release(self, key: ShardKey) -> None:
        """The fill was given up: its room is free again."""
        self._expect(key, State.FILLING, State.ABSENT)
        self.used -= self._filling.pop(key).size

    def drop(self, key: ShardKey) -> None:
        """An entry is gone: evicted, purged, or damaged."""
        self._expect(key, State.READY, State.ABSENT)
        entry = self._probation.pop(key, None)
        if entry is None:
            entry = self._protected.pop(key)
            self._protected_bytes -= entry.size
        self.used -= entry.size

    def hold(self, key: ShardKey) -> None:
        """Pin an entry, or a fill, without using it."""
        self._pins[key] += 1

    def pin(self, key: ShardKey) -> int:
        """Use an entry: it cannot be evicted until ``unpin``. Gives its size; raises KeyError."""
        size = self._find(key).size
        self._pins[key] += 1
        self.touch(key)
        return size

    def touch(self, key: ShardKey) -> None:
        """Use an entry: now protected, and the last to go. A fill, or what is absent, is left as it is."""
        if key in self._protected:
            self._protected.move_to_end(key)
            return
        entry = self._probation.pop(key, None)
        if entry is None:
            return
        self._protected[key] = entry
        self._protected_bytes += entry.size
        while self._protected_bytes > PROTECTED * self.budget:
            demoted, entry = self._protected.popitem(last=False)
            self._protected_bytes -= entry.size
            self._probation[demoted] = entry

    def unpin(self, key: ShardKey) -> None:
        """One reader less. An entry that was dropped meanwhile is no matter."""
        self._pins[key] -= 1
        if self._pins[key] <= 0:
            del self._pins[key]

    def statistics(self) -> LedgerStatistics:
        """What is held now."""
        segments = (self._filling, self._probation, self._protected)
        pinned = sum(entry.size for part in segments for key, entry in part.items() if key in self._pins)
        return LedgerStatistics(self.budget, self.used, sum(map(len, segments)), pinned)

    def _victims(self, need: int) -> list[ShardKey] | None:
        """What to evict for ``need`` bytes more; None where that much cannot be had."""
        victims: list[ShardKey] = []
        for favoured in (False, True):
            for segment in (self._probation, self._protected):
                for key, entry in segment.items():
                    if need <= 0:
                        return victims
                    if entry.favoured is favoured and key not in self._pins and key not in self.kept:
                        victims.append(key)
                        need -= entry.size
        return victims if need <= 0 else None

    def _find(self, key: ShardKey) -> Entry:
        entry = self._protected.get(key) or self._probation.get(key)
        return entry or self._filling[key]

    def _expect(self, key: ShardKey, before: State, after: State) -> None:
        if self.state(key) is not before or (before, after) not in MOVES:
            raise RuntimeError(f"an entry that is {self.state(key).value} cannot become {after.value}")
