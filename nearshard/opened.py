"""A task or a file of a model, read anywhere without having it: the shards that a read touches, checked, and the next.

No byte is handed out before its shard's digest was right. Shards are in memory while they are near, within a budget.
"""

from __future__ import annotations

import asyncio
import io
import os
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from shared.digest import Digest
from shared.errors import LocalError
from shared.layout import Layout, Span
from shared.tasks import end

T = TypeVar("T")

AHEAD = 2
"""Shards fetched ahead of a reader that goes from front to back."""
BUDGET = 96 << 20
"""Bytes of shards in memory; one that is being read may be over it."""

Fetch = Callable[[Digest], Awaitable[memoryview]]


class OpenFile:
    """A random access file; ``size`` in bytes, ``sha256`` (64 hex) of the whole. Of one task of asyncio at a time.

    Reading raises UpstreamError, IntegrityError.
    """

    def __init__(self, layout: Layout, fetch: Fetch, *, ahead: int = AHEAD, budget: int = BUDGET) -> None:
        """``fetch`` gives a shard, verified."""
        self.size, self.sha256 = layout.size, layout.sha256
        self._layout, self._fetch, self._ahead, self._budget = layout, fetch, ahead, budget
        self._order = layout.shards()
        self._number = {digest: number for number, digest in enumerate(self._order)}
        self._shards: OrderedDict[Digest, asyncio.Task[memoryview]] = OrderedDict()
        self._position = self._expected = 0
        self._closed = False

    def __repr__(self) -> str:
        return f"<OpenFile {self.size} bytes at {self._position}, {len(self._shards)} shards in memory>"

    def tell(self) -> int:
        """Where the next read begins."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a byte, as ``io.IOBase.seek``; also behind the end, where reads give nothing. Raises ValueError."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        if base + offset < 0:
            raise ValueError("before the first byte")
        self._position = base + offset
        return self._position

    async def read(self, size: int = -1) -> bytes:
        """The next ``size`` bytes, fewer at the end; all that is left by default."""
        length = self.size if size < 0 else size
        data = await self.read_at(self._position, length)
        self._position += len(data)
        return data

    async def read_at(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset`` on, fewer at the end."""
        if self._closed:
            raise LocalError("the file is closed")
        start = min(max(offset, 0), self.size)
        span = Span(start, min(start + max(length, 0), self.size))
        onwards = span.start == self._expected
        self._expected = span.stop
        parts = []
        for piece in self._layout.cut(span):
            data = await self._shard(piece.digest, onwards=onwards)
            parts.append(data[piece.offset : piece.offset + piece.length])
        return b"".join(parts)

    async def close(self) -> None:
        """End what is under way. Safe to call again."""
        self._closed = True
        await end(self._shards.values())
        self._shards.clear()

    async def _shard(self, digest: Digest, *, onwards: bool) -> memoryview:
        number = self._number[digest]
        wanted = self._order[number : number + 1 + (self._ahead if onwards else 0)]
        for name in wanted:
            if name not in self._shards:
                self._shards[name] = asyncio.ensure_future(self._fetch(name))
        self._shards.move_to_end(digest)
        try:
            data = await asyncio.shield(self._shards[digest])
        except BaseException:
            if self._shards[digest].done():  # the next read tries again
                del self._shards[digest]
            raise
        self._make_room(set(wanted))
        return data

    def _make_room(self, keep: set[Digest]) -> None:
        """Let go of the shards that were read longest ago; of those that failed when nobody wanted them, too."""
        for name, task in list(self._shards.items()):
            if task.done() and not task.cancelled() and task.exception() is not None:
                del self._shards[name]
        had = {name: len(task.result()) for name, task in self._shards.items() if task.done()}
        total = sum(had.values())
        for name, size in had.items():
            if total <= self._budget:
                return
            if name not in keep:
                del self._shards[name]
                total -= size


Run = Callable[[Coroutine[Any, Any, T]], T]


@contextmanager
def running() -> Iterator[Any]:
    """A loop in a thread of its own: gives what runs a coroutine there, and waits for it."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="nearshard", daemon=True)
    thread.start()
    try:
        yield lambda coroutine: asyncio.run_coroutine_threadsafe(coroutine, loop).result()
    finally:
        asyncio.run_coroutine_threadsafe(loop.shutdown_default_executor(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class BlockingFile(io.RawIOBase):
    """The same for who does not use asyncio; ``io.BufferedReader`` may be put around it."""

    def __init__(self, opened: OpenFile, run: Run[bytes]) -> None:
        """``run`` waits for what is asked in the loop that ``opened`` lives in."""
        super().__init__()
        self._opened, self._run = opened, run

    @property
    def size(self) -> int:
        """Bytes of the whole."""
        return self._opened.size

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """As ``OpenFile.seek``."""
        return self._opened.seek(offset, whence)

    def tell(self) -> int:
        """As ``OpenFile.tell``."""
        return self._opened.tell()

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        """Fill ``buffer`` with what comes next; 0 at the end."""
        data = self._run(self._opened.read(len(buffer)))
        buffer[: len(data)] = data
        return len(data)
