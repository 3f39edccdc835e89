"""A scripted source: a real HTTP server on a real socket that does to a shard what each test tells it to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from shared.digest import Digest, digest_of


@dataclass(frozen=True)
class Asked:
    """One request, as it came."""

    method: str
    path: str
    """With its query, but for that of metadata: sources of files know none."""
    headers: dict[str, str]

    @property
    def start(self) -> int:
        """First byte of ``Range: bytes=N-M``; 0 without one."""
        return int(self._range[0])

    @property
    def stop(self) -> int | None:
        """The byte after the last one that was asked for; None: all to the end."""
        return int(self._range[1]) + 1 if self._range[1] else None

    @property
    def ranged(self) -> bool:
        """Whether a range was asked for."""
        return "range" in self.headers

    @property
    def _range(self) -> list[str]:
        return self.headers.get("range", "bytes=0-").removeprefix("bytes=").split("-")


Act = Callable[["Script", Asked, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Script:
    """What the source has, what it does with each request (the last act goes on), and what it was asked."""

    blobs: dict[str, bytes] = field(default_factory=dict)
    acts: list[Act] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    release: asyncio.Event = field(default_factory=asyncio.Event)
    """Acts that hold back wait for this."""
    holding: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once an act holds back."""
    url: str = ""

    def add(self, data: bytes) -> Digest:
        """A shard to serve."""
        digest = digest_of(data)
        self.blobs[f"/blobs/{digest}"] = data
        return digest

    def gets(self) -> list[Asked]:
        """The GET requests, but for those of metadata: nodes ask for that by themselves."""
        return [asked for asked in self.asked if asked.method == "GET" and not asked.path.startswith("/trust/")]


async def serve_whole(script: Script, asked: Asked, writer: asyncio.StreamWriter) -> None:
    """As an honest source: 200, 206 or 404."""
    data = script.blobs.get(asked.path)
    if data is None:
        writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        return
    head(writer, data, asked)
    if asked.method == "GET":
        writer.write(data[asked.start : asked.stop])


def head(writer: asyncio.StreamWriter, data: bytes | bytearray, asked: Asked | None = None) -> None:
    """The head of an answer with what was asked for of ``data``; with all of it where nothing is said."""
    if asked is None or not asked.ranged:
        lines = ["HTTP/1.1 200 OK", f"Content-Length: {len(data)}"]
    else:
        stop = asked.stop or len(data)
        lines = ["HTTP/1.1 206 OK", f"Content-Length: {stop - asked.start}"]
        lines.append(f"Content-Range: bytes {asked.start}-{stop - 1}/{len(data)}")
    writer.write("\r\n".join([*lines, "", ""]).encode())


def broken_off(after: int) -> Act:
    """Closes after this many bytes of the body."""

    async def act(script: Script, asked: Asked, writer: asyncio.StreamWriter) -> None:
        data = script.blobs[asked.path]
        head(writer, data, asked)
        writer.write(data[asked.start : asked.stop][:after])
        await writer.drain()
        writer.close()

    return act


def held_after(after: int) -> Act:
    """Sends this many bytes, and the rest once the test says so."""

    async def act(script: Script, asked: Asked, writer: asyncio.StreamWriter) -> None:
        data = script.blobs[asked.path]
        part = data[asked.start : asked.stop]
        head(writer, data, asked)
        writer.write(part[:after])
        await writer.drain()
        script.holding.set()
        await script.release.wait()
        writer.write(part[after:])

    return act


def flipped_at(position: int) -> Act:
    """The right length, one bit wrong."""

    async def act(script: Script, asked: Asked, writer: asyncio.StreamWriter) -> None:
        data = bytearray(script.blobs[asked.path])
        data[position] ^= 1
        head(writer, data, asked)
        writer.write(bytes(data[asked.start : asked.stop]))

    return act


async def whole_for_a_range(script: Script, asked: Asked, writer: asyncio.StreamWriter) -> None:
    """200 to a Range."""
    data = script.blobs[asked.path]
    head(writer, data)
    writer.write(data)


async def wrong_content_range(script: Script, asked: Asked, writer: asyncio.StreamWriter) -> None:
    """206 from another byte than was asked for."""
    data = script.blobs[asked.path]
    body = data[asked.start : asked.stop]
    writer.write(
        f"HTTP/1.1 206 OK\r\nContent-Length: {len(body)}\r\n"
        f"Content-Range: bytes {asked.start + 1}-{len(data)}/{len(data) + 1}\r\n\r\n".encode()
    )
    writer.write(body)


async def gzip_encoded(script: Script, asked: Asked, writer: asyncio.StreamWriter) -> None:
    """An encoded body, though identity was asked for."""
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\n\x1f\x8b\x08\x00")


async def close_delimited(script: Script, asked: Asked, writer: asyncio.StreamWriter) -> None:
    """No Content-Length, half of the body, and a polite close."""
    data = script.blobs[asked.path]
    writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + data[: len(data) // 2])
    await writer.drain()
    writer.close()


async def unavailable(script: Script, asked: Asked, writer: asyncio.StreamWriter) -> None:
    """503."""
    writer.write(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")


async def too_long(script: Script, asked: Asked, writer: asyncio.StreamWriter) -> None:
    """Claims, and sends, more than the shard has."""
    data = script.blobs[asked.path] + b"more"
    head(writer, data)
    writer.write(data)


@asynccontextmanager
async def source(script: Script) -> AsyncIterator[Script]:
    """Serve ``script`` on a free loopback port."""
    handlers: set[asyncio.Task[None]] = set()

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        handlers.add(task)
        try:
            while not writer.is_closing() and (asked := await _request(reader)):
                act = script.acts.pop(0) if len(script.acts) > 1 else (script.acts or [serve_whole])[0]
                script.asked.append(asked)
                await act(script, asked, writer)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            handlers.discard(task)
            writer.close()

    server = await asyncio.start_server(connection, "127.0.0.1", 0)
    script.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield script
    finally:
        script.release.set()
        server.close()
        for task in list(handlers):
            task.cancel()
        await asyncio.gather(*handlers, return_exceptions=True)
        await server.wait_closed()


async def _request(reader: asyncio.StreamReader) -> Asked | None:
    line = (await reader.readline()).decode()
    if not line:
        return None
    method, path, _ = line.split(" ", 2)
    headers: dict[str, str] = {}
    while (field_line := (await reader.readline()).decode().strip()) != "":
        name, _, value = field_line.partition(":")
        headers[name.lower()] = value.strip()
    return Asked(method, path.partition("?")[0] if path.startswith("/trust/") else path, headers)
