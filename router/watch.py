"""What nodes say of themselves, asked while somebody looks: ``GET /status`` of each.

Nodes are asked all at once, at most every ``FRESH`` seconds, however many people look; never on the way of a redirect.
What a node said last is kept after it is gone, so that the day's sums do not shrink with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import aiohttp

from router.overview import Report, Seen, order, parse_report
from router.registry import Registry
from router.selection import Selection
from shared import codec
from shared.clock import Clock
from shared.enrolment import Enrolled
from shared.errors import DecodeError, UpstreamError
from shared.node import Node
from shared.ring import Ring
from shared.web.asking import Asking
from shared.web.session import Answered, read_whole, translated

FRESH = 5.0
"""Seconds for which what nodes said is shown."""
MAX_NODES = 512
"""Nodes that are asked and shown: those that are not well, then by name."""
AT_ONCE = 64
DEADLINE = aiohttp.ClientTimeout(total=2.0)
ROUND = 6.0
"""Seconds after which nobody waits for the others any more."""
MAX_STATUS = codec.MAX_JSON
"""Bytes of a node's status."""


@dataclass(slots=True)
class _Heard:
    """What a node said last, and how the last question went."""

    url: str
    report: Report | None = None
    at: float = 0.0
    trouble: str = ""
    rate: float | None = None
    link_rate: float | None = None


class Watch:
    """What is known of the nodes that are members, or may be."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        registry: Registry,
        selection: Selection,
        enrolled: Callable[[], Mapping[str, Enrolled]],
        clock: Clock,
    ) -> None:
        """``enrolled``: the nodes that may join, as far as they are named."""
        self._session, self._registry, self._selection = session, registry, selection
        self._enrolled, self._clock = enrolled, clock
        self._heard: dict[str, _Heard] = {}
        self._asked = float("-inf")
        self._asking = Asking()
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._shares: dict[str, tuple[Ring, Mapping[str, float]]] = {}

    async def close(self) -> None:
        """Stop."""
        await self._asking.close()

    @property
    def age(self) -> float:
        """Seconds since the nodes were asked last."""
        return self._clock.monotonic() - self._asked

    async def look(self) -> list[Seen]:
        """All nodes, the news not older than FRESH seconds."""
        if self.age >= FRESH:
            await self._asking.once("nodes", self._ask_all)
        now, members = self._clock.monotonic(), self._registry.snapshot.nodes
        away = [one.node for one in self._enrolled().values() if one.node.id not in members]
        return [self._seen(node, now) for node in (*members.values(), *away)]

    def _seen(self, node: Node, now: float) -> Seen:
        member = node.id in self._registry.snapshot.nodes
        told = self._selection.describe(node.id) if member else None
        share = self._shares[node.region][1].get(node.id, 0.0) if member and node.region in self._shares else 0.0
        heard = self._heard.get(node.id)
        if heard is None:
            return Seen(node, told, share)
        if heard.report is None:
            return Seen(node, told, share, trouble=heard.trouble)
        rates = (heard.rate, heard.link_rate) if member and not heard.trouble else (None, None)
        return Seen(node, told, share, heard.report, now - heard.at, heard.trouble, *rates)

    async def _ask_all(self) -> None:
        await self._reckon_shares()
        now = self._clock.monotonic()
        members, enrolled = self._registry.snapshot.nodes, self._enrolled()
        asked = [one.node for one in order(self._seen(node, now) for node in members.values())[:MAX_NODES]]
        away = [name for name in self._heard if name in enrolled and name not in members][:MAX_NODES]
        shown = {*away, *(node.id for node in asked)}
        self._heard = {name: heard for name, heard in self._heard.items() if name in shown}
        with suppress(TimeoutError):
            async with asyncio.timeout(ROUND), asyncio.TaskGroup() as group:
                for node in asked:
                    group.create_task(self._ask(node))
        self._asked = self._clock.monotonic()  # only now: who looks meanwhile waits for the same answers

    async def _reckon_shares(self) -> None:
        """Of rings that are new; in a thread, as it takes a second for ten thousand nodes."""
        rings = self._registry.snapshot.rings
        known = {name: self._shares.get(name) for name in rings}
        new = {name: ring for name, ring in rings.items() if (old := known[name]) is None or old[0] is not ring}
        made = await asyncio.to_thread(lambda: {name: (ring, ring.shares()) for name, ring in new.items()})
        self._shares = {name: made.get(name) or self._shares[name] for name in rings}

    async def _ask(self, node: Node) -> None:
        heard = self._heard.setdefault(node.id, _Heard(node.url))
        if heard.url != node.url:
            heard = self._heard[node.id] = _Heard(node.url)
        try:
            async with self._slots:
                report = parse_report(await self._status(f"{node.url}/status"))
        except UpstreamError as error:
            heard.trouble = error.error_code
            return
        now, before = self._clock.monotonic(), heard.report
        heard.rate = _rate(before.sent, report.sent, now - heard.at) if before else None
        heard.link_rate = _rate(before.received, report.received, now - heard.at) if before else None
        heard.report, heard.at, heard.trouble = report, now, ""

    async def _status(self, url: str) -> Any:
        """Raises UpstreamError."""
        try:
            with translated(url):
                async with self._session.get(url, timeout=DEADLINE, allow_redirects=False) as answer:
                    if answer.status != 200:
                        raise Answered(f"{url} answered {answer.status}")
                    return codec.decode_json(await read_whole(answer, url, MAX_STATUS), MAX_STATUS)
        except DecodeError as error:
            raise UpstreamError(f"{url} answered no status") from error


def _rate(before: int, now: int, seconds: float) -> float | None:
    """None where a node has started anew, or too long ago was asked to say how it does now."""
    return (now - before) / seconds if now >= before and 0 < seconds < 6 * FRESH else None
