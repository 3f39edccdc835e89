"""Who is a member: heartbeats to this router, and what other routers wrote to Redis.

    <prefix>node:<id>     JSON record of a node; expires TTL after its last heartbeat
    <prefix>epoch         counts changes of the membership

Redis is never on a request's path: heartbeats and requests use what is in memory, and one background task
exchanges it with Redis, each call under its own deadline. While Redis is away the router goes on with its own
heartbeats and with what it last read of others, and says ``degraded``.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from structlog.typing import FilteringBoundLogger

from shared.clock import Clock
from shared.codec import decode_json, encode_json
from shared.errors import DecodeError, RequestError
from shared.metrics import Metrics
from shared.node import Node, State, parse_node, parse_state
from shared.routing import Snapshot

EXCHANGE = 1.0
"""Seconds between two exchanges with Redis."""
DEADLINE = 0.5
"""Seconds that one call to Redis may take: the library's own default is over 25 when Redis is frozen."""
REMEMBER = 900.0
"""Seconds that members known only from Redis are kept while it is away."""
MAX_RECORD = 4096


@dataclass
class _Member:
    node: Node
    until: float
    state: State
    joined: float = 0.0


class Registry:
    """The members that this router knows. ``snapshot`` is always there and never changes in place."""

    def __init__(
        self,
        redis: Redis | None,
        prefix: str,
        ttl: float,
        clock: Clock,
        metrics: Metrics,
        log: FilteringBoundLogger,
    ) -> None:
        self._redis, self._prefix, self._ttl = redis, prefix, ttl
        self._clock, self._metrics, self._log = clock, metrics, log
        self._heard: dict[str, _Member] = {}
        """Nodes by their heartbeats to this router."""
        self._read: dict[str, _Member] = {}
        """Nodes as Redis had them last."""
        self._to_write: dict[str, _Member | None] = {}
        """Heartbeats (or None: it left) that Redis has not been told of."""
        self._epoch = 0
        self._changed = False
        self._closing = False
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.degraded = ""
        """Why this router is on its own; empty while all is well."""
        self.snapshot = Snapshot([], 0)
        self.states: dict[str, State] = {}
        """How the members do, as they told last."""

    @classmethod
    def connect(
        cls, url: str, prefix: str, ttl: float, clock: Clock, metrics: Metrics, log: FilteringBoundLogger
    ) -> Registry:
        """With the Redis at ``url``; without one where it is empty. Does not wait for it. Raises ValueError."""
        redis = None
        if url:
            redis = Redis.from_url(
                url,
                socket_timeout=DEADLINE,
                socket_connect_timeout=DEADLINE,
                retry=Retry(NoBackoff(), 0),
                max_connections=16,
            )
        return cls(redis, prefix, ttl, clock, metrics, log)

    # Heartbeats

    def heartbeat(self, node: Node, state: State | None = None) -> None:
        """A node is there."""
        now = self._clock.monotonic()
        known = self._heard.get(node.id) or self._read.get(node.id)
        state = state or State()
        heard = _Member(node, now + self._ttl, state, known.joined if known else now)
        self._heard[node.id] = self._to_write[node.id] = heard
        if known is None or known.node != node:
            self._log.info("node joined", node=node.id, region=node.region, url=node.url)
            self._rebuild()
            self._wake.set()
        elif known.state.draining != state.draining:
            self._log.info("node is draining" if state.draining else "node is back from draining", node=node.id)
            self._rebuild()
            self._wake.set()
        else:
            self.states[node.id] = state

    def joined_at(self, node: str) -> float:
        """When a node (re)joined, as far as this router knows: seconds of the clock's ``monotonic``."""
        member = self._heard.get(node) or self._read.get(node)
        return member.joined if member else 0.0

    def leave(self, node: str) -> bool:
        """A node goes. Gives whether it was known."""
        known = self._heard.pop(node, None) or self._read.pop(node, None)
        self._read.pop(node, None)
        if known:
            self._log.info("node left", node=node)
            self._to_write[node] = None
            self._rebuild()
            self._wake.set()
        return known is not None

    def expire(self) -> None:
        """Drop nodes that were not heard in time."""
        now = self._clock.monotonic()
        for table in (self._heard, self._read):
            for node in [node for node, member in table.items() if member.until <= now]:
                del table[node]
                self._read.pop(node, None)  # what Redis said of it is as old; the next exchange knows better
        self._rebuild()

    def _rebuild(self) -> None:
        """A new snapshot where the members are not those of the current one."""
        found = {**self._read, **self._heard}
        members = {node: member.node for node, member in found.items()}
        before, self.states = self.states, {node: member.state for node, member in found.items()}
        drained = {node for node, state in before.items() if state.draining}
        if drained != {node for node, state in self.states.items() if state.draining}:
            self._changed = True  # those who keep a ring of a region leave it out, so they must hear of it
            self._epoch += 1
        elif members == dict(self.snapshot.nodes):
            return
        else:
            self._changed = True
            self._epoch += 1
        for gone in self.snapshot.nodes.keys() - members.keys():
            self._log.info("node out", node=gone)
        regions = set(self.snapshot.rings)
        self.snapshot = Snapshot(members.values(), self._epoch, self.snapshot)
        for region in regions | set(self.snapshot.rings):
            ring = self.snapshot.rings.get(region)
            self._metrics.nodes.labels(region).set(len(ring.members) if ring else 0)

    # Redis

    def start(self) -> None:
        """Begin to expire members, and to exchange them with Redis."""
        self._task = asyncio.create_task(self._run(), name="membership")

    async def close(self) -> None:
        """Stop. A call to Redis that times out just as it is cancelled takes the cancellation for its own, so the
        task is told to end in words as well."""
        self._closing = True
        if self._task:
            self._task.cancel()
            await asyncio.wait([self._task], timeout=8 * DEADLINE)
        if self._redis is not None:
            with suppress(RedisError, OSError, TimeoutError):
                async with asyncio.timeout(DEADLINE):
                    await self._redis.aclose()

    async def _run(self) -> None:
        while not self._closing:
            self.expire()
            if self._redis is not None:
                await self._exchange_safely(self._redis)
            try:
                async with asyncio.timeout(EXCHANGE):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()

    async def _exchange_safely(self, redis: Redis) -> None:
        try:
            async with asyncio.timeout(4 * DEADLINE):
                await self._exchange(redis)
        except (RedisError, OSError, TimeoutError) as error:
            now = self._clock.monotonic()
            if not self.degraded:
                self._log.warning("Redis is away; going on alone", reason=f"{type(error).__name__}: {error}")
                for member in self._read.values():
                    member.until = now + REMEMBER
            self.degraded = f"Redis is away: {type(error).__name__}"
            self._metrics.degraded.set(1)
            return
        if self.degraded:
            self._log.info("Redis is back")
        self.degraded = ""
        self._metrics.degraded.set(0)

    async def _exchange(self, redis: Redis) -> None:
        """Tell Redis of our heartbeats, then take what it has. Raises RedisError, OSError, TimeoutError."""
        telling, self._to_write = self._to_write, {}
        try:
            if telling or self._changed:
                async with redis.pipeline(transaction=False) as pipe:
                    for node, record in telling.items():
                        if record is None:
                            pipe.delete(self._key(node))
                        else:
                            body = encode_json(record.node.record() | record.state.record())
                            pipe.set(self._key(node), body, px=self._left(node))
                    if self._changed:
                        pipe.incr(f"{self._prefix}epoch")
                    await pipe.execute()
                self._changed = False
        except BaseException:
            self._to_write = {**telling, **self._to_write}
            raise
        keys = [key async for key in redis.scan_iter(match=f"{self._prefix}node:*", count=1000)]
        values: list[Any] = await redis.mget([f"{self._prefix}epoch", *keys])
        self._take(keys, values[1:])
        seen: bytes = values[0] or b"0"
        if seen.isdigit():
            self._epoch = max(self._epoch, int(seen))  # only grows, also when Redis was emptied

    def _take(self, keys: list[bytes], values: list[bytes | None]) -> None:
        until = self._clock.monotonic() + self._ttl
        read: dict[str, _Member] = {}
        start = len(self._key(""))
        for key, value in zip(keys, values, strict=True):
            if value is None:
                continue  # expired since the scan
            try:
                if len(value) > MAX_RECORD:
                    raise RequestError("too large", code="bad_node")
                record = decode_json(value)
                node, state = parse_node(key.decode()[start:], record), parse_state(record)
            except (RequestError, DecodeError, UnicodeDecodeError) as error:
                self._metrics.refused_members.inc()
                self._log.warning("refused a member from Redis", reason=str(error))
                continue
            if self._to_write.get(node.id, node) is not None:  # not one that has just left
                known = self._read.get(node.id) or self._heard.get(node.id)
                read[node.id] = _Member(node, until, state, known.joined if known else self._clock.monotonic())
        self._read = read
        self._rebuild()

    def _left(self, node: str) -> int:
        """Milliseconds until a node that we heard is out: as long as its entry in Redis is to last."""
        member = self._heard.get(node)
        return max(1, int((member.until - self._clock.monotonic()) * 1000)) if member else 1

    def _key(self, node: str) -> str:
        return f"{self._prefix}node:{node}"
