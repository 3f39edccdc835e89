"""Requests as spans, by OpenTelemetry's conventions for HTTP: those that are answered, and those that are asked.

Never in them: queries, users of URLs, fields of requests but User-Agent. A question's span ends with the head of its
answer; what the body takes is in the span of what it was asked for (a fill, a request).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from aiohttp import ClientHandlerType, ClientRequest, ClientResponse, web

from shared.tracing import CURRENT, Attributes, Kind, RequestContext, Span, Tracer, context_of, span

_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT"))
_UPKEEP = ("/healthz", "/readyz", "/metrics", "/status", "/nodes/", "/ring")
"""Beginnings of paths that are asked for all the time, of no use to anybody as traces of their own."""
LONGEST = 400
"""Characters of a path or a field that are kept."""


@contextmanager
def serving(request: web.Request, tracer: Tracer | None) -> Iterator[Serving]:
    """Around the answering of a request: whatever is asked meanwhile goes by its context."""
    context = context_of(request.headers, tracer=tracer)
    if not context.parent and request.path.startswith(_UPKEEP):
        context = replace(context, tracer=None)
    token = CURRENT.set(context)
    try:
        with span(_method(request.method), Kind.SERVER, lambda: _asked(request, context)) as made:
            yield Serving(context.id, made)
    finally:
        CURRENT.reset(token)


class Serving:
    """A request that is being answered."""

    __slots__ = ("_span", "id")

    def __init__(self, request_id: str, made: Span | None) -> None:
        self.id, self._span = request_id, made

    def answered(self, request: web.Request, response: web.StreamResponse, failed: str) -> None:
        """This is the answer; ``failed``: the code of the error that it says, or that ended it."""
        if self._span is None:
            return
        if route := _route(request):
            self._span.name(f"{_method(request.method)} {route}")
        said = {"http.response.status_code": response.status}
        self._span.set({**said, **({"nearshard.code": failed} if failed else {}), **_cache_status(response)})
        if response.status >= 500:  # a 4xx is the client's
            self._span.fail(failed or str(response.status))


async def pass_on(request: ClientRequest, handler: ClientHandlerType) -> ClientResponse:
    """Around a question to another service: it is told whom it is for. A middleware of client sessions."""
    context = CURRENT.get()
    if context is None:
        return await handler(request)
    with span(_method(request.method), Kind.CLIENT, lambda: _asking(request)) as made:
        request.headers.update((made.context if made else context).fields())
        answer = await handler(request)
        if made:
            made.set({"http.response.status_code": answer.status})
            if answer.status >= 400:
                made.fail(str(answer.status))
        return answer


def _method(method: str) -> str:
    return method if method in _METHODS else "_OTHER"


def _asked(request: web.Request, context: RequestContext) -> Attributes:
    route, agent = _route(request), request.headers.get("User-Agent", "")
    version = request.version
    return {
        "http.request.method": _method(request.method),
        "url.path": request.rel_url.raw_path[:LONGEST],
        "url.scheme": request.scheme,
        "server.address": request.url.host or "",
        "client.address": request.remote or "",
        "network.protocol.version": f"{version.major}.{version.minor}",
        "nearshard.request_id": context.id,
        **({"http.route": route} if route else {}),
        **({"user_agent.original": agent[:LONGEST]} if agent else {}),
    }


def _asking(request: ClientRequest) -> Attributes:
    url = request.url.with_query(None).with_fragment(None).with_user(None)
    return {
        "http.request.method": _method(request.method),
        "server.address": url.host or "",
        "server.port": url.port or 0,
        "url.full": str(url)[: 2 * LONGEST],
    }


def _route(request: web.Request) -> str:
    """The path's template; empty where no path is known."""
    resource = request.match_info.route.resource
    return resource.canonical if resource else ""


def _cache_status(response: web.StreamResponse) -> Attributes:
    status = response.headers.get("Cache-Status")
    return {"http.response.header.cache-status": (status,)} if status else {}
