"""The operator's HTTP face of a node, in two places.

On loopback, on a port of its own, with a token of its own. Where it is and the token are in ``<data>/admin.json`` (mode
0600): whoever may read the node's files may run it. And below ``/admin`` of the port that clients use, for access
tokens with the right ``admin``: to the model that is named, or to all of them (``*/*``) for what names none.

    GET, PUT /link          the link's policy
    PUT /drain              {"draining": true or false}
    POST /preheat           {"what": ...}: a job;  GET /jobs/<id>: how far it is
    POST /bundle            a bundle, to be taken in
    GET /pins  POST /pin  POST /unpin  POST /purge     {"what": ...}
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Any

from aiohttp import web
from structlog.typing import FilteringBoundLogger

from edge_node.operations import Operations, model_of
from shared import codec
from shared.clock import Clock
from shared.errors import BadId, NotFound, RequestError
from shared.files import replace_file
from shared.metrics import Metrics
from shared.paths import ADMIN, BUNDLE
from shared.tokens import EVERYTHING, Forbidden, Right, Token, parse_scope
from shared.web.access import Gate
from shared.web.middleware import KIND, make_app, read_body, refuse_expectation

FILE = "admin.json"
HERE = Token("local", "", 0, inf, (parse_scope(f"{EVERYTHING}:{Right.ADMIN}"),))
"""What whoever shows the node's own token may do."""

RUN = 1 << 20
"""Bytes of a large body that are taken at a time."""
STALLED = 30.0
"""Seconds without a byte of it after which it is given up."""

Enter = Callable[[web.Request], Awaitable[Token]]
"""Gives what a request may do. Raises RequestError for one that may do nothing."""


@dataclass(frozen=True, slots=True)
class Operator:
    """Who asks. What was asked for, and by which token, is in the log."""

    token: Token
    log: FilteringBoundLogger

    def may(self, what: str) -> bool:
        """Whether a model, a task or a shard is theirs to operate on. Raises BadId."""
        return self.token.may(Right.ADMIN, model_of(what))

    def require_all(self) -> None:
        """For what is of no one model. Raises Forbidden."""
        self.token.require(Right.ADMIN, EVERYTHING)

    def begin(self, operation: str, what: str = "") -> None:
        """Let them change something: for ``what``, or, where none is named, for all. Raises Forbidden, BadId."""
        may = self.token.may(Right.ADMIN, model_of(what) if what else EVERYTHING)
        tell, event = (self.log.info, "operation") if may else (self.log.warning, "an operation was refused")
        tell(event, operation=operation, what=what, token_id=self.token.id, subject=self.token.subject)
        if not may:
            raise Forbidden


def build_admin(operations: Operations, token: str, clock: Clock, log: FilteringBoundLogger) -> web.Application:
    """The operator's application on loopback. Every request needs ``Authorization: Bearer <token>``."""

    async def enter(request: web.Request) -> Token:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), token.encode()):
            raise RequestError(code="unauthorized", headers={"WWW-Authenticate": "Bearer"})
        return HERE

    app = make_app("nearshard-edge admin", clock, Metrics(), log)
    _add_routes(app, "", operations, enter, log)
    return app


def add_admin_routes(app: web.Application, operations: Operations, gate: Gate, log: FilteringBoundLogger) -> None:
    """The same below ``/admin``, for access tokens."""

    async def enter(request: web.Request) -> Token:
        token = await gate.shown(request)
        if not any(scope.right is Right.ADMIN for scope in token.scopes):
            raise Forbidden
        return token

    _add_routes(app, ADMIN, operations, enter, log)


def _add_routes(
    app: web.Application, prefix: str, operations: Operations, enter: Enter, log: FilteringBoundLogger
) -> None:
    def route(method: str, path: str, handler: Callable[[web.Request, Operator], Awaitable[Any]]) -> None:
        async def guarded(request: web.Request) -> web.Response:
            request[KIND] = "admin"
            answer = await handler(request, Operator(await enter(request), log))
            return web.json_response(answer, headers={"Cache-Control": "no-store"})

        app.router.add_route(method, prefix + path, guarded, expect_handler=refuse_expectation)

    async def get_link(_: web.Request, operator: Operator) -> Any:
        operator.require_all()
        return operations.policy.as_json()

    async def put_link(request: web.Request, operator: Operator) -> Any:
        operator.begin("link")
        return operations.change_policy(codec.decode_json(await read_body(request))).as_json()

    async def drain(request: web.Request, operator: Operator) -> Any:
        operator.begin("drain")
        document = codec.decode_json(await read_body(request))
        if not isinstance(document, dict) or not isinstance(document.get("draining"), bool) or len(document) != 1:
            raise RequestError('the body is {"draining": true or false}', code="bad_json")
        operations.drain(document["draining"])
        return document

    async def preheat(request: web.Request, operator: Operator) -> Any:
        return asdict(await operations.preheat(await _what(request, operator, "preheat")))

    async def job(request: web.Request, operator: Operator) -> Any:
        number = request.match_info["number"]
        if not number.isascii() or not number.isdigit() or len(number) > 9:
            raise NotFound("there is no such job")
        found = operations.job(int(number))
        if not operator.may(found.what):
            raise NotFound("there is no such job of theirs", code="unknown_path")
        return asdict(found)

    async def pins(_: web.Request, operator: Operator) -> Any:
        operator.require_all()
        return {"pins": operations.pins()}

    async def pin(request: web.Request, operator: Operator) -> Any:
        return asdict(await operations.pin(await _what(request, operator, "pin")))

    async def unpin(request: web.Request, operator: Operator) -> Any:
        await operations.unpin(await _what(request, operator, "unpin"))
        return {"pins": [what for what in operations.pins() if operator.may(what)]}

    async def purge(request: web.Request, operator: Operator) -> Any:
        return await operations.purge(await _what(request, operator, "purge"))

    async def bundle(request: web.Request, operator: Operator) -> Any:
        return await operations.take_bundle(_chunks(request), lambda model: operator.begin("bundle", model))

    route("GET", "/link", get_link)
    route("POST", BUNDLE, bundle)
    route("PUT", "/link", put_link)
    route("PUT", "/drain", drain)
    route("GET", "/jobs/{number}", job)
    route("GET", "/pins", pins)
    for name, handler in (("preheat", preheat), ("pin", pin), ("unpin", unpin), ("purge", purge)):
        route("POST", f"/{name}", handler)


async def _chunks(request: web.Request) -> AsyncIterator[bytes]:
    """A large body as it comes, in runs worth a thread. Raises RequestError (``timed_out``) where it stalls."""
    run = bytearray()
    while True:
        try:
            async with asyncio.timeout(STALLED):
                chunk = await request.content.readany()
        except TimeoutError:
            raise RequestError(code="timed_out") from None
        run += chunk
        if len(run) >= RUN or (run and not chunk):
            yield bytes(run)
            run.clear()
        if not chunk:
            return


async def _what(request: web.Request, operator: Operator, operation: str) -> str:
    """What is to be operated on, where that is the operator's. Raises RequestError."""
    document = codec.decode_json(await read_body(request))
    if not isinstance(document, dict) or document.keys() != {"what"} or not isinstance(document["what"], str):
        raise RequestError('the body is {"what": "..."}', code="bad_json")
    what = document["what"]
    if not what:
        raise BadId("a model, a task or a shard is to be named")
    operator.begin(operation, what)
    return what


def write_access(data: Path, url: str, token: str) -> None:
    """Say where the operator's face is, to whoever may read the node's files."""
    replace_file(data / FILE, codec.encode_json({"url": url, "token": token}), mode=0o600)
