"""The Redis or Valkey that routers share: one server, the master that Sentinels name, or a cluster.

A call ends by its deadline whatever the library does: its own defaults hang for 25 s on a frozen server, and a call
may take its cancellation for a time-out of its own. So each call is a task, which is left behind when its time is
over, together with its connections: after any error the next call asks anew who the master is.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError

from router.exchange import SCRIPT, SHA, Ask, Reply, parse_reply
from shared.errors import UpstreamError

DEADLINE = 0.5
"""Seconds that one call may take."""
CONNECTING = 4 * DEADLINE
"""The same for the first call on a new client, which may have to ask Sentinels, or a cluster for its slots."""
SILENCE = 10.0
"""Seconds without a message after which the server is asked whether it is still there."""
_HOSTS = re.compile(r"(?:(?P<user>[^@/]*)@)?(?P<hosts>[^/]+)")

T = TypeVar("T")
Connect = Callable[[], Sequence[Any]]
"""Makes a client, and gives it with those that it uses itself: all are to be closed."""


def parse_redis_url(url: str) -> Connect:
    """What makes a client for a URL. Raises ValueError, which never repeats the URL: there may be a password in it.

    ``redis://``, ``rediss://`` (TLS), ``redis+sentinel://h1:26379,h2:26379/<master>/<db>`` (with
    ``?sentinel_username=&sentinel_password=`` where Sentinels want them), ``redis+cluster://h1:7000,h2:7001``; the
    latter two with ``rediss+`` for TLS. ``?ssl_ca_certs=`` names a file of CAs beside the system's.
    """
    options: dict[str, Any] = {
        "socket_timeout": DEADLINE,
        "socket_connect_timeout": DEADLINE,
        "retry": Retry(NoBackoff(), 0),
        "max_connections": 16,
    }
    scheme, _, kind = urlsplit(url).scheme.partition("+")
    if scheme not in ("redis", "rediss") or kind not in ("", "sentinel", "cluster"):
        raise ValueError("not a redis://, rediss://, redis+sentinel:// or redis+cluster:// URL")
    if not kind:
        try:
            Redis.from_url(url, **options)
        except (ValueError, TypeError):
            raise ValueError("not a usable redis:// URL") from None
        return lambda: [Redis.from_url(url, **options)]
    parts = urlsplit(url)
    match = _HOSTS.fullmatch(parts.netloc)
    if not match:
        raise ValueError("the URL names no host")
    if match["user"] is not None:
        user, _, password = match["user"].partition(":")
        options |= {"username": unquote(user) or None, "password": unquote(password) or None}
    query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    if scheme == "rediss":
        options["ssl"] = True
        if "ssl_ca_certs" in query:
            options["ssl_ca_certs"] = query.pop("ssl_ca_certs")
    if kind == "cluster":
        if query:
            raise ValueError("a redis+cluster:// URL has ssl_ca_certs, with TLS, and nothing else")
        if parts.path.strip("/"):
            raise ValueError("a cluster has no databases")
        nodes = _hosts(match["hosts"], 6379)
        return lambda: [RedisCluster(startup_nodes=[ClusterNode(host, port) for host, port in nodes], **options)]
    master, _, database = parts.path.strip("/").partition("/")
    if not master or not (database or "0").isdecimal():
        raise ValueError("a redis+sentinel:// URL ends with /<master>/<db>")
    sentinels = _hosts(match["hosts"], 26379)
    unknown = query.keys() - {"sentinel_username", "sentinel_password"}
    if unknown:
        raise ValueError(
            "a redis+sentinel:// URL has sentinel_username, sentinel_password, with TLS ssl_ca_certs, and nothing else"
        )
    own = {key: value for key, value in options.items() if key not in ("username", "password")}
    own |= {name.removeprefix("sentinel_"): value for name, value in query.items()}

    def connect() -> Sequence[Any]:
        sentinel = Sentinel(sentinels, sentinel_kwargs=own)  # type: ignore[no-untyped-call]
        return [sentinel.master_for(master, db=int(database or 0), **options), *sentinel.sentinels]

    return connect


def _hosts(text: str, default: int) -> list[tuple[str, int]]:
    hosts = []
    for item in text.split(","):
        parts = urlsplit(f"//{item}")
        try:
            port = parts.port
        except ValueError:
            raise ValueError("a port is a number") from None
        if not parts.hostname:
            raise ValueError("a host has no name")
        hosts.append((parts.hostname, port or default))
    return hosts


class SharedRedis:
    """Exchanges with Redis, and a word when another router changed something."""

    def __init__(self, connect: Connect, prefix: str, on_change: Callable[[], None]) -> None:
        """``on_change`` is called when another router says so."""
        self._connect, self._on_change = connect, on_change
        tag = "{%s}" % prefix  # noqa: UP031 - one slot of a cluster for all keys
        self._keys = [f"{tag}{name}" for name in ("meta", "until", "records", "changes")]
        self._channel = f"{tag}changed"
        self._clients: Sequence[Any] = ()
        self._listening: asyncio.Task[None] | None = None
        self._left: set[asyncio.Task[Any]] = set()
        """Calls and closings that nobody waits for any more."""
        self._seen = 0

    async def exchange(self, ask: Ask) -> Reply:
        """One exchange. Raises UpstreamError, by its deadline."""
        deadline = DEADLINE
        if not self._clients:
            self._clients, deadline = self._connect(), CONNECTING
        try:
            reply = parse_reply(await self._bounded(self._call(self._clients[0], ask.encoded()), deadline))
        except (RedisError, OSError, TimeoutError) as error:
            self._forget()
            raise UpstreamError(type(error).__name__) from error
        except UpstreamError:
            self._forget()
            raise
        self._seen = reply.seen
        if self._listening is None or self._listening.done():
            self._listening = asyncio.create_task(self._listen(self._clients[0]), name="redis messages")
        return reply

    async def close(self) -> None:
        """Leave nothing behind."""
        self._forget()
        if self._left:
            await asyncio.wait(self._left, timeout=2 * DEADLINE)

    async def _call(self, client: Any, asked: bytes) -> Any:
        words = (len(self._keys), *self._keys, self._channel, asked)
        try:
            return await client.execute_command("EVALSHA", SHA, *words)
        except NoScriptError:
            return await client.execute_command("EVAL", SCRIPT, *words)

    async def _bounded(self, call: Coroutine[Any, Any, T], seconds: float) -> T:
        task = self._leave(call)
        try:
            done, _ = await asyncio.wait({task}, timeout=seconds)
        except asyncio.CancelledError:
            task.cancel()
            raise
        if not done or task.cancelled():
            task.cancel()
            raise TimeoutError
        return task.result()

    def _leave(self, call: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(call)
        self._left.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._left.discard(task)
        if not task.cancelled():
            task.exception()  # seen: whoever waited has it too

    def _forget(self) -> None:
        """Drop the clients: the next one finds its master anew."""
        clients, self._clients = self._clients, ()
        listening, self._listening = self._listening, None
        if listening:
            listening.cancel()
            self._left.add(listening)
            listening.add_done_callback(self._ended)
        for client in clients:
            self._leave(_close(client))

    async def _listen(self, client: Any) -> None:
        """Hear of changes until the connection ends; the next exchange begins anew."""
        try:
            pubsub = client.pubsub()
            try:
                await pubsub.subscribe(self._channel)
                asked = False
                while True:
                    message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=SILENCE)
                    if message is not None and message["type"] == "message":
                        if int(message["data"]) > self._seen:
                            self._on_change()
                    elif message is None:
                        if asked:
                            return
                        await pubsub.ping()
                    asked = message is None
            finally:
                async with asyncio.timeout(DEADLINE):
                    await pubsub.aclose()
        except (RedisError, OSError, TimeoutError, ValueError):
            return


async def _close(client: Any) -> None:
    async with asyncio.timeout(DEADLINE):
        await client.aclose()
