"""Running a service: one process, one event loop, aiohttp behind our limits.

aiohttp's own error page repeats what the client sent and logs a traceback for a malformed request line, so the
connection handler's ``handle_error`` is ours.
"""

from __future__ import annotations

import asyncio
import resource
import signal
import socket
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import http_parser, web
from aiohttp.web_protocol import RequestHandler
from structlog.typing import FilteringBoundLogger

from shared.codec import encode_json
from shared.config import ServiceSettings
from shared.errors import ConfigError
from shared.files import replace_file
from shared.tracing import new_id
from shared.web.middleware import problem
from shared.web.session import SHORT
from shared.web.tls import Certificates, certificate_guard

DRAIN: web.AppKey[Callable[[], Awaitable[None]]] = web.AppKey("drain")
"""Awaited when the service is told to stop, while it still listens."""
DRAIN_TIME = 30.0
"""Seconds that requests under way have when the service stops."""
GRACE = 10.0
"""Seconds more that a service's own parts have to end."""
MAX_LINE = 8190
MAX_HEADERS = 64
BACKLOG = 1024
HANDSHAKE = 5.0
"""Seconds that a client has to agree on TLS."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a service takes on: connections in all and from one address (loopback has no such limit)."""

    connections: int = 4096
    per_address: int = 256
    congestion: str = ""
    """TCP congestion control of sending sockets, where the kernel has it."""
    nodes_only: bool = False
    """Whether reading is for nodes that show their certificate."""


FILES, FILES_KEPT, FILES_EACH = 1 << 16, 64, 3
"""Descriptors that a service asks the system for; that are not for its clients; and that a client may cost: its
connection, the same once more to send by, and a shard."""


def fit(connections: int) -> int:
    """As many of these connections as this process may have descriptors for, after asking for more of them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    return (
        connections if soft == resource.RLIM_INFINITY else max(1, min(connections, (soft - FILES_KEPT) // FILES_EACH))
    )


LIMITS: web.AppKey[Limits] = web.AppKey("limits")
_BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nCache-Control: no-store\r\nConnection: close\r\n"
    b"Content-Type: application/problem+json\r\nContent-Length: %d\r\n\r\n%b"
)


class Connection(RequestHandler):
    """One client connection. Answers what the parser refused in our words, and without a traceback."""

    __slots__ = ("_address",)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take a client on, or tell it to come back later."""
        super().connection_made(transport)
        server = self._manager
        assert isinstance(server, _Server)
        self._address = str((transport.get_extra_info("peername") or ("",))[0])
        if not server.admit(self._address):
            body = problem("busy", new_id()).body
            assert isinstance(body, bytes) and self.transport is not None
            self.transport.write(_BUSY % (len(body), body))
            self.force_close()
        elif self.limits.congestion:
            with suppress(OSError, AttributeError):  # the kernel has it not: its default does
                sock = transport.get_extra_info("socket")
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, self.limits.congestion.encode())

    @property
    def limits(self) -> Limits:
        """What the service takes on."""
        assert isinstance(self._manager, _Server)
        return self._manager.limits

    def connection_lost(self, exc: BaseException | None) -> None:
        """A client is gone."""
        server = self._manager
        assert isinstance(server, _Server)
        server.leave(self._address)
        super().connection_lost(exc)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """A problem document for a request that never became one; the connection is closed after it."""
        if request.writer.output_size > 0:
            raise ConnectionError("the response has begun")
        response = problem("bad_request" if status < 500 else "internal", new_id())
        response.headers["Server"] = "nearshard"
        response.force_close()
        return response


CONNECTION: web.AppKey[Callable[..., Connection]] = web.AppKey("connection")
"""What a service makes its connections with, where ``Connection`` is not enough."""


class _Server(web.Server):
    make: Callable[..., Connection]
    limits: Limits
    addresses: Counter[str]

    def admit(self, address: str) -> bool:
        """Count a connection in; whether it is within the limits. ``leave`` counts it out in any case."""
        self.addresses[address] += 1
        own = self.addresses[address]
        return len(self._connections) <= self.limits.connections and (
            own <= self.limits.per_address or address in ("127.0.0.1", "::1")
        )

    def leave(self, address: str) -> None:
        """Count a connection out."""
        self.addresses[address] -= 1
        if self.addresses[address] <= 0:
            del self.addresses[address]

    def __call__(self) -> RequestHandler:
        return self.make(self, loop=self._loop, **self._kwargs)


class Runner(web.AppRunner):
    """An AppRunner whose connections are ``Connection``s, or what the service says."""

    async def _make_server(self) -> web.Server:
        server = await super()._make_server()
        server.__class__ = _Server
        assert isinstance(server, _Server)
        server.make = self.app.get(CONNECTION, Connection)
        server.limits = self.app.get(LIMITS, Limits())
        server.addresses = Counter()
        return server


