"""The ring: everyone who knows the same members agrees, and a change of members moves little."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.ring import Ring
from tests.unit.strategies import few, names

TEN = {f"edge-{number}": 1 for number in range(10)}
KEYS = [f"acme/model-{number}:all" for number in range(5000)]

members = st.dictionaries(names, st.integers(1, 3), min_size=1, max_size=5)


def shares(ring: Ring) -> Mapping[str, float]:
    """Which part of the keys each member owns."""
    counted = Counter(ring.owners(key, 1)[0] for key in KEYS)
    return {member: counted[member] / len(KEYS) for member in ring.members}


@few
@given(members, st.text(), st.data())
def test_the_order_in_which_members_are_told_of_is_no_matter(
    weights: dict[str, int], key: str, data: st.DataObject
) -> None:
    shuffled = dict(data.draw(st.permutations(list(weights.items()))))
    assert Ring(shuffled).owners(key) == Ring(weights).owners(key)


@few
@given(members, st.text())
def test_every_member_owns_every_key_once_in_some_order(weights: dict[str, int], key: str) -> None:
    assert sorted(Ring(weights).owners(key)) == sorted(weights)


@few
@given(members, st.text(), st.integers(0, 6))
def test_fewer_owners_are_the_first_of_all_owners(weights: dict[str, int], key: str, count: int) -> None:
    ring = Ring(weights)
    assert ring.owners(key, count) == ring.owners(key)[:count]


def test_an_empty_ring_has_no_owners() -> None:
    assert Ring({}).owners("key") == []
    assert Ring({}).owners("key", 3) == []


@few
@given(members, st.text(), st.data())
def test_a_member_that_leaves_changes_the_order_of_no_others(
    weights: dict[str, int], key: str, data: st.DataObject
) -> None:
    gone = data.draw(st.sampled_from(sorted(weights)))
    left = {member: weight for member, weight in weights.items() if member != gone}
    assert Ring(left).owners(key) == [member for member in Ring(weights).owners(key) if member != gone]


@pytest.mark.parametrize("gone", TEN)
def test_one_of_ten_that_leaves_moves_its_own_keys_only(gone: str) -> None:
    before, after = Ring(TEN), Ring({member: 1 for member in TEN if member != gone})
    for key in KEYS[:1000]:
        first, second = before.owners(key, 2)
        assert after.owners(key, 1) == [second if first == gone else first]


@pytest.mark.parametrize("region", ["local", "lyon", "oslo", "paris", "rome"])
def test_one_of_ten_that_leaves_moves_at_most_12_percent_of_the_keys(region: str) -> None:
    """It moves those that it owned, so none may own more."""
    assert max(shares(Ring({f"{region}-{number}": 1 for number in range(1, 11)})).values()) <= 0.12


def test_a_member_of_more_weight_owns_more() -> None:
    share = shares(Ring({"large": 4, "middle": 2, "small-1": 1, "small-2": 1}))
    assert share["large"] == pytest.approx(0.5, abs=0.08)
    assert share["middle"] == pytest.approx(0.25, abs=0.06)
    assert share["small-1"] == pytest.approx(0.125, abs=0.04)
    assert share["small-2"] == pytest.approx(0.125, abs=0.04)
