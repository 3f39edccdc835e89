"""A router's choice of nodes, kept up to date: what the registry, the probes and clients tell, put together."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

from structlog.typing import FilteringBoundLogger

from router.registry import Registry
from shared.clock import Clock
from shared.errors import NotFound
from shared.health import Health
from shared.loads import Loads
from shared.metrics import Metrics
from shared.nearness import Nearness
from shared.node import State
from shared.routing import Choice, Routing
from shared.tasks import end
from shared.view import View, near

REFRESH = 0.5
"""Seconds between two looks at what nodes told of themselves; a change of members is taken at once."""


class Selection:
    """Which nodes to name for a key."""

    def __init__(
        self, registry: Registry, nearness: Nearness, clock: Clock, metrics: Metrics, log: FilteringBoundLogger
    ) -> None:
        self._registry, self._clock, self._metrics, self._log = registry, clock, metrics, log
        self._health = Health()
        self._loads = Loads()
        self._routing = Routing(nearness, self._loads, self._health)
        self._task: asyncio.Task[None] | None = None
        self._panics: frozenset[str] = frozenset()
        self._sent: Counter[tuple[str, str]] = Counter()
        """Redirects by region and verdict that the metrics have not been told of: this is a hot path."""
        metrics.before_render.append(self._tell_metrics)

    def start(self) -> None:
        """Begin to look at what nodes tell."""
        self._task = asyncio.create_task(self._run(), name="selection")

    async def close(self) -> None:
        """Stop."""
        await end([self._task] if self._task else [])

    async def _run(self) -> None:
        while True:
            self.refresh()
            await self._clock.sleep(REFRESH)

    def refresh(self) -> None:
        """Take what is known now."""
        registry = self._registry
        self._routing.update(registry.snapshot, registry.states, registry.joined_at, self._clock.monotonic())
        panics = frozenset(self._routing.panics)
        for region in panics - self._panics:
            self._metrics.panics.labels(region).inc()
            self._log.warning("more than half of a region is ejected; all of it is used", region=region)
        self._panics = panics

    def choose(self, region: str, key: str, count: int) -> list[Choice]:
        """Nodes for a key, best first, for a client in ``region``; none only where there is none at all."""
        if self._routing.snapshot is not self._registry.snapshot:
            self.refresh()
        return self._routing.choose(region, key, count, self._clock.monotonic())

    def send(self, region: str, key: str, count: int) -> list[Choice]:
        """Choose, and where there is a node, count the client as sent to the first: ``choose`` and ``sent`` in one."""
        if self._routing.snapshot is not self._registry.snapshot:
            self.refresh()
        now = self._clock.monotonic()
        choices = self._routing.choose(region, key, count, now)
        if choices:
            first = choices[0]
            self._loads.send(first.node.id, now)
            self._sent[first.node.region, first.verdict] += 1
        return choices

    def sent(self, choices: list[Choice]) -> None:
        """A client was sent to the first of these (or to an origin)."""
        self._routing.sent(choices, self._clock.monotonic())
        first = choices[0] if choices else None
        self._sent[(first.node.region, first.verdict) if first else ("", "origin")] += 1

    def _tell_metrics(self) -> None:
        for (region, verdict), count in self._sent.items():
            self._metrics.redirects.labels(region, verdict).inc(count)
        self._sent.clear()

    def view(self, region: str, origins: Sequence[str], count: int) -> View:
        """What a client in ``region`` needs to choose by itself, of about ``count`` nodes."""
        if self._routing.snapshot is not self._registry.snapshot:
            self.refresh()
        order = self._routing.nearest(region, self._clock.monotonic())
        return near(self._routing.snapshot, region, order, self._routing.passed_over(), origins, count)

    # Evidence

    def probed(self, node: str, ok: bool) -> None:
        """A probe of a node was answered, or not."""
        now = self._clock.monotonic()
        self._metrics.probes.labels("ok" if ok else "failed").inc()
        if ok:
            self._health.succeeded(node, now)
        elif self._health.failed(node, now):
            self._ejected(node)

    def reported(self, node: str, ok: bool, address: str) -> None:
        """A client says how a node did. Raises NotFound for one that is no member."""
        if node not in self._registry.snapshot.nodes:
            raise NotFound(code="unknown_node")
        if self._health.report(node, ok, address, self._clock.monotonic()):
            self._ejected(node)

    def _ejected(self, node: str) -> None:
        known = self._registry.snapshot.nodes.get(node)
        if known is None:
            return
        self._metrics.ejections.labels(known.region).inc()
        left = self._health.describe(node, self._clock.monotonic())["seconds_left"]
        self._log.warning("node ejected", node=node, region=known.region, seconds=left)
        self.refresh()

    # For people

    def nodes(self) -> list[dict[str, Any]]:
        """Every node: what it is, how it does, what is thought of it."""
        return [{**node.record(), **self.describe(node.id)} for node in self._registry.snapshot.nodes.values()]

    def describe(self, node: str) -> dict[str, Any]:
        """What a node told, its load as it is reckoned here, and what is thought of its health."""
        state = self._registry.states.get(node, State())
        now = self._clock.monotonic()
        self._loads.advance(now)
        load = round(self._loads.value(self._loads.of(node)), 1)
        health = self._health.describe(node, now)
        return {"in_flight": state.in_flight, "draining": state.draining, "load": load, "health": health}

    def regions(self, region: str) -> list[dict[str, Any]]:
        """The regions as seen from one, nearest first, and why."""
        counts = {name: len(ring.members) for name, ring in self._registry.snapshot.rings.items()}
        return [{**away.as_json(), "nodes": counts.get(away.region, 0)} for away in self._routing.order(region)]
