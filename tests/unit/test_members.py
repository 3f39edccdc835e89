"""The members that a router knows, against a Redis that is a model: whatever happens in which order, routers agree
in the end, and nobody who is heard is ever out."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from router.exchange import Ask, Reply, Tell, from_record, moved, to_record
from router.members import BEFORE, Members
from shared.enrolment import Leave, Told, parse_told
from shared.node import State
from shared.routing import Snapshot

TTL = 6.0
NODES = ["n0", "n1", "n2", "n3"]


def told(node: str, sequence: int, region: str = "north", in_flight: int = 0) -> Told:
    """A heartbeat."""
    body = (
        f'{{"boot":"b0","in_flight":{in_flight},"region":"{region}","sequence":{sequence},"url":"http://127.0.0.1:9"}}'
    )
    return parse_told(node, body.encode())


class Store:
    """What the script does, in a few lines, without the checks of what others do to its keys."""

    def __init__(self) -> None:
        self.life, self.count, self.epoch = b"0", 0, 0
        self.records: dict[str, tuple[bytes, float, int]] = {}
        """Record, when it is out, sequence."""
        self.changes: dict[str, int] = {}

    def exchange(self, ask: Ask, now: float) -> Reply:
        """As ``exchange.lua``."""
        if ask.life == self.life and self.count < ask.seen:
            self.life = ask.candidate.encode()
        for node in [node for node, (_, until, _) in self.records.items() if until <= now]:
            self.drop(node)
        since = ask.seen if ask.life == self.life else 0
        page = [
            (node.encode(), self.records[node][0] if node in self.records else b"")
            for node, at in self.changes.items()
            if at > since
        ]
        fresh, unknown = ask.life == self.life, []
        if fresh:
            for node, _, sequence in ask.leaves:
                if node in self.records and self.records[node][2] <= sequence:
                    self.drop(node)
            for tell in ask.tells:
                self.tell(tell, now)
            for node, left in ask.heard:
                if node in self.records:
                    record, until, sequence = self.records[node]
                    self.records[node] = record, max(until, now + left / 1000), sequence
                else:
                    unknown.append(node.encode())
        self.epoch = max(self.epoch, ask.epoch)
        return Reply(self.life, int(now * 1000), self.epoch, self.count, False, fresh, page, unknown)

    def tell(self, tell: Tell, now: float) -> None:
        """One record."""
        node = tell.told.node.id
        if node not in self.records or self.records[node][2] < tell.told.sequence:
            self.changed(node)
            self.epoch += 1
            self.records[node] = to_record(tell.told), now + tell.left / 1000, tell.told.sequence

    def drop(self, node: str) -> None:
        """It is gone."""
        del self.records[node]
        self.changed(node)
        self.epoch += 1

    def changed(self, node: str) -> None:
        """Count it."""
        self.count += 1
        self.changes[node] = self.count

    def empty(self, life: int) -> None:
        """FLUSHALL."""
        self.__init__()  # type: ignore[misc]
        self.life = b"%d" % life


class Routers(RuleBasedStateMachine):
    """Two routers, nodes that beat to either, and a Redis that is emptied or away."""

    @initialize()
    def begin(self) -> None:
        self.now, self.lives, self.sequence = 100.0, 1, 0
        self.store, self.away = Store(), False
        self.routers = [Members(TTL), Members(TTL)]
        self.heard: list[dict[str, float]] = [{}, {}]
        self.epochs = [0, 0]

    @rule(router=st.integers(0, 1), node=st.sampled_from(NODES), region=st.sampled_from(["north", "south"]))
    def beat(self, router: int, node: str, region: str) -> None:
        self.sequence += 1
        self.routers[router].heard(told(node, self.sequence, region), self.now)
        self.heard[router][node] = self.now
        self.routers[router].rebuild(self.now)

    @rule(router=st.integers(0, 1), node=st.sampled_from(NODES))
    def leave(self, router: int, node: str) -> None:
        self.sequence += 1
        self.routers[router].left(Leave(node, "b0", self.sequence))
        self.heard[router].pop(node, None)
        self.routers[router].rebuild(self.now)
        assert node not in self.routers[router].snapshot.nodes

    @rule(router=st.integers(0, 1))
    def exchange(self, router: int) -> None:
        members = self.routers[router]
        members.expire(self.now, alone=self.away)
        if self.away:
            members.begin_listing()
            members.rebuild(self.now)
            return
        for _ in range(3):
            ask = members.ask(self.now, f"{self.lives:x}")
            reply = self.store.exchange(ask, self.now)
            members.answered(ask, reply, self.now)
            for name, record in reply.page:
                if record:
                    members.take(from_record(name, record), self.now)
                else:
                    members.gone(name.decode())
            members.done(ask, reply, self.now)
            members.rebuild(self.now, reply.epoch)
            if reply.fresh:
                return
        raise AssertionError("an exchange comes to an end")

    @rule(seconds=st.floats(0, 4))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def empty(self) -> None:
        self.lives += 1
        self.store.empty(self.lives)

    @rule(away=st.booleans())
    def go(self, away: bool) -> None:
        self.away = away

    @rule()
    def settle(self) -> None:
        """All at rest, and Redis there: after an exchange or two each, routers agree."""
        self.away = False
        for router in (0, 1, 0, 1):
            self.exchange(router)
        for router in (0, 1):
            for node in list(self.heard[router]):
                if self.heard[router][node] + TTL > self.now and node in self.routers[router].snapshot.nodes:
                    held = self.routers[router].get(node)
                    assert held is not None
                    self.beat(router, node, held.node.region)
        for _ in range(7):
            self.now += 1
            for router in (0, 1, 0, 1):
                self.exchange(router)
        one, two = (members.snapshot for members in self.routers)
        assert one.nodes == two.nodes == {}, "nobody beats any more"

    @invariant()
    def who_is_heard_is_a_member(self) -> None:
        for members, heard in zip(self.routers, self.heard, strict=True):
            for node, at in heard.items():
                assert self.now >= at + TTL or node in members.snapshot.nodes

    @invariant()
    def epochs_only_grow_and_snapshots_are_of_now(self) -> None:
        for number, members in enumerate(self.routers):
            assert members.snapshot.epoch >= self.epochs[number]
            self.epochs[number] = members.snapshot.epoch
            assert set(members.snapshot.nodes) == set(members.all()) == set(members.states) == set(members.joined)
            fresh = Snapshot(members.snapshot.nodes.values(), 0)
            assert {region: ring.members for region, ring in members.snapshot.rings.items()} == {
                region: ring.members for region, ring in fresh.rings.items()
            }


Routers.TestCase.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)
TestRouters = Routers.TestCase


def test_a_ring_is_made_anew_only_where_its_region_changed() -> None:
    members = Members(TTL)
    members.heard(told("n0", 1, "north"), 0)
    members.heard(told("n1", 1, "south"), 0)
    members.rebuild(0)
    former = members.snapshot
    members.heard(told("n0", 2, "north", in_flight=99), 1)
    members.rebuild(1)
    assert members.snapshot is former and members.states["n0"].in_flight == 99, "a state makes no snapshot"
    members.heard(told("n2", 1, "south"), 1)
    members.rebuild(1)
    assert members.snapshot.rings["north"] is former.rings["north"]
    assert members.snapshot.rings["south"].members == {"n1": 1, "n2": 1}
    assert members.snapshot.epoch == former.epoch + 1


def test_joined_says_since_when_this_router_knows() -> None:
    members = Members(TTL)
    members.remember([told("old", 1)], 900)
    members.heard(told("new", 1), 5)
    members.rebuild(5)
    assert members.joined == {"old": BEFORE, "new": 5}
    members.heard(replace(told("new", 1), boot="b1"), 7)
    assert members.joined["new"] == 7, "it started anew"


def test_who_was_not_heard_as_we_stood_still_has_time_to_be() -> None:
    members = Members(TTL)
    members.heard(told("n0", 1), 0)
    members.expire(1, alone=True)
    members.expire(60, alone=True)
    assert members.get("n0")
    members.heard(told("n1", 1), 61)
    for second in range(61, 67):
        members.expire(second, alone=True)
    assert not members.get("n0") and members.get("n1")


def test_what_is_worth_telling() -> None:
    for old, new, told_ in (
        (0, 3, False), (0, 4, True), (100, 120, False), (100, 140, True), (100, 70, True), (8, 4, True), (8, 6, False),
    ):  # fmt: skip
        assert moved(State(old), State(new)) == told_, (old, new)
    assert moved(State(), State(draining=True))
    assert moved(State(rtt={"a": 10}), State(rtt={"b": 10}))
    assert not moved(State(rtt={"a": 10}), State(rtt={"a": 11.5}))
    assert moved(State(rtt={"a": 10}), State(rtt={"a": 20}))


@pytest.mark.parametrize("again", ["drains", "started again"])
def test_a_node_that_drains_or_started_again_makes_a_new_epoch(again: str) -> None:
    """Peers read the ring, and the choice its times, anew where the epoch has changed."""
    members = Members(TTL)
    node = told("a", 1)
    members.heard(node, 0.0)
    members.rebuild(0.0)
    before = members.snapshot
    later = replace(node, state=State(draining=True)) if again == "drains" else replace(node, boot="2" * 32)
    assert members.heard(later, 1.0)
    members.rebuild(1.0)
    assert members.snapshot is not before
    assert members.snapshot.epoch == before.epoch + 1
    assert members.snapshot.rings["north"] is before.rings["north"]
    assert not members.heard(replace(later, sequence=9), 2.0)
    after = members.snapshot
    members.rebuild(2.0)
    assert members.snapshot is after
