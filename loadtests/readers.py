"""Clients of a benchmark: they read an answer as it comes, at a pace, and hash it."""

from __future__ import annotations

import asyncio
import hashlib
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPConnection
from urllib.parse import urlsplit

BLOCK = 256 << 10
"""Bytes read at a time."""
RECEIVE = 64 << 10
"""Bytes of the receive buffer of a client with a pace: the kernel's own would take megabytes at once."""
_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)\r\n", re.IGNORECASE)


@dataclass(frozen=True)
class Answer:
    """What came of a request. ``status`` 0: nothing."""

    status: int
    size: int
    """Bytes of the body that came; fewer than were announced where it broke off."""
    sha256: str
    first: float
    """Seconds from the connection's beginning to the first byte of the body."""
    seconds: float


def get(url: str, path: str, fields: Mapping[str, str] | None = None) -> tuple[int, Mapping[str, str], bytes]:
    """Status, header fields (names in lower case) and body of a GET."""
    connection = HTTPConnection(urlsplit(url).netloc, timeout=30)
    try:
        connection.request("GET", path, headers=dict(fields or {}))
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


async def read(url: str, path: str, *, span: range | None = None, pace: int = 0) -> Answer:
    """GET ``path``, or the bytes ``span`` of it, on a connection of its own.

    ``pace``: bytes a second that it takes at most; 0: as fast as they come. Never raises for what the server does.
    """
    loop = asyncio.get_running_loop()
    parts = urlsplit(url)
    fields = f"Range: bytes={span.start}-{span.stop - 1}\r\n" if span else ""
    request = f"GET {path} HTTP/1.1\r\nHost: {parts.netloc}\r\n{fields}\r\n".encode()
    buffer = memoryview(bytearray(min(BLOCK, pace // 8) if pace else BLOCK))
    started = loop.time()
    first, size, hashed, status = 0.0, 0, hashlib.sha256(), 0
    with socket.socket() as sock:
        sock.setblocking(False)
        if pace:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE)
        try:
            await loop.sock_connect(sock, (parts.hostname, parts.port))
            await loop.sock_sendall(sock, request)
            head, body = await _head(loop, sock)
            status, length = _meaning(head)
            while True:
                if body and not size:
                    first = loop.time() - started
                size += len(body)
                hashed.update(body)
                if size >= length:
                    break
                await asyncio.sleep(max(0.0, size / pace - (loop.time() - started)) if pace else 0)  # others' turn
                count = await loop.sock_recv_into(sock, buffer)
                if not count:
                    break
                body = buffer[:count]
        except OSError:
            pass  # the answer is short, which says it all
    return Answer(status, size, hashed.hexdigest(), first, loop.time() - started)


async def _head(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> tuple[bytes, memoryview]:
    """Status line and fields, and what came of the body with them. Raises ConnectionError."""
    came = b""
    while b"\r\n\r\n" not in came:
        more = await loop.sock_recv(sock, 1 << 14)
        if not more:
            raise ConnectionResetError("no whole answer")
        came += more
    end = came.index(b"\r\n\r\n") + 4
    return came[:end], memoryview(came)[end:]


def _meaning(head: bytes) -> tuple[int, int]:
    """Status and Content-Length; one that is missing is taken for endless."""
    found = _LENGTH.search(head)
    return int(head.split(b" ", 2)[1]), int(found[1]) if found else 1 << 62
