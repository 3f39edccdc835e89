"""Routers whose Redis is killed, frozen, emptied, swapped or poisoned, and that start anew meanwhile: every request is
answered, from the nodes, all the time.

Two routers; two nodes heartbeat to the first one alone and one to the second one, so each knows nodes from Redis
only. The nodes are the edge's own membership code, without an edge around it.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import socket
import threading
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from edge_node.membership import Membership
from edge_node.peers import Peers
from router.exchange import to_record
from shared import log
from shared.clock import SystemClock
from shared.enrolment import HEARTBEAT, Enrolled, enrolment_line, parse_signature, parse_told, sign
from shared.keys import NodeKey
from shared.node import Node
from tests.faults import invariants
from tests.faults.client import until
from tests.faults.line import forwarder
from tests.faults.network import poison
from tests.harness import Lab, Service, get_json, make_model
from tests.redis_server import KINDS, RedisServer

TTL = 2.0
OUTAGES = [
    pytest.param(2 * TTL, id="short"),
    pytest.param(60.0, id="minute", marks=[pytest.mark.long, pytest.mark.timeout(240)]),
]
RECOVERY = 5.0
PLAN = "application/vnd.nearshard.plan+json"


@dataclass
class Net:
    """What is under test."""

    lab: Lab
    redis: RedisServer
    enrolled: Path
    origin: Service
    routers: list[Service] = field(default_factory=list)
    nodes: dict[str, Node] = field(default_factory=dict)
    keys: dict[str, NodeKey] = field(default_factory=dict)
    members: dict[str, Membership] = field(default_factory=dict)
    answered: int = 0
    failures: list[str] = field(default_factory=list)
    slowest: float = 0.0
    least: int = 3
    """Nodes that every plan names at least."""
    restarting: list[Service] = field(default_factory=list)
    """Routers that nobody expects to answer."""

    def known(self, router: Service) -> set[str]:
        """Who is a member there."""
        return {node["id"] for node in router.status()["nodes"]}

    def all_known(self) -> bool:
        """Whether every router knows every node."""
        return all(self.known(router) == set(self.nodes) for router in self.routers)

    def degraded(self) -> list[bool]:
        """Which routers say so: in /status, /readyz and the metrics alike."""
        said = []
        for router in self.routers:
            degraded = bool(router.status()["degraded"])
            said.append(degraded)
            if degraded != ("degraded" in get_json(f"{router.url}/readyz")) or degraded != (metric(router) == 1):
                return []  # changed between two looks
        return said

    def well(self) -> bool:
        """Whether all is as it should be."""
        return self.degraded() == [False] * len(self.routers) and self.all_known() and self.same_epoch()

    def same_epoch(self) -> bool:
        """Whether routers count alike."""
        return len({router.status()["epoch"] for router in self.routers}) == 1


def metric(router: Service, name: str = "nearshard_degraded") -> float:
    """The sum of a metric's values."""
    with urllib.request.urlopen(f"{router.url}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if re.match(rf"{name}(_total)?[ {{]", line))


@asynccontextmanager
async def network(lab: Lab, redis: RedisServer, *, url: str = "") -> AsyncIterator[Net]:
    """Two routers and three nodes, known to both; requests trickle all the time."""
    net = Net(lab, redis, lab.folder / "nodes.toml", await asyncio.to_thread(_publish, lab))
    for name in ("n0", "n1", "n2"):
        net.keys[name] = NodeKey.generate()
        net.nodes[name] = Node(name, f"http://127.0.0.1:{9000 + int(name[1:])}", "default", 1)
    write_enrolment(net)
    for number in range(2):
        net.routers.append(await asyncio.to_thread(start_router, net, number, url or redis.url))
    async with aiohttp.ClientSession() as session:
        for name in net.nodes:
            net.members[name] = member(net, session, name, net.routers[name == "n2"])
            net.members[name].start()
        trickle = None
        try:
            await until(net.well, "all nodes known to both routers", 10)
            trickle = asyncio.create_task(_trickle(net, session))
            yield net
            assert not trickle.done()
        finally:
            if trickle:
                trickle.cancel()
            for node in net.members.values():
                await node.leave()
    assert net.answered > 20 and net.failures == [], net.failures[:5]
    for router in net.routers:
        invariants.nothing_crashed(router)


def _publish(lab: Lab) -> Service:
    make_model(lab.folder / "model", width=64)
    lab.publish(lab.folder / "model")
    return lab.origin()


def write_enrolment(net: Net, *names: str) -> None:
    """Enrol these nodes (all by default)."""
    lines = [enrolment_line(Enrolled(net.nodes[name], net.keys[name].public)) for name in names or net.nodes]
    temporary = net.enrolled.with_name("new.toml")
    temporary.write_text("\n".join(lines) + "\n")
    temporary.replace(net.enrolled)


def start_router(net: Net, number: int, url: str) -> Service:
    """A router of the network, with a directory of its own."""
    flags = {"enrolled": str(net.enrolled), "data": str(net.lab.folder / f"router-{number}"), "ttl": str(TTL)}
    return net.lab.router(net.origin, redis=url, default_region="default", **flags)


def member(net: Net, session: aiohttp.ClientSession, name: str, *routers: Service) -> Membership:
    """A node's heartbeats."""
    return Membership(
        session, [router.url for router in routers], name, lambda: net.nodes[name].record(), 0.4, SystemClock(),
        random.Random(name), log.get("test"), region="default", peers=Peers(name, 1), key=net.keys[name],
    )  # fmt: skip


async def _trickle(net: Net, session: aiohttp.ClientSession) -> None:
    """A plan and a redirect of each router, again and again: each names a node, never the origin alone."""
    clock = asyncio.get_running_loop().time
    while True:
        for router in list(net.routers):
            if router in net.restarting:
                continue
            started = clock()
            try:
                url = f"{router.url}/shards/acme/tiny"
                async with session.get(url, allow_redirects=False, timeout=aiohttp.ClientTimeout(total=5)) as answer:
                    place = answer.headers.get("Location", "")
                    if answer.status != 307 or place.startswith(net.origin.url):
                        net.failures.append(f"{answer.status} {place}")
                async with session.get(url, headers={"Accept": PLAN}, timeout=aiohttp.ClientTimeout(total=5)) as answer:
                    plan = json.loads(await answer.read())
                    named = min(len(shard["urls"]) - 1 for shard in plan["shards"])  # the origin comes last
                    if answer.status != 200 or named < net.least:
                        net.failures.append(f"{answer.status}, a plan with {named} nodes")
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                if router not in net.restarting:
                    net.failures.append(f"{type(error).__name__}: {error}")
            net.answered += 1
            net.slowest = max(net.slowest, clock() - started)
        await asyncio.sleep(0.03)


@pytest.fixture(params=[KINDS[0], *(pytest.param(kind, marks=pytest.mark.long) for kind in KINDS[1:])])
def redis(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A server of this test's own."""
    server = RedisServer(request.param, tmp_path / "redis").start()
    yield server
    server.kill()


async def stays(net: Net, seconds: float, expected: Callable[[], bool]) -> None:
    """For this long it holds at every look."""
    end = asyncio.get_running_loop().time() + seconds
    await until(lambda: _holds(expected) and asyncio_time() >= end, "to hold", seconds + 30)


def asyncio_time() -> float:
    """The clock of event loops, from any thread."""
    return SystemClock().monotonic()


def _holds(expected: Callable[[], bool]) -> bool:
    assert expected()
    return True


@pytest.mark.parametrize("seconds", OUTAGES)
@pytest.mark.parametrize("fault", ["killed", "frozen"])
async def test_redis_is_away(
    lab: Lab, redis: RedisServer, fault: str, seconds: float, measured: Callable[[str], None]
) -> None:
    """F7, F8: longer than a TTL. Every node stays in every answer; it is said; afterwards nothing has changed."""
    async with network(lab, redis) as net:
        (redis.kill if fault == "killed" else redis.freeze)()
        await until(lambda: net.degraded() == [True, True], "degraded said", RECOVERY)
        await stays(net, seconds, net.all_known)
        assert net.degraded() == [True, True]
        await asyncio.to_thread(redis.start if fault == "killed" else redis.thaw)
        started = asyncio_time()
        await until(net.well, "recovery", RECOVERY)
        measured(f"recovered in {asyncio_time() - started:.2f} s; slowest answer {net.slowest * 1000:.0f} ms")
        await stays(net, 1.5 * TTL, net.all_known)
        assert redis.ask("HLEN", "{nearshard:}records") == 3


async def test_a_node_that_falls_silent_while_redis_is_away_is_out(lab: Lab, redis: RedisServer) -> None:
    async with network(lab, redis) as net:
        net.least = 2
        redis.kill()
        await until(lambda: net.degraded() == [True, True], "degraded said", RECOVERY)
        beating = net.members["n0"]._beating
        assert beating is not None
        beating.cancel()
        await until(lambda: net.known(net.routers[0]) == {"n1", "n2"}, "it is out where it was heard", TTL + 3)
        del net.nodes["n0"]
        await asyncio.to_thread(redis.start)
        await until(net.well, "recovery: the other router has it no more either", RECOVERY + TTL)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 20))])
