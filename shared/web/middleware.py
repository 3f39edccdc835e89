"""What happens around every request: an id, the checks that aiohttp leaves out, errors as problem documents.

The only place where an error becomes a response. Once a body has begun there is no response left to make:
the connection is closed short of its Content-Length, so that no client takes the part for the whole.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from aiohttp import HttpVersion11, web
from aiohttp.typedefs import Middleware

from shared import codec
from shared.clock import Clock
from shared.codec import encode_json
from shared.errors import CODES, NearshardError, RequestError
from shared.metrics import Metrics
from shared.tracing import Tracer, new_id, open_tracer
from shared.web.spans import serving

if TYPE_CHECKING:  # a client has no use for it, and it takes long to import
    from structlog.typing import FilteringBoundLogger

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

PROBLEM = "application/problem+json"
REQUEST_ID = web.RequestKey("request_id", str)
KIND = web.RequestKey("kind", str)
"""What kind of path a request is for, in metrics: a handful of fixed words."""

BODY_TIME = 30.0
"""Seconds that a small body may take."""
_BY_STATUS = {
    400: "bad_request", 404: "unknown_path", 405: "method_not_allowed", 408: "timed_out",
    413: "too_large", 415: "unsupported_type", 417: "expectation_failed",
}  # fmt: skip


async def read_body(request: web.Request) -> bytes:
    """A small body, in time. Raises RequestError: ``unsupported_type`` for one that is encoded, ``timed_out``."""
    if "Content-Encoding" in request.headers:
        raise RequestError(code="unsupported_type")
    try:
        async with asyncio.timeout(BODY_TIME):
            return await request.read()
    except TimeoutError:
        raise RequestError(code="timed_out") from None


def problem(code: str, request_id: str, error: NearshardError | None = None) -> web.Response:
    """The problem document of an error (RFC 9457); nothing in it comes from the request."""
    meaning = error.meaning if error else CODES[code]
    document = {
        "type": f"urn:nearshard:error:{code}",
        "title": meaning.title,
        "status": meaning.status,
        "code": code,
        "request_id": request_id,
        **(error.public if error else {}),
    }
    headers = {"Cache-Control": "no-store", "X-Request-Id": request_id, **(error.headers if error else {})}
    if meaning.status in (503, 504):
        headers.setdefault("Retry-After", "1")
    return web.Response(status=meaning.status, body=encode_json(document), content_type=PROBLEM, headers=headers)


async def refuse_expectation(request: web.Request) -> web.StreamResponse | None:
    """``Expect``: 100-continue is obeyed, anything else is refused (RFC 9110 §10.1.1)."""
    if request.headers.get("Expect", "").lower() != "100-continue":
        return problem("expectation_failed", new_id())
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    request.writer.output_size = 0
    return None


def make_app(
    server: str, clock: Clock, metrics: Metrics, log: FilteringBoundLogger, *, otlp: str | None = None
) -> web.Application:
    """An application with what every service needs. ``server`` is its name in the Server field, and its node's;
    ``otlp``: the collector that spans go to. Raises ConfigError."""
    tracer = open_tracer(otlp, *server.split(" ", 1))
    metrics.before_render.append(lambda: metrics.tasks.set(len(asyncio.all_tasks())))

    async def stamp(request: web.Request, response: web.StreamResponse) -> None:
        response.headers["Server"] = server

    async def send_spans(_: web.Application) -> None:
        if tracer:
            await asyncio.to_thread(tracer.close)

    app = web.Application(middlewares=[_guard(clock, metrics, log, tracer)], client_max_size=codec.MAX_JSON)
    app.on_response_prepare.append(stamp)
    app.on_cleanup.append(send_spans)
    return app


def _guard(clock: Clock, metrics: Metrics, log: FilteringBoundLogger, tracer: Tracer | None) -> Middleware:

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        started = clock.monotonic()
        with serving(request, tracer) as served:
            request[REQUEST_ID], failed = served.id, ""
            try:
                _check(request)
                response = await handler(request)
            except NearshardError as error:
                response, failed = _failed(request, error, served.id, log), error.error_code
            except web.HTTPException as error:
                failed = _BY_STATUS.get(error.status, "")
                if not failed:
                    raise
                response = problem(failed, served.id)
                if allow := error.headers.get("Allow"):
                    response.headers["Allow"] = allow
            except ConnectionError:
                log.debug("client left", path=request.rel_url.raw_path[:200])
                raise
            except Exception as error:
                log.error("a request failed", exc_info=error)
                wrong = NearshardError(str(error))
                response, failed = _failed(request, wrong, served.id, log), wrong.error_code
            kind = request.get(KIND, "other")
            metrics.requests.labels(kind, str(response.status)).inc()
            metrics.seconds.labels(kind).observe(clock.monotonic() - started)
            log.debug("request", method=request.method, kind=kind, status=response.status)
            served.answered(request, response, failed)
            return response

    return middleware


def _check(request: web.Request) -> None:
    """What RFC 9112 asks of a server and the parser does not do."""
    if request.version > HttpVersion11 or request.version.major != 1:
        raise RequestError(code="http_version")
    hosts = request.headers.getall("Host", [])
    if len(hosts) > 1 or (request.version == HttpVersion11 and not hosts):
        raise RequestError("Host is needed once")  # RFC 9112 §3.2


def _failed(
    request: web.Request, error: NearshardError, request_id: str, log: FilteringBoundLogger
) -> web.StreamResponse:
    started: web.StreamResponse | None = request.get(BODY_BEGUN)
    if error.status >= 500:
        log.warning("request failed", code=error.error_code, reason=str(error))
    if started is None:
        return problem(error.error_code, request_id, error)
    started.force_close()
    if request.transport is not None:
        request.transport.close()  # flushes, then FIN: a reset would make some clients give up for good
    return started


BODY_BEGUN = web.RequestKey("body_begun", web.StreamResponse)
"""Set by whoever has sent a response's head: from there on an error can only end the connection."""
