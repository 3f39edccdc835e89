"""Outcomes: one answer is reported as its dearest part, and Cache-Status says it as RFC 9211 wants."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.outcome import Outcome, cache_status, dearest
from tests.unit.strategies import quick

CHEAPEST_FIRST = [
    Outcome.HIT_MEMORY,
    Outcome.HIT_DISK,
    Outcome.COLLAPSED,
    Outcome.FILL_PEER,
    Outcome.FILL_PARENT,
    Outcome.FILL_ORIGIN,
    Outcome.STALE,
]


def test_outcomes_are_ordered_by_cost() -> None:
    assert sorted(Outcome, key=lambda outcome: outcome.cost) == CHEAPEST_FIRST


@quick
@given(st.lists(st.sampled_from(Outcome), min_size=1))
def test_many_outcomes_are_reported_as_the_dearest(outcomes: list[Outcome]) -> None:
    found = dearest(outcomes)
    assert found in outcomes
    assert all(outcome.cost <= found.cost for outcome in outcomes)


@pytest.mark.parametrize(
    ("outcome", "field"),
    [
        (Outcome.HIT_MEMORY, '"edge-1"; hit; detail=hit-memory'),
        (Outcome.HIT_DISK, '"edge-1"; hit; detail=hit-disk'),
        (Outcome.COLLAPSED, '"edge-1"; fwd=uri-miss; collapsed; detail=collapsed'),
        (Outcome.FILL_PEER, '"edge-1"; fwd=uri-miss; detail=fill-peer'),
        (Outcome.FILL_PARENT, '"edge-1"; fwd=uri-miss; detail=fill-parent'),
        (Outcome.FILL_ORIGIN, '"edge-1"; fwd=uri-miss; detail=fill-origin'),
        (Outcome.STALE, '"edge-1"; hit; ttl=-1; detail=stale'),
    ],
)
def test_cache_status_says_how_it_was_served(outcome: Outcome, field: str) -> None:
    assert cache_status("edge-1", outcome) == field


@pytest.mark.parametrize("outcome", Outcome)
def test_cache_status_has_hit_or_fwd_and_never_both(outcome: Outcome) -> None:
    parameters = {part.partition("=")[0] for part in cache_status("edge-1", outcome).split("; ")[1:]}
    assert len(parameters & {"hit", "fwd"}) == 1
    assert "collapsed" not in parameters or "fwd" in parameters
