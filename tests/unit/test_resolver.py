"""The resolver: names ahead, kept, and good for a while without anybody to ask."""

from __future__ import annotations

import asyncio
import socket

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult

from shared.web.resolver import FRESH, STALE, AheadResolver
from tests.clock import HandClock


class Inner(AbstractResolver):
    """Counts, and fails when told."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.fails = False

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        assert family is socket.AF_UNSPEC, "both families"
        self.asked.append(host)
        if self.fails:
            raise OSError("no resolver")
        return [ResolveResult(hostname=host, host="127.0.0.1", port=0, family=socket.AF_INET, proto=0, flags=0)]

    async def close(self) -> None:
        pass


async def settle() -> None:
    """Let what was begun beside us end."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_names_are_looked_up_ahead_and_once_however_many_ask() -> None:
    inner = Inner()
    resolver = AheadResolver(HandClock(), inner)
    resolver.ahead(["http://a:1", "http://a:2/x", "https://b"])
    await settle()
    results = await asyncio.gather(*(resolver.resolve("a", 80) for _ in range(10)))
    assert sorted(inner.asked) == ["a", "b"]
    assert {result[0]["port"] for result in results} == {80}
    await resolver.close()


async def test_a_name_is_renewed_beside_the_requests_that_use_it() -> None:
    clock, inner = HandClock(), Inner()
    resolver = AheadResolver(clock, inner)
    await resolver.resolve("a")
    clock.now += FRESH
    assert await resolver.resolve("a")
    await settle()
    assert inner.asked == ["a", "a"]
    await resolver.close()


async def test_without_a_resolver_a_name_is_good_for_an_hour() -> None:
    clock, inner = HandClock(), Inner()
    resolver = AheadResolver(clock, inner)
    await resolver.resolve("a")
    inner.fails = True
    clock.now += STALE - 1
    assert await resolver.resolve("a")
    await settle()
    clock.now += 1
    with pytest.raises(OSError, match="no resolver"):
        await resolver.resolve("a")
    with pytest.raises(OSError, match="no resolver"):
        await resolver.resolve("never known")
    await resolver.close()
