"""The order of regions: what was measured, what is configured, and what is not known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.nearness import Nearness, kilometres
from tests.unit.strategies import quick

PLACES = {"stockholm": (59.3, 18.1), "berlin": (52.5, 13.4), "lagos": (6.5, 3.4), "tokyo": (35.7, 139.7)}
ALL = ["berlin", "lagos", "oslo", "stockholm", "tokyo"]
Told = Mapping[str, Sequence[Mapping[str, float]]]


def order(nearness: Nearness, here: str, told: Told | None = None) -> list[tuple[str, str]]:
    """Regions and how their distance is known."""
    return [(away.region, away.how) for away in nearness.order(here, ALL, lambda region: (told or {}).get(region, []))]


def test_coordinates_order_regions_where_nothing_was_measured() -> None:
    assert order(Nearness(PLACES), "stockholm") == [
        ("stockholm", "here"), ("berlin", "coordinates"), ("lagos", "coordinates"), ("tokyo", "coordinates"),
        ("oslo", "unknown"),
    ]  # fmt: skip


def test_what_was_measured_wins_over_coordinates() -> None:
    told = {"stockholm": [{"tokyo": 1.0, "lagos": 300.0}]}
    found = order(Nearness(PLACES), "stockholm", told)
    assert found == [
        ("stockholm", "here"), ("tokyo", "measured"), ("berlin", "coordinates"), ("lagos", "measured"),
        ("oslo", "unknown"),
    ]  # fmt: skip


def test_the_median_of_the_nodes_counts() -> None:
    told = {"oslo": [{"berlin": 1.0}, {"berlin": 40.0}, {"berlin": 50.0}, {}], "berlin": [{"oslo": 2.0}]}
    [away] = Nearness().order("oslo", ["berlin"], lambda region: told[region])
    assert (away.ms, away.how) == (40.0, "measured")


def test_a_region_without_measurements_takes_those_of_the_other_side() -> None:
    told = {"berlin": [{"oslo": 7.0}]}
    [away] = Nearness(PLACES).order("oslo", ["berlin"], lambda region: told.get(region, []))
    assert (away.ms, away.how) == (7.0, "measured")


def test_links_cost_both_ways_unless_each_is_given() -> None:
    nearness = Nearness(PLACES, {"stockholm>berlin": 500.0, "berlin>lagos": 1.0, "lagos>berlin": 900.0})
    assert order(nearness, "stockholm")[-2][0] == "berlin"
    assert nearness.order("berlin", ["stockholm"], lambda _: [])[0].link == 500.0
    assert nearness.order("berlin", ["lagos"], lambda _: [])[0].link == 1.0
    assert nearness.order("lagos", ["berlin"], lambda _: [])[0].link == 900.0


def test_a_link_alone_is_known_and_regions_of_which_nothing_is_known_come_last_by_name() -> None:
    assert order(Nearness({}, {"oslo>tokyo": 80.0}), "oslo") == [
        ("oslo", "here"), ("tokyo", "link"), ("berlin", "unknown"), ("lagos", "unknown"), ("stockholm", "unknown"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("one", "other", "km"), [("stockholm", "berlin", 812), ("berlin", "lagos", 5198), ("stockholm", "tokyo", 8170)]
)
def test_great_circles(one: str, other: str, km: float) -> None:
    assert kilometres(PLACES[one], PLACES[other]) == pytest.approx(km, rel=0.02)


points = st.tuples(st.floats(-90, 90), st.floats(-180, 180))


@quick
@given(points, points)
def test_great_circles_are_symmetric_and_at_most_half_the_way_round(
    one: tuple[float, float], other: tuple[float, float]
) -> None:
    length = kilometres(one, other)
    assert 0 <= length <= 20_016
    assert length == pytest.approx(kilometres(other, one), abs=1e-6)


rtts = st.dictionaries(st.sampled_from(ALL), st.floats(0, 1000), max_size=5)


@quick
@given(st.sampled_from([*ALL, "nowhere", ""]), st.dictionaries(st.sampled_from(ALL), st.lists(rtts, max_size=3)))
def test_every_region_is_there_once_and_the_clients_own_first(here: str, told: Told) -> None:
    found = order(Nearness(PLACES), here, told)
    assert sorted(region for region, _ in found) == ALL
    assert here not in ALL or found[0] == (here, "here")
