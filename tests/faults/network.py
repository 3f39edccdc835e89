"""A whole network of real processes under steady use: Redis, an origin, two routers, six enrolled edges in two regions.

Clients of both kinds ask for a model again and again in every region: our SDK, and plain HTTP clients that follow a
router's 307 and, where that fails, its ``Link: rel=duplicate``. At the end none may have failed, none may have had
other bytes than were published, and every process must be as ``tests.faults.invariants`` wants it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from nearshard import Client, NearshardError
from shared.clock import SystemClock
from shared.enrolment import KEY, Enrolled, enrolment_line
from shared.keys import load_or_make_key
from shared.node import Node
from shared.web.server import free_port
from tests.faults import invariants
from tests.faults.client import until
from tests.faults.line import Line
from tests.harness import Lab, Service, make_model
from tests.redis_server import RedisServer

EDGES = {f"{region}-{number}": region for number in (1, 2, 3) for region in ("north", "south")}
MODEL = "acme/tiny"
PATIENCE = aiohttp.ClientTimeout(total=None, sock_connect=1.5, sock_read=1.5)
"""Of plain clients, which then try the next URL: seconds to connect, and between two reads."""
PAUSE = 0.2
"""Seconds between two requests of one client."""
now = SystemClock().monotonic
POISON = """
redis.call('HSET', '{nearshard:}records', ARGV[1], ARGV[2])
redis.call('ZADD', '{nearshard:}until', 4e12, ARGV[1])
redis.call('ZADD', '{nearshard:}changes', redis.call('HINCRBY', '{nearshard:}meta', 'count', 1), ARGV[1])
"""
Program = Callable[[str], Sequence[str]]
"""The words that start a service's module in a process."""


class Refused(AssertionError):
    """Nobody gave it; whoever answered said so by an error with a code."""


@dataclass(frozen=True)
class Place:
    """Where processes run: their address, and the words before their commands."""

    host: str = "127.0.0.1"
    within: tuple[str, ...] = ()


