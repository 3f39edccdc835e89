"""The faults that the live network is given; each returns once its fault is over.

Where a fault has a time to last, it is the run's ``--hold``; where moments are chosen, the run's seed chooses them.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from shared.web.server import free_port
from tests.faults.client import Crowd, until
from tests.faults.live import LATE, Fault, Scene, wipe
from tests.faults.network import MODEL, poison
from tests.forked import Forked
from tests.harness import Service, command

KILLS = 3
SLOW = 100
"""Connections of slow clients."""


async def edges_killed_in_the_middle_of_fills(scene: Scene) -> None:
    """One after the other, each back before the next."""
    for _ in range(KILLS):
        edge = scene.net.edges[scene.any_edge()]
        await scene.hold(scene.rng.uniform(1, 3))
        edge.kill()
        await scene.hold(scene.rng.uniform(0.1, 1))
        await asyncio.to_thread(edge.start)


async def publisher_killed(scene: Scene) -> None:
    """Anywhere in a publish; then the same is published again."""
    for _ in range(KILLS):
        folder = await asyncio.to_thread(scene.next_version)
        words = [str(folder), MODEL, "--store", str(scene.lab.store), "--json", "--no-compress", "--no-deltas"]
        process = Forked("origin.publish_command", words, os.environ, scene.lab.folder / "killed-publish.log")
        await scene.hold(scene.rng.uniform(0.1, 1.5))
        process.kill()
        await asyncio.to_thread(process.wait, 10)
        scene.revisions.append(await asyncio.to_thread(scene.lab.publish, folder, MODEL))


async def client_killed_in_a_download(scene: Scene) -> None:
    """Again and again; then it gets the rest."""
    out = scene.lab.folder / f"killed-{len(scene.revisions)}-{scene.rng.getrandbits(32):x}"
    out.mkdir()
    words = ["get", MODEL, "--router", scene.net.routers[0].url, "-o", str(out), "--force"]
    for _ in range(KILLS):
        process = Forked("nearshard", [*words, "--limit-rate", "500K"], os.environ, scene.lab.folder / "killed.log")
        await scene.hold(scene.rng.uniform(0.3, 1.5))
        process.kill()
        await asyncio.to_thread(process.wait, 10)
        scene.whole(out / "model.safetensors")
    await asyncio.to_thread(command, *words)
    scene.whole(out / "model.safetensors")
    left = sorted(path.name for path in out.iterdir())
    assert left == ["config.json", "model.safetensors", "tokenizer.json"], f"of a whole download there is {left}"


@asynccontextmanager
async def standing_still(*services: Service) -> AsyncIterator[None]:
    """SIGSTOP, and SIGCONT whatever happens."""
    for service in services:
        os.kill(service.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for service in services:
            os.kill(service.pid, signal.SIGCONT)


async def edge_stands_still(scene: Scene) -> None:
    """SIGSTOP."""
    async with standing_still(scene.net.edges[scene.any_edge()]):
        await scene.hold()


async def region_cut_off(scene: Scene) -> None:
    """All of the south stands still."""
    async with standing_still(*scene.net.of("south")):
        await scene.hold()


async def origin_stands_still(scene: Scene) -> None:
    """SIGSTOP."""
    async with standing_still(scene.net.origin):
        await scene.hold()


async def origin_killed(scene: Scene) -> None:
    """SIGKILL, and started again."""
    scene.net.origin.kill()
    await scene.hold()
    await asyncio.to_thread(scene.net.origin.start)


async def redis_killed(scene: Scene) -> None:
    """And started again, empty."""
    scene.redis.kill()
    await scene.hold()
    await asyncio.to_thread(scene.redis.start)


async def redis_stands_still(scene: Scene) -> None:
    """SIGSTOP."""
    scene.redis.freeze()
    try:
        await scene.hold()
    finally:
        scene.redis.thaw()


async def redis_emptied(scene: Scene) -> None:
    """FLUSHALL, at moments of no meaning."""
    for _ in range(KILLS):
        await asyncio.to_thread(scene.redis.ask, "FLUSHALL")
        await scene.hold(scene.rng.uniform(0.1, 3))


async def redis_read_only(scene: Scene) -> None:
    """It is made the replica of nobody, and refuses to write."""
    await asyncio.to_thread(scene.redis.ask, "REPLICAOF", "127.0.0.1", free_port())
    await scene.hold()
    await asyncio.to_thread(scene.redis.ask, "REPLICAOF", "NO", "ONE")


async def redis_poisoned(scene: Scene) -> None:
    """Records that are too long, no records, of nodes that there are and of one that nobody knows."""
    for record in (bytes(10 << 20), scene.rng.randbytes(200), b"ff 1000000000000000 00000000\n" + bytes(64)):
        for name in (scene.any_edge(), "stranger"):
            await asyncio.to_thread(poison, scene.redis, name, record)
            await scene.hold(1)


async def slow_headers(scene: Scene) -> None:
    """A byte a second of a header, from many; the node cuts them off in 15 s."""
    edge = scene.net.edges[scene.any_edge()]
    with await asyncio.to_thread(Crowd, edge.port, SLOW) as crowd:
        crowd.send(b"GET /blobs/x HTTP/1.1\r\n")
        for _ in range(round(scene.options.hold)):
            crowd.send(b"x")
            await scene.hold(1)


async def slow_readers(scene: Scene) -> None:
    """They ask for the whole model and read next to nothing of it."""
    edge = scene.net.edges[scene.any_edge()]
    with await asyncio.to_thread(lambda: Crowd(edge.port, SLOW, receive=4096)) as crowd:
        crowd.send(f"GET /shards/{MODEL} HTTP/1.1\r\nHost: edge\r\n\r\n".encode())
        for _ in range(round(scene.options.hold)):
            crowd.sip(10, 0)
            await scene.hold(1)


async def link_slow_and_far(scene: Scene) -> None:
    """The nodes' way to the origin takes 50 ms each way, and 64 KiB at a time; nothing is lost."""
    scene.line.delay = 0.05
    try:
        await scene.hold()
    finally:
        scene.line.delay = 0.0


