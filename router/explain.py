"""What a router says of its choice, and what clients say of nodes.

GET  /locate/<digest or task id>    the URLs for a client, best first; ``?explain=1``: why
POST /reports                       {"node": id, "ok": bool}: how a node did; 204
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

from aiohttp import web

from router.location import Found
from router.selection import Selection
from shared import codec
from shared.digest import parse_digest
from shared.errors import BadId, NotFound, RequestError
from shared.ids import parse_name, parse_task_id
from shared.paths import BlobPath, TaskPath, decode_path
from shared.routing import REASONS, Choice
from shared.web.access import Gate
from shared.web.middleware import KIND, read_body, refuse_expectation
from shared.web.reads import get

MAX_EXPLAINED = 64
"""Nodes that an explanation shows."""
_NO_STORE = {"Cache-Control": "no-store"}


class Route(NamedTuple):
    """Where a client is sent: the nodes chosen and why, and URLs of them and of the origins, best first."""

    key: str
    choices: Sequence[Choice]
    urls: Sequence[str]


Locate = Callable[[web.Request, TaskPath | BlobPath, int | None], Awaitable[Route]]
"""The route of what a path asks for, for who asks, over at most so many nodes (None: as in answers)."""


def add_explain_routes(
    app: web.Application,
    gate: Gate,
    locate: Locate,
    find: Callable[[web.Request], Found],
    selection: Selection,
) -> None:
    """``/locate``, for whom ``gate`` lets through to what is asked for, and ``/reports``."""

    async def located(request: web.Request) -> web.Response:
        request[KIND] = "locate"
        path = _parse(request.rel_url.raw_path)
        await gate.enter(request, path)
        found = find(request)
        explain = request.query.get("explain", "0")
        if explain not in ("", "0", "1"):
            raise RequestError("explain is 0 or 1")
        if explain != "1":
            route = await locate(request, path, None)
            return web.json_response({"urls": route.urls}, headers=_NO_STORE)
        route = await locate(request, path, MAX_EXPLAINED)
        document = {
            "key": route.key,
            "client": found._asdict(),
            "regions": selection.regions(found.region),
            "nodes": [_explained(choice, selection) for choice in route.choices],
            "urls": route.urls,
        }
        return web.json_response(document, headers=_NO_STORE)

    async def report(request: web.Request) -> web.Response:
        request[KIND] = "report"
        if request.content_type != "application/json":
            raise RequestError(code="unsupported_type")
        node, ok = _parse_report(codec.decode_json(await read_body(request)))
        selection.reported(node, ok, find(request).address)
        return web.Response(status=204, headers=_NO_STORE)

    get(app, "/locate/{path:[\\s\\S]*}", located)
    app.router.add_post("/reports", report, expect_handler=refuse_expectation)


def _parse(raw: str) -> TaskPath | BlobPath:
    if raw == "/locate/":
        raise NotFound("no id")
    text = decode_path(raw).removeprefix("/locate/")
    return BlobPath(parse_digest(text)) if text.startswith("sha256:") else TaskPath(parse_task_id(text))


def _parse_report(document: object) -> tuple[str, bool]:
    if not isinstance(document, dict) or document.keys() != {"node", "ok"} or not isinstance(document["ok"], bool):
        raise RequestError('a report is {"node": "...", "ok": true or false}', code="bad_json")
    if not isinstance(document["node"], str):
        raise RequestError("a node is named by its id", code="bad_json")
    try:
        return parse_name(document["node"]), document["ok"]
    except BadId:
        raise BadId("not a node's name") from None


def _explained(choice: Choice, selection: Selection) -> dict[str, Any]:
    node = choice.node
    return {
        "id": node.id,
        "region": node.region,
        "url": node.url,
        "verdict": choice.verdict.value,
        "reason": REASONS[choice.verdict],
        "weight": node.weight,
        **selection.describe(node.id),
    }
