"""A WAN without root: a TCP proxy on loopback that delays and paces what passes (``python -m loadtests.delays``).

One process for each region's link. Each direction has one rate, which all connections share, and half the round trip; a
connection takes a round trip to be made. There is no loss, and TCP's own behaviour on a long way is not in it: the
namespaces of ``loadtests.wan`` have both.

It is told what to do by lines on its standard input, and answers each with one: ``forward HOST:PORT`` with the port on
loopback that leads there, ``carried`` with the bytes that came down so far, ``cut`` and ``mend`` with ``ok``.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from loadtests.services import BenchmarkError, bound, environment

CHUNK = 16 << 10
WAITING = 64
"""Chunks of one connection that are under way at most: then its sender waits, as it would for TCP's window."""


class DelayProxy:
    """The process, from ``with`` until its end. ``rtt_ms``: milliseconds. ``mbit``: 10^6 bits a second, each way."""

    def __init__(self, *, rtt_ms: float, mbit: float) -> None:
        command = [sys.executable, "-m", "loadtests.delays", f"--rtt={rtt_ms / 1e3}", f"--rate={mbit * 1e6 / 8}"]
        self._process = subprocess.Popen(
            bound(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
            cwd=Path(__file__).parents[1],
            start_new_session=True,
        )

    def __enter__(self) -> DelayProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def forward(self, host: str, port: int) -> int:
        """A port on loopback that leads to another one over the link."""
        return int(self._ask(f"forward {host}:{port}"))

    def carried(self) -> int:
        """Bytes that came down to the site so far, those that wait to be delivered included."""
        return int(self._ask("carried"))

    def cut(self) -> None:
        """Break what is connected, and let nobody connect, until ``mend``."""
        self._ask("cut")

    def mend(self) -> None:
        """Let all through again."""
        self._ask("mend")

    def _ask(self, line: str) -> str:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        if not (answer := self._process.stdout.readline()):
            raise BenchmarkError("the proxy in the place of a link has ended")
        return answer


# The process


class Direction:
    """One way of the link. ``delay`` in seconds, ``rate`` in bytes a second."""

    def __init__(self, delay: float, rate: float) -> None:
        self._delay, self._rate, self._free = delay, rate, 0.0
        self.carried = 0

    def arrival(self, size: int, now: float) -> float:
        """When ``size`` bytes that are sent now arrive."""
        self._free = max(self._free, now) + size / self._rate
        self.carried += size
        return self._free + self._delay

    async def pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        """Carry one connection's bytes until its sender has ended."""
        loop = asyncio.get_running_loop()
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(WAITING)

        async def deliver() -> None:
            while (arrived := await under_way.get())[1]:
                await asyncio.sleep(arrived[0] - loop.time())
                sink.write(arrived[1])
                await sink.drain()

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(deliver())
            while data := await source.read(CHUNK):
                await under_way.put((self.arrival(len(data), loop.time()), data))
            await under_way.put((0.0, b""))
        with suppress(OSError, RuntimeError):  # the other side has gone altogether
            sink.write_eof()


class Proxy:
    """All connections of one link."""

    def __init__(self, rtt: float, rate: float) -> None:
        self._rtt = rtt
        self._up, self._down = Direction(rtt / 2, rate), Direction(rtt / 2, rate)
        self._open: set[asyncio.Task[None]] = set()
        self._is_cut = False

    async def answer(self, line: str) -> str:
        """Do what a line says, and give the answer to it."""
        word, _, rest = line.strip().partition(" ")
        if word == "forward":
            host, _, port = rest.rpartition(":")
            return str(await self._forward(host, int(port)))
        if word == "carried":
            return str(self._down.carried)
        self._is_cut = word == "cut"
        if self._is_cut:
            for task in self._open:
                task.cancel()
        return "ok"

    async def _forward(self, host: str, port: int) -> int:
        def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(self._serve(host, port, reader, writer))
            self._open.add(task)
            task.add_done_callback(self._open.discard)

        server = await asyncio.start_server(accepted, "127.0.0.1", 0, limit=CHUNK)
        listening: int = server.sockets[0].getsockname()[1]
        return listening

    async def _serve(self, host: str, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        other: asyncio.StreamWriter | None = None
        try:
            if not self._is_cut:
                await asyncio.sleep(self._rtt)  # of TCP's handshake
                answers, other = await asyncio.open_connection(host, port, limit=CHUNK)
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._up.pump(reader, other))
                    tasks.create_task(self._down.pump(answers, writer))
        except* OSError:
            pass  # one side broke off: so does the other
        finally:
            for end in (writer, other):
                if end:
                    end.transport.abort() if self._is_cut else end.close()


async def serve(rtt: float, rate: float) -> None:
    """Do what comes in on standard input, until it ends."""
    proxy = Proxy(rtt, rate)
    while line := await asyncio.to_thread(sys.stdin.readline):
        print(await proxy.answer(line), flush=True)


def main() -> None:
    """The proxy of one link: seconds of its round trip, bytes a second."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.delays", description="A link's delay and rate.")
    for name in ("rtt", "rate"):
        parser.add_argument(f"--{name}", type=float, required=True)
    options = parser.parse_args()
    asyncio.run(serve(options.rtt, options.rate))


if __name__ == "__main__":
    main()
