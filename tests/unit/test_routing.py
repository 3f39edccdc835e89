"""The choice of nodes: in which order, who is passed over and why, and that nobody is lost by it."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.health import EJECTION, THRESHOLD, Health
from shared.loads import BOUND, FADE, FLOOR, SLOW, Loads
from shared.nearness import Nearness
from shared.node import Node, State
from shared.routing import FIRST_KEYS, SLOW_START, Choice, Routing, Snapshot, Verdict
from tests.unit.strategies import few, quick

OLD = -1000.0
"""When nodes joined that are long there."""
KEYS = [f"acme/model-{number}:all" for number in range(300)]


def snapshot_of(**regions: int) -> Snapshot:
    """So many nodes in each region."""
    nodes = [
        Node(f"{region}-{number}", f"http://{region}-{number}", region, 1)
        for region, count in regions.items()
        for number in range(count)
    ]
    return Snapshot(nodes, 1)


class Table:
    """A routing and what is told to it."""

    def __init__(self, snapshot: Snapshot, joined: Mapping[str, float] | None = None) -> None:
        self.snapshot, self.now = snapshot, 0.0
        self.states: dict[str, State] = {}
        self.joined = dict(joined or {})
        self.routing = Routing(Nearness(), Loads(), Health())
        self.update()

    def update(self) -> None:
        """Tell it."""
        self.routing.update(self.snapshot, self.states, lambda node: self.joined.get(node, OLD), self.now)

    def eject(self, *nodes: str) -> None:
        """Let probes of these fail."""
        for node in nodes:
            for _ in range(THRESHOLD):
                self.routing.health.failed(node, self.now)
        self.update()

    def drain(self, *nodes: str) -> None:
        """These say that they drain."""
        self.states |= {node: State(draining=True) for node in nodes}
        self.update()

    def busy(self, in_flight: Mapping[str, int]) -> None:
        """These are answering so many requests."""
        self.states |= {node: State(in_flight=count) for node, count in in_flight.items()}
        self.now += 100 * SLOW
        self.update()

    def choose(self, key: str, region: str = "paris", count: int = 100) -> list[Choice]:
        """The choices for a key."""
        return self.routing.choose(region, key, count, self.now)

    def verdicts(self, key: str, region: str = "paris", count: int = 100) -> dict[str, Verdict]:
        """Why each node is where it is."""
        return {choice.node.id: choice.verdict for choice in self.choose(key, region, count)}


# Order


@st.composite
def tables(draw: st.DrawFn) -> Table:
    """Nodes in regions, each somehow."""
    ids = draw(st.lists(st.sampled_from([f"edge-{number}" for number in range(8)]), unique=True))
    region, weight = st.sampled_from(["lyon", "oslo", "paris"]), st.integers(1, 3)
    snapshot = Snapshot([Node(node, f"http://{node}:8720", draw(region), draw(weight)) for node in ids], epoch=1)
    table = Table(snapshot, {node: draw(st.sampled_from([OLD, OLD, -1.0, -25.0])) for node in ids})
    for node in ids:
        table.states[node] = State(draw(st.integers(0, 40)), draw(st.integers(0, 3)) == 0)
    table.update()
    table.eject(*(node for node in ids if draw(st.integers(0, 2)) == 0))
    return table


regions = st.sampled_from(["lyon", "oslo", "paris", "nowhere"])


@few
@given(tables(), regions, st.text())
def test_every_node_is_there_once_and_fewer_are_the_first_of_all(table: Table, region: str, key: str) -> None:
    whole = table.choose(key, region)
    assert sorted(choice.node.id for choice in whole) == sorted(table.snapshot.nodes)
    for count in range(len(whole) + 2):
        assert table.choose(key, region, count or 1) == whole[: count or 1]


@few
@given(tables(), regions, st.text())
def test_those_that_are_well_come_in_the_order_of_regions_and_rings(table: Table, region: str, key: str) -> None:
    found = [c.node for c in table.choose(key, region) if c.verdict in (Verdict.OWNER, Verdict.PANIC)]
    order = [region, *sorted(table.snapshot.rings.keys() - {region})]
    expected = [
        node for name in order if name in table.snapshot.rings for node in table.snapshot.rings[name].owners(key)
    ]
    assert [node.id for node in found] == [name for name in expected if name in {node.id for node in found}]


@few
@given(tables(), regions, st.text())
def test_those_passed_over_for_load_or_youth_come_after_their_region_and_the_others_last(
    table: Table, region: str, key: str
) -> None:
    rank = {Verdict.OWNER: 0, Verdict.PANIC: 0, Verdict.STARTING: 1, Verdict.LOADED: 1}
    order = [region, *sorted(table.snapshot.rings.keys() - {region})]
    ranks = []
    for choice in table.choose(key, region):
        if choice.verdict in rank:
            ranks.append((0, order.index(choice.node.region), rank[choice.verdict]))
        else:
            ranks.append((1 if choice.verdict is Verdict.DRAINING else 2, order.index(choice.node.region), 0))
    assert ranks == sorted(ranks)


@few
@given(tables(), regions, st.text())
def test_routers_that_know_the_same_agree(table: Table, region: str, key: str) -> None:
    other = Table(Snapshot(reversed([*table.snapshot.nodes.values()]), epoch=2), table.joined)
    other.states, other.routing.health = table.states, table.routing.health
    other.update()
    assert other.choose(key, region) == table.choose(key, region)


def test_without_nodes_there_are_no_choices() -> None:
    assert Table(Snapshot([], epoch=0)).choose("key") == []


def test_a_snapshot_keeps_the_rings_of_regions_that_have_not_changed() -> None:
    before = snapshot_of(paris=3, oslo=2)
    gone = [node for node in before.nodes.values() if node.id != "oslo-1"]
    after = Snapshot(gone, 2, before)
    assert after.rings["paris"] is before.rings["paris"]
    assert after.rings["oslo"] is not before.rings["oslo"]
    assert after.rings["oslo"].owners("key") == Snapshot(gone, 2).rings["oslo"].owners("key")
    moved = [*gone, Node("oslo-1", "http://oslo-1", "oslo", 2)]
    assert Snapshot(moved, 3, before).rings["oslo"].members["oslo-1"] == 2


# Draining and health


def test_a_node_that_drains_is_passed_over_and_still_there() -> None:
    table = Table(snapshot_of(paris=3, oslo=1))
    owner = table.choose("key")[0].node.id
    table.drain(owner)
    found = table.verdicts("key")
    assert [*found][-1] == owner
    assert found[owner] is Verdict.DRAINING
    table.states[owner] = State()
    table.update()
    assert table.choose("key")[0].node.id == owner


def test_an_ejected_node_is_passed_over_until_its_time_is_over() -> None:
    table = Table(snapshot_of(paris=3))
    owner = table.choose("key")[0].node.id
    table.eject(owner)
    assert [*table.verdicts("key").items()][-1] == (owner, Verdict.EJECTED)
    table.now = EJECTION
    table.update()
    assert table.choose("key")[0].node.id == owner


def test_more_than_half_of_a_region_ejected_is_panic_and_all_are_used() -> None:
    table = Table(snapshot_of(paris=4, oslo=4))
    table.eject("paris-0", "paris-1")
    assert Counter(table.verdicts("key").values()) == {Verdict.OWNER: 6, Verdict.EJECTED: 2}
    table.eject("paris-2")
    assert Counter(table.verdicts("key").values()) == {Verdict.OWNER: 5, Verdict.PANIC: 3}
    assert [choice.node.id for choice in table.choose("key", count=4)] == table.snapshot.rings["paris"].owners("key")
    assert table.routing.panics == ["paris"]


def test_nodes_that_drain_are_no_part_of_the_half() -> None:
    table = Table(snapshot_of(paris=4))
    table.drain("paris-0", "paris-1")
    table.eject("paris-2")
    assert table.routing.panics == []
    assert [*table.verdicts("key").values()] == [
        Verdict.OWNER, Verdict.DRAINING, Verdict.DRAINING, Verdict.EJECTED,
    ]  # fmt: skip
    table.eject("paris-3")
    assert [*table.verdicts("key").values()] == [Verdict.PANIC] * 2 + [Verdict.DRAINING] * 2


def test_a_region_that_drains_as_a_whole_is_still_used_where_there_is_no_other() -> None:
    table = Table(snapshot_of(paris=2, oslo=1))
    table.drain("paris-0", "paris-1")
    assert [choice.node.region for choice in table.choose("key")] == ["oslo", "paris", "paris"]
    table = Table(snapshot_of(paris=2))
    table.drain("paris-0", "paris-1")
    assert len(table.choose("key")) == 2


# Slow start


def test_a_new_node_is_given_more_of_its_keys_as_it_ages_and_keeps_them() -> None:
    table = Table(snapshot_of(paris=4), {"paris-0": 0.0})
    owned = [key for key in KEYS if table.snapshot.rings["paris"].owners(key, 1) == ["paris-0"]]
    before: set[str] = set()
    for age in (0.0, 5.0, 10.0, 20.0, 29.9, 30.0):
        table.now = age
        table.update()
        given = {key for key in owned if table.choose(key)[0].node.id == "paris-0"}
        share = FIRST_KEYS + (1 - FIRST_KEYS) * age / SLOW_START
        assert before <= given
        assert len(given) / len(owned) == pytest.approx(share, abs=0.15)
        assert all(table.verdicts(key)["paris-0"] is Verdict.STARTING for key in owned if key not in given)
        before = given
    assert given == set(owned)


def test_nobody_is_spared_where_most_of_a_region_is_new() -> None:
    """A router that has just started knows all nodes for a moment only."""
    table = Table(snapshot_of(paris=4), {f"paris-{number}": -number for number in range(4)})
    assert all(table.choose(key)[0].verdict is Verdict.OWNER for key in KEYS)


# Loads


def test_an_owner_with_its_share_is_passed_over_and_comes_after_its_region() -> None:
    table = Table(snapshot_of(paris=3, oslo=1))
    owner = table.choose("key")[0].node.id
    table.busy({f"paris-{number}": 10 for number in range(3)} | {owner: 20})
    assert [*table.verdicts("key")].index(owner) == 2
    assert table.verdicts("key")[owner] is Verdict.LOADED
    table.busy({f"paris-{number}": 100 for number in range(3)} | {owner: 120})
    assert table.choose("key")[0].node.id == owner


def test_an_idle_region_keeps_keys_on_their_owners() -> None:
    table = Table(snapshot_of(paris=3))
    owner = table.choose("key")[0].node.id
    for _ in range(int(FLOOR)):
        assert table.choose("key")[0].node.id == owner
        table.routing.sent(table.choose("key"), 0)
    assert table.choose("key")[0].node.id != owner


def test_what_was_sent_fades() -> None:
    loads = Loads()
    loads.group({"a": 1})
    for _ in range(100):
        loads.send("a", 5.0)
    assert loads.value(loads.of("a")) == pytest.approx(100)
    for now in (5.0 + FADE, 5.0 + 100 * FADE, 1e6):
        loads.advance(now)
        assert loads.value(loads.of("a")) == pytest.approx(100 * math.exp(-(now - 5) / FADE), abs=1e-9)
    loads.send("a", 1e6)
    assert loads.value(loads.of("a")) == pytest.approx(1, abs=0.05)


def test_a_node_that_gets_no_work_counts_in_no_mean() -> None:
    table = Table(snapshot_of(paris=4))
    table.busy({f"paris-{number}": 10 for number in range(4)} | {"paris-0": 1000})
    table.states["paris-0"] = State(1000, draining=True)
    table.busy({"paris-1": 20})
    assert all(table.verdicts(key)["paris-1"] is Verdict.LOADED for key in KEYS)


sends = st.lists(st.tuples(st.integers(0, 30), st.floats(0, 0.5)), min_size=1, max_size=300)


@quick
@given(st.lists(st.integers(1, 3), min_size=1, max_size=6), sends, st.integers(1, 3))
def test_no_node_is_sent_more_than_its_share(weights: list[int], demand: list[tuple[int, float]], burst: int) -> None:
    table = Table(Snapshot([Node(f"n{n}", f"http://n{n}", "paris", w) for n, w in enumerate(weights)], 1))
    loads = table.routing.loads
    for key, wait in demand:
        table.now += wait
        for _ in range(burst * 5):
            chosen = table.choose(f"key-{key}", count=1)
            node = chosen[0].node
            table.routing.sent(chosen, table.now)
            values = {name: loads.value(loads.of(name)) for name in table.snapshot.nodes}
            mean = sum(values.values()) / sum(weights)
            assert values[node.id] <= max(BOUND * mean, FLOOR) * node.weight + 1 + 1e-6


def test_demand_of_few_keys_is_spread_within_the_bound() -> None:
    """Zipf's law, 20 nodes: the most wanted key alone is more than two nodes' share."""
    table, rng = Table(snapshot_of(paris=20)), random.Random(7)
    weights = [1 / rank for rank in range(1, len(KEYS) + 1)]
    for key in rng.choices(KEYS, weights, k=20_000):
        table.routing.sent(table.choose(key, count=1), 0.0)
    loads = table.routing.loads
    values = [loads.value(loads.of(node)) for node in table.snapshot.nodes]
    mean = sum(values) / len(values)
    assert max(values) <= BOUND * mean + 1
    assert Counter(key for key in rng.choices(KEYS, weights, k=20_000)).most_common(1)[0][1] > 2 * mean, (
        "unevenly asked"
    )


# What is kept for a key


def test_all_nodes_of_a_region_are_named_in_the_order_of_its_ring() -> None:
    table = Table(snapshot_of(paris=9))
    for key in KEYS:
        owners = table.snapshot.rings["paris"].owners(key)
        assert [choice.node.id for choice in table.choose(key, count=3)] == owners[:3]
        assert [choice.node.id for choice in table.choose(key, count=9)] == owners


def test_what_is_kept_for_keys_is_of_the_members_there_are_now() -> None:
    table = Table(snapshot_of(paris=9, oslo=2))
    for key in KEYS:
        table.choose(key)  # all of both regions
    table.snapshot = snapshot_of(paris=12, oslo=3)
    table.update()
    table.drain("paris-3")
    fresh = Table(table.snapshot)
    fresh.drain("paris-3")
    for key in KEYS:
        assert table.choose(key, count=3) == fresh.choose(key, count=3)
        assert table.choose(key) == fresh.choose(key)


def test_more_keys_than_are_kept_are_chosen_for_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    table, other = Table(snapshot_of(paris=9)), Table(snapshot_of(paris=9))
    expected = [table.choose(key, count=5) for key in KEYS]
    monkeypatch.setattr("shared.routing.WALKS", 7)
    assert [other.choose(key, count=5) for key in KEYS] == expected
    assert len(other.routing._walks) <= 7


def test_a_node_that_moved_is_named_where_it_is() -> None:
    table = Table(Snapshot([Node("a", "http://a:1", "paris", 1)], 1))
    table.choose("key")
    table.snapshot = Snapshot([Node("a", "http://a:2", "paris", 1)], 2, table.snapshot)
    table.update()
    assert table.choose("key")[0].node.url == "http://a:2"