async def test_redis_is_emptied(lab: Lab, redis: RedisServer, seed: int) -> None:
    """F9: nobody vanishes, not for a moment; Redis has all again within four seconds."""
    rng = random.Random(seed)
    async with network(lab, redis) as net:
        for _ in range(3):
            epoch = net.routers[0].status()["epoch"]
            await stays(net, rng.uniform(0, 1), net.all_known)
            redis.ask("FLUSHALL")
            await until(lambda: redis.ask("HLEN", "{nearshard:}records") == 3, "Redis told anew", 4)
            await until(net.well, "routers agree", RECOVERY)
            await stays(net, 1.2 * TTL, net.all_known)
            assert net.routers[0].status()["epoch"] >= epoch


async def test_redis_becomes_a_replica_and_a_master_again(lab: Lab, redis: RedisServer, tmp_path: Path) -> None:
    """F9: READONLY; what was written to the other master is what counts afterwards, and nobody notices."""
    other = RedisServer(redis.kind, tmp_path / "other").start()
    try:
        async with network(lab, redis) as net:
            redis.ask("REPLICAOF", "127.0.0.1", other.port)
            await until(lambda: net.degraded() == [True, True], "degraded said", 10)
            await stays(net, 2 * TTL, net.all_known)
            redis.ask("REPLICAOF", "NO", "ONE")
            await until(net.well, "recovery", RECOVERY)
            await stays(net, 1.5 * TTL, net.all_known)
    finally:
        other.kill()


