"""Health: what ejects a node, for how long, and what does not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.health import EJECTION, FORGIVE, LONGEST, MAX_REPORTERS, REPORT_LIFETIME, THRESHOLD, Health, reporter
from tests.unit.strategies import quick


def fail(health: Health, times: int, now: float = 0.0) -> bool:
    """Failing probes; whether the last one ejected."""
    return [health.failed("a", now) for _ in range(times)][-1]


def out(health: Health, now: float) -> bool:
    """Whether the node is ejected."""
    return "a" in health.ejected(now)


def test_five_failures_one_after_the_other_eject_for_half_a_minute() -> None:
    health = Health()
    assert not fail(health, THRESHOLD - 1)
    assert not out(health, 0)
    assert fail(health, 1)
    assert out(health, EJECTION - 0.1)
    assert not out(health, EJECTION)


def test_a_success_between_them_begins_anew() -> None:
    health = Health()
    for _ in range(10):
        assert not fail(health, THRESHOLD - 1)
        health.succeeded("a", 0)
    assert not out(health, 0)


def test_after_an_ejection_one_failure_is_enough_and_it_lasts_longer_each_time() -> None:
    health, now = Health(), 0.0
    fail(health, THRESHOLD)
    for number in range(1, 15):
        lasts = min(EJECTION * number, LONGEST)
        assert out(health, now + lasts - 0.1)
        now += lasts
        assert not out(health, now)
        assert fail(health, 1, now)


def test_a_success_ends_probation_and_time_without_failures_forgives_step_by_step() -> None:
    health = Health()
    fail(health, THRESHOLD)
    fail(health, 1, 30)  # the second, for 60 s
    now = 90.0
    assert not out(health, now)
    health.succeeded("a", now)
    assert not fail(health, THRESHOLD - 1, now), "no longer on probation"
    health.succeeded("a", now)
    assert health.describe("a", now)["ejections"] == 2
    for left in (1, 0, 0):
        now += FORGIVE
        health.succeeded("a", now)
        health.succeeded("a", now)
        assert health.describe("a", now)["ejections"] == left


def test_while_it_is_out_failures_do_not_keep_it_out_longer() -> None:
    health = Health()
    fail(health, THRESHOLD)
    assert not fail(health, 50, 10)
    assert not out(health, EJECTION)


def test_one_address_ejects_nothing_however_often_it_complains() -> None:
    health = Health()
    assert not any(health.report("a", False, "192.0.2.1", now / 10) for now in range(1000))
    assert not any(health.report("a", False, f"2001:db8::{n:x}", 100) for n in range(1, 1000)), "one customer's /64"
    assert not out(health, 100)


def test_two_addresses_do_not_finish_what_probes_began() -> None:
    health = Health()
    fail(health, THRESHOLD - 1)
    assert not health.report("a", False, "192.0.2.1", 0)
    assert not health.report("a", False, "192.0.2.2", 0)
    assert health.report("a", False, "192.0.2.3", 0)


def test_many_addresses_do_it_alone_and_only_within_a_minute() -> None:
    health = Health()
    assert [health.report("a", False, f"192.0.2.{n}", 0) for n in range(10)] == [False] * 9 + [True]
    health = Health()
    for n in range(100):
        assert not health.report("a", False, f"192.0.2.{n}", n * REPORT_LIFETIME / 8)


def test_a_client_that_is_content_takes_its_complaint_back() -> None:
    health = Health()
    for n in range(9):
        health.report("a", False, f"192.0.2.{n}", 0)
    health.report("a", True, "192.0.2.0", 0)
    assert not health.report("a", False, "192.0.2.9", 0)


def test_complaints_take_bounded_room() -> None:
    health = Health()
    fail(health, THRESHOLD)
    for n in range(10_000):
        health.report("a", False, f"10.0.{n >> 8}.{n & 255}", 1)
    assert health.describe("a", 1)["complaints"] == MAX_REPORTERS


def test_leaving_and_coming_back_is_no_cure() -> None:
    health = Health()
    fail(health, THRESHOLD)
    health.keep({})
    assert out(health, 1)
    assert not out(health, EJECTION)
    health.keep({})
    assert health.describe("a", EJECTION)["ejections"] == 0


def test_those_who_keep_views_hear_of_ejections_and_of_their_ends() -> None:
    health = Health()
    before = health.changes
    fail(health, THRESHOLD)
    health.ejected(1)
    during = health.changes
    health.ejected(EJECTION)
    assert before < during < health.changes


@pytest.mark.parametrize(
    ("address", "who"),
    [
        ("192.0.2.1", "192.0.2.1"), ("::ffff:192.0.2.1", "192.0.2.1"), ("2001:db8::1", "20010db800000000::"),
        ("2001:db8:0:0:9::1", "20010db800000000::"), ("2001:db8:0:1::1", "20010db800000001::"), ("", ""),
    ],
)  # fmt: skip
def test_a_report_is_its_customers(address: str, who: str) -> None:
    assert reporter(address) == who


acts = st.lists(
    st.tuples(st.sampled_from(["ok", "failed", "complaint", "content"]), st.floats(0, 40), st.integers(1, 9))
)


@quick
@given(acts)
def test_no_ejection_is_longer_than_it_may_be_and_none_comes_without_cause(steps: list[tuple[str, float, int]]) -> None:
    health, now, causes = Health(), 0.0, 0
    for act, wait, who in steps:
        now += wait
        if act == "ok":
            health.succeeded("a", now)
        elif act == "failed":
            causes += 1
            health.failed("a", now)
        else:
            causes += act == "complaint"
            health.report("a", act == "content", f"192.0.2.{who}", now)
        described = health.describe("a", now)
        assert 0 <= described["seconds_left"] <= LONGEST
        assert out(health, now) == described["ejected"]
        assert not described["ejected"] or causes >= THRESHOLD
    assert not out(health, now + LONGEST)
