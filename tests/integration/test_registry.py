"""Exchanges with real servers, and a registry over a Redis that misbehaves."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from router.admission import Admission
from router.exchange import MAX_RECORD, Ask, Tell, from_record, to_record
from router.members import ROUNDS, Members
from router.redis_client import SharedRedis, parse_redis_url
from router.registry import Registry
from shared import log
from shared.clock import SystemClock
from shared.enrolment import Leave, Told, parse_told
from shared.errors import UpstreamError
from shared.metrics import Metrics
from shared.web.server import free_port
from tests.harness import wait_until
from tests.redis_server import KINDS, RedisServer

PREFIX = "x:"


def told(node: str, sequence: int = 1, *, boot: str = "b0", region: str = "north", in_flight: int = 0) -> Told:
    """A heartbeat."""
    return parse_told(
        node,
        f'{{"boot":"{boot}","in_flight":{in_flight},"region":"{region}","sequence":{sequence},'
        f'"url":"http://127.0.0.1:9"}}'.encode(),
    )


class Router:
    """The members of a router, exchanged by hand; its clock only for expiry."""

    def __init__(self, url: str) -> None:
        self.shared = SharedRedis(parse_redis_url(url), PREFIX, lambda: None)
        self.members = Members(6.0)
        self.clock = SystemClock()
        self.pages = 0

    async def exchange(self, *, once: bool = False) -> None:
        """As the registry does it, signatures aside."""
        while True:
            ask = self.members.ask(self.clock.monotonic(), f"{random.randrange(1 << 64):016x}")
            try:
                reply = await self.shared.exchange(ask)
            except UpstreamError:
                self.members.begin_listing()
                raise
            now = self.clock.monotonic()
            self.members.answered(ask, reply, now)
            self.pages += 1
            for name, record in reply.page:
                if not record:
                    self.members.gone(name.decode())
                elif record == b"!":
                    self.members.refuse(name.decode(), now)
                else:
                    self.members.take(from_record(name, record), now)
            self.members.done(ask, reply, now)
            if not reply.more:
                self.members.rebuild(now, reply.epoch)
            if reply.fresh or once:
                return

    def hear(self, *heard: Told) -> None:
        """Heartbeats."""
        for one in heard:
            self.members.heard(one, self.clock.monotonic())

    def names(self) -> set[str]:
        """Who is a member."""
        return set(self.members.snapshot.nodes)


@pytest.fixture(scope="module", params=KINDS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    made = RedisServer(request.param, tmp_path_factory.mktemp("redis")).start()
    yield made
    made.kill()


@pytest.fixture
async def routers(server: RedisServer) -> AsyncIterator[list[Router]]:
    """Two that share one server, empty."""
    server.ask("FLUSHALL")
    made = [Router(server.url) for _ in range(2)]
    yield made
    for router in made:
        await router.shared.close()


async def test_routers_agree_after_an_exchange_each(routers: list[Router]) -> None:
    one, two = routers
    one.hear(*(told(f"n{n}", region=f"r{n % 3}") for n in range(9)))
    two.hear(told("other"))
    for router in (one, two, one):
        await router.exchange()
    assert one.names() == two.names() == {"other", *(f"n{n}" for n in range(9))}
    assert one.members.snapshot.epoch == two.members.snapshot.epoch
    one.members.left(Leave("n1", "b0", 2))
    one.hear(told("n2", 2, in_flight=50))
    two.hear(told("other", 2, region="r1"))
    for router in (one, two, one):
        await router.exchange()
    assert "n1" not in one.names() | two.names()
    assert two.members.states["n2"].in_flight == 50
    assert one.members.snapshot.nodes == two.members.snapshot.nodes
    assert one.members.snapshot.epoch == two.members.snapshot.epoch


async def test_at_rest_nothing_but_names_is_said_and_small_loads_are_not_told(
    routers: list[Router], server: RedisServer
) -> None:
    one, two = routers
    one.hear(*(told(f"n{n}") for n in range(200)))
    await one.exchange()
    await two.exchange()
    rings = two.members.snapshot.rings["north"]
    before = server.ask("INFO", "stats")
    one.hear(*(told(f"n{n}", 2, in_flight=3) for n in range(200)))
    await one.exchange()
    await two.exchange()
    after = server.ask("INFO", "stats")
    moved = [after[f"total_net_{way}_bytes"] - before[f"total_net_{way}_bytes"] for way in ("input", "output")]
    assert moved[0] < 200 * 12 + 2000 and moved[1] < 8000, moved
    assert two.members.snapshot.rings["north"] is rings, "no ring is made anew"


async def test_more_nodes_than_a_page_are_all_read(routers: list[Router], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.exchange.PAGE", 10)
    one, two = routers
    one.hear(*(told(f"n{n}") for n in range(27)))
    await one.exchange()
    await two.exchange()
    assert two.names() == {f"n{n}" for n in range(27)}
    assert two.pages == 3


async def test_a_write_from_another_life_or_from_long_ago_is_refused(
    routers: list[Router], server: RedisServer
) -> None:
    """F9: a router that stood still, or knew the Redis before it was emptied, may read and not write."""
    shared = routers[0].shared
    known = await shared.exchange(Ask(candidate="c1"))
    tell = [Tell(told("late"), 6000)]
    base = {"tells": tell, "leaves": [("n", "b0", 9)], "epoch": 1, "candidate": "c2"}
    for life, as_of in ((b"other", known.now), (known.life, known.now - 2500), (known.life, known.now + 2500)):
        reply = await shared.exchange(Ask(life=life, as_of=as_of, seen=known.seen, **base))  # type: ignore[arg-type]
        assert not reply.fresh
    assert server.ask("HLEN", "{x:}records") == 0
    reply = await shared.exchange(Ask(life=known.life, as_of=known.now, seen=known.seen, **base))  # type: ignore[arg-type]
    assert reply.fresh and server.ask("HLEN", "{x:}records") == 1
    server.ask("FLUSHALL")
    emptied = await shared.exchange(Ask(life=reply.life, as_of=reply.now, seen=reply.seen, epoch=7, candidate="c3"))
    assert not emptied.fresh and emptied.life == b"c3" and emptied.epoch == 7, "an epoch only grows"


async def test_an_older_heartbeat_does_not_replace_a_later_one(routers: list[Router], server: RedisServer) -> None:
    one, two = routers
    one.hear(told("n", 5, in_flight=500))
    two.hear(told("n", 4, in_flight=100))
    await one.exchange()
    await two.exchange()
    two.hear(told("n", 4, in_flight=100))
    two.members._read.clear()  # it does not know better
    await two.exchange()
    assert b'"sequence":5' in server.ask("HGET", "{x:}records", "n")
    two.members._leaves["n"] = Leave("n", "b0", 4)
    await two.exchange()
    assert server.ask("HLEN", "{x:}records") == 1, "who left before it was heard last is there"


async def test_the_epoch_only_grows_and_who_vanished_stays_for_its_ttl(
    routers: list[Router], server: RedisServer
) -> None:
    """F9."""
    one, two = routers
    one.hear(told("n1"), told("n2"))
    for router in (one, two):
        await router.exchange()
    epochs = [router.members.snapshot.epoch for router in routers]
    server.ask("FLUSHALL")
    await two.exchange()
    assert two.names() == {"n1", "n2"}
    two.members.expire(two.clock.monotonic() + 5.9, alone=False)
    two.members.rebuild(0)
    assert two.names() == {"n1", "n2"}
    for router in (one, two):
        await router.exchange()
    two.members.expire(two.clock.monotonic() + 60, alone=False)
    two.members.rebuild(0)
    assert two.names() == {"n1", "n2"}, "whoever hears them has told Redis anew"
    for router, epoch in zip(routers, epochs, strict=True):
        assert router.members.snapshot.epoch >= epoch


async def test_who_vanished_and_is_heard_by_nobody_is_out_after_its_ttl(
    routers: list[Router], server: RedisServer
) -> None:
    one, two = routers
    one.hear(told("n1"))
    for router in (one, two):
        await router.exchange()
    server.ask("FLUSHALL")
    await two.exchange()
    two.members.expire(two.clock.monotonic() + 6.1, alone=False)
    two.members.rebuild(0)
    assert two.names() == set()


async def test_who_is_silent_is_out_everywhere(routers: list[Router], server: RedisServer) -> None:
    one, two = routers
    one.hear(told("n1"), told("n2"))
    for router in (one, two):
        await router.exchange()
    server.ask("ZADD", "{x:}until", 1, "n1")
    await two.exchange()
    assert two.names() == {"n2"}
    await one.exchange()
    assert one.names() == {"n1", "n2"}, "its own ears come first, for a TTL"
    one.members.expire(one.clock.monotonic() + 6.1, alone=False)
    one.members.rebuild(0)
    assert one.names() == {"n2"}


async def test_a_clock_that_jumps_puts_nobody_out(routers: list[Router], server: RedisServer) -> None:
    """A server that stood still for a minute, or one with another clock that took over."""
    one, two = routers
    one.hear(told("n1"))
    for router in (one, two):
        await router.exchange()
    for jump in (60_000, -86_400_000):
        for node in server.ask("ZRANGE", "{x:}until", 0, -1):
            server.ask("ZINCRBY", "{x:}until", -jump, node)
        server.ask("HINCRBY", "{x:}meta", "time", -jump)
        await two.exchange()
        assert two.names() == {"n1"}
        now = int(server.ask("TIME")[0]) * 1000
        assert now < server.ask("ZSCORE", "{x:}until", "n1") <= now + 8000


@pytest.mark.parametrize(
    "act",
    [
        ("SET", "{x:}records", "text"),
        ("SET", "{x:}until", "text"),
        ("DEL", "{x:}records"),
        ("DEL", "{x:}until"),
        ("DEL", "{x:}changes"),
        ("DEL", "{x:}meta"),
        ("HSET", "{x:}meta", "count", "abc"),
        ("HSET", "{x:}meta", "epoch", "1e300"),
        ("HSET", "{x:}meta", "count", "0"),
        ("HSET", "{x:}meta", "time", "9007199254740992"),
        ("HSET", "{x:}records", "half", "x"),
        ("ZADD", "{x:}until", "inf", "half"),
        ("ZADD", "{x:}until", "inf", "n1"),
        ("ZADD", "{x:}changes", "inf", "n1"),
        ("ZADD", "{x:}changes", "1e15", "nobody"),
    ],
    ids=" ".join,
)
async def test_keys_that_were_tampered_with_heal(
    routers: list[Router], server: RedisServer, act: tuple[str, ...]
) -> None:
    """F10: nobody is out, routers do not fail, and within two exchanges each Redis has all again."""
    one, two = routers
    one.hear(told("n1"), told("n2"))
    for router in (one, two):
        await router.exchange()
    epoch = two.members.snapshot.epoch
    server.ask(*act)
    for router in (two, one, two, one, two):
        await router.exchange()
        assert router.names() == {"n1", "n2"}
    assert set(server.ask("HKEYS", "{x:}records")) == {b"n1", b"n2"}
    assert set(server.ask("ZRANGE", "{x:}until", 0, -1)) == {b"n1", b"n2"}
    assert two.members.snapshot.epoch >= epoch
    now = int(server.ask("TIME")[0]) * 1000
    assert all(server.ask("ZSCORE", "{x:}until", node) <= now + 8000 for node in ("n1", "n2"))
    three = Router(server.url)
    await three.exchange()
    assert three.names() == {"n1", "n2"}, "and a new router reads it"
    await three.shared.close()


async def test_a_forged_record_gives_way_to_the_node_itself(routers: list[Router], server: RedisServer) -> None:
    """F10: however new it looks, and however large it is; it is not even moved."""
    one, two = routers
    one.hear(told("n1"))
    for router in (one, two):
        await router.exchange()
    before = server.ask("INFO", "stats")["total_net_output_bytes"]
    for _ in range(2):
        server.ask("HSET", "{x:}records", "n1", b"b0 4000000000000000 00000000\n" + bytes(10 << 20))
        server.ask("ZADD", "{x:}changes", server.ask("HINCRBY", "{x:}meta", "count", 1), "n1")
        for router in (two, one, one, two):
            await router.exchange()
            assert router.names() == {"n1"}
        assert server.ask("HSTRLEN", "{x:}records", "n1") < MAX_RECORD
    assert server.ask("INFO", "stats")["total_net_output_bytes"] - before < 1 << 20
    assert server.ask("HGET", "{x:}records", "n1") == to_record(told("n1"))


async def test_a_record_that_is_replaced_behind_everybodys_back_is_found(
    routers: list[Router], server: RedisServer
) -> None:
    """F10: no reader is told of a change, so nobody would look; a new router would miss the node."""
    one, two = routers
    one.hear(told("n1"), told("n2"))
    for router in (one, two):
        await router.exchange()
    server.ask("HSET", "{x:}records", "n1", b"ff 4000000000000000 00000000\n" + bytes(100))
    for _ in range(ROUNDS + 1):
        await one.exchange()
    assert server.ask("HGET", "{x:}records", "n1") == to_record(told("n1"))
    await two.exchange()
    assert one.names() == two.names() == {"n1", "n2"}


async def test_those_that_are_gone_do_not_pile_up(routers: list[Router], server: RedisServer) -> None:
    one, two = routers
    one.hear(told("n1"))
    for router in (one, two):
        await router.exchange()
    each = "redis.call('ZADD', KEYS[1], redis.call('HINCRBY', KEYS[2], 'count', 1), 'gone' .. n)"
    server.ask("EVAL", f"for n = 1, 1200 do {each} end", "2", "{x:}changes", "{x:}meta")
    for router in (two, one, two, one):
        await router.exchange()
        assert router.names() == {"n1"}
    assert server.ask("ZCARD", "{x:}changes") == 1


class Deaf:
    """A Redis whose calls take a cancellation for their own time-out, as the library's can."""

    def __init__(self) -> None:
        self.called = asyncio.Event()

    async def execute_command(self, *_: object) -> None:
        self.called.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise TimeoutError from None

    async def aclose(self) -> None:
        await asyncio.Event().wait()