@pytest.mark.long  # Sentinels go by the clock: where the machine stands still for seconds, so does what they decide
async def test_sentinels_name_another_master(
    lab: Lab, redis: RedisServer, tmp_path: Path, measured: Callable[[str], None]
) -> None:
    """F9: the master dies, its replica takes over; the routers find it by themselves."""
    other = RedisServer(redis.kind, tmp_path / "other", "--replicaof", "127.0.0.1", str(redis.port)).start()
    conf = tmp_path / "sentinel.conf"
    conf.write_text(
        f"sentinel monitor m 127.0.0.1 {redis.port} 1\nsentinel down-after-milliseconds m 1000\n"
        "sentinel failover-timeout m 3000\n"
    )
    sentinel = RedisServer(redis.kind, tmp_path / "sentinel", str(conf), "--sentinel").start()
    try:
        await until(lambda: len(sentinel.ask("SENTINEL", "REPLICAS", "m")) == 1, "the replica known")
        url = f"redis+sentinel://127.0.0.1:9,127.0.0.1:{sentinel.port}/m/0"
        async with network(lab, redis, url=url) as net:
            redis.kill()
            await until(lambda: other.ask("ROLE")[0] == b"master", "the other one is master")
            started = asyncio_time()
            await until(net.well, "recovery", RECOVERY)
            measured(f"recovered {asyncio_time() - started:.2f} s after the failover")
            await stays(net, 1.5 * TTL, net.all_known)
            assert other.ask("HLEN", "{nearshard:}records") == 3
    finally:
        sentinel.kill()
        other.kill()


