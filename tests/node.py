"""The caching parts of an edge node, in the process of a test, over sources that the test scripts."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from edge_node.cache import Cache
from edge_node.fill import Fills
from edge_node.rebuild import Rebuilder
from edge_node.recipes import Recipes
from edge_node.shard_key import ShardKey
from edge_node.store import DiskTier, MemoryTier
from edge_node.upstream import Upstreams
from shared import log
from shared.clock import SystemClock
from shared.ids import TaskId
from shared.metrics import Metrics
from shared.web.send import FileRegion
from shared.web.session import IDLE, Sessions
from tests.scripted import Script


class QuickClock(SystemClock):
    """No waiting between rounds."""

    async def sleep(self, seconds: float) -> None:
        """Let others run."""
        await asyncio.sleep(0)


@dataclass
class Node:
    """The caching parts of an edge, without its HTTP side."""

    cache: Cache
    upstreams: Upstreams
    folder: Path
    recipes: Recipes
    rebuilder: Rebuilder
    metrics: Metrics

    async def read(
        self, key: ShardKey, offset: int = 0, length: int | None = None, *, size: int | None = None
    ) -> bytes:
        """Read a shard as a request would; ``size`` where a manifest said it."""
        reader = self.cache.open(key, size)
        try:
            length = (await reader.size()) - offset if length is None else length
            parts = []
            async for piece in reader.read(offset, length):
                if isinstance(piece, FileRegion):
                    parts.append(pread(piece))
                else:
                    parts.append(bytes(piece))
            return b"".join(parts)
        finally:
            reader.close()

    def files(self) -> list[str]:
        """Every file under the disk tier."""
        return sorted(str(p.relative_to(self.folder)) for p in self.folder.rglob("*") if p.is_file())

    async def settled(self) -> None:
        """Until no fill is under way."""
        while len(self.cache.fills):
            await asyncio.sleep(0)


def pread(region: FileRegion) -> bytes:
    """Its bytes."""
    return os.pread(region.file.fileno(), region.length, region.offset)


@asynccontextmanager
async def node_over(
    folder: Path, *sources: Script, memory: int = 8 << 20, disk: int = 64 << 20, idle: float = IDLE
) -> AsyncIterator[Node]:
    """A node whose origins are ``sources``. It reads no manifests but those that it is taught."""
    sessions, clock, metrics, logger = Sessions(idle=idle), QuickClock(), Metrics(), log.get("test")
    memory_tier = MemoryTier(memory, metrics)
    disk_tier = DiskTier(folder, disk, clock, metrics, logger)
    disk_tier.recover()
    upstreams = Upstreams(sessions, [script.url for script in sources], clock, metrics)
    fills = Fills(memory_tier, disk_tier, upstreams, clock, random.Random(0), metrics, logger)
    cache = Cache(memory_tier, disk_tier, fills)
    recipes = Recipes()

    async def read(of: TaskId, private: str) -> None:
        raise AssertionError("nobody names a revision here")

    rebuilder = Rebuilder(cache, recipes, upstreams, read, metrics, logger)
    fills.make, fills.named = rebuilder.make, recipes.named
    try:
        yield Node(cache, upstreams, folder, recipes, rebuilder, metrics)
    finally:
        await cache.close()
        await sessions.close()
