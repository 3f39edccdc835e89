"""Files to sockets without passing through Python, on any event loop.

uvloop has no sendfile, and asyncio lets nobody watch a descriptor that a transport owns. So bytes of files are sent
on a duplicate of the socket, when the transport has nothing of its own to send; the loop watches the duplicate.
"""

from __future__ import annotations

import asyncio
import os
import socket
from types import TracebackType
from typing import BinaryIO, Self

from shared.errors import DiskError, LocalError


def is_encrypted(transport: asyncio.Transport) -> bool:
    """Whether what is sent must pass through the transport: written to the socket, it would go out as it is."""
    return transport.get_extra_info("sslcontext") is not None


def duplicate(transport: asyncio.Transport) -> socket.socket:
    """Another descriptor of a connection's socket, to write to: the one place where a socket leaves its transport.

    Raises OSError where this process can have no more descriptors, ConnectionResetError where the connection is closed.
    """
    if is_encrypted(transport):
        raise RuntimeError("bytes that are written to this socket would not be encrypted")
    sock = transport.get_extra_info("socket")
    if sock is None or sock.fileno() < 0:
        raise ConnectionResetError("the client left")
    return socket.socket(fileno=os.dup(sock.fileno()))


class Wire:
    """A duplicate of a connection's socket. A context manager: while it is open, so is the connection."""

    def __init__(self, transport: asyncio.Transport) -> None:
        """Raises ConnectionResetError where the connection is closed already, LocalError (``busy``) where this process
        can have no more descriptors."""
        try:
            self._socket = duplicate(transport)
        except ConnectionError:
            raise
        except OSError as error:
            raise LocalError(f"no descriptor to send by: {error}", code="busy") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    async def sendfile(self, file: BinaryIO, offset: int, size: int) -> None:
        """Send ``size`` bytes of ``file`` from ``offset`` on. The transport's own buffer must be empty.

        Raises ConnectionError where the client is gone, DiskError where the file is shorter than that.
        """
        while size:
            try:
                sent = os.sendfile(self._socket.fileno(), file.fileno(), offset, size)
            except BlockingIOError:
                await self._writable()
                continue
            if not sent:
                raise DiskError("a cached file is shorter than it was")
            offset, size = offset + sent, size - sent

    async def _writable(self) -> None:
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        descriptor = self._socket.fileno()
        loop.add_writer(descriptor, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_writer(descriptor)
