"""Who may take how many bytes: the accounting of one cache tier. Pure.

An entry's life is the table ``MOVES``; any other move is a bug and raises. Room is taken at admission, before
the first byte is written, so a tier never holds more than its budget: fills are counted like entries.
Eviction picks the entry that was used longest ago and is not pinned; a filling entry is never picked.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
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


@dataclass
class Entry:
    """One shard in a tier."""

    size: int
    state: State


@dataclass(frozen=True)
class LedgerStatistics:
    """A snapshot of a tier's accounting; bytes."""

    budget: int
    used: int
    entries: int
    pinned: int


class Ledger:
    """Least-recently-used accounting by bytes."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.used = 0
        self._entries: OrderedDict[Digest, Entry] = OrderedDict()
        self._pins: Counter[Digest] = Counter()
        """Readers by shard. They outlive an entry that is dropped under them, and hold its successor too."""

    def __repr__(self) -> str:
        return f"<Ledger {self.used}/{self.budget} bytes, {len(self._entries)} entries>"

    def __contains__(self, digest: Digest) -> bool:
        return self.state(digest) is State.READY

    def state(self, digest: Digest) -> State:
        """Where an entry is in its life."""
        entry = self._entries.get(digest)
        return entry.state if entry else State.ABSENT

    def size(self, digest: Digest) -> int:
        """Bytes of an entry that is there. Raises KeyError."""
        return self._entries[digest].size

    def reserve(self, digest: Digest, size: int) -> list[Digest] | None:
        """Room for a fill: the entries that were evicted for it (the caller drops their bytes now).

        None where it does not fit, and then nothing was evicted.
        """
        self._expect(digest, State.ABSENT, State.FILLING)
        need = self.used + size - self.budget
        victims: list[Digest] = []
        if need > 0:
            for candidate, entry in self._entries.items():
                if entry.state is State.READY and candidate not in self._pins:
                    victims.append(candidate)
                    need -= entry.size
                    if need <= 0:
                        break
            if need > 0:
                return None
        for victim in victims:
            self.drop(victim)
        self._entries[digest] = Entry(size, State.FILLING)
        self.used += size
        return victims

    def commit(self, digest: Digest) -> None:
        """The fill is complete and verified; now the most recently used."""
        self._expect(digest, State.FILLING, State.READY)
        self._entries[digest].state = State.READY
        self._entries.move_to_end(digest)

    def release(self, digest: Digest) -> None:
        """The fill was given up: its room is free again."""
        self._expect(digest, State.FILLING, State.ABSENT)
        self.used -= self._entries.pop(digest).size

    def drop(self, digest: Digest) -> None:
        """An entry is gone: evicted, purged, or damaged."""
        self._expect(digest, State.READY, State.ABSENT)
        self.used -= self._entries.pop(digest).size

    def pin(self, digest: Digest) -> int:
        """Use an entry: it cannot be evicted until ``unpin``. Gives its size; raises KeyError."""
        entry = self._entries[digest]
        self._pins[digest] += 1
        self._entries.move_to_end(digest)
        return entry.size

    def touch(self, digest: Digest) -> None:
        """Now the most recently used. Raises KeyError."""
        self._entries.move_to_end(digest)

    def unpin(self, digest: Digest) -> None:
        """One reader less. An entry that was dropped meanwhile is no matter."""
        self._pins[digest] -= 1
        if self._pins[digest] <= 0:
            del self._pins[digest]

    def statistics(self) -> LedgerStatistics:
        """What is held now."""
        pinned = sum(entry.size for digest, entry in self._entries.items() if digest in self._pins)
        return LedgerStatistics(self.budget, self.used, len(self._entries), pinned)

    def _expect(self, digest: Digest, before: State, after: State) -> None:
        if self.state(digest) is not before or (before, after) not in MOVES:
            raise RuntimeError(f"an entry that is {self.state(digest).value} cannot become {after.value}")
