"""Being a member: a heartbeat to every router, and a word when leaving."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import aiohttp
from structlog.typing import FilteringBoundLogger

from shared.clock import Clock
from shared.errors import UpstreamError
from shared.web.session import translated

EAGER = 0.1
"""Seconds until the second try to reach a router at start; doubled up to the interval."""
TIMEOUT = aiohttp.ClientTimeout(total=2.0)


class Membership:
    """Tells routers that this node is there. ``record`` gives what is told, anew each time."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        routers: Sequence[str],
        node: str,
        record: Callable[[], Mapping[str, Any]],
        interval: float,
        clock: Clock,
        rng: random.Random,
        log: FilteringBoundLogger,
    ) -> None:
        self._session, self._routers, self._node, self._record = session, list(routers), node, record
        self._interval, self._clock, self._random, self._log = interval, clock, rng, log
        self._heard: dict[str, bool] = dict.fromkeys(routers, False)
        self._beating: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to send heartbeats."""
        if self._routers:
            self._beating = asyncio.create_task(self._beat(), name="heartbeats")

    async def _beat(self) -> None:
        """The jitter keeps the nodes of a site from beating together. A new node is eager to be known."""
        eager = EAGER
        while True:
            await asyncio.gather(*(self._tell("PUT", router) for router in self._routers))
            eager = self._interval if all(self._heard.values()) else min(2 * eager, self._interval)
            await self._clock.sleep(eager * (0.9 + 0.2 * self._random.random()))

    async def leave(self) -> None:
        """Stop, and ask the routers to send nobody here any more. Does nothing the second time."""
        beating, self._beating = self._beating, None
        if beating is None:
            return
        beating.cancel()
        await asyncio.wait([beating])
        await asyncio.gather(*(self._tell("DELETE", router) for router in self._routers))

    async def _tell(self, method: str, router: str) -> None:
        url = f"{router}/nodes/{self._node}"
        try:
            with translated(url):
                body = dict(self._record()) if method == "PUT" else None
                async with self._session.request(
                    method, url, json=body, timeout=TIMEOUT, allow_redirects=False
                ) as answer:
                    if answer.status >= 400:
                        raise UpstreamError(f"{url} answered {answer.status}: {(await answer.text())[:300]}")
            if not self._heard[router]:
                self._log.info("a router knows this node", router=router)
            self._heard[router] = True
        except UpstreamError as error:
            if self._heard[router]:  # once for each change: a router that is away is not news twice
                self._log.warning("a router does not hear this node", router=router, reason=str(error))
            self._heard[router] = False
