"""Enrolling nodes from afar: ``PUT`` and ``DELETE /enrolments/<node>``, with a token for ``*/*:enroll``.

What is written is the enrolment file, so that it holds after a restart, and for all routers that share the file. This
one goes by it before it answers.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from aiohttp import web
from structlog.typing import FilteringBoundLogger

from router.registry import Registry
from shared import codec
from shared.enrolment import MAX_BODY, Enrolled, parse_enrolled
from shared.enrolment_file import change_file
from shared.errors import RequestError
from shared.ids import parse_name
from shared.paths import ENROLMENTS
from shared.tokens import EVERYTHING, Right, Token
from shared.web.access import Gate
from shared.web.middleware import KIND, read_body, refuse_expectation


def add_enrolment_routes(
    app: web.Application, file: Path, registry: Registry, gate: Gate, log: FilteringBoundLogger
) -> None:
    """Have nodes enrolled in the file, and thrown out."""

    async def put(request: web.Request) -> web.Response:
        token, node = await enter(request)
        if request.content_type != "application/json":
            raise RequestError(code="unsupported_type")
        body = await read_body(request)
        if len(body) > MAX_BODY:
            raise RequestError(f"more than {MAX_BODY} bytes", code="too_large")
        enrolled = parse_enrolled(node, codec.decode_json(body))
        await change(node, enrolled)
        said = {"key": enrolled.key.hex(), **enrolled.node.record()}
        log.info("a node was enrolled", node=node, **said, token_id=token.id, subject=token.subject)
        return web.Response(status=204)

    async def delete(request: web.Request) -> web.Response:
        token, node = await enter(request)
        await change(node, None)
        log.info("a node was thrown out", node=node, token_id=token.id, subject=token.subject)
        return web.Response(status=204)

    async def enter(request: web.Request) -> tuple[Token, str]:
        request[KIND] = "enrolment"
        token = await gate.require(request, Right.ENROLL, EVERYTHING)
        return token, parse_name(request.match_info["enrolled"], "a node")

    async def change(node: str, enrolled: Enrolled | None) -> None:
        await asyncio.to_thread(change_file, file, node, enrolled)
        await registry.follow_enrolment()

    # Not {node}: who enrols a node does not speak for it, and has no certificate of it
    path = ENROLMENTS + "/{enrolled}"
    app.router.add_put(path, put, expect_handler=refuse_expectation)
    app.router.add_delete(path, delete, expect_handler=refuse_expectation)