def require_c_parser() -> None:
    """Raises ConfigError where aiohttp runs without its C parser: most smuggling bugs are in the other one."""
    if getattr(http_parser, "HttpRequestParser", None) is http_parser.HttpRequestParserPy:
        raise ConfigError("aiohttp is installed without its C extension; install a wheel of it")


class _Site(web.TCPSite):
    """One whose clients have HANDSHAKE seconds to agree on TLS: until then, nothing counts their connections."""

    async def start(self) -> None:
        await web.BaseSite.start(self)
        assert self._runner.server is not None
        self._server = await asyncio.get_running_loop().create_server(
            self._runner.server,
            self._host,
            self._port,
            ssl=self._ssl_context,
            ssl_handshake_timeout=HANDSHAKE if self._ssl_context else None,
            backlog=self._backlog,
            reuse_address=self._reuse_address,
        )


async def listen(
    app: web.Application, host: str, port: int, keepalive: float, tls: ssl.SSLContext | None = None
) -> tuple[Runner, str]:
    """Listen, and give the runner (for ``cleanup``) and the base URL. Raises OSError."""
    require_c_parser()
    runner = Runner(
        app,
        access_log=None,
        keepalive_timeout=keepalive,
        max_line_size=MAX_LINE,
        max_field_size=MAX_LINE,
        max_headers=MAX_HEADERS,
        lingering_time=2.0,
        shutdown_timeout=DRAIN_TIME,
        auto_decompress=False,
    )
    await runner.setup()
    try:
        await _Site(runner, host, port, backlog=BACKLOG, reuse_address=True, ssl_context=tls).start()
    except OSError:
        await runner.cleanup()
        raise
    return runner, _url(host, runner.addresses[0][1], tls is not None)


def _url(host: str, port: int, encrypted: bool) -> str:
    return f"http{'s' * encrypted}://{f'[{host}]' if ':' in host else host}:{port}"


def free_port() -> int:
    """A port of the loopback address that nobody listens on right now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


async def run(
    build: Callable[[str, Certificates], web.Application], settings: ServiceSettings, log: FilteringBoundLogger
) -> None:
    """Serve until SIGTERM or SIGINT, then drain. ``build`` gets the service's own base URL, and its certificates, which
    are read again when they change, or at SIGHUP. Raises ConfigError."""
    stop = asyncio.Event()
    certificates = Certificates(settings, log)
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_say_shortage(log))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if not settings.port:
        settings = settings.model_copy(update={"port": free_port()})
    tls, nodes_only = certificates.server, settings.node_certificates == "required"
    app = build(_url(settings.host, settings.port, tls is not None), certificates)
    app[LIMITS] = Limits(fit(settings.connections), settings.connections_per_address, settings.congestion, nodes_only)
    if tls and settings.tls_ca:
        app.middlewares.append(certificate_guard(nodes_only=nodes_only))
    try:
        runner, url = await listen(app, settings.host, settings.port, settings.keepalive, tls)
    except OSError as error:
        raise ConfigError(
            f"{settings.service}.port: cannot listen on {settings.host}:{settings.port}: {error.strerror}"
        ) from error
    watching = asyncio.create_task(certificates.watch(), name="certificates") if certificates else None
    if watching:
        loop.add_signal_handler(signal.SIGHUP, certificates.read_again)
    try:
        if settings.ready_file:
            await asyncio.to_thread(write_ready, settings.ready_file, {"url": url})
        log.info("listening", url=url)
        await stop.wait()
        log.info("draining")
        if drain := app.get(DRAIN):
            await drain()
    finally:
        if watching:
            watching.cancel()
        try:
            async with asyncio.timeout(DRAIN_TIME + GRACE):
                await runner.cleanup()
        except TimeoutError:
            log.error("something does not end; leaving it behind")


def _say_shortage(log: FilteringBoundLogger) -> Callable[[asyncio.AbstractEventLoop, dict[str, Any]], None]:
    """What the event loop does about errors that nobody catches. Without descriptors, asyncio accepts again after a
    second; it would log a traceback for each place in the backlog."""
    said_at = float("-inf")

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal said_at
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in SHORT:
            loop.default_exception_handler(context)
        elif loop.time() - said_at >= 1:
            said_at = loop.time()
            log.warning("no descriptors are left: new clients wait", reason=str(error))

    return handle


def write_ready(file: Path, document: object) -> None:
    """Write a ready file by rename, so that whoever waits for it never reads half of it."""
    replace_file(file, encode_json(document) + b"\n")
