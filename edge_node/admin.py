"""The operator's HTTP face of a node: on loopback, on a port of its own, with a token of its own.

Where it is and the token are in ``<data>/admin.json`` (mode 0600): whoever may read the node's files may run it.

    GET, PUT /link          the link's policy
    PUT /drain              {"draining": true or false}
    POST /preheat           {"what": ...}: a job;  GET /jobs/<id>: how far it is
    GET /pins  POST /pin  POST /unpin  POST /purge     {"what": ...}
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aiohttp import web
from structlog.typing import FilteringBoundLogger

from edge_node.operations import Operations
from shared import codec
from shared.clock import Clock
from shared.errors import NotFound, RequestError
from shared.files import replace_file
from shared.metrics import Metrics
from shared.web.middleware import make_app, read_body

FILE = "admin.json"


def build_admin(operations: Operations, token: str, clock: Clock, log: FilteringBoundLogger) -> web.Application:
    """The operator's application. Every request needs ``Authorization: Bearer <token>``."""
    app = make_app("nearshard-edge admin", clock, Metrics(), log)

    def route(method: str, path: str, handler: Callable[[web.Request], Awaitable[Any]]) -> None:
        async def guarded(request: web.Request) -> web.Response:
            given = request.headers.get("Authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), token.encode()):
                raise RequestError(code="unauthorized", headers={"WWW-Authenticate": "Bearer"})
            return web.json_response(await handler(request), headers={"Cache-Control": "no-store"})

        app.router.add_route(method, path, guarded)

    async def get_link(_: web.Request) -> Any:
        return operations.policy.as_json()

    async def put_link(request: web.Request) -> Any:
        return operations.change_policy(codec.decode_json(await read_body(request))).as_json()

    async def drain(request: web.Request) -> Any:
        document = codec.decode_json(await read_body(request))
        if not isinstance(document, dict) or not isinstance(document.get("draining"), bool) or len(document) != 1:
            raise RequestError('the body is {"draining": true or false}', code="bad_json")
        operations.drain(document["draining"])
        return document

    async def preheat(request: web.Request) -> Any:
        return asdict(await operations.preheat(await _what(request)))

    async def job(request: web.Request) -> Any:
        number = request.match_info["number"]
        if not number.isascii() or not number.isdigit() or len(number) > 9:
            raise NotFound("there is no such job")
        return asdict(operations.job(int(number)))

    async def pins(_: web.Request) -> Any:
        return {"pins": operations.pins()}

    async def pin(request: web.Request) -> Any:
        return asdict(await operations.pin(await _what(request)))

    async def unpin(request: web.Request) -> Any:
        await operations.unpin(await _what(request))
        return {"pins": operations.pins()}

    async def purge(request: web.Request) -> Any:
        return await operations.purge(await _what(request))

    route("GET", "/link", get_link)
    route("PUT", "/link", put_link)
    route("PUT", "/drain", drain)
    route("GET", "/jobs/{number}", job)
    route("GET", "/pins", pins)
    for name, handler in (("preheat", preheat), ("pin", pin), ("unpin", unpin), ("purge", purge)):
        route("POST", f"/{name}", handler)
    return app


async def _what(request: web.Request) -> str:
    document = codec.decode_json(await read_body(request))
    if not isinstance(document, dict) or document.keys() != {"what"} or not isinstance(document["what"], str):
        raise RequestError('the body is {"what": "..."}', code="bad_json")
    return document["what"]


def write_access(data: Path, url: str, token: str) -> None:
    """Say where the operator's face is, to whoever may read the node's files."""
    replace_file(data / FILE, codec.encode_json({"url": url, "token": token}), mode=0o600)
