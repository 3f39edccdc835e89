"""Where the bytes of one shard go while they come: hashed and written in blocks, by a thread, beside the receiving.

A landing knows how far it got, so the next source goes on from there. Its bytes count when the whole digest is right.
"""

from __future__ import annotations

import asyncio
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence

from shared.digest import Digest, hex_of

BLOCK = 1 << 20
"""Bytes handed to a thread at a time; a landing holds twice that at most."""


class Landing(ABC):
    """Of one shard of ``size`` bytes. ``reached``: bytes that it has."""

    def __init__(self, digest: Digest, size: int) -> None:
        self.digest, self.size, self.reached = digest, size, 0
        self._hashed = hashlib.sha256()
        self._chunks: list[bytes] = []
        self._waiting = 0
        self._written = 0
        """Where the next block begins."""
        self._writing: asyncio.Future[None] | None = None

    def _begin(self) -> None:  # noqa: B027 - memory is ready
        """Make ready, in a thread; ``reached`` is then what there is from before. Raises DiskError."""

    @abstractmethod
    def _store(self, chunks: Sequence[bytes], position: int) -> None:
        """Keep these bytes, which begin at ``position`` of the shard. In a thread. Raises DiskError."""

    async def begin(self) -> None:
        """Make ready. Raises DiskError."""
        self._writing = asyncio.ensure_future(asyncio.to_thread(self._begin))
        await self._wait()

    def close(self) -> None:  # noqa: B027 - memory has nothing to give back
        """Give back what it holds, once it is settled. Safe to call again."""

    async def write(self, chunk: bytes) -> None:
        """The next bytes. Raises DiskError, also for those before."""
        self._chunks.append(chunk)
        self._waiting += len(chunk)
        self.reached += len(chunk)
        if self._waiting >= BLOCK or self.reached == self.size:
            await self._hand_over()

    async def settle(self) -> None:
        """All that was written is kept. Raises DiskError."""
        await self._hand_over()
        await self._wait()

    async def is_right(self) -> bool:
        """Whether all is there and the digest is right; else it begins again, at byte 0."""
        await self.settle()
        if self.reached == self.size and self._hashed.hexdigest() == hex_of(self.digest):
            return True
        self.restart()
        return False

    def restart(self) -> None:
        """Nothing of what is there counts."""
        self.reached = self._written = 0
        self._hashed = hashlib.sha256()

    async def _hand_over(self) -> None:
        await self._wait()
        if self._chunks:
            chunks, position = self._chunks, self._written
            self._chunks, self._waiting, self._written = [], 0, self.reached
            self._writing = asyncio.ensure_future(asyncio.to_thread(self._take, chunks, position))

    async def _wait(self) -> None:
        """For the block that is being written; who is cancelled meanwhile does not stop it."""
        if self._writing:
            await asyncio.shield(self._writing)
            self._writing = None

    def _take(self, chunks: Sequence[bytes], position: int) -> None:
        for chunk in chunks:
            self._hashed.update(chunk)
        self._store(chunks, position)


class MemoryLanding(Landing):
    """In memory: ``data``."""

    def __init__(self, digest: Digest, size: int) -> None:
        super().__init__(digest, size)
        self.data = memoryview(bytearray(size))

    def _store(self, chunks: Sequence[bytes], position: int) -> None:
        for chunk in chunks:
            self.data[position : position + len(chunk)] = chunk
            position += len(chunk)
