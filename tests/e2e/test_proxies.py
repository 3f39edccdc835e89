"""Upstreams behind a proxy: the node reaches them through it, and through it only."""

from __future__ import annotations

import asyncio
import hashlib
import json
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.harness import Lab, make_model


def fetch(url: str) -> str:
    """SHA-256 of a body."""
    with urllib.request.urlopen(url, timeout=20) as answer:
        return hashlib.sha256(answer.read()).hexdigest()


@asynccontextmanager
async def socks5(port: int) -> AsyncIterator[tuple[str, list[str]]]:
    """A SOCKS5 proxy (RFC 1928) that leads every host to one loopback port; its URL, and the hosts it was asked for."""
    asked: list[str] = []
    tasks: set[asyncio.Task[None]] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        _, methods = await reader.readexactly(2)
        await reader.readexactly(methods)
        writer.write(b"\x05\x00")
        assert (await reader.readexactly(4)) == b"\x05\x01\x00\x03", "a connect by name: the proxy resolves"
        (length,) = await reader.readexactly(1)
        asked.append((await reader.readexactly(length)).decode())
        await reader.readexactly(2)
        there = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"\x05\x00\x00\x01\x7f\x00\x00\x01\x00\x00")
        await asyncio.gather(pump(reader, there[1]), pump(there[0], writer), return_exceptions=True)

    server = await asyncio.start_server(client, "127.0.0.1", 0)
    try:
        yield f"socks5h://127.0.0.1:{server.sockets[0].getsockname()[1]}", asked
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def test_an_http_proxy_leads_to_an_upstream_that_has_no_address_here(lab: Lab) -> None:
    """The origin stands in for the proxy: it answers a target in absolute form like any other (RFC 9112 3.2.2)."""
    make_model(lab.folder / "model")
    lab.publish(lab.folder / "model")
    origin = lab.origin()
    expected = fetch(f"{origin.url}/shards/acme/tiny")
    upstream = "http://origin.invalid:8710"
    edge = lab.edge(upstream, upstream_proxies=json.dumps({upstream: origin.url}))
    assert fetch(f"{edge.url}/shards/acme/tiny") == expected


async def test_a_socks_proxy_leads_to_an_upstream_and_resolves_its_name(lab: Lab) -> None:
    make_model(lab.folder / "model")
    await asyncio.to_thread(lab.publish, lab.folder / "model")
    origin = await asyncio.to_thread(lab.origin)
    expected = await asyncio.to_thread(fetch, f"{origin.url}/shards/acme/tiny")
    upstream = "http://origin.invalid:8710"
    async with socks5(origin.port) as (proxy, asked):
        edge = await asyncio.to_thread(lab.edge, upstream, upstream_proxies=json.dumps({upstream: proxy}))
        assert await asyncio.to_thread(fetch, f"{edge.url}/shards/acme/tiny") == expected
        await asyncio.to_thread(edge.stop)
    assert set(asked) == {"origin.invalid"}
