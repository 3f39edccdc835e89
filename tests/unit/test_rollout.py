"""A rollout's rule: who is in, how many, and that they stay in."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from origin.rollout import Asked, decide
from origin.signing import Ref
from shared.digest import Digest, digest_of
from shared.errors import BadId, ConfigError, Conflict, NotFound
from shared.pins import check_pin, parse_pins, pinned
from shared.rollout import NOBODY, Rollout, Subject, at_address, meant_for, next_step

OLD, NEW = digest_of(b"old"), digest_of(b"new")
KEYS = st.text(min_size=1, max_size=40)
PERCENTS = st.integers(1, 100)


def is_in(percent: int, key: str, *sites: str, site: str = "", revision: Digest = NEW) -> bool:
    return meant_for(Rollout(revision, 9, percent, sites), "acme/lm", "main", Subject(key, site))


@given(KEYS, PERCENTS, PERCENTS)
def test_who_is_in_stays_in_when_it_goes_on(key: str, one: int, other: int) -> None:
    low, high = sorted((one, other))
    assert is_in(low, key) <= is_in(high, key) <= is_in(100, key) is True


@pytest.mark.parametrize("percent", [1, 10, 50, 90])
def test_the_share_is_near_the_percentage(percent: int) -> None:
    count = sum(is_in(percent, f"client {n}") for n in range(10_000))
    assert abs(count - 100 * percent) < 5 * (percent * (100 - percent)) ** 0.5, "five standard deviations"


def test_other_revisions_are_tried_on_others() -> None:
    first = {n for n in range(2000) if is_in(10, str(n))}
    second = {n for n in range(2000) if is_in(10, str(n), revision=OLD)}
    assert len(first & second) < len(first) / 2


@given(KEYS, PERCENTS)
def test_sites_that_are_not_named_are_left_out(key: str, percent: int) -> None:
    assert not is_in(percent, key, "north", site="south") and not is_in(percent, key, "north")
    assert is_in(percent, key, "north", "south", site="south") == is_in(percent, key)
    assert is_in(100, "", "north", site="north")
    assert percent == 100 or not is_in(percent, ""), "of whom nothing is known is among the last"


def test_the_places_are_the_same_for_ever() -> None:
    """Old and new clients, edges and routers must agree on them."""
    assert [n for n in range(40) if is_in(10, f"client {n}")] == [2, 4, 5, 23, 35]


def test_an_address_is_a_subject_by_what_stays_of_it() -> None:
    assert at_address("::ffff:10.0.0.1", "a") == at_address("10.0.0.1", "a") == Subject("10.0.0.1", "a")
    one, other = at_address("2001:db8::1:2", ""), at_address("2001:db8::ffff:ffff:ffff:1", "")
    assert one == other != at_address("2001:db9::1:2", "")
    assert at_address("fe80::1%eth0", "").key and at_address("unix:", "") == at_address(None, "") == NOBODY


@given(PERCENTS, st.lists(st.sampled_from(["a", "b", "c"]), unique=True))
def test_a_rule_is_what_was_signed(percent: int, sites: list[str]) -> None:
    rule = Rollout(NEW, 9, percent, tuple(sites))
    assert Rollout.parse(rule.record() | {"later": 1}) == rule


@pytest.mark.parametrize(
    "wrong",
    [
        {"percent": 0}, {"percent": 101}, {"percent": True}, {"percent": 1.5}, {"size": 0}, {"size": "9"},
        {"sites": "a"}, {"sites": [1]}, {"sites": ["A b"]}, {"sites": ["a"] * 2000},
        {"revision": "x"}, {"revision": None},
    ],
)  # fmt: skip
def test_a_wrong_rule_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises((ValueError, BadId, KeyError, TypeError)):
        Rollout.parse(Rollout(NEW, 9, 5).record() | wrong)


def refs(rule: Rollout | None = None) -> dict[str, Ref]:
    return {"main": Ref(OLD, "then", 8, rollout=rule), "canary": Ref(NEW, "now", 9)}


def test_a_rollout_begins_goes_on_and_ends() -> None:
    def after(rule: Rollout | None, **asked: Any) -> Rollout | None:
        return decide(refs(rule), "acme/lm", "main", Asked(**asked)).rollout

    begun = after(None, candidate="canary", percent=10, sites=("a",))
    assert begun == Rollout(NEW, 9, 10, ("a",)) and after(begun) == begun
    assert after(None, candidate=NEW, further=True) == Rollout(NEW, 9, 1)
    assert after(begun, percent=50) == Rollout(NEW, 9, 50, ("a",))
    assert after(begun, candidate="canary", sites=()) == Rollout(NEW, 9, 10)
    assert after(begun, further=True) == Rollout(NEW, 9, 25, ("a",))
    assert after(begun, rollback=True) is None
    done = decide(refs(begun), "acme/lm", "main", Asked(finish=True))
    assert (done.revision, done.size, done.rollout) == (NEW, 9, None)
    assert [next_step(n) for n in (0, 1, 99, 100)] == [1, 5, 100, 100]


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        (Asked(percent=5), NotFound),
        (Asked(finish=True), NotFound),
        (Asked("nightly", percent=5), NotFound),
        (Asked(digest_of(b"unpublished"), percent=5), NotFound),
        (Asked("main", percent=5), ConfigError),
        (Asked("canary"), ConfigError),
    ],
)
def test_what_cannot_be_rolled_out_is_refused(asked: Asked, error: type[Exception]) -> None:
    with pytest.raises(error):
        decide(refs(), "acme/lm", "main", asked)


def test_a_pin_is_of_one_ref_and_of_a_site_before_all() -> None:
    pins = parse_pins([f"acme/lm={OLD}", f"acme/lm@v2={NEW}", f"acme/lm={NEW}@north"])
    assert pinned(pins, "acme/lm", "main", "south") == pinned(pins, "acme/lm", "main", "") == OLD
    assert pinned(pins, "acme/lm", "main", "north") == pinned(pins, "acme/lm", "v2", "north") == NEW
    assert pinned(pins, "acme/lm", "v3", "") is pinned(pins, "acme/other", "main", "") is None
    for wrong in ("acme/lm", "acme/lm=main", f"lm={OLD}", f"acme/lm@={OLD}", f"acme/lm={OLD}@", ""):
        with pytest.raises(ValueError, match="a pin is"):
            check_pin(wrong)
    with pytest.raises(BadId):
        parse_pins([f"acme/lm={OLD}", f"acme/lm@main={NEW}"])


def test_one_rollout_of_a_ref_at_a_time() -> None:
    with pytest.raises(Conflict):
        decide(refs(Rollout(digest_of(b"third"), 7, 5)), "acme/lm", "main", Asked("canary", percent=5))
    for wrong in (Asked(percent=0), Asked(percent=5, finish=True), Asked("canary", rollback=True)):
        with pytest.raises(ConfigError):
            wrong.check()
