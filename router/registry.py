"""Who is a member: heartbeats to this router, and what other routers wrote to Redis.

Redis is never on a request's path: heartbeats and requests use what is in memory (``router/members.py``), and one
background task exchanges it with Redis (``router/exchange.py``), once a second, and early where something changed.
Nothing is taken from Redis, nor from the file that outlasts a restart, that the node has not signed
(``router/admission.py``).
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Mapping
from pathlib import Path

from structlog.typing import FilteringBoundLogger

from router.admission import Admission
from router.enrolment_file import EnrolmentFile
from router.exchange import Reply, from_record
from router.members import BEFORE, Members
from router.redis_client import SharedRedis, parse_redis_url
from router.remembered import read_members, write_members
from shared.clock import Clock
from shared.enrolment import Leave, Told
from shared.errors import DiskError, RequestError, UpstreamError
from shared.metrics import Metrics
from shared.node import State
from shared.routing import Snapshot

EXCHANGE = 1.0
"""Seconds between two exchanges with Redis, give or take a tenth."""
BREATH = 0.02
"""Seconds between two exchanges at least."""
REMEMBER = 900.0
"""Seconds that members known only from Redis, or from the file, are kept while it is away."""
CHECKED = 20
"""Signatures that are checked before others have a turn."""
SAVING = 2.0
"""Seconds between two writes of the file."""
SHARE = 10
"""A rebuild that took a second is not repeated for so many: many nodes join at once where a site comes back."""
MAX_PAGES = 1000


class Registry:
    """The members that this router knows. ``snapshot`` is always there and never changes in place."""

    def __init__(
        self,
        admission: Admission,
        ttl: float,
        clock: Clock,
        rng: random.Random,
        metrics: Metrics,
        log: FilteringBoundLogger,
        *,
        redis: str = "",
        prefix: str = "nearshard:",
        file: Path | None = None,
        enrolment: EnrolmentFile | None = None,
    ) -> None:
        """``redis``: URL, or empty for none; ``file``: where members outlast a restart; ``enrolment``: what the
        admission goes by. Does not wait for Redis. Raises ValueError for a URL that is none."""
        self._admission, self._enrolment = admission, enrolment
        self._clock, self._random, self._metrics, self._log = clock, rng, metrics, log
        self._members = Members(ttl)
        self._wake = asyncio.Event()
        self._redis = SharedRedis(parse_redis_url(redis), prefix, self._wake.set) if redis else None
        self._away_since = clock.monotonic()
        self.degraded = "Redis has not been reached yet" if redis else ""
        """Why this router is on its own; empty while all is well, and where it is meant to be alone."""
        self._file, self._saved, self._saved_at = file, 0, BEFORE
        self._rebuilt_at, self._rebuild_cost = BEFORE, 0.0
        self._reading, self._enrolled_anew = asyncio.Lock(), set[str]()
        """Nodes whose enrolment changed since the last round."""
        self._closing = False
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Registry {self._members!r}: {self.degraded or 'well'}>"

    @property
    def snapshot(self) -> Snapshot:
        """The members at one epoch."""
        return self._members.snapshot

    @property
    def states(self) -> Mapping[str, State]:
        """How each member does, as it told last."""
        return self._members.states

    def joined_at(self, node: str) -> float:
        """When a member joined, or started anew: seconds of the monotonic clock; minus infinity for one that was
        there before this router knew, and for one that is not there."""
        return self._members.joined.get(node, BEFORE)

    def heartbeat(self, told: Told) -> None:
        """A node is there. ``told`` has passed the admission."""
        if self._members.heard(told, self._clock.monotonic()):
            # Now; with the next round where rebuilding would else be all that is done.
            if self._clock.monotonic() - self._rebuilt_at >= SHARE * self._rebuild_cost:
                self._rebuild()
            self._wake.set()

    def leave(self, leave: Leave) -> bool:
        """A node goes. Gives whether it was known."""
        if self._members.get(leave.node) is None:
            return False
        self._members.left(leave)
        self._rebuild()
        self._wake.set()
        return True

    async def follow_enrolment(self) -> None:
        """Go by the enrolment file as it is now, and not as it was in the last round."""
        await self._read_enrolment()
        if self._enrolled_anew:
            self._drop_unproven()
            self._rebuild()
            self._wake.set()

    def _rebuild(self, epoch: int = 0) -> None:
        """Bring the snapshot up to date, and note how long that took."""
        former, started = self.snapshot, self._clock.monotonic()
        self._members.rebuild(started, epoch)
        self._say_changes(former)
        if self.snapshot is not former:
            self._rebuilt_at = self._clock.monotonic()
            self._rebuild_cost = self._rebuilt_at - started

    def _say_changes(self, former: Snapshot) -> None:
        current = self.snapshot
        if current.nodes == former.nodes:
            return
        for node in current.nodes.values():
            if former.nodes.get(node.id) != node:
                self._log.info("node joined", node=node.id, region=node.region, url=node.url)
        for gone in former.nodes.keys() - current.nodes.keys():
            self._log.info("node out", node=gone)
        for region in former.rings.keys() | current.rings.keys():
            ring = current.rings.get(region)
            self._metrics.nodes.labels(region).set(len(ring.members) if ring else 0)

    # The task

    async def start(self) -> None:
        """Take up what was known before a restart, begin to expire members, and to exchange them with Redis."""
        if self._file:
            await self._remember(self._file)
        self._task = asyncio.create_task(self._run(), name="membership")

    async def close(self) -> None:
        """Stop. A call to Redis may take our cancellation for its own time-out, so the task is told in words too."""
        self._closing = True
        if self._task:
            self._task.cancel()
            await asyncio.wait([self._task], timeout=4.0)
        if self._redis:
            await self._redis.close()
        await self._save()

    async def _run(self) -> None:
        while not self._closing:
            self._wake.clear()
            try:
                await self._round()
            except Exception as error:  # noqa: BLE001 - a mistake in one round must not end membership for good
                self._log.error("a round of the membership failed", exc_info=error)
            await self._clock.sleep(max(BREATH, SHARE * self._rebuild_cost if self._members.behind else 0))
            try:
                async with asyncio.timeout(EXCHANGE * (0.9 + 0.2 * self._random.random()) - BREATH):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _round(self) -> None:
        await self._read_enrolment()
        if self._enrolled_anew:
            # Also where it was followed already: what is under way with Redis then may have brought a node back. All of
            # Redis is read again, as nodes may be enrolled now that were not.
            self._drop_unproven()
            self._enrolled_anew.clear()
            self._members.begin_listing()
        self._members.expire(self._clock.monotonic(), alone=self._redis is None or bool(self.degraded))
        self._rebuild()
        if self._redis:
            await self._exchange_safely(self._redis)
        if self._clock.monotonic() - self._saved_at >= SAVING:
            await self._save()

    async def _read_enrolment(self) -> None:
        """Hear by the enrolment as it is now."""
        async with self._reading:
            if self._enrolment is None or not await self._enrolment.changed():
                return
            before, now = self._admission.enrolled or {}, self._enrolment.nodes
            self._admission.enrolled = now
            self._enrolled_anew |= {node for node in before.keys() | now.keys() if before.get(node) != now.get(node)}

    def _drop_unproven(self) -> None:
        """Check those members again whose enrolment changed."""
        for node in self._enrolled_anew:
            told = self._members.get(node)
            if told and not self._is_proven(told, "enrolment"):
                self._members.drop(node)

    def _is_proven(self, told: Told, source: str) -> bool:
        try:
            self._admission.check(told)
        except RequestError as error:
            self._say_refused(source, told.node.id, error)
            return False
        return True

    def _say_refused(self, source: str, node: str, error: RequestError) -> None:
        self._metrics.refused_members.labels(source, error.error_code).inc()
        self._log.warning("refused a member", source=source, node=node[:64], reason=str(error))

    # Redis

    async def _exchange_safely(self, redis: SharedRedis) -> None:
        try:
            await self._exchange(redis)
        except UpstreamError as error:
            now = self._clock.monotonic()
            if not self.degraded:
                self._away_since = now
            if not self.degraded.startswith("Redis is away"):
                self._log.warning("Redis is away; going on alone", reason=f"{error}: {error.__cause__}"[:200])
            self.degraded = f"Redis is away: {error}"
            self._metrics.degraded.set(1)
            self._members.begin_listing()  # it may come back emptied, or be another server
            if now - self._away_since > REMEMBER:
                self._members.forget_read()
            return
        if self.degraded:
            self._log.info("Redis is in use")
        self.degraded = ""
        self._metrics.degraded.set(0)

    async def _exchange(self, redis: SharedRedis) -> None:
        """Take what is new in Redis, then tell it what we heard. Raises UpstreamError."""
        for _ in range(MAX_PAGES):
            ask = self._members.ask(self._clock.monotonic(), secrets.token_hex(8))
            reply = await redis.exchange(ask)
            self._members.answered(ask, reply, self._clock.monotonic())
            await self._take(reply)
            former = self.snapshot
            self._members.done(ask, reply, self._clock.monotonic())
            self._say_changes(former)
            if not reply.more:
                self._rebuild(reply.epoch)
            if reply.fresh:
                return
        raise UpstreamError("Redis does not come to an end")

    async def _take(self, reply: Reply) -> None:
        for number, (name, record) in enumerate(reply.page, 1):
            node = name.decode(errors="replace")
            if not record:
                self._members.gone(node)
                continue
            try:
                told = from_record(name, record)
                self._admission.check(told)
            except RequestError as error:
                self._say_refused("redis", node, error)
                if self._members.refuse(node, self._clock.monotonic()):
                    self._wake.set()
                continue
            self._members.take(told, self._clock.monotonic())
            if number % CHECKED == 0:
                await asyncio.sleep(0)

    # The file

    async def _remember(self, file: Path) -> None:
        try:
            epoch, members = await asyncio.to_thread(read_members, file)
        except DiskError as error:
            self._log.warning("the members of before the restart cannot be read", reason=str(error))
            return
        proven = [told for told in members if self._is_proven(told, "file")]
        now = self._clock.monotonic()
        self._members.remember(proven, now + (REMEMBER if self._redis else self._members.ttl))
        self._rebuild(epoch)

    async def _save(self) -> None:
        epoch = self.snapshot.epoch
        if self._file is None or self._saved == epoch:
            return
        self._saved, self._saved_at = epoch, self._clock.monotonic()
        try:
            await asyncio.to_thread(write_members, self._file, epoch, self._members.all().values())
        except DiskError as error:
            self._log.warning("the members cannot be kept for a restart", reason=str(error))
