"""Rounds of federated updates, for sites that reach only their node: what they say is passed on to an origin.

Nothing is looked at but the path, and nothing is kept: a site signs what it sends, the origin checks it. A body is
passed on as it comes, at the pace of the link's caps. An origin is asked over TLS only, or on this machine: updates
tell of the data that they were trained on.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Protocol

import aiohttp
from aiohttp import web
from yarl import URL

from shared.clock import Clock
from shared.codec import MAX_JSON
from shared.enrolment import SIGNATURE_FIELD
from shared.errors import NearshardError, RequestError, UpstreamError
from shared.federated import (
    LENGTH_FIELD,
    MAX_STATEMENT,
    MAX_UPDATE,
    OFFSET_FIELD,
    PREFIX,
    check_url,
    parse_federated_path,
)
from shared.publishing import LEAST_RATE
from shared.web.middleware import KIND, refuse_expectation
from shared.web.session import CONNECT, IDLE, Sessions, read_whole, translated

AT_ONCE = 16
"""Updates that are passed on at a time; each has a buffer of a connection or two in memory."""
SLOW_FOR = 30.0
"""Seconds waited for a site's bytes after which it must have brought LEAST_RATE of them a second."""
CHECKING = 300.0
"""Seconds that an origin may take to check an update whose last byte it has."""
UP = ("Authorization", "Content-Type", "Accept", OFFSET_FIELD, SIGNATURE_FIELD)
DOWN = (
    "Content-Type", "Cache-Control", "ETag", "Retry-After", "Vary", "WWW-Authenticate", "X-Request-Id",
    OFFSET_FIELD, LENGTH_FIELD,
)  # fmt: skip
"""Fields that are passed on: towards the origin, and of its answer."""


class UpLink(Protocol):
    """The link to the origins, as fills use it too."""

    async def pass_up(self, base: str, size: int) -> None:
        """Wait until ``size`` bytes more for ``base`` fit into the link's caps."""
        ...


class Relay:
    """The paths below ``/federated`` of a node."""

    def __init__(self, sessions: Sessions, origins: Sequence[str], link: UpLink, clock: Clock) -> None:
        """``origins``: base URLs, best first. An update that has begun at one of them goes on there."""
        self._sessions, self._origins, self._link, self._clock = sessions, list(origins), link, clock
        self._room = asyncio.Semaphore(AT_ONCE)

    def add_routes(self, app: web.Application) -> None:
        """Answer below ``/federated``."""
        model = PREFIX + "/{org}/{name}"
        upload = model + "/updates/{digest}"
        for method, path in (
            ("GET", model),
            ("HEAD", model),
            ("POST", f"{model}/updates"),
            ("HEAD", upload),
            ("PATCH", upload),
        ):
            app.router.add_route(method, path, self._pass_on, expect_handler=refuse_expectation)

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        request[KIND] = "federated"
        path = request.rel_url.raw_path
        parse_federated_path(path)
        length = _checked_length(request)
        if self._room.locked():
            raise UpstreamError("too many updates are on their way through here", code="busy")
        async with self._room:
            return await self._ask_origins(request, path, length)

    async def _ask_origins(self, request: web.Request, path: str, length: int) -> web.Response:
        """The answer of the first origin that gives one. Another is asked only while no byte of the body was read."""
        failure: NearshardError = UpstreamError("no origin is known")
        for base in self._origins:
            try:
                check_url(base)
            except RequestError as error:  # this node's settings are not for this
                failure = UpstreamError(str(error))
                continue
            body = _Body(request, length, base, self._link, self._clock.monotonic)
            try:
                return await self._exchange(request, base + path, base, body)
            except UpstreamError as error:
                if body.failure:  # the site's fault, and nobody's who was asked
                    raise body.failure from error
                if body.begun:
                    raise
                failure = error
        raise failure

    async def _exchange(self, request: web.Request, url: str, base: str, body: _Body) -> web.Response:
        fields = {name: request.headers[name] for name in UP if name in request.headers}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT, sock_read=CHECKING if body.length else IDLE)
        with translated(url):
            asking = self._sessions.of(base).request(
                request.method,
                URL(url, encoded=True),
                data=body.chunks() if body.length else None,
                headers=fields if request.method in ("GET", "HEAD") else {**fields, "Content-Length": str(body.length)},
                allow_redirects=False,
                timeout=timeout,
            )
            async with asking as answer:
                given = b"" if request.method == "HEAD" else await read_whole(answer, url, MAX_JSON)
                if not body.ended:
                    answer.close()  # it has answered before the end: the rest is not for it
                passed = _passed_down(answer.headers)
                return web.Response(status=answer.status, body=given or None, headers=passed)


class _Body:
    """A body on its way up, with what became of it."""

    def __init__(self, request: web.Request, length: int, base: str, link: UpLink, now: Callable[[], float]) -> None:
        self.length, self.begun, self.ended = length, False, not length
        self.failure: RequestError | None = None
        self._request, self._base, self._link, self._now = request, base, link, now

    async def chunks(self) -> AsyncIterator[bytes]:
        """The bytes as they come, held to the link's caps. Raises RequestError where the site is at fault."""
        try:
            left, waited, had = self.length, 0.0, 0
            while left:
                asked = self._now()
                async with asyncio.timeout(IDLE):
                    chunk = await self._request.content.readany()
                self.begun = True
                if not chunk:
                    raise RequestError("the body ended early")
                left -= len(chunk)
                waited, had = waited + self._now() - asked, had + len(chunk)
                if waited >= SLOW_FOR:
                    if had < LEAST_RATE * waited and left:
                        raise RequestError(code="timed_out")
                    waited, had = 0.0, 0
                await self._link.pass_up(self._base, len(chunk))
                yield chunk
            self.ended = True
        except TimeoutError:
            self.failure = RequestError(code="timed_out")
            raise self.failure from None
        except (OSError, aiohttp.ClientError, web.RequestPayloadError) as error:
            self.failure = RequestError("the site broke off")
            raise self.failure from error
        except RequestError as error:
            self.failure = error
            raise


def _checked_length(request: web.Request) -> int:
    """Bytes of the body. Raises RequestError."""
    if "Content-Encoding" in request.headers:
        raise RequestError(code="unsupported_type")
    if not request.body_exists:
        return 0
    length = request.content_length
    if length is None or length > (MAX_UPDATE if request.method == "PATCH" else MAX_STATEMENT):
        raise RequestError("a body of a known length, within the limits", code="too_large")
    return length


def _passed_down(fields: Mapping[str, str]) -> dict[str, str]:
    passed = {name: fields[name] for name in DOWN if name in fields}
    passed.setdefault("Cache-Control", "no-store")
    return passed
