"""The ledger: never over budget, never a reader's entry evicted, the right ones evicted in the right order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from edge_node.ledger import MOVES, PROTECTED, Ledger, LedgerStatistics, State
from edge_node.shard_key import ShardKey, shard_key
from shared.digest import digest_of

A, B, C, D = NAMES = [shard_key(digest_of(letter)) for letter in (b"a", b"b", b"c", b"d")]


def ledger_of(budget: int, **sizes: int) -> Ledger:
    """A ledger that holds A, B, ... in this order, the first used longest ago."""
    ledger = Ledger(budget)
    for letter, size in sizes.items():
        key = NAMES["abcd".index(letter)]
        assert ledger.reserve(key, size) == []
        ledger.commit(key)
    return ledger


# Evicting


def test_room_is_made_by_what_was_used_longest_ago() -> None:
    ledger = ledger_of(10, a=3, b=3, c=3)
    assert ledger.reserve(D, 4) == [A]
    assert [key in ledger for key in (A, B, C)] == [False, True, True]


def test_no_more_is_evicted_than_is_needed() -> None:
    assert ledger_of(10, a=3, b=3, c=3).reserve(D, 1) == []
    assert ledger_of(10, a=3, b=3, c=3).reserve(D, 5) == [A, B]


def test_use_makes_an_entry_the_last_to_go() -> None:
    ledger = ledger_of(9, a=3, b=3, c=3)
    ledger.pin(A)
    ledger.unpin(A)
    assert ledger.reserve(D, 3) == [B]


def test_a_scan_flushes_nothing_that_was_used_again() -> None:
    ledger = ledger_of(10, a=3, b=3)
    for key in (A, B):
        ledger.touch(key)
    for number in range(50):
        scanned = shard_key(digest_of(str(number).encode()))
        assert ledger.reserve(scanned, 4) is not None
        ledger.commit(scanned)
    assert A in ledger and B in ledger


def test_what_is_protected_beyond_its_share_is_on_probation_again() -> None:
    ledger = ledger_of(10, a=4, b=4, c=2)
    for key in (A, B, C):
        ledger.touch(key)
    assert list(ledger) == [A, B, C], "A was pushed out, so it is the next to go"
    assert ledger.reserve(D, 1) == [A]


def test_what_is_favoured_goes_last_and_what_is_kept_never() -> None:
    ledger = Ledger(9)
    for key, favoured in ((A, True), (B, False), (C, False)):
        ledger.reserve(key, 3, favoured=favoured)
        ledger.commit(key)
    ledger.kept = frozenset([B])
    assert ledger.reserve(D, 4) == [C, A]


def test_a_touch_makes_an_entry_the_last_to_go_and_pins_nothing() -> None:
    ledger = ledger_of(9, a=3, b=3, c=3)
    ledger.touch(A)
    assert ledger.reserve(D, 9) == [B, C, A]


def test_a_commit_counts_as_use() -> None:
    ledger = Ledger(9)
    for key in (A, B, C):
        ledger.reserve(key, 3)
    for key in (B, C, A):
        ledger.commit(key)
    assert ledger.reserve(D, 3) == [B]


def test_a_pinned_entry_is_passed_over() -> None:
    ledger = ledger_of(9, a=3, b=3, c=3)
    assert ledger.pin(A) == 3
    ledger.pin(B)
    assert ledger.reserve(D, 3) == [C]


def test_an_entry_stays_until_its_last_reader_lets_go() -> None:
    ledger = ledger_of(5, a=5)
    ledger.pin(A)
    ledger.pin(A)
    ledger.unpin(A)
    assert ledger.reserve(B, 1) is None
    ledger.unpin(A)
    assert ledger.reserve(B, 1) == [A]


def test_a_fill_is_passed_over_and_takes_room_from_its_first_byte() -> None:
    ledger = Ledger(10)
    assert ledger.reserve(A, 6) == []
    assert (ledger.used, A in ledger) == (6, False)
    assert ledger.reserve(B, 6) is None


def test_what_does_not_fit_evicts_nothing() -> None:
    ledger = ledger_of(10, a=3, b=3, c=3)
    ledger.pin(A)
    assert ledger.reserve(D, 8) is None
    assert all(key in ledger for key in (A, B, C))
    assert (ledger.used, ledger.state(D)) == (9, State.ABSENT)


def test_what_is_over_the_budget_never_fits() -> None:
    assert Ledger(10).reserve(A, 11) is None
    assert Ledger(10).reserve(A, 10) == []
    assert Ledger(0).reserve(A, 1) is None


def test_a_fill_that_is_given_up_gives_its_room_back() -> None:
    ledger = Ledger(10)
    ledger.reserve(A, 10)
    ledger.release(A)
    assert (ledger.used, ledger.reserve(B, 10)) == (0, [])


def test_a_damaged_entry_can_be_dropped_under_its_readers() -> None:
    ledger = ledger_of(10, a=10)
    ledger.pin(A)
    ledger.drop(A)
    ledger.unpin(A)
    assert (ledger.used, ledger.state(A)) == (0, State.ABSENT)


def test_a_reader_of_a_dropped_entry_unpins_nothing_of_its_successor() -> None:
    ledger = ledger_of(10, a=5)
    ledger.pin(A)  # the first reader
    ledger.drop(A)
    ledger.reserve(A, 5)
    ledger.commit(A)
    ledger.pin(A)  # the second reader
    ledger.unpin(A)  # the first one lets go; the second one still reads
    assert ledger.reserve(B, 10) is None


def test_the_statistics_count_what_is_held() -> None:
    ledger = ledger_of(20, a=3, b=4)
    ledger.reserve(C, 5)
    ledger.pin(B)
    assert ledger.statistics() == LedgerStatistics(budget=20, used=12, entries=3, pinned=4)
    assert ledger.size(C) == 5


# Moves

CALLS: dict[tuple[State, State], Callable[[Ledger], object]] = {
    (State.ABSENT, State.FILLING): lambda ledger: ledger.reserve(A, 1),
    (State.FILLING, State.READY): lambda ledger: ledger.commit(A),
    (State.FILLING, State.ABSENT): lambda ledger: ledger.release(A),
    (State.READY, State.ABSENT): lambda ledger: ledger.drop(A),
}


def in_state(state: State) -> Ledger:
    """A ledger with A in this state."""
    ledger = Ledger(10)
    if state is not State.ABSENT:
        ledger.reserve(A, 5)
    if state is State.READY:
        ledger.commit(A)
    return ledger


def test_every_move_has_a_call() -> None:
    assert CALLS.keys() == MOVES.keys()


@pytest.mark.parametrize("move", CALLS, ids=lambda move: f"{move[0].value} to {move[1].value}")
@pytest.mark.parametrize("state", State)
def test_a_call_makes_its_move_and_raises_in_any_other_state(state: State, move: tuple[State, State]) -> None:
    ledger = in_state(state)
    before = (state, ledger.used)
    if state is move[0]:
        CALLS[move](ledger)
        assert ledger.state(A) is move[1]
        return
    with pytest.raises(RuntimeError):
        CALLS[move](ledger)
    assert (ledger.state(A), ledger.used) == before


def test_what_is_absent_has_no_size_and_no_pin() -> None:
    Ledger(10).touch(A)
    for call in (Ledger(10).size, Ledger(10).pin):
        with pytest.raises(KeyError):
            call(A)
    Ledger(10).unpin(A)


# Whatever happens in whatever order


class Model(RuleBasedStateMachine):
    """A second ledger, too simple to be wrong, told the same and asked the same."""

    def __init__(self) -> None:
        super().__init__()
        self.filling: dict[ShardKey, int] = {}
        self.ready: dict[ShardKey, int] = {}
        """Sizes; the next to be evicted is the first: those on probation, then the protected."""
        self.protected: set[ShardKey] = set()
        self.pins: list[ShardKey] = []

    @initialize(budget=st.integers(0, 20))
    def start(self, budget: int) -> None:
        """An empty ledger."""
        self.ledger = Ledger(budget)

    def used(self, key: ShardKey) -> None:
        """It is now protected, and the last to go; what is too much there goes back."""
        self.protected.add(key)
        self.ready[key] = self.ready.pop(key)
        while sum(self.ready[held] for held in self.protected) > PROTECTED * self.ledger.budget:
            oldest = next(held for held in self.ready if held in self.protected)
            self.protected.remove(oldest)
            self.on_probation(oldest)

    def on_probation(self, key: ShardKey) -> None:
        """The last of those that are not protected."""
        size = self.ready.pop(key)
        kept = {held: self.ready.pop(held) for held in list(self.ready) if held in self.protected}
        self.ready |= {key: size} | kept

    @rule(key=st.sampled_from(NAMES), size=st.integers(1, 12))
    def reserve(self, key: ShardKey, size: int) -> None:
        """A fill begins, evicting as many as it must, or not at all."""
        if key in self.filling or key in self.ready:
            return
        room = self.ledger.budget - sum(self.filling.values()) - sum(self.ready.values())
        victims: list[ShardKey] = []
        for candidate in self.ready:
            if room < size and candidate not in self.pins:
                victims.append(candidate)
                room += self.ready[candidate]
        if room < size:
            assert self.ledger.reserve(key, size) is None
            return
        assert self.ledger.reserve(key, size) == victims
        self.ready = {held: bytes for held, bytes in self.ready.items() if held not in victims}
        self.protected -= set(victims)
        self.filling[key] = size

    @precondition(lambda self: self.filling)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        """A fill is complete."""
        key = data.draw(st.sampled_from(sorted(self.filling)))
        self.ledger.commit(key)
        self.ready[key] = self.filling.pop(key)
        self.on_probation(key)

    @precondition(lambda self: self.filling)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """A fill is given up."""
        key = data.draw(st.sampled_from(sorted(self.filling)))
        self.ledger.release(key)
        del self.filling[key]

    @precondition(lambda self: self.ready)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        """A reader comes."""
        key = data.draw(st.sampled_from(sorted(self.ready)))
        assert self.ledger.pin(key) == self.ready[key]
        self.used(key)
        self.pins.append(key)

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        """A reader goes."""
        key = data.draw(st.sampled_from(self.pins))
        self.ledger.unpin(key)
        self.pins.remove(key)

    @precondition(lambda self: self.ready)
    @rule(data=st.data())
    def touch(self, data: st.DataObject) -> None:
        """An entry is used at once."""
        key = data.draw(st.sampled_from(sorted(self.ready)))
        self.ledger.touch(key)
        self.used(key)

    @precondition(lambda self: self.ready)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        """An entry is purged, whoever reads it; its readers let go later."""
        key = data.draw(st.sampled_from(sorted(self.ready)))
        self.ledger.drop(key)
        del self.ready[key]
        self.protected.discard(key)

    @invariant()
    def agrees(self) -> None:
        """Both ledgers hold the same, and no more than the budget."""
        held = self.filling | self.ready
        statistics = self.ledger.statistics()
        assert statistics.used == self.ledger.used == sum(held.values()) <= self.ledger.budget
        assert statistics.entries == len(held)
        assert statistics.pinned == sum(size for key, size in held.items() if key in self.pins)
        for key in NAMES:
            expected = State.READY if key in self.ready else State.FILLING if key in self.filling else State.ABSENT
            assert self.ledger.state(key) is expected


TestAnyOrder = Model.TestCase
TestAnyOrder.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
