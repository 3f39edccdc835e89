"""A TCP line to a service that can be cut and torn, beside the service."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

AT_ONCE = struct.pack("ii", 1, 0)
"""SO_LINGER that makes a close a reset (RST)."""


class Line:
    """A TCP line to a port that can be cut: nothing comes through, nobody is told; or torn: all are told at once.

    ``delay``: seconds that each 64 KiB take in each direction."""

    def __init__(self, target: int) -> None:
        self.target, self._open = target, asyncio.Event()
        self._open.set()
        self._carried: set[asyncio.StreamWriter] = set()
        self.port, self.delay = 0, 0.0

    def cut(self) -> None:
        """Nothing comes through."""
        self._open.clear()

    def mend(self) -> None:
        """It does again."""
        self._open.set()

    def tear(self) -> int:
        """Every connection is reset; new ones are carried. How many there were."""
        torn = list(self._carried)
        for writer in torn:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
            writer.transport.abort()
        return len(torn)

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        self._carried.add(writer)
        try:
            await self._open.wait()
            there, back = await asyncio.open_connection("127.0.0.1", self.target)
            await asyncio.gather(self._copy(reader, back), self._copy(there, writer), return_exceptions=True)
        except OSError:
            pass  # nobody listens there: whoever asked sees its connection closed
        finally:
            self._carried.discard(writer)
            writer.close()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                await self._open.wait()
                if self.delay:
                    await asyncio.sleep(self.delay)
                writer.write(data)
                await writer.drain()
        finally:
            writer.close()


@asynccontextmanager
async def forwarder(port: int = 0) -> AsyncIterator[Line]:
    """A line to a port."""
    line = Line(port)
    tasks: set[asyncio.Task[None]] = set()

    def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(line.carry(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    line.port = server.sockets[0].getsockname()[1]
    try:
        yield line
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
