"""Views: what a client is told of the members, and what it takes of what it is told."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearshard.owners import Owners
from shared.codec import encode_json
from shared.errors import UpstreamError
from shared.health import THRESHOLD, Health
from shared.loads import Loads
from shared.nearness import Nearness
from shared.node import Node, State
from shared.routing import Routing, Snapshot, Verdict
from shared.view import MAX_ORIGINS, MAX_VIEW, MAX_WEIGHT, View, decode, near, parse
from tests.unit.strategies import few, names, quick

REGIONS = ("lyon", "oslo", "paris")
WELL: Mapping[Verdict, frozenset[str]] = {Verdict.DRAINING: frozenset(), Verdict.EJECTED: frozenset()}
ORIGINS = ("http://origin:8710",)


def node(region: str, number: int, weight: int = 1) -> Node:
    """One of a region."""
    return Node(f"{region}-{number}", f"http://{region}-{number}:8720", region, weight)


def snapshot_of(**regions: int) -> Snapshot:
    """So many nodes in each region."""
    return Snapshot([node(region, number) for region, count in regions.items() for number in range(count)], 7)


# What is told


@pytest.mark.parametrize(
    ("count", "regions", "left_off"),
    [
        (100, ["paris", "oslo", "lyon"], 0), (12, ["paris", "oslo"], 5), (11, ["paris", "lyon"], 9),
        (8, ["paris", "lyon"], 9), (7, ["paris"], 14), (1, ["paris"], 14),
    ],
)  # fmt: skip
def test_regions_come_whole_the_nearest_always_the_others_where_they_fit(
    count: int, regions: list[str], left_off: int
) -> None:
    snapshot = snapshot_of(paris=3, lyon=5, oslo=9)
    view = near(snapshot, "paris", ["paris", "oslo", "lyon"], WELL, ORIGINS, count)
    assert (list(view.regions), view.left_off) == (regions, left_off)
    assert {n.id for n in view.nodes} == {n.id for n in snapshot.nodes.values() if n.region in regions}
    assert (view.epoch, view.region, view.origins) == (7, "paris", ORIGINS)


def test_only_nodes_that_are_told_of_are_said_to_be_passed_over() -> None:
    passed = {Verdict.DRAINING: {"paris-0", "oslo-1"}, Verdict.EJECTED: {"paris-1", "oslo-2"}}
    view = near(snapshot_of(paris=3, oslo=5), "paris", ["paris", "oslo"], passed, ORIGINS, 3)
    assert (set(view.draining), set(view.ejected)) == ({"paris-0"}, {"paris-1"})


def test_ten_thousand_nodes_make_a_small_view() -> None:
    snapshot = snapshot_of(**{f"r{number}": 100 for number in range(100)})
    view = near(snapshot, "r7", ["r7", *(r for r in snapshot.rings if r != "r7")], WELL, ORIGINS, 256)
    assert len(view.nodes) == 200 and view.left_off == 9800
    assert len(encode_json(view.record())) < 40_000


# What is taken


@st.composite
def views(draw: st.DrawFn) -> View:
    """Any that a router may tell."""
    found = draw(st.lists(st.tuples(st.sampled_from(REGIONS), st.integers(0, 9), st.integers(1, 10)), max_size=8,
                          unique_by=lambda item: item[:2]))  # fmt: skip
    nodes = [node(*item) for item in found]
    regions = draw(st.permutations(sorted({n.region for n in nodes})))
    passed = {n.id: draw(st.sampled_from(["well", "well", "draining", "ejected", "both"])) for n in nodes}
    return View(
        draw(st.integers(0, 1 << 40)),
        draw(names),
        tuple(regions),
        tuple(nodes),
        frozenset(name for name, how in passed.items() if how in ("draining", "both")),
        frozenset(name for name, how in passed.items() if how in ("ejected", "both")),
        tuple(draw(st.lists(st.sampled_from(["http://o:1", "https://o/base"]), unique=True))),
        draw(st.integers(0, 10_000)),
    )


@quick
@given(views())
def test_a_client_reads_the_view_that_was_told(view: View) -> None:
    assert decode(encode_json(view.record())) == view


GOOD = View(3, "paris", ("paris", "oslo"), (node("paris", 1), node("oslo", 1)), origins=ORIGINS).record()
JUNK: list[Any] = [
    None,
    5,
    -1,
    1.5,
    True,
    "",
    "x y",
    "UPPER",
    [],
    [[]],
    [5],
    ["", ""],
    {},
    {"id": 5},
    "http://a b",
    ["file:/x"],
]


def changed(*path: str | int, to: Any) -> Any:
    """The good one with something else at a place."""
    document = copy.deepcopy(GOOD)
    where: Any = document
    for step in path[:-1]:
        where = where[step]
    where[path[-1]] = to
    return document


@pytest.mark.parametrize(
    "document",
    [
        None, [], "view", 5, {},
        *({key: value for key, value in GOOD.items() if key != missing} for missing in GOOD),
        *(changed(key, to=junk) for key in ("nodes", "regions") for junk in JUNK if junk != []),
        *(changed(key, to=junk) for key in ("epoch", "left_off") for junk in JUNK if junk != 5),
        changed("epoch", to=1 << 60), changed("region", to="North"), changed("region", to=5),
        changed("regions", to=["paris"]), changed("regions", to=["paris", "oslo", "lyon"]),
        changed("regions", to=["paris", "oslo", "oslo"]), changed("nodes", 1, "id", to="paris-1"),
        changed("nodes", 0, "url", to="http://169.254.169.254"), changed("nodes", 0, "url", to="http://a/path"),
        changed("nodes", 0, "url", to="file:///etc/passwd"), changed("nodes", 0, "weight", to=0),
        changed("nodes", 0, "weight", to=11), changed("nodes", 0, "draining", to=1),
        changed("nodes", 0, "ejected", to=None), changed("nodes", 0, "id", to="../x"),
        changed("origins", to=["http://a b"]), changed("origins", to=["ftp://a"]), changed("origins", to=[5]),
        changed("origins", to=["http://a\r\nX: y"]), changed("origins", to=["http://a"] * (MAX_ORIGINS + 1)),
        changed("origins", to=["http://" + "a" * 2001]),
    ],
)  # fmt: skip
def test_what_is_no_view_is_refused(document: object) -> None:
    with pytest.raises(UpstreamError):
        parse(document)


def test_more_than_a_client_has_use_for_is_refused() -> None:
    many = [node("paris", number, 10).record() | {"draining": False, "ejected": False}
            for number in range(MAX_WEIGHT // 10 + 1)]  # fmt: skip
    with pytest.raises(UpstreamError):
        parse({**GOOD, "regions": ["paris"], "nodes": many})
    assert parse({**GOOD, "regions": ["paris"], "nodes": many[:-1]}).left_off == 0
    for data in (b"", b"{", b"\xff", b"[" * 100_000, b" " * (MAX_VIEW + 1), b'{"epoch":NaN}'):
        with pytest.raises(UpstreamError):
            decode(data)


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)
anything = st.recursive(plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner))


@quick
@given(st.sampled_from(sorted(GOOD)), anything)
def test_nothing_but_a_refusal_comes_of_anything(key: str, value: object) -> None:
    for document in (value, {**GOOD, key: value}, {**GOOD, "nodes": [value]}):
        try:
            view = parse(json.loads(json.dumps(document)))
        except UpstreamError:
            continue
        Owners(view).sources("key", set())


# Owners: the client's are the router's


@st.composite
def tables(draw: st.DrawFn) -> tuple[Routing, Snapshot]:
    """A router's choice, among nodes in regions, each somehow, with round trips that some measured."""
    found = draw(st.lists(st.tuples(st.sampled_from(REGIONS), st.integers(0, 5), st.integers(1, 3)), min_size=1,
                          max_size=9, unique_by=lambda item: item[:2]))  # fmt: skip
    snapshot = Snapshot([node(*item) for item in found], 4)
    health = Health()
    states = {}
    for name in snapshot.nodes:
        rtt = draw(st.dictionaries(st.sampled_from(REGIONS), st.floats(1, 100), max_size=2))
        states[name] = State(0, draw(st.integers(0, 4)) == 0, rtt)
        if draw(st.integers(0, 4)) == 0:
            for _ in range(THRESHOLD):
                health.failed(name, 0.0)
    routing = Routing(Nearness({"oslo": (59.9, 10.7), "paris": (48.9, 2.4)}), Loads(), health)
    routing.update(snapshot, states, lambda _: -1000.0, 0.0)
    return routing, snapshot