async def link_swallows_all(scene: Scene) -> None:
    """The nodes' way to the origin gives nothing, and nobody is told."""
    scene.line.cut()
    try:
        await scene.hold()
    finally:
        scene.line.mend()


async def link_resets(scene: Scene) -> None:
    """Every connection from nodes to the origin is reset, several times a second at times."""
    end = asyncio.get_running_loop().time() + scene.options.hold
    while asyncio.get_running_loop().time() < end:
        scene.line.tear()
        await scene.hold(scene.rng.uniform(0.1, 1.5))


async def node_leaves_and_comes_back_empty(scene: Scene) -> None:
    """SIGTERM; its cache is gone when it is back."""
    name = scene.any_edge()
    edge: Service = scene.net.edges[name]
    await asyncio.to_thread(edge.stop)
    data: Path = scene.lab.folder / name
    await asyncio.to_thread(wipe, data)
    await scene.hold()
    await asyncio.to_thread(edge.start)


async def no_edge_alive(scene: Scene) -> None:
    """All are killed."""
    edges = list(scene.net.edges.values())
    for edge in edges:
        edge.kill()
    await scene.hold()
    await asyncio.gather(*(asyncio.to_thread(edge.start) for edge in edges))


async def keys_rotated(scene: Scene) -> None:
    """One after the other; then a version is published with the new ones."""
    for role in ("root", "targets", "online"):
        await asyncio.to_thread(scene.lab.trust, "rotate", role)
        await scene.hold(2)
    await scene.publish()


async def all_restarted_in_turn(scene: Scene) -> None:
    """SIGTERM, each back before the next."""
    for service in scene.services.values():
        assert await asyncio.to_thread(service.stop) == 0
        await asyncio.to_thread(service.start)
        await until(scene.net.well, f"all well after {service.module}", LATE)


LIVE: Sequence[Fault] = [
    Fault("F1", edges_killed_in_the_middle_of_fills, True),
    Fault("F2", publisher_killed, True),
    Fault("F3", client_killed_in_a_download, True),
    Fault("F5", edge_stands_still, True),
    Fault("F6", origin_stands_still, False),
    Fault("F6", origin_killed, False),
    Fault("F7", redis_killed, True),
    Fault("F8", redis_stands_still, True),
    Fault("F9", redis_emptied, True),
    Fault("F9", redis_read_only, True),
    Fault("F10", redis_poisoned, True),
    Fault("F23", slow_headers, True),
    Fault("F24", slow_readers, True),
    Fault("F25", link_slow_and_far, True),
    Fault("F26", link_swallows_all, False),
    Fault("F26", link_resets, False),
    Fault("F27", region_cut_off, True),
    Fault("F30", node_leaves_and_comes_back_empty, True),
    Fault("F31", no_edge_alive, False),
    Fault("F32", all_restarted_in_turn, True),
    Fault("F34", keys_rotated, True),
]
"""In the order of the table."""
