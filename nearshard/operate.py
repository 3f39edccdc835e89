"""Operating nodes of this machine: their admin faces, found in their data directories."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from shared import codec
from shared.errors import CODES, DiskError, LocalError, NearshardError, NotFound, UpstreamError
from shared.web.session import make_session, translated

POLL = 0.2
"""Seconds between two looks at a job."""


@dataclass(frozen=True)
class NodeAccess:
    """One node's admin face."""

    name: str
    url: str
    token: str


def find_nodes(data: Path, names: list[str]) -> list[NodeAccess]:
    """The nodes under ``data``: a node's own directory, or one with ``edges/<name>/`` (as ``nearshard up`` makes).

    Only those in ``names``, if any are given. Raises NotFound, DiskError.
    """
    files = [data / "admin.json"] if (data / "admin.json").exists() else sorted(data.glob("edges/*/admin.json"))
    nodes = []
    for file in files:
        if names and file.parent.name not in names:
            continue
        try:
            access = json.loads(file.read_bytes())
            nodes.append(NodeAccess(file.parent.name, str(access["url"]), str(access["token"])))
        except OSError as error:
            raise DiskError(f"{file}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise LocalError(f"{file}: not a node's admin.json") from error
    if missing := set(names) - {node.name for node in nodes}:
        raise NotFound(f"{data}: there is no node {', '.join(sorted(missing))} here", code="unknown_node")
    if not nodes:
        raise NotFound(f"{data}: there is no node here; --data names another directory", code="unknown_node")
    return nodes


async def call(node: NodeAccess, method: str, path: str, body: object = None) -> Any:
    """Ask a node. Raises what it answers, as the error it is; UpstreamError where it does not."""
    url = node.url + path
    with translated(url):
        async with (
            make_session() as session,
            session.request(
                method,
                url,
                json=body,
                headers={"Authorization": f"Bearer {node.token}"},
                timeout=aiohttp.ClientTimeout(total=60),
                allow_redirects=False,
            ) as answer,
        ):
            document = codec.decode_json(await answer.content.read(codec.MAX_JSON))
            if answer.status >= 400:
                code = document.get("code")
                if code in CODES:
                    names = document.get("tasks")
                    public = {"tasks": names} if isinstance(names, list) else {}
                    raise NearshardError(f"{node.name}: {CODES[code].title}", code=code, public=public)
                raise UpstreamError(f"{url} answered {answer.status}")
            return document


async def on_all(nodes: list[NodeAccess], method: str, path: str, body: object = None) -> dict[str, Any]:
    """Ask every node; answers by name. Raises the first error."""
    answers = await asyncio.gather(*(call(node, method, path, body) for node in nodes))
    return {node.name: answer for node, answer in zip(nodes, answers, strict=True)}


async def follow_jobs(
    nodes: list[NodeAccess], path: str, what: str, progress: Callable[[Mapping[str, Any]], None]
) -> dict[str, Any]:
    """Start a job on every node and follow it to its end; ``progress`` gets the jobs by node again and again.

    Raises UpstreamError where one failed.
    """
    jobs = await on_all(nodes, "POST", path, {"what": what})
    while True:
        progress(jobs)
        running = [node for node in nodes if jobs[node.name]["state"] not in ("done", "failed")]
        if not running:
            break
        await asyncio.sleep(POLL)
        for node in running:
            jobs[node.name] = await call(node, "GET", f"/jobs/{jobs[node.name]['id']}")
    if failed := {name: job["reason"] for name, job in jobs.items() if job["state"] == "failed"}:
        name, reason = next(iter(failed.items()))
        raise UpstreamError(f"{name}: {reason}")
    return jobs
