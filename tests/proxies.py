"""Proxies on real sockets that lead every host to one loopback port, and note what they were asked for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter, list[str]], Awaitable[bytes]]
"""Takes what a client asks of the proxy; what of it goes on to the server."""


@asynccontextmanager
async def socks5(port: int) -> AsyncIterator[tuple[str, list[str]]]:
    """A SOCKS5 proxy (RFC 1928); its URL, and the hosts it was asked for."""
    async with _proxy(port, _socks5) as (address, asked):
        yield f"socks5h://{address}", asked


@asynccontextmanager
async def http_proxy(port: int) -> AsyncIterator[tuple[str, list[str]]]:
    """An HTTP proxy (RFC 9110 §9.3.6 for TLS; a target in absolute form else); its URL, and the request lines' targets
    with the method in front."""
    async with _proxy(port, _http) as (address, asked):
        yield f"http://{address}", asked


async def _socks5(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: list[str]) -> bytes:
    _, methods = await reader.readexactly(2)
    await reader.readexactly(methods)
    writer.write(b"\x05\x00")
    assert (await reader.readexactly(4)) == b"\x05\x01\x00\x03", "a connect by name: the proxy resolves"
    (length,) = await reader.readexactly(1)
    asked.append((await reader.readexactly(length)).decode())
    await reader.readexactly(2)
    writer.write(b"\x05\x00\x00\x01\x7f\x00\x00\x01\x00\x00")
    return b""


async def _http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: list[str]) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    method, target, _ = head.split(b" ", 2)
    asked.append(f"{method.decode()} {target.decode()}")
    if method != b"CONNECT":
        return head  # services answer a target in absolute form like any other (RFC 9112 §3.2.2)
    writer.write(b"HTTP/1.1 200 Connected\r\n\r\n")
    return b""


@asynccontextmanager
async def _proxy(port: int, serve: Serve) -> AsyncIterator[tuple[str, list[str]]]:
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
        first = await serve(reader, writer, asked)
        there = await asyncio.open_connection("127.0.0.1", port)
        there[1].write(first)
        await asyncio.gather(pump(reader, there[1]), pump(there[0], writer), return_exceptions=True)

    server = await asyncio.start_server(client, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", asked
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
