"""Nodes of one region: each shard crosses the link once, lives on its owner, and nobody waits in a circle."""

from __future__ import annotations

import asyncio
import hashlib
import urllib.request
from pathlib import Path

import pytest
from aiohttp import web

from shared.ring import Ring
from tests.harness import Lab, Service, get_json, make_model, wait_nodes, wait_until
from tests.scripted import Script, source


def shards_on_disk(lab: Lab, node: str) -> set[str]:
    """Digests (hex) of what a node keeps on disk."""
    return {path.name for path in (lab.folder / node / "blobs").rglob("*") if path.is_file()}


def fetch(url: str) -> str:
    """SHA-256 of a body."""
    with urllib.request.urlopen(url, timeout=30) as answer:
        return hashlib.sha256(answer.read()).hexdigest()


@pytest.fixture
def region(lab: Lab) -> tuple[Service, list[Service]]:
    """A router and three edges of one region over one origin, with a model of many shards."""
    make_model(lab.folder / "model", width=512)
    lab.publish(lab.folder / "model", "acme/tiny", "--shard-target", "64KiB", "--shard-limit", "64KiB")
    origin = lab.origin()
    router = lab.router(origin)
    edges = [lab.edge(origin, router=router, node=f"n{n}", region="default") for n in range(3)]
    wait_nodes(router, 3)
    return router, edges


def wait_peers(edge: Service, count: int) -> None:
    """Until a node knows this many members of its ring."""
    wait_until(lambda: edge.status()["peers"] == count, f"{count} peers known to {edge.url}")


def settle(edges: list[Service]) -> None:
    """Until every node has the whole ring (its epoch came with a heartbeat) and no fill is under way."""
    for edge in edges:
        wait_peers(edge, len(edges))


def test_a_region_takes_each_shard_over_the_link_once_and_keeps_it_on_its_owner(
    lab: Lab, region: tuple[Service, list[Service]]
) -> None:
    _, edges = region
    settle(edges)
    plan = get_json(f"{edges[0].url}/shards/acme/tiny", Accept="application/vnd.nearshard.plan+json")
    sizes = {shard["digest"]: shard["size"] for shard in plan["shards"]}
    expected = plan["layout"]["sha256"]
    for edge in edges * 2:
        assert fetch(f"{edge.url}/shards/acme/tiny@{plan['revision']}") == expected
    body = {plan["shards"][index]["digest"] for index, _, _ in plan["layout"]["slices"]}
    assert sum(edge.status()["upstream_bytes"] for edge in edges) == sum(sizes[digest] for digest in body)
    ring = Ring({f"n{n}": 1 for n in range(3)})
    for number in range(3):
        owned = {digest.removeprefix("sha256:") for digest in body if ring.owners(digest, 1) == [f"n{number}"]}
        assert shards_on_disk(lab, f"n{number}") == owned
        assert owned, "each node has its share"
    assert all(edge.status()["peer_bytes"] > 0 for edge in edges)


def test_a_dead_owner_costs_a_fetch_from_above_and_no_request(region: tuple[Service, list[Service]]) -> None:
    _, edges = region
    settle(edges)
    edges[1].kill()
    plan = get_json(f"{edges[0].url}/shards/acme/tiny", Accept="application/vnd.nearshard.plan+json")
    assert fetch(f"{edges[0].url}/shards/acme/tiny@{plan['revision']}") == plan["layout"]["sha256"]


async def test_nodes_with_different_rings_never_wait_on_each_other(lab: Lab) -> None:
    """Each is told that the other one owns everything."""
    script = Script()
    data = bytes(range(256)) * 4000
    digest = script.add(data)
    edges: dict[str, Service] = {}

    async def heartbeat(request: web.Request) -> web.Response:
        return web.json_response({"epoch": len(edges), "ttl": 6})

    async def ring(request: web.Request) -> web.Response:
        other = "b" if request.query["region"] == "a" else "a"
        nodes = [{"id": other, "url": edges[other].url, "weight": 1}] if len(edges) == 2 else []
        return web.json_response({"nodes": nodes})

    app = web.Application()
    app.router.add_put("/nodes/{node}", heartbeat)
    app.router.add_get("/ring", ring)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    router = Service("fake", [], Path("x"), Path("y"), url=f"http://127.0.0.1:{runner.addresses[0][1]}")
    try:
        async with source(script):
            for name in ("a", "b"):
                edges[name] = await asyncio.to_thread(
                    lab.edge, script.url, router=router, node=name, region=name, heartbeat="0.1"
                )
            for edge in edges.values():
                await asyncio.to_thread(wait_peers, edge, 1)
            async with asyncio.timeout(10):
                sums = await asyncio.gather(
                    *(asyncio.to_thread(fetch, f"{edge.url}/blobs/{digest}") for edge in list(edges.values()) * 10)
                )
            assert set(sums) == {hashlib.sha256(data).hexdigest()}
            for edge in edges.values():
                await asyncio.to_thread(edge.stop)
    finally:
        await runner.cleanup()