@few
@given(tables(), st.sampled_from([*REGIONS, "nowhere"]), st.lists(st.text(), min_size=1, max_size=10))
def test_a_client_reckons_the_owners_that_a_router_does(
    table: tuple[Routing, Snapshot], region: str, keys: list[str]
) -> None:
    routing, snapshot = table
    order = routing.nearest(region, 0.0)
    view = near(snapshot, region, order, routing.passed_over(), ORIGINS, 4096)
    owners = Owners(decode(encode_json(view.record())))
    for key in keys:
        theirs = routing.choose(region, key, 4, 0.0)
        well = [choice.node.url for choice in theirs if choice.verdict in (Verdict.OWNER, Verdict.PANIC)]
        mine = owners.nodes(key, set())
        assert mine[: len(well)] == well
        assert len(mine) == len(theirs) == len(set(mine))


@few
@given(tables(), st.text(), st.integers(0, 200))
def test_who_failed_is_the_last_resort_and_nobody_is_asked_twice(
    table: tuple[Routing, Snapshot], key: str, picked: int
) -> None:
    routing, snapshot = table
    order = routing.nearest("paris", 0.0)
    owners = Owners(near(snapshot, "paris", order, routing.passed_over(), ["http://o:1", "http://o:2"], 4096))
    everyone = [*(n.url for n in snapshot.nodes.values()), "http://o:1", "http://o:2"]
    failed = {url for number, url in enumerate(everyone) if picked >> number % 8 & 1}
    found = owners.sources(key, failed)
    assert len(found) == len(set(found))
    flags = [url in failed for url in found]
    assert flags == sorted(flags)
    assert len([url for url in found if url not in failed]) >= min(4, len([u for u in everyone if u not in failed]))
    assert {"http://o:1", "http://o:2"} <= set(found)
    before = owners.sources(key, set())
    assert [url for url in found if url in before and url not in failed] == [u for u in before if u not in failed]
