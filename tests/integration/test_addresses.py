"""Hosts with several addresses: one that hangs or refuses keeps nobody from the others (RFC 8305)."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, nullcontext, suppress

import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult

from shared.clock import SystemClock
from shared.errors import UpstreamError
from shared.web.resolver import AheadResolver
from shared.web.session import fetch, make_session

BOTH = (("::1", socket.AF_INET6), ("127.0.0.1", socket.AF_INET))


class Both(AbstractResolver):
    """Every host has an IPv6 address, which comes first, and one of IPv4."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        return [
            ResolveResult(hostname=host, host=address, port=port, family=kind, proto=0, flags=0)
            for address, kind in BOTH
        ]

    async def close(self) -> None:
        pass


@pytest.fixture
async def port() -> AsyncIterator[int]:
    """Of a server on IPv4 only."""

    async def answer(_: web.Request) -> web.Response:
        return web.Response(text="here")

    app = web.Application()
    app.router.add_get("/", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield runner.addresses[0][1]
    await runner.cleanup()


@contextmanager
def hanging(address: str, family: socket.AddressFamily, port: int) -> Iterator[None]:
    """Nobody is refused there, and nobody connects: the queue of who waits is full."""
    filling: list[socket.socket] = []
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address, port))
        except OSError:
            pytest.skip("this machine has no IPv6")
        listener.listen(0)
        for _ in range(4):
            filling.append(socket.socket(family))
            filling[-1].setblocking(False)
            with suppress(BlockingIOError):
                filling[-1].connect((address, port))
        try:
            yield
        finally:
            for each in filling:
                each.close()


@pytest.mark.parametrize("hangs", [True, False], ids=["hangs", "refuses"])
async def test_an_ipv6_address_that_does_not_work_costs_no_request(port: int, hangs: bool) -> None:
    resolver = AheadResolver(SystemClock(), Both())
    async with make_session(resolver=resolver) as session:
        with hanging("::1", socket.AF_INET6, port) if hangs else nullcontext():
            assert (await fetch(session, f"http://host.invalid:{port}/", limit=100)).body == b"here"
            with pytest.raises(UpstreamError, match="in time" if hangs else "onnect"):
                await fetch(session, f"http://[::1]:{port}/", limit=100)
    await resolver.close()