async def test_a_router_stops_also_when_a_call_to_redis_swallows_its_cancellation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    deaf = Deaf()
    monkeypatch.setattr("router.registry.parse_redis_url", lambda url: lambda: [deaf])
    admission = Admission(None, lambda: 0.0, lambda: "00")
    registry = Registry(
        admission, 6.0, SystemClock(), random.Random(), Metrics(), log.get("test"), redis="redis://127.0.0.1:9"
    )
    registry.heartbeat(told("a"))
    await registry.start()
    await deaf.called.wait()
    async with asyncio.timeout(5):
        await registry.close()
    assert not [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]


@pytest.mark.parametrize(
    "url",
    [
        "http://h", "redis", "redis+other://h", "redis+cluster://", "redis+cluster://h/1", "redis+sentinel://h",
        "redis+sentinel://h/m/x", "redis+sentinel://h/m/0?secret=1", "redis+sentinel://h:x/m", "redis+sentinel:///m",
        "redis://u:geheim@h:port", "redis+cluster://u:geheim@h:port", "redis://h/0?socket_timeout=geheim",
        "redis+sentinel://h/m/0?ssl_ca_certs=/geheim", "rediss+cluster://h?geheim=1",
    ],
)  # fmt: skip
def test_what_is_no_redis_url_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as refused:
        parse_redis_url(url)
    assert not re.search("geheim", str(refused.value))


@pytest.mark.parametrize("kind", KINDS)
async def test_a_cluster_keeps_the_membership_in_one_slot(kind: str, tmp_path: Path) -> None:
    server = RedisServer(kind, tmp_path, "--cluster-enabled", "yes", "--cluster-port", str(free_port())).start()
    try:
        server.ask("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        await asyncio.to_thread(wait_until, lambda: _ok(server), "the cluster to be well")
        routers = [Router(f"redis+cluster://127.0.0.1:{server.port}") for _ in range(2)]
        routers[0].hear(told("n1"))
        for router in routers:
            await router.exchange()
        assert routers[1].names() == {"n1"}
        for router in routers:
            await router.shared.close()
    finally:
        server.kill()


def _ok(server: RedisServer) -> bool:
    info = server.ask("CLUSTER", "INFO")
    return bool(info[b"cluster_state"] == b"ok") if isinstance(info, dict) else b"cluster_state:ok" in info
