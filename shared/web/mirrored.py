"""What a node or router does with a model that it does not know: an origin may mirror another hub, and get it there."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from urllib.parse import urlencode

import aiohttp
from aiohttp import web

from shared.clock import Clock
from shared.errors import Mirroring, NotFound, UpstreamError
from shared.manifest import MAX_MANIFEST
from shared.paths import manifest_path
from shared.token_file import bearer
from shared.web.access import QUERY, token_text
from shared.web.asking import Asking
from shared.web.reads import Tier
from shared.web.session import CONNECT, Sessions, fetch, read_whole, translated

MISSING = 5.0
"""Seconds after which what no origin has is asked for again."""
RELAY = 9.0
"""Seconds that an origin has to answer a client of the hub's, who waits for ten."""
MAX_DOCUMENT = 32 << 20
"""Bytes of a document that is passed on."""
PASSED_ON = (
    "Content-Type", "Content-Length", "ETag", "Cache-Control", "Accept-Ranges", "Retry-After", "Vary",
    "X-Repo-Commit", "X-Linked-Etag", "X-Linked-Size", "X-Error-Code", "X-Error-Message",
)  # fmt: skip
"""Fields of an origin's answer that are passed on with it: nothing of Xet is among them."""
REMEMBERED = 10_000
"""Such answers that are remembered."""


class Mirrored:
    """Asks origins. One question for all who want the same thing with the same token."""

    def __init__(self, sessions: Sessions, origins: Sequence[str], clock: Clock, forget: Callable[[str], None]) -> None:
        """``forget``: called with a model that is there after all, so that what is known is looked up anew."""
        self._sessions, self._origins, self._clock, self._forget = sessions, list(origins), clock, forget
        self._missing: OrderedDict[tuple[str, str, str], float] = OrderedDict()
        self._asking = Asking()

    async def absent(self, request: web.Request, model: str, ref: str) -> bool:
        """As of ``shared.web.reads.Absent``. Raises Mirroring."""
        token = token_text(request)
        key = (model, ref, token)
        if self._clock.monotonic() < self._missing.get(key, float("-inf")):
            return False
        there = await self._asking.once(key, partial(self._ask, model, ref, token))
        if there:
            self._forget(model)
            return True
        self._remember_missing(key)
        return False

    def _remember_missing(self, key: tuple[str, str, str]) -> None:
        self._missing[key] = self._clock.monotonic() + MISSING
        self._missing.move_to_end(key)
        while len(self._missing) > REMEMBERED:
            self._missing.popitem(last=False)

    async def hub_absent(
        self, request: web.Request, answer: Callable[[Tier], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse | None:
        """As of ``shared.web.hub.HubAbsent``: documents are passed on from an origin that has them, and whoever wants
        bytes is sent there."""
        if request.method not in ("GET", "HEAD") or request.path.startswith("/api/v1/"):
            return None  # ModelScope's clients do not try again: they wait until all is here
        token, target = token_text(request), request.rel_url.raw_path_qs
        key = (target, "", token)
        if self._clock.monotonic() < self._missing.get(key, float("-inf")):
            return None
        for base in self._origins:
            with suppress(UpstreamError):
                if (found := await self._relay(request, base, target, token)) is not None:
                    return found
        self._remember_missing(key)
        return None

    async def _relay(self, request: web.Request, base: str, target: str, token: str) -> web.Response | None:
        """What an origin answers; None where it has not got it either. Raises UpstreamError."""
        url, of_file = base + target, "path" in request.match_info and "/resolve/" in request.path
        headers = {**bearer(token), "User-Agent": request.headers.get("User-Agent", "")}
        method = "HEAD" if of_file else request.method
        timeout = aiohttp.ClientTimeout(total=RELAY, sock_connect=CONNECT)
        with translated(url):
            asking = self._sessions.of(base).request(
                method, url, headers=headers, allow_redirects=False, timeout=timeout
            )
            async with asking as got:
                fields = {name: got.headers[name] for name in PASSED_ON if name in got.headers}
                if got.status == 404 and fields.get("X-Error-Code") != "EntryNotFound":
                    return None
                if of_file and request.method == "GET" and got.status == 200:
                    where = f"{url}?{urlencode({QUERY: token})}" if token and not request.query_string else url
                    return web.Response(status=307, headers={"Location": where, "Cache-Control": "no-store"})
                if request.method == "HEAD":
                    return web.Response(status=got.status, headers=fields)
                body = await read_whole(got, url, MAX_DOCUMENT) if method == "GET" else b""
                fields.pop("Content-Length", None)
                return web.Response(status=got.status, body=body, headers=fields)

    async def close(self) -> None:
        """End what is under way."""
        await self._asking.close()

    async def _ask(self, model: str, ref: str, token: str) -> bool:
        path = manifest_path(model, ref)
        for base in self._origins:
            try:
                await fetch(self._sessions.of(base), base + path, limit=MAX_MANIFEST, headers=bearer(token))
            except Mirroring:
                raise
            except (NotFound, UpstreamError):  # which is what was known before
                continue
            return True
        return False