class Trap:
    """A server that nobody may ever connect to."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.visits = 0
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.visits += 1
            connection.close()

    def close(self) -> None:
        """End it."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def poisons(net: Net, trap: Trap) -> dict[str, tuple[str, bytes]]:
    """Node and record by what is wrong with it."""
    stranger, record = NodeKey.generate(), {"region": "default", "weight": 1}

    def signed(key: NodeKey, name: str, url: str, **change: Any) -> bytes:
        body, signature = sign(
            key, HEARTBEAT, {**record, "id": name, "url": url, "boot": "ff", "sequence": 10**15, **change}
        )
        head = b"ff 1000000000000000 00000000\n"
        return head + parse_signature(signature) + body

    mine = net.keys["n1"]
    good = to_record(parse_told("n1", sign(mine, HEARTBEAT, {**net.nodes["n1"].record(), "boot": "ff"})[0]))
    return {
        "10 MB": ("n1", b"ff 1 00000000\n" + bytes(10 << 20)),
        "not enrolled": ("evil", signed(stranger, "evil", trap.url)),
        "another's key": ("n1", signed(stranger, "n1", net.nodes["n1"].url)),
        "unsigned": ("n1", good),
        "moved by the node itself": ("n1", signed(mine, "n1", trap.url)),
        "metadata": ("n1", signed(mine, "n1", "http://169.254.169.254")),
        "a file": ("n1", signed(mine, "n1", "file:///etc/passwd")),
        "another's record": ("n0", signed(mine, "n1", net.nodes["n1"].url)),
        "no record": ("n1", b"\xff\xfe"),
        "no name": ("../\xff", b"x"),
    }


def refusals(net: Net) -> float:
    """At both routers: the one that hears a node may have put its record right before the other one looked."""
    return sum(metric(router, "nearshard_refused_members") for router in net.routers)


async def test_what_is_poisoned_in_redis_is_refused_and_nothing_is_sent_there(lab: Lab, redis: RedisServer) -> None:
    """F10. Nobody else is out either, and the nodes' own records come back."""
    trap = Trap()
    async with network(lab, redis) as net:
        for name, (node, record) in poisons(net, trap).items():
            before = refusals(net)
            poison(redis, node, record)
            await until(lambda before=before: refusals(net) > before, f"{name} refused", 5)  # type: ignore[misc]
            assert net.all_known(), name
            for router in net.routers:
                body = json.dumps({"model": "acme/tiny"}).encode()
                async with aiohttp.ClientSession() as session, session.post(f"{router.url}/announce", data=body):
                    pass  # a router tells all nodes of a publish
        await until(lambda: set(redis.ask("HKEYS", "{nearshard:}records")) == {b"n0", b"n1", b"n2"}, "all healed", 10)
        await until(net.well, "all well")
        await stays(net, 1.5 * TTL, net.all_known)
        assert trap.visits == 0
    trap.close()


async def test_a_router_that_starts_while_redis_is_away_is_not_empty(lab: Lab, redis: RedisServer) -> None:
    """It knows from its file also the node that only the other router hears."""
    async with network(lab, redis) as net:
        redis.kill()
        await until(lambda: net.degraded() == [True, True], "degraded said", RECOVERY)
        epoch = net.routers[0].status()["epoch"]
        for router in net.routers:
            net.restarting.append(router)
            await asyncio.to_thread(router.stop)
            await asyncio.to_thread(router.start)
            net.restarting.remove(router)
            assert net.known(router) == set(net.nodes), "from the very first answer"
        assert net.routers[0].status()["epoch"] >= epoch
        await stays(net, 1.5 * TTL, net.all_known)
        await asyncio.to_thread(redis.start)
        await until(net.well, "recovery", RECOVERY)


