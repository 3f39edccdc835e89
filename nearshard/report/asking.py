"""Asks a network's nodes for their usage."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from nearshard.report.sums import NodeUsage, Silent
from nearshard.routes import nodes
from shared import codec
from shared.errors import BadId, DecodeError, NotFound, UpstreamError
from shared.ids import parse_name
from shared.token_file import bearer
from shared.usage import PATH, parse_days
from shared.web.session import fetch, make_session
from shared.web.tls import tls_by

MAX_ANSWER = 64 << 20
"""Bytes of a node's answer: 400 days of a hundred models a day are some 10 MB."""
AT_ONCE = 32
"""Nodes that are asked at a time."""


async def ask_nodes(
    routers: Sequence[str], since: str, token: str, ca: Path | None
) -> tuple[Sequence[NodeUsage], Sequence[Silent]]:
    """What the nodes that the routers know say of the days from ``since`` on; and who said nothing.

    Raises UpstreamError where no router answers, or knows a node, or none of the nodes answers.
    """
    known = await nodes(routers, ca)
    turns = asyncio.Semaphore(AT_ONCE)
    async with make_session(tls=tls_by(ca)) as session:

        async def ask(node: Mapping[str, Any]) -> NodeUsage | Silent:
            name, site = _names(node)
            async with turns:
                try:
                    return NodeUsage(name, site, await _ask(session, f"{node['url']}{PATH}?since={since}", token))
                except (UpstreamError, NotFound) as error:
                    return Silent(name, site, str(error))

        answers = await asyncio.gather(*map(ask, known))
    said, silent = _of(NodeUsage, answers), _of(Silent, answers)
    if not said:
        why = f": {silent[0].node}: {silent[0].reason}" if silent else ""
        raise UpstreamError(f"none of {len(known)} nodes said what it served{why}")
    return said, silent


async def _ask(session: aiohttp.ClientSession, url: str, token: str) -> Mapping[str, Any]:
    answer = await fetch(session, url, limit=MAX_ANSWER, headers=bearer(token))
    try:
        document = await asyncio.to_thread(codec.decode_json, answer.body, MAX_ANSWER)
        return parse_days(document.get("days") if isinstance(document, dict) else None)
    except DecodeError as error:
        raise UpstreamError(f"{url} answered what is no usage: {error}") from error


def _names(node: Mapping[str, Any]) -> tuple[str, str]:
    """A node's and its region's name, which go into tables. Raises UpstreamError."""
    try:
        return parse_name(str(node["id"])), parse_name(str(node["region"]))
    except (BadId, KeyError) as error:
        raise UpstreamError("a router's list of nodes has one with no proper name") from error


def _of(kind: type[Any], answers: Iterable[object]) -> list[Any]:
    return [answer for answer in answers if isinstance(answer, kind)]