@dataclass
class Net:
    """What is under test."""

    lab: Lab
    regions: Mapping[str, str]
    model: Path
    origin: Service = field(init=False)
    routers: list[Service] = field(default_factory=list)
    edges: dict[str, Service] = field(default_factory=dict)
    done: Counter[str] = field(default_factory=Counter)
    """Downloads that went well, by client."""
    slowest: dict[str, float] = field(default_factory=dict)
    """Seconds of the slowest download, by client."""
    elsewhere: int = 0
    """Downloads of the SDK for which a router failed, and the other one did."""
    failures: list[str] = field(default_factory=list)
    patience: aiohttp.ClientTimeout = PATIENCE

    def of(self, region: str) -> list[Service]:
        """The edges of a region."""
        return [edge for name, edge in self.edges.items() if self.regions[name] == region]

    def knows(self, names: set[str]) -> bool:
        """Whether every router knows these nodes and no other, each once."""
        return all(sorted(known(router)) == sorted(names) for router in self.routers)

    def well(self) -> bool:
        """Whether every router knows every node, and all is as it should be with Redis."""
        status = [router.status() for router in self.routers]
        told = [(one["degraded"], one["epoch"], {node["id"] for node in one["nodes"]}) for one in status]
        return told == [("", told[0][1], set(self.regions))] * len(told)

    def changes(self) -> list[Counter[tuple[str, str]]]:
        """For each router, how often it has seen a node join, and go: ``("joined", "north-1")``."""
        return [
            Counter(re.findall(r"node (joined|out)\b.*?\bnode=([a-z0-9-]+)", router.text())) for router in self.routers
        ]

    # Clients

    async def get(self, clients: Sequence[Client], folder: Path) -> None:
        """The SDK: one download, by the first client that can. Raises the last one's NearshardError, AssertionError."""
        for number, client in enumerate(clients, 1):
            try:
                got = await client.get(MODEL, folder / "model.safetensors", force=True)
                self.elsewhere += number > 1
                break
            except NearshardError:
                if number == len(clients):
                    raise
        body = await asyncio.to_thread(got.paths[0].read_bytes)
        assert body == self.model.read_bytes(), "the SDK gave other bytes than were published"
        await asyncio.to_thread(got.paths[0].unlink)

    async def ask(
        self,
        session: aiohttp.ClientSession,
        region: str,
        first: int = 0,
        path: str = f"/shards/{MODEL}",
        right: Callable[[bytes], bool] | None = None,
    ) -> str:
        """A plain client: one download, by the redirect of the first router that answers. Gives the URL that had it.

        ``right``: whether bytes are those of ``path``; by default those of the model that was published first. Raises
        Refused where nothing that is named gives it, AssertionError where anything is wrong that looks right."""
        right, tried = right or (lambda body: body == self.model.read_bytes()), []
        for router in [*self.routers[first:], *self.routers[:first]]:
            try:
                named = await redirect(session, router, path, region, self.patience)
            except (aiohttp.ClientError, TimeoutError) as error:
                tried.append(f"{router.url}: {type(error).__name__}")
                continue
            for url in named:
                try:
                    async with session.get(url, timeout=self.patience, allow_redirects=False) as answer:
                        body = await answer.read()
                except (aiohttp.ClientError, TimeoutError) as error:
                    tried.append(f"{url}: {type(error).__name__}")
                    continue
                if answer.status == 200:
                    assert right(body), f"{url} gave other bytes than were published"
                    return url
                tried.append(f"{url}: {answer.status} {typed(answer, body)}")
            raise Refused(f"nothing that {router.url} named gave it: {tried}")
        raise Refused(f"no router answered: {tried}")

    async def _again_and_again(self, who: str, download: Callable[[], Any], ending: asyncio.Event) -> None:
        while not ending.is_set():
            started = now()
            try:
                await download()
                self.done[who] += 1
            except (NearshardError, AssertionError) as error:
                self.failures.append(f"{who}, {now() - started:.1f} s: {type(error).__name__}: {error}")
            self.slowest[who] = max(self.slowest.get(who, 0.0), now() - started)
            await asyncio.sleep(PAUSE)

    @asynccontextmanager
    async def in_use(self) -> AsyncIterator[None]:
        """Clients of each region, of both kinds, all the time. None fails."""
        ending = asyncio.Event()
        async with AsyncExitStack() as stack:
            session = await stack.enter_async_context(aiohttp.ClientSession())
            tasks = []
            for region in sorted(set(self.regions.values())):
                clients = [await stack.enter_async_context(Client([r.url for r in self.routers], region=region))]
                out = self.lab.folder / f"got-{region}"
                out.mkdir()
                turn = itertools.cycle(range(len(self.routers)))
                sdk = lambda clients=clients, out=out: self.get(clients, out)  # noqa: E731
                plain = lambda region=region, turn=turn: self.ask(session, region, next(turn))  # noqa: E731
                for who, download in ((f"sdk {region}", sdk), (f"plain {region}", plain)):
                    tasks.append(asyncio.create_task(self._again_and_again(who, download, ending), name=who))
            try:
                yield
            finally:
                ending.set()
                await asyncio.gather(*tasks)
        assert self.failures == [], self.failures[:5]
        assert len(self.done) == len(tasks), self.done

    def figures(self) -> str:
        """For people."""
        slowest = ", ".join(f"{who} {seconds:.1f} s" for who, seconds in self.slowest.items())
        again = f"{self.elsewhere} of the SDK by the second router"
        return f"{self.done.total()} downloads, none failed, {again}; the slowest: {slowest}"


def poison(redis: RedisServer, node: str, record: bytes) -> None:
    """Put a record among those of the nodes, as whoever has Redis can; routers look at it as at a change."""
    redis.ask("EVAL", POISON, 0, node, record)


def known(router: Service) -> list[str]:
    """The nodes that a router knows."""
    return [node["id"] for node in router.status()["nodes"]]


async def redirect(
    session: aiohttp.ClientSession,
    router: Service,
    path: str,
    region: str,
    patience: aiohttp.ClientTimeout = PATIENCE,
) -> list[str]:
    """What a router names for a path, best first. Raises ClientError, TimeoutError; Refused for no 307."""
    fields = {"Nearshard-Region": region}
    async with session.get(router.url + path, headers=fields, timeout=patience, allow_redirects=False) as answer:
        if answer.status != 307:
            raise Refused(f"{router.url} answered {answer.status} {typed(answer, await answer.read())}")
        links = [re.fullmatch(r"<(.+)>; rel=duplicate; pri=\d+", link) for link in answer.headers.getall("Link", ())]
        return [answer.headers["Location"], *(link[1] for link in links if link)]