async def test_a_router_that_stood_still_takes_no_node_for_silent(lab: Lab, redis: RedisServer) -> None:
    """Its nodes beat all the time, and it did not hear them: from its first answer on, they are there."""
    async with network(lab, redis) as net:
        router = net.routers[0]
        net.least = 1  # at the other router, nodes that only this one hears are out meanwhile
        net.restarting.append(router)
        os.kill(router.pid, signal.SIGSTOP)
        await until(lambda: net.known(net.routers[1]) == {"n2"}, "the others out", TTL + 5)
        os.kill(router.pid, signal.SIGCONT)
        net.restarting.remove(router)
        await stays(net, 1.0, lambda: net.known(router) >= {"n0", "n1"})
        await until(net.well, "all well", RECOVERY)


async def test_a_router_that_alone_is_cut_off_agrees_again(lab: Lab, redis: RedisServer) -> None:
    """Routers that see different states: one loses Redis; nodes come and go meanwhile; then both agree."""
    async with forwarder(redis.port) as line, network(lab, redis) as net, aiohttp.ClientSession() as session:
        net.least = 2
        third = await asyncio.to_thread(start_router, net, 2, f"redis://127.0.0.1:{line.port}/0")
        net.routers.append(third)
        await until(net.well, "three routers agree", 10)
        line.cut()
        await until(lambda: net.degraded() == [False, False, True], "one is degraded", 10)
        net.keys["n3"] = NodeKey.generate()
        net.nodes["n3"] = Node("n3", "http://127.0.0.1:9003", "default", 1)
        write_enrolment(net)
        net.members["n3"] = member(net, session, "n3", net.routers[0])
        net.members["n3"].start()
        await net.members["n0"].leave()
        others = {"n1", "n2", "n3"}
        await until(lambda: net.known(net.routers[0]) == net.known(net.routers[1]) == others, "two agree", 5)
        assert net.known(third) == {"n0", "n1", "n2"}, "the third goes on with what it knew"
        line.mend()
        del net.nodes["n0"]
        await until(net.well, "all three agree", RECOVERY + TTL)
        await net.members["n3"].leave()
        await until(lambda: "n3" not in net.known(third), "and go on to", 3)
        del net.nodes["n3"]


async def test_a_node_whose_line_is_removed_is_out_and_one_that_is_added_is_in(lab: Lab, redis: RedisServer) -> None:
    async with network(lab, redis) as net:
        net.least = 2
        node = net.nodes["n2"]
        write_enrolment(net, "n0", "n1")
        for router in net.routers:
            await until(lambda router=router: net.known(router) == {"n0", "n1"}, "thrown out", 4)  # type: ignore[misc]
        await stays(net, 1.5 * TTL, lambda: "n2" not in net.known(net.routers[0]) | net.known(net.routers[1]))
        net.enrolled.write_text("this is = not toml = at all")
        await until(lambda: "cannot be read" in net.routers[0].status()["membership"], "trouble said", 5)
        assert net.known(net.routers[0]) == {"n0", "n1"}, "what it said last holds"
        net.nodes["n2"] = node
        write_enrolment(net)
        await until(net.well, "it is in again", 5)


async def test_routers_agree_at_once_and_at_the_next_exchange_without_messages(
    lab: Lab, redis: RedisServer, measured: Callable[[str], None]
) -> None:
    """A server that lets nobody subscribe or publish is as good, only slower."""
    async with network(lab, redis) as net, aiohttp.ClientSession() as session:
        net.least = 2
        for how in ("with", "without"):
            if how == "without":
                redis.ask("ACL", "SETUSER", "default", "-subscribe")
                redis.ask("CLIENT", "KILL", "TYPE", "pubsub")
            await net.members["n2"].leave()
            await until(lambda: not any("n2" in net.known(router) for router in net.routers), "out", 4)
            started = asyncio_time()
            net.members["n2"] = member(net, session, "n2", net.routers[1])
            net.members["n2"].start()
            await until(net.all_known, "in", 4)
            measured(f"agreed in {asyncio_time() - started:.2f} s {how} messages")
        await net.members["n2"].leave()
