"""How long a round trip to other regions takes, measured by connecting to their nodes; told in heartbeats.

A TCP handshake is one round trip, answered by the other side's kernel, so it says how far a node is and not how busy.
Each time a few regions have their turn, a node or two of each: over a few intervals all of them, and the load on the
network does not grow with its size.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from urllib.parse import urlsplit

import aiohttp
from structlog.typing import FilteringBoundLogger

from shared import codec
from shared.clock import Clock
from shared.errors import RequestError, UpstreamError
from shared.node import Node, parse_node
from shared.tasks import end
from shared.web.session import fetch

EAGER = 2.0
"""Seconds until the first measurement, at most: routers know the node by then, and it knows them."""
NODES, REGIONS = 2, 16
"""Nodes of a region, and regions, that are measured in one pass."""
TOLD = 32
"""Regions that a heartbeat tells of, the nearest ones: clients are sent no farther where those have a node."""
DEADLINE = 2.0
TRIES = 2
"""Handshakes with each node. The quickest counts: the first one may wait for a name to be looked up."""
NEW = 0.5
"""What a new measurement weighs against those before it."""
MAX_RING = 16 << 20


class RoundTrips:
    """Milliseconds to other regions. ``interval`` in seconds; 0 measures nothing."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        routers: Sequence[str],
        region: str,
        interval: float,
        clock: Clock,
        rng: random.Random,
        log: FilteringBoundLogger,
    ) -> None:
        self._session, self._routers, self._region = session, list(routers), region
        self._interval, self._clock, self._random, self._log = interval, clock, rng, log
        self._ms: dict[str, float] = {}
        self._turn: list[str] = []
        """Regions in the order in which they had their turn, the one that waits longest first."""
        self._etag, self._nodes = "", dict[str, list[Node]]()
        self._task: asyncio.Task[None] | None = None

    def nearest(self) -> Mapping[str, float]:
        """Milliseconds by region, of those that are nearest."""
        nearest = sorted(self._ms, key=lambda region: (self._ms[region], region))[:TOLD]
        return {region: round(self._ms[region], 2) for region in nearest}

    def start(self) -> None:
        """Begin to measure."""
        if self._interval and self._routers:
            self._task = asyncio.create_task(self._run(), name="round trips")

    async def close(self) -> None:
        """Stop."""
        await end([self._task] if self._task else [])

    async def _run(self) -> None:
        await self._clock.sleep(min(EAGER, self._interval) * self._random.random())
        while True:
            try:
                await self._look()
            except (UpstreamError, RequestError, KeyError, TypeError) as error:
                self._log.debug("the other regions are not known now", reason=str(error))
            await asyncio.gather(*(self._measure(region) for region in self._next()))
            await self._clock.sleep(self._interval * (0.9 + 0.2 * self._random.random()))

    async def _look(self) -> None:
        """Learn the nodes of all regions, from any router. Raises UpstreamError, RequestError, KeyError, TypeError."""
        failure: UpstreamError | None = None
        for router in self._random.sample(self._routers, len(self._routers)):
            try:
                headers = {"If-None-Match": self._etag} if self._etag else {}
                answer = await fetch(self._session, f"{router}/ring", limit=MAX_RING, headers=headers)
            except UpstreamError as error:
                failure = error
                continue
            if answer.status == 200:
                self._take(codec.decode_json(answer.body, MAX_RING)["nodes"])
                self._etag = answer.headers.get("ETag", "")
            return
        if failure:
            raise failure

    def _take(self, records: Sequence[Mapping[str, object]]) -> None:
        nodes: dict[str, list[Node]] = defaultdict(list)
        for record in records:
            node = parse_node(str(record["id"]), record)
            if node.region != self._region:
                nodes[node.region].append(node)
        self._nodes = nodes
        self._ms = {region: ms for region, ms in self._ms.items() if region in nodes}
        new = nodes.keys() - set(self._turn)
        self._turn = [*sorted(new), *(region for region in self._turn if region in nodes)]

    def _next(self) -> list[str]:
        """The regions whose turn it is."""
        chosen, rest = self._turn[:REGIONS], self._turn[REGIONS:]
        self._turn = rest + chosen
        return chosen

    async def _measure(self, region: str) -> None:
        nodes = self._random.sample(self._nodes[region], min(NODES, len(self._nodes[region])))
        times = [ms for node in nodes if (ms := await self._handshake(node)) is not None]
        if not times:
            self._ms.pop(region, None)  # nobody there: farther than what can be measured
            return
        known = self._ms.get(region, min(times))
        self._ms[region] = known + NEW * (min(times) - known)

    async def _handshake(self, node: Node) -> float | None:
        """Milliseconds of a TCP handshake with a node; None where there was none in time."""
        parts = urlsplit(node.url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        best: float | None = None
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(DEADLINE):
                for _ in range(TRIES):
                    started = self._clock.monotonic()
                    _, writer = await asyncio.open_connection(parts.hostname, port)
                    taken = (self._clock.monotonic() - started) * 1000
                    writer.close()
                    with suppress(OSError):
                        await writer.wait_closed()
                    best = taken if best is None else min(best, taken)
        return best
