"""What a node is subscribed to: of the revision that a ref means it has the shards that it owns, before anybody asks.

Each subscription has its schedule (``shared.schedule``): at an interval, spread, inside the operator's hours, and when
a publish is announced. What a run could not end the next one goes on with: the cache holds what came.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from structlog.typing import FilteringBoundLogger

from edge_node.cache import Cache
from edge_node.config import EdgeSettings
from edge_node.operations import Operations
from edge_node.shard_key import ShardKey
from shared.catalog import Catalog
from shared.clock import Clock
from shared.digest import Digest
from shared.errors import NearshardError, UpstreamError
from shared.ids import TaskId, parse_task_id
from shared.metrics import Metrics
from shared.schedule import Schedule
from shared.tasks import end
from shared.web.trusted import Trusted

LONGEST = 300.0
"""Seconds of one sleep, at most: a clock that was set is noticed."""


class _HoursOver(Exception):
    """The hours ended while shards were being fetched."""


@dataclass
class Subscription:
    """One of them, and how it is. Bytes are of shards that this node owns."""

    what: str
    task_id: TaskId
    schedule: Schedule
    state: str = "waiting"
    revision: Digest | None = None
    """What is held, all of it."""
    looked_at: Digest | None = None
    """What the ref meant when it was last asked."""
    moved: int = 0
    saved: int = 0
    error: NearshardError | None = None
    news: bool = False
    """Whether a publish was announced since it was last begun."""


class Subscriptions:
    """All of a node's, brought up to date one after the other: they share one link."""

    def __init__(
        self,
        settings: EdgeSettings,
        operations: Operations,
        cache: Cache,
        catalog: Catalog,
        trusted: Trusted,
        clock: Clock,
        rng: random.Random,
        metrics: Metrics,
        log: FilteringBoundLogger,
    ) -> None:
        self._operations, self._cache, self._catalog, self._trusted = operations, cache, catalog, trusted
        self._clock, self._metrics, self._log = clock, metrics, log
        self._pin = settings.subscription_pin
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        every, hours = settings.subscription_interval, settings.subscription_windows
        self.all = [
            Subscription(what, parse_task_id(what), Schedule(every, hours, clock, rng))
            for what in dict.fromkeys(settings.subscriptions)
        ]

    def __repr__(self) -> str:
        return f"<Subscriptions to {', '.join(one.what for one in self.all)}>"

    def start(self) -> None:
        """Begin."""
        if self.all:
            self._task = asyncio.create_task(self._run(), name="subscriptions")

    async def close(self) -> None:
        """Stop; what came is kept."""
        await end([self._task] if self._task else [])

    def heard(self, model: str) -> None:
        """Something of a model was published."""
        for one in self.all:
            if one.task_id.model == model:
                one.news = True
                one.schedule.hurry()
                self._news.set()

    def status(self) -> Sequence[Mapping[str, object]]:
        """For people; a private model's name is not for all of them."""
        return [
            {
                "what": one.what if self._trusted.known_public(one.task_id.model) else "(private)",
                "state": one.state,
                "revision": one.revision,
                "moved": one.moved,
                "saved": one.saved,
                "error": one.error.error_code if one.error else None,
                "failures": one.schedule.failures,
                "next_run_in": round(one.schedule.wait()),
            }
            for one in self.all
        ]

    async def _run(self) -> None:
        while True:
            due = [one for one in self.all if not one.schedule.wait()]
            for one in due:
                await self.bring(one)
            if not due:
                await self._wait(min(one.schedule.wait() for one in self.all))

    async def _wait(self, seconds: float) -> None:
        """Until something is due, or was announced."""
        sleeping = asyncio.create_task(self._clock.sleep(min(seconds, LONGEST)))
        hearing = asyncio.create_task(self._news.wait())
        try:
            await asyncio.wait([sleeping, hearing], return_when=asyncio.FIRST_COMPLETED)
        finally:
            await end([sleeping, hearing])
        self._news.clear()

    async def bring(self, one: Subscription) -> None:
        """Bring one up to date. What goes wrong is logged and counted, and tried again when its schedule says."""
        one.state, one.news = "running", False
        try:
            await self._fetch(one)
        except _HoursOver:
            one.state = "paused: its hours are over"
            one.schedule.closed()
        except NearshardError as error:
            one.state, one.error = "failed", error
            one.schedule.failed()
            self._metrics.subscription_failures.labels(error.error_code).inc()
            wait = round(one.schedule.wait())
            self._log.warning(
                "a subscription is not up to date",
                what=one.what,
                code=error.error_code,
                reason=str(error),
                again_in=wait,
            )
        else:
            one.state, one.error = "up to date", None
            one.schedule.done()
            if one.news:  # while it was under way: it may not have seen that
                one.schedule.hurry()

    async def _fetch(self, one: Subscription) -> None:
        """Raises NotFound, UpstreamError, _HoursOver."""
        found = await self._catalog.resolve(one.task_id.model, one.task_id.ref)
        revision = found.manifest.revision
        pinned = one.what.partition("@")[0] + f"@{revision}"  # a ref that moves meanwhile is the next run's
        shards = await self._operations.owned(pinned)
        missing = {key: size for key, size in shards.items() if self._cache.known_size(key) is None}
        if revision != one.looked_at:
            one.looked_at = revision
            self._count(one, "saved", sum(shards.values()) - sum(missing.values()) if missing or one.revision else 0)
        if missing:
            await self._fetch_missing(one, missing)
        if self._pin:
            await self._operations.keep(one.what)
        if revision != one.revision or missing:
            self._log.info(
                "a subscription is up to date", what=one.what, revision=revision, moved=one.moved, saved=one.saved
            )
        one.revision = revision

    async def _fetch_missing(self, one: Subscription, missing: Mapping[ShardKey, int]) -> None:
        """Raises UpstreamError, _HoursOver."""
        job, fetching = self._operations.fetch(one.what, missing)
        left = one.schedule.left()
        closing = asyncio.create_task(self._clock.sleep(left)) if left < float("inf") else None
        try:
            await asyncio.wait([fetching, *([closing] if closing else [])], return_when=asyncio.FIRST_COMPLETED)
            if not fetching.done():
                raise _HoursOver
        finally:
            await end([fetching, *([closing] if closing else [])])
            self._count(one, "moved", sum(n for key, n in missing.items() if self._cache.known_size(key) is not None))
        if job.state != "done":
            raise UpstreamError(job.reason)

    def _count(self, one: Subscription, how: str, size: int) -> None:
        one.moved += size if how == "moved" else 0
        one.saved += size if how == "saved" else 0
        self._metrics.subscribed.labels(how).inc(size)
