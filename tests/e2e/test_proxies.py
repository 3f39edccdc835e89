"""Upstreams behind a proxy: the node reaches them through it, and through it only."""

from __future__ import annotations

import asyncio
import hashlib
import json
import urllib.request

from tests.harness import Lab, make_model
from tests.proxies import socks5


def fetch(url: str) -> str:
    """SHA-256 of a body."""
    with urllib.request.urlopen(url, timeout=20) as answer:
        return hashlib.sha256(answer.read()).hexdigest()


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
