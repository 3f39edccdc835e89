"""The registry against a Redis that misbehaves."""

from __future__ import annotations

import asyncio
from typing import Any

from router.registry import Registry
from shared import log
from shared.clock import SystemClock
from shared.metrics import Metrics
from shared.node import Node


class Deaf:
    """A Redis whose calls take a cancellation for their own time-out, as the library's can."""

    def __init__(self) -> None:
        self.called = asyncio.Event()

    def pipeline(self, **_: Any) -> Deaf:
        return self

    async def __aenter__(self) -> Deaf:
        self.called.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise TimeoutError from None
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def aclose(self) -> None:
        await asyncio.Event().wait()


async def test_a_router_stops_also_when_a_call_to_redis_swallows_its_cancellation() -> None:
    redis: Any = Deaf()
    registry = Registry(redis, "x:", 6.0, SystemClock(), Metrics(), log.get("test"))
    registry.heartbeat(Node("a", "http://127.0.0.1:1", "north", 1))
    registry.start()
    await redis.called.wait()
    async with asyncio.timeout(5):
        await registry.close()
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "membership"]
