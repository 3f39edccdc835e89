"""``GET /openapi.json``: what a service answers, as it is run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

from aiohttp import web

from shared import codec
from shared.openapi.form import Operation
from shared.openapi.tier import describe
from shared.representation import REVALIDATE
from shared.web.reads import document, get


def add_description(app: web.Application, tier: str, operations: Callable[[], Iterable[Operation]]) -> None:
    """Answer it. The document is made when somebody asks first: most services are never asked."""
    made: list[bytes] = []

    async def described(request: web.Request) -> web.Response:
        if not made:
            made.append(codec.encode_json(describe(tier, operations())))
        return document(request, made[0], "application/json", hashlib.sha256(made[0]).hexdigest(), REVALIDATE, {})

    get(app, "/openapi.json", described)
