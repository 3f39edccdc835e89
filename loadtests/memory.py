"""The memory of a process, from outside: now, and at its peak."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

EVERY = 0.05
"""Seconds between two samples."""
STILL, PATIENCE = 2.0, 15.0
"""Seconds without a change that mean rest; seconds that it is waited for."""


@dataclass
class Memory:
    """Bytes resident: all (``rss``), and those that are no file's, as programs' code and libraries are (``anon``)."""

    rss: int
    anon: int


def memory(pid: int) -> Memory:
    """Of a process, now."""
    return Memory(_status(pid, "VmRSS"), _status(pid, "RssAnon"))


async def at_rest(pid: int) -> Memory:
    """Of a process, once it changes no more; as it is then where it never rests."""
    loop = asyncio.get_running_loop()
    end, since, last = loop.time() + PATIENCE, loop.time(), memory(pid)
    while loop.time() < min(end, since + STILL):
        await asyncio.sleep(EVERY)
        if (now := memory(pid)) != last:
            since, last = loop.time(), now
    return last


@asynccontextmanager
async def peak(pid: int) -> AsyncIterator[Memory]:
    """The most that a process has while the context is open; complete at its end.

    The kernel keeps the peak of ``rss`` itself, where it lets us begin anew; ``anon`` is sampled.
    """
    kernels = False
    with suppress(OSError):
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # proc(5): resets VmHWM
        kernels = True
    seen = memory(pid)

    async def watch() -> None:
        while True:
            now = memory(pid)
            seen.rss, seen.anon = max(seen.rss, now.rss), max(seen.anon, now.anon)
            await asyncio.sleep(EVERY)

    watching = asyncio.create_task(watch())
    try:
        yield seen
    finally:
        watching.cancel()
    if kernels:
        seen.rss = max(seen.rss, _status(pid, "VmHWM"))


def _status(pid: int, name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(found[1]) << 10 if found else 0
