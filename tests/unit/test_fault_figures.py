"""What a run of faults and a soak say is what was seen: slopes, verdicts, coverage, tables."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.faults.figures import FAULTS, Case, Series, exit_code, grows, ids_by_fault, named, outcomes, page, row, slope

ROOT = Path(__file__).parents[2]
HOUR = 3600.0


def samples(an_hour: float, noise: float, seed: int = 1, count: int = 400) -> list[tuple[float, float]]:
    """Half an hour of something that grows, and goes up and down beside that."""
    rng = random.Random(seed)
    return [(at, 80 + an_hour * at / HOUR + rng.gauss(0, noise)) for at in (n * 1800 / count for n in range(count))]


@settings(deadline=None, max_examples=20)
@given(st.floats(-50, 50), st.integers(0, 1000))
def test_a_slope_is_what_it_grows_by(an_hour: float, seed: int) -> None:
    found = slope(samples(an_hour, 0, seed))
    assert found is not None
    assert found.low <= found.middle <= found.high
    assert found.middle == pytest.approx(an_hour, abs=1e-6)


def test_spikes_and_one_step_do_not_make_a_slope() -> None:
    spiky = [(at, value + (500 if number % 20 == 0 else 0)) for number, (at, value) in enumerate(samples(0, 0.1))]
    found = slope(spiky)
    assert found is not None and abs(found.middle) < 0.2
    assert grows(found, 1.0) == "flat"


@pytest.mark.parametrize(
    ("an_hour", "noise", "count", "verdict"),
    [
        (0, 0.1, 400, "flat"),
        (8, 0.1, 400, "grows"),
        (8, 2, 400, "grows"),
        (0, 20, 400, "unclear"),
        (8, 0, 5, "unclear"),
    ],
)
def test_what_grows_is_told_from_what_goes_up_and_down(an_hour: float, noise: float, count: int, verdict: str) -> None:
    assert grows(slope(samples(an_hour, noise, count=count)), 1.0) == verdict


def test_what_grew_by_less_than_an_allocator_keeps_is_unclear() -> None:
    found = slope(samples(8, 0.1))
    assert grows(found, 1.0, least=3.5) == "grows" and grows(found, 1.0, least=5) == "unclear"


def test_what_comes_before_it_is_warm_does_not_count() -> None:
    rising = [(float(at), float(min(at, 600))) for at in range(0, 1800, 5)]
    assert Series("edge", "RSS MB", 1.0, rising, warm=0).verdict != "flat"
    assert Series("edge", "RSS MB", 1.0, rising, warm=600).verdict == "flat"


def test_the_page_needs_nothing_else_and_shows_names_as_they_are() -> None:
    made = page("Soak", {"broken": "<none>"}, [Series("edge <1>", "RSS MB", 1.0, samples(0, 1), warm=300)])
    assert made.count("<svg") == 1 and "edge &lt;1&gt;" in made and "&lt;none&gt;" in made
    assert "http" not in made and "<script" not in made
    assert "<svg" not in page("Soak", {}, [Series("edge", "tasks", 1.0, [(0.0, 1.0)])])


def test_a_case_is_held_broken_skipped_or_not_run() -> None:
    held = Case("F7", injected=2, recoveries=[1.0, 4.0], served=100, passed=3, skipped=1)
    broken = Case("F5", injected=1, broken=["I1: other bytes"])
    assert row(held) == ["F7", "Redis killed", "2", "100", "", "2.5 / 4.0", "3 (+1 skipped)", "held"]
    assert row(broken)[-1] == "BROKEN"
    assert row(Case("F4", skipped=2))[-1] == "skipped" and row(Case("F4"))[-1] == "not run"
    assert row(Case("F4", covered=False))[-1] == "not covered"
    assert exit_code([held, Case("F4")]) == 0 and exit_code([held, broken]) == 1


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("F7, F8: longer than a TTL.", {"F7", "F8"}),
        ("F15 to F18: whoever", {"F15", "F16", "F17", "F18"}),
        ("by the client: F16. F99 and AF3 are nothing", {"F16"}),
        ("", set()),
    ],
)
def test_docstrings_name_faults(docstring: str, expected: set[str]) -> None:
    assert named(docstring) == expected


def test_outcomes_are_of_tests_without_their_parameters() -> None:
    came = outcomes([("tests.faults.test_x", "test_a[1-b]", "passed"), ("tests.faults.test_x", "test_a[2]", "failed")])
    assert came == {"tests/faults/test_x.py::test_a": {"passed": 1, "failed": 1}}


def test_every_test_of_a_fault_is_there_by_its_docstring() -> None:
    found = ids_by_fault(ROOT, ["tests/faults"])
    assert list(found) == list(FAULTS)
    assert "tests/faults/test_router.py::test_redis_is_away" in found["F7"]
    assert "tests/faults/test_router.py::test_redis_is_away" in found["F8"]
    assert len(found["F30"]) > 1, "by the docstring of their module"
