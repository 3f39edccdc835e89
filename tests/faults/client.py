"""A plain HTTP client on sockets: it sees where an answer ends short, and always ends by its deadline."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

from tests.harness import Lab, Service, wait_until
from tests.scripted import Script

T = TypeVar("T")
Take = TypeVar("Take")

DEADLINE = 20.0
BLOCK = 1 << 18
LONG = "X-Slow: sends a request the long way"
"""A field that the short path of an edge does not know."""


@dataclass(frozen=True)
class Answer:
    """What came of a request. ``status`` 0: the connection ended without an answer."""

    status: int
    fields: dict[str, str]
    size: int
    """Bytes of the body that came."""
    sha256: str
    body: bytes
    """The body, where it was kept."""
    seconds: float

    @property
    def whole(self) -> bool:
        """Whether as many bytes came as were announced."""
        return self.status > 0 and self.size == int(self.fields.get("content-length", -1))

    def gave(self, digest: str) -> bool:
        """Whether this is, to any client, the whole of a shard."""
        return self.status == 200 and self.whole and digest == f"sha256:{self.sha256}"

    def is_refusal(self) -> bool:
        """Whether this is an error with a code, that says when to come back where that may help."""
        retry = self.status not in (503, 504) or "retry-after" in self.fields
        return self.status in (502, 503, 504, 507) and retry and b'"code"' in self.body


def request(path: str, *fields: str, method: str = "GET") -> bytes:
    """A request with these field lines."""
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: edge", *fields, "", ""]).encode()


async def get(
    port: int,
    path: str,
    *fields: str,
    deadline: float = DEADLINE,
    keep: bool = True,
    first: Callable[[], object] | None = None,
) -> Answer:
    """GET on a connection of its own; ``first`` is called at the first byte of the body. Raises TimeoutError."""
    started = time.monotonic()
    async with asyncio.timeout(deadline), connection(port) as (reader, writer):
        head, body, size, hashed = b"", bytearray(), 0, hashlib.sha256()
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            writer.write(request(path, *fields))
            head = await reader.readuntil(b"\r\n\r\n")
        status, known = parse_head(head)
        announced = int(known.get("content-length", 1 << 62)) if head else 0
        with suppress(ConnectionError):
            while size < announced and (part := await reader.read(BLOCK)):
                if first and not size:
                    first()
                size += len(part)
                hashed.update(part)
                if keep or status != 200:
                    body += part
    return Answer(status, known, size, hashed.hexdigest(), bytes(body), time.monotonic() - started)


@asynccontextmanager
async def connection(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection, closed at the end whatever became of it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=BLOCK)
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


def parse_head(head: bytes) -> tuple[int, dict[str, str]]:
    """Status and fields (names in lower case); 0 and none where there is no head."""
    if not head:
        return 0, {}
    first, *lines = head.decode().rstrip().split("\r\n")
    return int(first.split(" ")[1]), {name.lower(): value for name, _, value in (x.partition(": ") for x in lines)}


async def start_edge(lab: Lab, *sources: Script | str, node: str = "edge", **flags: str) -> Service:
    """An edge over these sources, its data in a folder of its name."""
    words = [f"--origin={source if isinstance(source, str) else source.url}" for source in sources]
    words += [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    words += ["--data", str(lab.folder / node), "--node", node, "--trust-root", str(lab.trust_root)]
    return await asyncio.to_thread(lambda: lab.service("edge_node", *words, name=node))


async def blob(edge: Service, digest: str, *fields: str, deadline: float = DEADLINE, keep: bool = True) -> Answer:
    """GET a shard of an edge."""
    return await get(edge.port, f"/blobs/{digest}", *fields, deadline=deadline, keep=keep)


async def until(check: Callable[[], T], what: str, deadline: float = DEADLINE) -> T:
    """``wait_until`` beside a running event loop."""
    return await asyncio.to_thread(wait_until, check, what, deadline)


class Crowd:
    """Many sockets that one thread drives: clients that are slow on purpose. Bounded by who makes it."""

    def __init__(self, port: int, count: int, *, receive: int = 0) -> None:
        """``count`` connections; ``receive``: bytes of their receive buffers, the kernel's choice by default."""
        self.sockets: list[socket.socket] = []
        self.taken = 0
        self._next_round = 0.0
        self._port, self._receive = port, receive
        for _ in range(count):
            self.sockets.append(self._connect())

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in self.sockets:
            sock.close()

    def _connect(self) -> socket.socket:
        sock = socket.socket()
        if self._receive:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive)
        sock.settimeout(DEADLINE)
        sock.connect(("127.0.0.1", self._port))
        sock.setblocking(False)
        return sock

    def send(self, data: bytes) -> None:
        """The same from everybody who is still connected."""
        for sock in self.sockets:
            with suppress(OSError):
                sock.send(data)

    def drip(self, data: Sequence[bytes], every: float = 1.0) -> None:
        """Send the next of ``data`` once in ``every`` seconds; for calling often."""
        if time.monotonic() >= self._next_round:
            self._next_round = time.monotonic() + every
            self.send(data[0])

    def sip(self, size: int, every: float = 1.0) -> int:
        """Take ``size`` bytes each, once in ``every`` seconds; for calling often. Gives the bytes taken so far."""
        if time.monotonic() >= self._next_round:
            self._next_round = time.monotonic() + every
            for sock in self.sockets:
                with suppress(OSError):
                    self.taken += len(sock.recv(size))
        return self.taken

    def closed(self) -> int:
        """How many the other end has closed; whatever it sent before is thrown away."""
        count = 0
        for sock in self.sockets:
            try:
                while sock.recv(1 << 16):
                    pass
                count += 1
            except BlockingIOError:
                pass
            except OSError:
                count += 1
        return count
