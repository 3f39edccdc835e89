"""Asking every node whether it is up, again and again: ``GET /healthz``.

Nodes are asked one after the other over the interval, in an order that is new each time, so that probes are an even
trickle however many nodes there are; above ``RATE`` a second the interval grows.
"""

from __future__ import annotations

import asyncio
import random

import aiohttp

from router.registry import Registry
from router.selection import Selection
from shared.clock import Clock
from shared.errors import UpstreamError
from shared.node import Node
from shared.tasks import end
from shared.web.asking import Asking
from shared.web.session import translated

DEADLINE = aiohttp.ClientTimeout(total=2.0)
AT_ONCE = 64
RATE = 200.0
"""Probes a second at most."""

FRESH = 1.0
"""Seconds for which a probe says how it is now."""


class Prober:
    """Probes the members of a registry and tells a selection."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        registry: Registry,
        selection: Selection,
        interval: float,
        clock: Clock,
        rng: random.Random,
    ) -> None:
        self._session, self._registry, self._selection = session, registry, selection
        self._interval, self._clock, self._random = interval, clock, rng
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._probes: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None
        self._heard: dict[str, tuple[bool, float]] = {}
        """By node what its last probe said, and when."""
        self._asking = Asking()

    def start(self) -> None:
        """Begin, unless the interval is 0."""
        if self._interval:
            self._task = asyncio.create_task(self._run(), name="prober")

    async def close(self) -> None:
        """Stop."""
        await end([*self._probes, *([self._task] if self._task else [])])
        await self._asking.close()

    async def answers(self, node: Node) -> bool:
        """Whether a node is up, as of FRESH seconds ago at most: for clients that do not get over one that is gone."""
        ok, when = self._heard.get(node.id, (False, float("-inf")))
        if self._clock.monotonic() - when <= FRESH:
            return ok
        return await self._asking.once(node.id, lambda: self._ask(node))

    async def _run(self) -> None:
        while True:
            nodes = list(self._registry.snapshot.nodes)
            self._random.shuffle(nodes)
            self._heard = {node: heard for node, heard in self._heard.items() if node in self._registry.snapshot.nodes}
            pause = max(self._interval / max(1, len(nodes)), 1 / RATE)
            for node in nodes:
                if known := self._registry.snapshot.nodes.get(node):
                    await self._slots.acquire()
                    probe = asyncio.create_task(self._probe(known))
                    self._probes.add(probe)
                    probe.add_done_callback(self._probes.discard)
                await self._clock.sleep(pause * (0.8 + 0.4 * self._random.random()))
            if not nodes:
                await self._clock.sleep(pause)

    async def _probe(self, node: Node) -> None:
        try:
            await self._ask(node)
        finally:
            self._slots.release()

    async def _ask(self, node: Node) -> bool:
        try:
            url = f"{node.url}/healthz"
            with translated(url):
                async with self._session.get(url, timeout=DEADLINE, allow_redirects=False) as answer:
                    ok = answer.status == 200
                    await answer.content.readexactly(min(answer.content_length or 0, 1024))  # to use it once more
        except (UpstreamError, asyncio.IncompleteReadError):
            ok = False
        if node.id in self._registry.snapshot.nodes:  # it may have left meanwhile
            self._heard[node.id] = ok, self._clock.monotonic()
            self._selection.probed(node.id, ok)
        return ok
