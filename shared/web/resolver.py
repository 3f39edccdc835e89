"""Names of upstreams, resolved ahead and kept: a slow or absent resolver costs no request.

A name is looked up in both address families, when it is first needed or by ``ahead``; after ``FRESH`` seconds it is
looked up again beside the requests that go on using what is known; while no resolver answers, what was known last
is good for ``STALE`` seconds. The connector races the families (RFC 8305).
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.helpers import is_ip_address
from aiohttp.resolver import ThreadedResolver

from shared.clock import Clock
from shared.tasks import end

FRESH, STALE = 30.0, 3600.0
KEEP = 1000
"""Names kept."""


@dataclass
class _Known:
    results: list[ResolveResult]
    since: float


class AheadResolver(AbstractResolver):
    """A resolver with a memory. ``inner`` does the looking up; the system's own by default."""

    def __init__(self, clock: Clock, inner: AbstractResolver | None = None) -> None:
        self._clock = clock
        self._inner = inner or ThreadedResolver()
        self._known: dict[str, _Known] = {}
        self._asking: dict[str, asyncio.Task[list[ResolveResult]]] = {}

    def ahead(self, urls: Iterable[str]) -> None:
        """Begin to look up the hosts of these URLs."""
        for url in urls:
            if (host := urlsplit(url).hostname) and not is_ip_address(host):
                self._ask(host)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Addresses of a host. Raises OSError where it was never known, or too long ago, and cannot be looked up."""
        known = self._known.get(host)
        age = self._clock.monotonic() - known.since if known else STALE
        if known is None or age >= STALE:
            results = await asyncio.shield(self._ask(host))
        else:
            results = known.results
            if age >= FRESH:
                self._ask(host)
        return [ResolveResult(**{**result, "port": port}) for result in results]

    async def close(self) -> None:
        """End what is under way."""
        await end(self._asking.values())
        await self._inner.close()

    def _ask(self, host: str) -> asyncio.Task[list[ResolveResult]]:
        task = self._asking.get(host)
        if task is None:
            task = self._asking[host] = asyncio.create_task(self._look_up(host))
            task.add_done_callback(lambda done: self._asked(host, done))
        return task

    async def _look_up(self, host: str) -> list[ResolveResult]:
        results = await self._inner.resolve(host, 0, socket.AF_UNSPEC)
        if len(self._known) >= KEEP:
            self._known.clear()
        self._known[host] = _Known(results, self._clock.monotonic())
        return results

    def _asked(self, host: str, task: asyncio.Task[list[ResolveResult]]) -> None:
        self._asking.pop(host, None)
        if not task.cancelled():
            task.exception()  # whoever waits for it gets it; ahead of time, nobody does
