"""Telling who keeps refs that something was published, so that they ask at once and not when a lifetime ends.

An announcement is believed no further than that: it makes the next request revalidate with the origin.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

import aiohttp
from aiohttp import web
from structlog.typing import FilteringBoundLogger

from shared import codec
from shared.errors import RequestError, UpstreamError
from shared.ids import parse_model
from shared.tasks import end
from shared.web.middleware import KIND, read_body, refuse_expectation
from shared.web.session import Sessions, translated

PATH = "/announce"
TIMEOUT = aiohttp.ClientTimeout(total=5)


def add_announce_route(app: web.Application, heard: Callable[[str], None]) -> None:
    """``POST /announce`` with ``{"model": "org/name"}``: ``heard`` is told the model."""

    async def post(request: web.Request) -> web.Response:
        request[KIND] = "announce"
        if request.content_type != "application/json":
            raise RequestError(code="unsupported_type")
        document = codec.decode_json(await read_body(request))
        if not isinstance(document, dict) or document.keys() != {"model"}:
            raise RequestError('the body is {"model": "org/name"}', code="bad_json")
        heard(parse_model(str(document["model"])))
        return web.Response(status=204)

    app.router.add_post(PATH, post, expect_handler=refuse_expectation)


async def announce(session: aiohttp.ClientSession, url: str, model: str) -> None:
    """Tell a service. Raises UpstreamError."""
    with translated(url):
        async with session.post(url + PATH, json={"model": model}, timeout=TIMEOUT, allow_redirects=False) as answer:
            if answer.status >= 300:
                raise UpstreamError(f"{url} answered {answer.status}")


class Announcer:
    """Tells services, beside whatever else goes on. Who is not told sees it when a ref's lifetime ends."""

    def __init__(self, sessions: Sessions, log: FilteringBoundLogger) -> None:
        self._sessions, self._log = sessions, log
        self._tasks: set[asyncio.Task[None]] = set()

    def tell(self, urls: Iterable[str], model: str) -> None:
        """Something of this model was published."""
        for url in urls:
            task = asyncio.create_task(self._tell(url, model), name="announce")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Stop telling."""
        await end(self._tasks)

    async def _tell(self, url: str, model: str) -> None:
        try:
            await announce(self._sessions.of(url), url, model)
        except UpstreamError as error:
            self._log.info("somebody was not told of a publish", url=url, reason=str(error))