def typed(answer: aiohttp.ClientResponse, body: bytes) -> str:
    """The code of an error, which has one, is no 500, and says when to come back where that may help."""
    assert answer.status in (502, 503, 504), f"{answer.url} answered {answer.status}"
    assert answer.status == 502 or "Retry-After" in answer.headers, answer.headers
    return str(json.loads(body)["code"])


@asynccontextmanager
async def network(
    lab: Lab,
    *redis_urls: str,
    tells: Callable[[str], Sequence[int]] = lambda _: (0, 1),
    regions: Mapping[str, str] = EDGES,
    hub: Place = Place(),
    places: Mapping[str, Place] | None = None,
    ttl: float = 2.0,
    heartbeat: float = 0.4,
    width: int = 64,
    program: Program = lambda module: (module,),
    line: Line | None = None,
    **edge_flags: str,
) -> AsyncIterator[Net]:
    """A network that is well. ``redis_urls``: the way to Redis of both routers, or of each. ``tells``: the numbers of
    the routers that a node heartbeats to. ``places``: by region; ``hub`` is where all else is. ``line``: the way
    of the nodes to the origin. At the end every process must be well too."""
    made = await asyncio.to_thread(_publish, lab, width)
    net = Net(lab, regions, made)
    where = {name: (places or {}).get(region, hub) for name, region in regions.items()}
    urls = {name: _free_url(where.get(name, hub)) for name in ("origin", "router-0", "router-1", *regions)}
    above = urls["origin"]
    if line:
        line.target, above = int(above.rpartition(":")[2]), f"http://127.0.0.1:{line.port}"
    enrolled = lab.folder / "nodes.toml"
    enrolled.write_text("".join(f"{_enrol(lab, net, name, urls[name])}\n" for name in regions))

    def router(number: int) -> Service:
        words = [
            "--origin",
            urls["origin"],
            "--redis",
            redis_urls[number % len(redis_urls)],
            "--enrolled",
            str(enrolled),
        ]
        words += ["--data", str(lab.folder / f"router-{number}"), "--ttl", str(ttl), "--default-region", "north"]
        words += ["--host", hub.host, "--insecure", "--trust-root", str(lab.trust_root)]
        return lab.service(
            *program("router"), *words, name=f"router-{number}", url=urls[f"router-{number}"], within=hub.within
        )

    def edge(name: str) -> Service:
        words = [f"--router={urls[f'router-{number}']}" for number in tells(name)]
        words += ["--origin", above, "--region", regions[name], "--heartbeat", str(heartbeat)]
        words += [f"--{flag.replace('_', '-')}={value}" for flag, value in edge_flags.items()]
        words += ["--host", where[name].host, "--insecure", "--node", name, "--data", str(lab.folder / name)]
        words += ["--trust-root", str(lab.trust_root)]
        return lab.service(*program("edge_node"), *words, name=name, url=urls[name], within=where[name].within)

    def origin() -> Service:
        words = ["--store", str(lab.store), "--host", hub.host, "--insecure"]
        return lab.service(*program("origin"), *words, name="origin", url=urls["origin"], within=hub.within)

    net.origin, *others = await asyncio.gather(
        asyncio.to_thread(origin),
        *(asyncio.to_thread(router, number) for number in range(2)),
        *(asyncio.to_thread(edge, name) for name in regions),
    )
    net.routers, net.edges = others[:2], dict(zip(regions, others[2:], strict=True))
    await until(net.well, "the network to be well")
    yield net
    for name, service in net.edges.items():
        await invariants.all_hold(service, lab.folder / name)
    for service in (*net.routers, net.origin):
        invariants.nothing_crashed(service)
    for together in (net.edges.values(), (*net.routers, net.origin)):
        assert set(await asyncio.gather(*(asyncio.to_thread(service.stop) for service in together))) == {0}


def _publish(lab: Lab, width: int) -> Path:
    make_model(lab.folder / "model", width=width)
    lab.publish(lab.folder / "model", MODEL, "--shard-target", "64KiB", "--shard-limit", "64KiB")
    return lab.folder / "model" / "model.safetensors"


def _free_url(place: Place) -> str:
    return f"http://{place.host}:{free_port()}"


def _enrol(lab: Lab, net: Net, name: str, url: str) -> str:
    key = load_or_make_key(lab.folder / name / KEY)
    return enrolment_line(Enrolled(Node(name, url, net.regions[name], 1), key.public))
