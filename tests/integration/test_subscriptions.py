"""What a node is subscribed to, with time in the test's hands and shards that come when the test says."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import SimpleNamespace
from typing import Any, cast

from structlog.typing import FilteringBoundLogger

from edge_node.config import EdgeSettings
from edge_node.operations import Job
from edge_node.subscriptions import Subscriptions
from shared.digest import digest_of
from shared.errors import NearshardError, UpstreamError
from shared.log import configure
from shared.metrics import Metrics
from tests.clock import HandClock

HOUR = 3600.0
WHAT = "acme/tiny@main"


@dataclass
class Node:
    """What there is upstream and here; sizes by shard."""

    shards: dict[str, int]
    held: dict[str, int] = field(default_factory=dict)
    stop_after: int = 99
    """Shards that come until none does any more."""
    broken: NearshardError | None = None
    kept: list[str] = field(default_factory=list)

    async def resolve(self, model: str, ref: str) -> Any:
        """Catalog."""
        if self.broken:
            raise self.broken
        revision = digest_of(repr(self.shards).encode())
        return SimpleNamespace(manifest=SimpleNamespace(revision=revision))

    def known_size(self, key: str) -> int | None:
        """Cache."""
        return self.held.get(key)

    async def owned(self, what: str) -> Mapping[str, int]:
        """Operations."""
        return self.shards

    def fetch(self, what: str, shards: Mapping[str, int]) -> tuple[Job, asyncio.Task[None]]:
        """Operations."""
        job = Job(1, what)
        return job, asyncio.create_task(self._run(job, shards))

    async def _run(self, job: Job, shards: Mapping[str, int]) -> None:
        for number, (key, size) in enumerate(shards.items()):
            if number == self.stop_after:
                await asyncio.Event().wait()
            self.held[key] = size
        job.state = "done"

    async def keep(self, what: str) -> None:
        """Operations."""
        self.kept.append(what)

    def known_public(self, model: str) -> bool:
        """Trusted."""
        return True


def subscribed(node: Node, hour: int = 12, **settings: Any) -> tuple[Subscriptions, HandClock]:
    """One that is subscribed to WHAT."""
    clock = HandClock(datetime(2027, 1, 5, hour).astimezone().timestamp())
    made = EdgeSettings.model_construct(
        **{"subscriptions": [WHAT], "subscription_interval": HOUR, "subscription_windows": [],
           "subscription_pin": True, **settings}
    )  # fmt: skip
    parts = cast("Any", node)
    log: FilteringBoundLogger = configure("error", "json", "edge")
    return Subscriptions(made, parts, parts, parts, parts, clock, random.Random(1), Metrics(), log), clock


async def test_what_is_held_is_saved_and_what_fails_is_tried_again() -> None:
    node = Node({"a": 10, "b": 20})
    subscriptions, clock = subscribed(node)
    (one,) = subscriptions.all
    await subscriptions.bring(one)
    assert (one.moved, one.saved, one.state) == (30, 0, "up to date") and node.kept == [WHAT]
    assert 0.9 * HOUR <= one.schedule.wait() <= 1.1 * HOUR
    await subscriptions.bring(one)
    assert (one.moved, one.saved) == (30, 0), "nothing was to be done"
    node.shards = {"a": 10, "c": 5}
    subscriptions.heard("acme/other")
    assert one.schedule.wait()
    subscriptions.heard("acme/tiny")
    assert not one.schedule.wait()
    node.broken = UpstreamError("nobody answers")
    await subscriptions.bring(one)
    assert one.state == "failed" and 0 < one.schedule.wait() <= 30
    clock.now += one.schedule.wait()
    node.broken = None
    await subscriptions.bring(one)
    assert (one.moved, one.saved, one.error) == (35, 10, None)


async def test_its_hours_interrupt_it_and_it_goes_on_with_what_came() -> None:
    node = Node({"a": 10, "b": 20}, stop_after=1)
    subscriptions, clock = subscribed(node, hour=23, subscription_windows=["22:00-06:00"])
    (one,) = subscriptions.all
    await subscriptions.bring(one)
    assert one.state.startswith("paused") and one.moved == 10 and not node.kept and one.revision is None
    assert clock.time() == datetime(2027, 1, 6, 6).astimezone().timestamp()
    assert one.schedule.wait() >= 16 * HOUR
    subscriptions.heard("acme/tiny")
    assert one.schedule.wait() >= 16 * HOUR, "also what is announced waits for them"
    clock.now += one.schedule.wait()
    node.stop_after = 99
    await subscriptions.bring(one)
    assert one.moved == 30 and subscriptions.status()[0]["state"] == "up to date"


async def test_what_is_announced_while_it_is_looked_at_is_looked_at_again() -> None:
    node = Node({"a": 10})
    subscriptions, _ = subscribed(node)
    (one,) = subscriptions.all
    looked = asyncio.create_task(subscriptions.bring(one))
    await asyncio.sleep(0)
    subscriptions.heard("acme/tiny")
    await looked
    assert not one.schedule.wait()
