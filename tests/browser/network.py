"""Networks as a test wants them seen: a real router, and nodes whose answers are scripted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from tests.e2e.test_routing import member
from tests.harness import Lab, Service, get_json, wait_nodes
from tests.scripted import Script, source


def usage(served: int, link: int, **more: int) -> dict[str, int]:
    """What a node counted of a model."""
    return {"served": served, "link": link, "peers": 0, "saved": 0, "hits": 9, "requests": 10, "errors": 0, **more}


def status(models: Mapping[str, Mapping[str, int]], **more: object) -> dict[str, Any]:
    """A node's status, as far as the dashboard reads it."""
    tier = {"used": 150 * 10**9, "budget": 200 * 10**9}
    today = {"day": datetime.now(UTC).date().isoformat(), "models": models}
    counts = {"sent_bytes": {"hit-disk": 10**9}, "upstream_bytes": 0}
    return {**counts, "memory": tier, "disk": tier, "usage": today, **more}


Said = Mapping[tuple[str, str], Mapping[str, Any] | bytes]
"""By region and name, what a node answers to who asks for its status."""


@dataclass
class Seen:
    """A router, and its nodes by name."""

    router: Service
    nodes: dict[str, Script]

    async def network(self) -> Any:
        """``GET /network``; the nodes are of this loop, so it must not wait."""
        return await asyncio.to_thread(get_json, f"{self.router.url}/network")

    def says(self, node: str, said: Mapping[str, Any] | bytes) -> None:
        """What a node answers from now on."""
        self.nodes[node].blobs["/status"] = said if isinstance(said, bytes) else json.dumps(said).encode()

    def asked(self, node: str) -> int:
        """How often a node was asked for its status."""
        return sum(asked.path == "/status" for asked in self.nodes[node].gets())


@asynccontextmanager
async def seen(lab: Lab, said: Said) -> AsyncIterator[Seen]:
    """A router whose members answer what is said. They send one heartbeat, which is enough."""
    router = lab.router("http://127.0.0.1:1", ttl="300", probe="0")
    async with AsyncExitStack() as stack:
        made = Seen(router, {})
        for (region, node), answer in said.items():
            script = made.nodes[node] = await stack.enter_async_context(source(Script(blobs={"/healthz": b"{}"})))
            made.says(node, answer)
            member(router, node, script.url, region=region)
        wait_nodes(router, len(said))
        yield made
