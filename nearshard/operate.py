"""Operating nodes: those of this machine by their admin faces, found in their data directories; others with a token.

Routers are asked to enrol nodes in the same way.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from shared import codec
from shared.errors import (
    CODES,
    DecodeError,
    DiskError,
    LocalError,
    NearshardError,
    NotFound,
    RequestError,
    UpstreamError,
)
from shared.token_file import bearer
from shared.web.session import make_session, translated
from shared.web.tls import tls_by

POLL = 0.2
"""Seconds between two looks at a job."""


@dataclass(frozen=True)
class Access:
    """A service that takes orders, and the token that it takes them for."""

    name: str
    url: str
    token: str
    tls: ssl.SSLContext | None = None


def from_afar(urls: Sequence[str], prefix: str, token: str, ca: Path | None) -> list[Access]:
    """Services by their URLs, each once. ``prefix``: of the paths. Raises RequestError, ConfigError."""
    tls, bases = tls_by(ca), dict.fromkeys(url.rstrip("/") for url in urls)
    if not all(url.startswith(("http://", "https://")) for url in bases):
        raise RequestError("a service's URL is http://host:port or https://host:port")
    return [Access(url, url + prefix, token, tls) for url in bases]


def find_nodes(data: Path, names: list[str]) -> list[Access]:
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
            nodes.append(Access(file.parent.name, str(access["url"]), str(access["token"])))
        except OSError as error:
            raise DiskError(f"{file}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise LocalError(f"{file}: not a node's admin.json") from error
    if missing := set(names) - {node.name for node in nodes}:
        raise NotFound(f"{data}: there is no node {', '.join(sorted(missing))} here", code="unknown_node")
    if not nodes:
        raise NotFound(f"{data}: there is no node here; --data names another directory", code="unknown_node")
    return nodes


async def call(
    service: Access, method: str, path: str, body: object = None, *, data: AsyncIterator[bytes] | None = None
) -> dict[str, Any]:
    """Ask a service. ``data``: what is sent in place of ``body``, for as long as it takes. Raises what it answers, as
    the error it is; UpstreamError where it does not."""
    url = service.url + path
    with translated(url):
        async with (
            make_session(tls=service.tls) as session,
            session.request(
                method,
                url,
                json=body if data is None else None,
                data=data,
                headers=bearer(service.token),
                timeout=aiohttp.ClientTimeout(total=60 if data is None else None),
                allow_redirects=False,
            ) as answer,
        ):
            document = await _read_object(answer)
            if answer.status >= 300:
                code = str(document.get("code"))
                if code in CODES:
                    names = document.get("tasks")
                    public = {"tasks": names} if isinstance(names, list) else {}
                    raise NearshardError(f"{service.name}: {CODES[code].title}", code=code, public=public)
                raise UpstreamError(f"{url} answered {answer.status}")
            return document


async def _read_object(answer: aiohttp.ClientResponse) -> dict[str, Any]:
    """The object that an answer is; empty for anything else, as of a service that is none of ours."""
    body = bytearray()
    async for chunk in answer.content.iter_any():
        body += chunk
        if len(body) > codec.MAX_JSON:
            return {}
    with suppress(DecodeError):
        document = codec.decode_json(bytes(body))
        if isinstance(document, dict):
            return document
    return {}


async def on_all(services: list[Access], method: str, path: str, body: object = None) -> dict[str, dict[str, Any]]:
    """Ask every service, also where another one fails; answers by name. Raises the first error."""
    asked = (call(service, method, path, body) for service in services)
    answers = {}
    for service, answer in zip(services, await asyncio.gather(*asked, return_exceptions=True), strict=True):
        if isinstance(answer, BaseException):
            raise answer
        answers[service.name] = answer
    return answers


async def follow_jobs(
    nodes: list[Access], path: str, what: str, progress: Callable[[Mapping[str, Any]], None]
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
