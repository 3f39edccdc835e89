"""TLS, for listening and for asking: certificates from files, which are read again when they change.

A handshake is done by what the files said last. Connections under way keep what they began with; files that are not
right are logged, and what they said before goes on.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import web
from aiohttp.typedefs import Middleware

from shared.certificates import first_expiry, node_of
from shared.errors import ConfigError, RequestError
from shared.files import Stamp, stamp
from shared.keys import check_private
from shared.paths import ADMIN

if TYPE_CHECKING:  # a client has no use for either, and they take long to import
    from structlog.typing import FilteringBoundLogger

    from shared.config import ServiceSettings

WATCH = 1.0
"""Seconds between two looks at the files."""
PROTOCOLS = ["http/1.1"]


@dataclass(frozen=True)
class Files:
    """Where certificates are, all PEM: a chain and its key for whoever has one; the CAs that others are checked by."""

    cert: Path | None = None
    key: Path | None = None
    ca: Path | None = None

    def all(self) -> list[Path]:
        """Those that are set."""
        return [file for file in (self.cert, self.key, self.ca) if file]

    def expiries(self) -> dict[str, float]:
        """When what is in them expires, in seconds since 1970, by setting."""
        found = {}
        for setting, file in (("tls_cert", self.cert), ("tls_ca", self.ca)):
            with suppress(OSError, ValueError):  # who loads them for use says what is wrong
                if file:
                    found[setting] = first_expiry(file.read_bytes())
        return found


def client_context(files: Files) -> ssl.SSLContext:
    """For asking: the system's CAs and those of ``files``; its certificate is shown to who asks for one.

    ``SSL_CERT_FILE`` and ``SSL_CERT_DIR`` stand for the system's CAs, as everywhere with OpenSSL. Raises ConfigError.
    """
    context = ssl.create_default_context()
    return _loaded(context, files)


def tls_by(ca: Path | None) -> ssl.SSLContext | None:
    """For a client whose deployment may have a CA of its own; None: the system's will do. Raises ConfigError."""
    return client_context(Files(ca=ca)) if ca else None


def server_context(files: Files) -> ssl.SSLContext:
    """For listening, with a certificate. Who shows one must have it from the CAs. Raises ConfigError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if files.ca:
        context.verify_mode = ssl.CERT_OPTIONAL
        # Who resumes a session is not checked again, so there are no tickets where certificates count (see peer_of).
        context.options |= ssl.OP_NO_TICKET
        context.num_tickets = 0
    return _loaded(context, files)


def _loaded(context: ssl.SSLContext, files: Files) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(PROTOCOLS)
    file = files.ca
    try:
        if files.ca:
            context.load_verify_locations(files.ca)
        if files.cert and files.key:
            check_private(files.key)
            file = files.cert
            context.load_cert_chain(files.cert, files.key, password=_no_password)
    except OSError as error:  # ssl.SSLError is one
        reason = "not a certificate and its key, in PEM" if file == files.cert else "not certificates in PEM"
        said = reason if isinstance(error, ssl.SSLError) else error.strerror
        raise ConfigError(f"{file}: {said}") from error
    return context


def _no_password() -> str:
    """Else OpenSSL would ask the terminal for it."""
    raise ConfigError("a private key of a service is not encrypted, but for its owner alone (chmod 600)")


class Certificates:
    """A service's certificates as they are now."""

    def __init__(self, settings: ServiceSettings, log: FilteringBoundLogger) -> None:
        """Raises ConfigError."""
        self._files = Files(settings.tls_cert, settings.tls_key, settings.tls_ca)
        self._log = log
        self._stamps = self._look()
        self.client = client_context(self._files) if self else None
        """For asking others, from now on; None: the system's CAs are all that is known."""
        self._current = server_context(self._files) if self._files.cert else None
        self.server = server_context(self._files) if self._files.cert else None
        """For listening, all the time; None: without TLS. Each handshake is done by the context that is current."""
        if self.server:
            self.server.sni_callback = self._pick
        self.expiries = self._files.expiries()
        """When what is in use expires, in seconds since 1970, by setting."""
        self._followers: list[Callable[[ssl.SSLContext], None]] = []
        self._said = asyncio.Event()

    def __bool__(self) -> bool:
        """Whether there are any files to watch."""
        return bool(self._files.all())

    def follow(self, follower: Callable[[ssl.SSLContext], None]) -> None:
        """``follower`` is given each ``client`` that comes after this one."""
        self._followers.append(follower)

    def read_again(self) -> None:
        """Have ``watch`` read the files, whether or not they look changed."""
        self._said.set()

    async def watch(self) -> None:
        """Read the files again whenever they change, until cancelled."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(WATCH):
                    await self._said.wait()
            stamps = self._look()
            if stamps != self._stamps or self._said.is_set():
                self._said.clear()
                self._stamps = stamps
                await self._renew()

    async def _renew(self) -> None:
        try:
            client = await asyncio.to_thread(client_context, self._files)
            current = await asyncio.to_thread(server_context, self._files) if self.server else None
        except ConfigError as error:
            self._log.error("new certificates cannot be used; the old ones go on", reason=str(error))
            return
        expiries = await asyncio.to_thread(self._files.expiries)
        self.client, self._current, self.expiries = client, current, expiries
        for follower in self._followers:
            follower(client)
        self._log.info("certificates read again")

    def _look(self) -> list[Stamp | None]:
        found: list[Stamp | None] = []
        for file in self._files.all():
            try:
                found.append(stamp(file))
            except OSError:  # it is being replaced
                found.append(None)
        return found

    def _pick(self, handshake: ssl.SSLObject, name: str | None, base: ssl.SSLContext) -> None:
        """OpenSSL calls this for every handshake, also of a client that names no host."""
        if self._current:
            handshake.context = self._current


def peer_of(transport: asyncio.BaseTransport | None) -> str | None:
    """The node at the other end of a connection, where it has shown a certificate of the deployment's CA."""
    tls = transport.get_extra_info("ssl_object") if transport else None
    if transport is None or tls is None or tls.session_reused:  # what is resumed was not checked again
        return None
    return node_of(transport.get_extra_info("peercert"))


def peer_node(request: web.BaseRequest) -> str | None:
    """The node that sent a request, by its certificate; None where it has none."""
    return peer_of(request.transport)


CLAIMED: web.AppKey[Callable[[web.Request], str | None]] = web.AppKey("claimed")
"""Gives the node that a request says it is from; None where it is anybody's. With ``tls_ca`` it must be so."""
_HEALTH = ("/healthz", "/readyz")


def _is_open(request: web.Request) -> bool:
    """Whether a GET is no reading of models: how a service is, or what an operator asks with a token."""
    resource = request.match_info.route.resource  # what will answer, however the path is written
    return request.path in _HEALTH or (resource is not None and resource.canonical.startswith(f"{ADMIN}/"))


def certificate_guard(*, nodes_only: bool) -> Middleware:
    """Nobody speaks for a node but who shows its certificate; nor reads, where that is for nodes only.

    What is not reading is authenticated by itself: publishing by tokens, heartbeats by signatures.
    """

    @web.middleware
    async def middleware(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        peer, claim = peer_node(request), request.app.get(CLAIMED)
        claimed = claim(request) if claim else None
        if claimed is not None and claimed != peer:
            raise RequestError(code="certificate_needed")
        if nodes_only and peer is None and request.method in ("GET", "HEAD") and not _is_open(request):
            raise RequestError(code="certificate_needed")
        return await handler(request)

    return middleware
