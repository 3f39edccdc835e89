"""What a router says of its nodes and of its choices, for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import aiohttp
from rich.console import Console

from nearshard.guide import parse_routers
from shared import codec
from shared.digest import parse_digest
from shared.errors import DecodeError, UpstreamError
from shared.ids import parse_name, parse_task_id
from shared.token_file import bearer
from shared.web.session import fetch, make_session
from shared.web.tls import tls_by

MAX_ANSWER = 64 << 20


async def network(routers: Sequence[str], ca: Path | None = None) -> dict[str, Any]:
    """The whole network as the first router that answers sees it. Raises UpstreamError."""
    return await _ask(routers, "/network", ca)


async def nodes(routers: Sequence[str], ca: Path | None = None) -> list[dict[str, Any]]:
    """All nodes that the first router that answers knows, and with those that it shows, how they did today; those that
    may join and have not are among them. Raises UpstreamError."""
    seen = {node["id"]: node for node in (await network(routers, ca))["nodes"]}
    found = {node["id"]: node for node in (await _ask(routers, "/status", ca))["nodes"]}
    rest = {name: {**node, "state": "draining" if node["draining"] else "well"} for name, node in found.items()}
    return list({**rest, **seen}.values())


async def locate(
    routers: Sequence[str], what: str, *, region: str | None, explain: bool, token: str = "", ca: Path | None = None
) -> dict[str, Any]:
    """Where the first router that answers sends a client of ``region``. Raises BadId, NotFound, UpstreamError."""
    canonical = parse_digest(what) if what.startswith("sha256:") else parse_task_id(what)
    query = {"region": parse_name(region, "a region")} if region else {}
    query |= {"explain": "1"} if explain else {}
    path = f"/locate/{canonical}"
    return await _ask(routers, f"{path}?{urlencode(query)}" if query else path, ca, token)


async def _ask(routers: Sequence[str], path: str, ca: Path | None, token: str = "") -> dict[str, Any]:
    failure = UpstreamError("no router is named")
    async with make_session(tls=tls_by(ca)) as session:
        for router in parse_routers(routers):
            try:
                return await _ask_one(session, router + path, token)
            except UpstreamError as error:
                failure = error
    raise failure


async def _ask_one(session: aiohttp.ClientSession, url: str, token: str) -> dict[str, Any]:
    answer = await fetch(session, url, limit=MAX_ANSWER, headers=bearer(token), missing="unknown_task")
    try:
        document: dict[str, Any] = codec.decode_json(answer.body, MAX_ANSWER)
    except DecodeError as error:
        raise UpstreamError(f"{url} is no router") from error
    if "nodes" not in document and "urls" not in document:
        raise UpstreamError(f"{url} is no router")
    return document


def show_route(document: Mapping[str, Any]) -> None:
    """The URLs, best first; the reasons where they were asked for."""
    console = Console(highlight=False, soft_wrap=True)
    for line in _lines(document):
        console.print(line, markup=False)


def _lines(document: Mapping[str, Any]) -> Iterator[str]:
    if client := document.get("client"):
        yield f"client  region {client['region']} ({client['how']}), address {client['address']}"
        for away in document["regions"]:
            far = "unknown" if away["ms"] is None else f"{away['ms']} ms"
            link = f", link +{away['link']:g} ms" if away["link"] else ""
            yield f"region  {away['region']}: {far} ({away['how']}{link}), nodes: {away['nodes']}"
        for node in document["nodes"]:
            yield (
                f"node    {node['id']} ({node['region']}): {node['verdict']}: {node['reason']}; load {node['load']}"
                + (f"; {_health(node)}" if _health(node) != "well" else "")
            )
    yield from document["urls"]


def _health(node: Mapping[str, Any]) -> str:
    health = node["health"]
    if node["draining"]:
        return "draining"
    if health["ejected"]:
        return f"ejected for {health['seconds_left']:.0f} s"
    return f"{health['failures']} failed probes" if health["failures"] else "well"
