"""The scrubber: reads the disk cache through, slowly, and drops what rotted."""

from __future__ import annotations

import asyncio
import hashlib
import os
from typing import BinaryIO

from structlog.typing import FilteringBoundLogger

from edge_node.shard_key import ShardKey, digest_in
from edge_node.store import DiskTier
from shared.clock import Clock
from shared.digest import hex_of
from shared.errors import LocalError
from shared.tasks import end

BLOCK = 1 << 20
LEAST_PAUSE = 0.05
"""Seconds between two shards, however many there are: the disk is there for clients."""
IDLE = 60.0
"""Seconds to wait where there is nothing to read."""


class Scrubber:
    """Checks every shard on disk once in ``cycle`` seconds; a cycle of 0 is never."""

    def __init__(self, disk: DiskTier, cycle: float, clock: Clock, log: FilteringBoundLogger) -> None:
        self._disk, self._cycle, self._clock, self._log = disk, cycle, clock, log
        self._task: asyncio.Task[None] | None = None
        self.checked = 0
        self.rotten = 0

    def start(self) -> None:
        """Begin."""
        if self._cycle:
            self._task = asyncio.create_task(self._run(), name="scrub")

    async def close(self) -> None:
        """Stop."""
        await end([self._task] if self._task else [])

    async def _run(self) -> None:
        while True:
            shards = list(self._disk.ledger)
            pause = max(LEAST_PAUSE, self._cycle / len(shards)) if shards else min(IDLE, self._cycle)
            for key in shards:
                await self.check(key)
                await self._clock.sleep(pause)
            if not shards:
                await self._clock.sleep(pause)

    async def check(self, key: ShardKey) -> bool:
        """Whether a shard on disk is what it was; one that is not is dropped, and fetched when it is asked for."""
        try:
            file = self._disk.look(key)
        except LocalError:
            return True  # the next cycle looks again
        if file is None:
            return False
        try:
            found = await asyncio.to_thread(_sha256, file)
        except OSError as error:
            found = str(error)
        finally:
            file.close()
            self._disk.ledger.unpin(key)
        self.checked += 1
        if found == hex_of(digest_in(key)):
            return True
        self.rotten += 1
        self._log.warning("a cached shard has rotted", shard=key)
        self._disk.drop(key)
        return False


def _sha256(file: BinaryIO) -> str:
    digest, position = hashlib.sha256(), 0
    while block := os.pread(file.fileno(), BLOCK, position):
        digest.update(block)
        position += len(block)
    return digest.hexdigest()
