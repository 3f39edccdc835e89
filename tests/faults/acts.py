"""More things that a source can do to a shard, beside those of ``tests.scripted``."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from contextlib import suppress

from tests.scripted import Act, Asked, Script, head, serve_whole, unavailable


async def chunked_without_end(script: Script, asked: Asked, writer: asyncio.StreamWriter) -> None:
    """Chunked, all bytes but the last chunk that says so."""
    data = script.blobs[asked.path]
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(data), data))
    await writer.drain()
    writer.close()


async def partial_unasked(script: Script, asked: Asked, writer: asyncio.StreamWriter) -> None:
    """206 with the first half to a plain GET."""
    data = script.blobs[asked.path]
    half = len(data) // 2
    writer.write(
        f"HTTP/1.1 206 OK\r\nContent-Length: {half}\r\nContent-Range: bytes 0-{half - 1}/{len(data)}\r\n\r\n".encode()
    )
    writer.write(data[:half])


async def silent(script: Script, asked: Asked, writer: asyncio.StreamWriter) -> None:
    """Takes the request and never answers."""
    script.holding.set()
    await script.release.wait()


async def stalled_after_head(script: Script, asked: Asked, writer: asyncio.StreamWriter) -> None:
    """A head, then nothing."""
    head(writer, script.blobs[asked.path], asked)
    await writer.drain()
    script.holding.set()
    await script.release.wait()


def dripping(size: int, every: float = 1.0) -> Act:
    """``size`` bytes once in ``every`` seconds, until the test is over."""

    async def act(script: Script, asked: Asked, writer: asyncio.StreamWriter) -> None:
        data = script.blobs[asked.path]
        head(writer, data, asked)
        part = data[asked.start : asked.stop]
        for start in range(0, len(part), size):
            writer.write(part[start : start + size])
            await writer.drain()
            with suppress(TimeoutError):
                await asyncio.wait_for(script.release.wait(), every)
                return

    return act


def flapping(rng: random.Random, share: float = 0.5) -> Act:
    """503 to this share of requests."""

    async def act(script: Script, asked: Asked, writer: asyncio.StreamWriter) -> None:
        await (unavailable if rng.random() < share else serve_whole)(script, asked, writer)

    return act


def by_path(acts: Mapping[str, Act]) -> Act:
    """An act for each path."""

    async def act(script: Script, asked: Asked, writer: asyncio.StreamWriter) -> None:
        await acts[asked.path](script, asked, writer)

    return act
