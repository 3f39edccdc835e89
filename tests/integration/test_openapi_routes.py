"""The OpenAPI documents describe what the services route: all of it, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import structlog
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from edge_node.api import operations as of_edge
from edge_node.app import build_app as build_edge
from edge_node.config import EdgeSettings
from origin.api import operations as of_origin
from origin.app import build_app as build_origin
from origin.config import OriginSettings
from router.api import operations as of_router
from router.app import build_app as build_router
from router.config import RouterSettings
from shared.clock import SystemClock
from shared.config import load
from shared.openapi.form import Operation
from shared.web.tls import Certificates
from tests.harness import Lab

NO_MODELS = {"/{name}/resolve/{rest}", "/api/{kind}/{rest}", "/{kind}/{rest}"}
"""Routed, so that what is no model is answered in the words of other hubs: there is nothing there."""


def app_of(tier: str, lab: Lab) -> tuple[web.Application, list[Operation]]:
    """A tier's application as it is run, and what is said of it."""
    enrolled = lab.folder / "enrolled.toml"
    enrolled.write_text("# nobody is enrolled\n")
    trusting = [f"--trust-root={lab.trust_root}", f"--token={lab.node_token}", "--origin=http://127.0.0.1:9"]
    tiers: dict[str, tuple[Any, Callable[..., web.Application], list[str], list[Operation]]] = {
        "origin": (OriginSettings, build_origin, [f"--store={lab.store}"], of_origin()),
        "router": (RouterSettings, build_router, [*trusting, "--redis=", f"--enrolled={enrolled}"], of_router()),
        "edge": (EdgeSettings, build_edge, [*trusting, f"--data={lab.folder / 'edge'}", "--node=edge"], of_edge()),
    }
    kind, build, words, operations = tiers[tier]
    settings, log = load(kind, words), structlog.get_logger()
    return build(settings, "http://127.0.0.1:1", Certificates(settings, log), SystemClock(), log), operations


@pytest.mark.parametrize("tier", ["origin", "router", "edge"])
async def test_what_is_routed_is_described_and_the_other_way_round(lab: Lab, tier: str) -> None:
    app, operations = app_of(tier, lab)
    runner = web.AppRunner(app)
    await runner.setup()  # so that what the application opened is closed
    try:
        await check(app, operations)
    finally:
        await runner.cleanup()


async def check(app: web.Application, operations: list[Operation]) -> None:
    """Ask the application's own router for each operation."""
    routed = {(route.method, route.resource.canonical) for route in app.router.routes() if route.resource}
    described = set()
    for operation in operations:
        for method in operation.methods:
            match = await app.router.resolve(make_mocked_request(method, operation.example))
            assert match.http_exception is None, f"{method} {operation.example}: {match.http_exception}"
            assert match.route.resource is not None
            described.add((method, match.route.resource.canonical))
    assert {(method, path) for method, path in routed if path not in NO_MODELS} == described


def test_each_operation_has_a_name_of_its_own() -> None:
    for operations in (of_origin(), of_router(), of_edge()):
        names = [operation.name for operation in operations]
        assert len(set(names)) == len(names)
