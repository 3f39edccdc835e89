"""Asking other services: one client session a process, and the one place where its errors become ours.

Bodies are taken as they are (no decompression), redirects are not followed, cookies and proxies from the
environment are ignored. Lengths and ranges are checked here: a body that ends early, or at another offset
than was asked for, is an UpstreamError however politely it ended.
"""

from __future__ import annotations

import asyncio
import errno
import re
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiohttp_socks import ProxyConnectionError, ProxyConnector, ProxyError, ProxyTimeoutError
from yarl import URL

from shared import codec
from shared.clock import SystemClock
from shared.deltas import REBUILDING
from shared.errors import (
    CODES,
    BadId,
    DecodeError,
    Mirroring,
    NearshardError,
    NotFound,
    RequestError,
    UpstreamError,
)
from shared.ids import parse_name
from shared.proxy import ProxyOf
from shared.tasks import end
from shared.token_file import TokenFile
from shared.view import EPOCH
from shared.web.resolver import AheadResolver
from shared.web.spans import pass_on
from shared.web.tls import Certificates

CONNECT, FIRST_BYTE, IDLE = 2.0, 5.0, 10.0
"""Seconds to connect, until the head of an answer, and between two reads of a node."""
CLIENT_IDLE = 5.0
"""Seconds between two reads of a client. A node that finds its source stalled helps all its readers by waiting for the
one it has; a client's node may be the one that stands still, and the client has others to go on with."""
BUFFER = 1 << 16
"""Bytes that a body may be ahead of its reader, about: twice that, and one read of the event loop (256 KB), for each
of dozens of streams. More is no faster, and keeps the loop from its other clients for longer at a time."""
ALIVE = 2.5
"""Seconds between two looks whether a node that makes a shard, and sends nothing meanwhile, is still there; and that it
has to say so."""
SLOW_FOR, SLOW_RATE = 10.0, 10_000
"""A body that brings fewer than SLOW_RATE bytes a second for SLOW_FOR seconds is left for another source; several from
one source share that rate."""
SHORT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)
"""What the kernel says where this process has too little of something: no file's and no source's fault."""
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19})")


def make_session(
    proxy: str | None = None,
    resolver: AheadResolver | None = None,
    *,
    idle: float = CLIENT_IDLE,
    tls: ssl.SSLContext | None = None,
) -> aiohttp.ClientSession:
    """A session; close it at the end. Callers bound how much they ask for at once.

    ``proxy``: ``http://``, ``socks5://`` or ``socks5h://``, for all requests of the session. ``resolver``: one of
    its own by default. ``idle``: seconds between two reads. ``tls``: how servers are checked; by the system's CAs by
    default.
    """
    # aiohttp 3.14.5 may leave the timer of a read running on a connection that is idle: what is taken up again after
    # that has failed before it begins. So none is kept for as long.
    kept = 0.8 * idle
    connector: aiohttp.TCPConnector
    if proxy and proxy.startswith("socks"):
        url = proxy.replace("socks5h:", "socks5:")
        connector = ProxyConnector.from_url(url, rdns=True, limit=0, ssl=tls or True, keepalive_timeout=kept)
        proxy = None
    else:
        resolver = resolver or AheadResolver(SystemClock())
        connector = aiohttp.TCPConnector(
            limit=0,
            use_dns_cache=False,
            resolver=resolver,
            family=socket.AF_UNSPEC,
            ssl=tls or True,
            keepalive_timeout=kept,
        )
    return aiohttp.ClientSession(
        connector=connector,
        proxy=proxy,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT, sock_read=idle),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        trust_env=False,
        headers={"Accept-Encoding": "identity", "User-Agent": "nearshard"},
        raise_for_status=False,
        read_bufsize=BUFFER,
        middlewares=[pass_on],
    )


class NoRanges(UpstreamError):
    """A source that sends the whole shard where a part was asked for."""


class Answered(UpstreamError):
    """A source that is there, and answered with an error: its own trouble, or that of its sources."""


class NotLetIn(Answered):
    """A source that wants a token, or another one than it was shown.

    To whoever asks a service of ours that is the service's trouble with its source, so the status is that of any
    other. Who shows a token of its own raises ``refusal`` in its place.
    """

    def __init__(self, url: str, code: str) -> None:
        super().__init__(f"{url} refused: {CODES[code].title}")
        self.refusal = RequestError(f"{CODES[code].title} ({url})", code=code)


class Sessions:
    """The sessions of a process or a client: one for what is asked directly, and one for each proxy."""

    def __init__(
        self,
        proxy_of: ProxyOf = lambda _: None,
        token: TokenFile | None = None,
        certificates: Certificates | None = None,
        *,
        tls: ssl.SSLContext | None = None,
        idle: float = IDLE,
    ) -> None:
        """``proxy_of``: the proxy by base URL. ``token``: this service's own, for what is private. ``certificates``:
        of the service; without them, others are checked by ``tls``, or the system's CAs, and this one shows nothing.
        ``idle``: seconds between two reads."""
        self.token = token or TokenFile(None)
        self._proxy_of, self._idle = proxy_of, idle
        self._resolver = AheadResolver(SystemClock())
        self._tls = certificates.client if certificates else tls
        self.direct = make_session(resolver=self._resolver, idle=idle, tls=self._tls)
        self._proxied: dict[str, aiohttp.ClientSession] = {}
        if certificates:
            certificates.follow(self._show)

    def of(self, base: str) -> aiohttp.ClientSession:
        """The session for a base URL."""
        proxy = self._proxy_of(base)
        if proxy is None:
            return self.direct
        if proxy not in self._proxied:
            self._proxied[proxy] = make_session(proxy, idle=self._idle, tls=self._tls)
        return self._proxied[proxy]

    def resolve_ahead(self, bases: Iterable[str]) -> None:
        """Look up the hosts of base URLs before they are needed; a proxy does so by itself."""
        self._resolver.ahead(base for base in bases if self._proxy_of(base) is None)

    def _show(self, tls: ssl.SSLContext) -> None:
        """New connections are made by this context; a session has no public way to say so."""
        self._tls = tls
        for session in (self.direct, *self._proxied.values()):
            assert isinstance(session.connector, aiohttp.TCPConnector)
            session.connector._ssl = tls

    async def close(self) -> None:
        """Close them all."""
        for session in (self.direct, *self._proxied.values()):
            await session.close()
        await self._resolver.close()


@dataclass(frozen=True)
class Fetched:
    """A small answer, read whole. ``status`` is 200 or 304."""

    status: int
    body: bytes
    headers: Mapping[str, str]


async def fetch(
    session: aiohttp.ClientSession,
    url: str,
    *,
    limit: int,
    headers: Mapping[str, str] | None = None,
    missing: str = "unknown_path",
    too_long: Callable[[str], UpstreamError] = UpstreamError,
    hops: int = 0,
) -> Fetched:
    """GET a document of at most ``limit`` bytes, by way of at most ``hops`` redirects. Raises NotFound (with code
    ``missing``, or the code that a server of ours gave), ``too_long`` at the first byte over the limit, Mirroring, or
    UpstreamError."""
    with translated(url):
        timeout = aiohttp.ClientTimeout(total=30, sock_connect=CONNECT, sock_read=FIRST_BYTE)
        async with AsyncExitStack() as stack:
            answer = await _get(stack, session, url, headers or {}, hops, timeout)
            if answer.status == 304:
                return Fetched(304, b"", answer.headers)
            if answer.status == 404:
                raise await _not_found(answer, missing)
            if answer.status in (401, 403):
                raise NotLetIn(url, await _given_code(answer) or "unauthorized")
            if answer.status != 200:
                raise await _answered(url, answer)
            return Fetched(200, await read_whole(answer, url, limit, too_long), answer.headers)


async def read_whole(
    answer: aiohttp.ClientResponse, url: str, limit: int, too_long: Callable[[str], UpstreamError] = UpstreamError
) -> bytes:
    """A body of at most ``limit`` bytes. Raises as ``fetch``; call it within ``translated``."""
    body = bytearray()
    async for chunk in answer.content.iter_any():
        body += chunk
        if len(body) > limit:
            raise too_long(f"{url} answered more than {limit} bytes")
    if answer.content_length not in (None, len(body)):
        raise UpstreamError(f"{url} ended early")
    return bytes(body)


@dataclass(frozen=True)
class Body:
    """A shard's bytes on their way: ``size`` of the whole, and chunks from ``start`` on."""

    size: int
    start: int
    chunks: AsyncIterator[bytes]
    cache_status: str = ""
    epoch: str = ""
    """What the source says of the membership's epoch."""


@asynccontextmanager
async def open_blob(
    session: aiohttp.ClientSession,
    url: str,
    *,
    start: int,
    stop: int | None = None,
    size: int | None,
    max_size: int,
    headers: Mapping[str, str] | None = None,
    sharing: Callable[[], int] = lambda: 1,
    hops: int = 0,
) -> AsyncIterator[Body]:
    """GET a shard from byte ``start`` up to ``stop``, or to its end. ``size`` of the whole where it is known.

    Gives a Body whose chunks end exactly there. A 200 where all from ``start`` on was asked for is taken from its
    beginning (``start`` 0). ``sharing``: how many bodies share the source's link now. ``hops``: redirects to follow.

    Raises NotFound; NoRanges for a 200 where ``stop`` was given; UpstreamError for any other status, a length or a
    Content-Range that does not fit, a body that is encoded, or one that ends early.
    """
    fields = dict(headers or {})
    if start or stop is not None:
        fields["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
    with translated(url):
        async with AsyncExitStack() as stack:
            async with asyncio.timeout(FIRST_BYTE):
                answer = await _get(stack, session, url, fields, hops)
            if answer.status == 404:
                raise await _not_found(answer, "unknown_blob")
            if answer.status in (401, 403):
                raise NotLetIn(url, await _given_code(answer) or "unauthorized")
            if answer.status not in (200, 206):
                raise Answered(f"{url} answered {answer.status}")
            if answer.headers.get("Content-Encoding", "identity") != "identity":
                raise UpstreamError(f"{url} sent an encoded body")
            length = answer.content_length
            if length is None:
                raise UpstreamError(f"{url} sent no Content-Length")  # a body cut short would look complete
            begin, whole = 0, length
            if answer.status == 200 and stop is not None:
                raise NoRanges(f"{url} sent all where a part was asked for")
            if answer.status == 206:
                match = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
                begin, last, whole = map(int, match.groups()) if match else (-1, -1, -1)
                end = whole if stop is None else stop
                if "Range" not in fields or begin != start or last != end - 1 or length != end - begin:
                    raise UpstreamError(f"{url} sent another range than was asked for")
            if (size is not None and whole != size) or not 0 < whole <= max_size:
                raise UpstreamError(f"{url} has {whole} bytes, not {size}")
            fields_of = answer.headers
            late = REBUILDING in fields_of
            chunks = _exactly(answer, length, url, sharing, late=late)
            if late:
                chunks = _once_made(session, answer, chunks)
            yield Body(whole, begin, chunks, fields_of.get("Cache-Status", ""), fields_of.get(EPOCH, ""))


async def _get(
    stack: AsyncExitStack,
    session: aiohttp.ClientSession,
    url: str,
    headers: Mapping[str, str],
    hops: int,
    timeout: aiohttp.ClientTimeout | None = None,
) -> aiohttp.ClientResponse:
    """The answer to a GET, after at most ``hops`` redirects; a token stays with the server that it is for."""
    for _ in range(hops + 1):
        asking = session.get(url, headers=headers, allow_redirects=False, timeout=timeout or session.timeout)
        answer = await stack.enter_async_context(asking)
        location = answer.headers.get("Location", "")
        if not hops or answer.status not in (301, 302, 303, 307, 308) or not location:
            return answer
        target = answer.url.join(URL(location, encoded=True))
        if target.scheme not in ("http", "https"):
            raise UpstreamError(f"{url} redirects to what is not http(s)")
        if target.origin() != answer.url.origin():
            headers = {name: value for name, value in headers.items() if name.lower() != "authorization"}
        answer.release()
        url = str(target)
    raise UpstreamError(f"{url} redirects again and again")


async def _once_made(
    session: aiohttp.ClientSession, answer: aiohttp.ClientResponse, chunks: AsyncIterator[bytes]
) -> AsyncIterator[bytes]:
    """``chunks`` of a node that makes the shard before it sends any: while it is there, its silence is no fault. What
    it takes is held to its times, so that it goes on, or gives up, by itself. Raises TimeoutError."""
    idle = _set_idle(answer, None)
    first = asyncio.ensure_future(anext(chunks, b""))
    try:
        while not (await asyncio.wait([first], timeout=ALIVE))[0]:
            timeout = aiohttp.ClientTimeout(total=ALIVE)
            async with session.get(answer.url.origin() / "healthz", allow_redirects=False, timeout=timeout):
                pass  # it is there, whatever it says
        chunk = first.result()
    finally:
        await end([first])
    _set_idle(answer, idle)
    if chunk:
        yield chunk
        async for chunk in chunks:
            yield chunk


def _set_idle(answer: aiohttp.ClientResponse, seconds: float | None) -> float | None:
    """Change the seconds that may pass between two reads of a body, unless all of it is here; what they were."""
    protocol = answer.connection.protocol if answer.connection else None
    if protocol is None:
        return None
    before, protocol.read_timeout = protocol.read_timeout, seconds
    protocol.start_timeout()
    return before


async def _exactly(
    answer: aiohttp.ClientResponse, length: int, url: str, sharing: Callable[[], int], *, late: bool = False
) -> AsyncIterator[bytes]:
    """``late``: the first chunk may take any time."""
    left = length
    now = asyncio.get_running_loop().time
    waited, had = 0.0, 0  # of the sender alone: a reader that takes its time says nothing about it
    while True:
        asked = now()
        chunk = await answer.content.readany()
        if not chunk:
            break
        if late and left == length:
            asked = now()
        left -= len(chunk)
        waited, had = waited + now() - asked, had + len(chunk)
        if waited >= SLOW_FOR:
            if had * max(1, sharing()) < SLOW_RATE * waited and left:
                raise UpstreamError(f"{url} sends too slowly", code="upstream_timeout")
            waited, had = 0.0, 0
        if left < 0:
            raise UpstreamError(f"{url} sent more than it said")
        yield chunk
    if left:
        raise UpstreamError(f"{url} broke off {left} bytes early")


async def _given_code(answer: aiohttp.ClientResponse) -> str:
    """The code that a server of ours gave with an error; empty for any other's."""
    return str((await _problem(answer)).get("code", ""))


async def _problem(answer: aiohttp.ClientResponse) -> Mapping[str, Any]:
    """The problem document that a server of ours gave; empty for any other's."""
    if answer.content_type == "application/problem+json":
        with suppress(DecodeError):
            document = codec.decode_json(await answer.content.read(codec.MAX_JSON))
            given = document.get("code") if isinstance(document, dict) else None
            if isinstance(given, str) and given in CODES and CODES[given].status == answer.status:
                return dict(document)
    return {}


async def _answered(url: str, answer: aiohttp.ClientResponse) -> UpstreamError:
    """What an answer that is no document means."""
    document = await _problem(answer) if answer.status == CODES[Mirroring.code].status else {}
    done, total, after = document.get("done"), document.get("total"), answer.headers.get("Retry-After", "1")
    if document.get("code") == Mirroring.code and type(done) is int and type(total) is int:
        return Mirroring(done=done, total=total, retry_after=min(int(after), 60) if after.isdecimal() else 1)
    return Answered(f"{url} answered {answer.status}")


async def _not_found(answer: aiohttp.ClientResponse, missing: str) -> NotFound:
    """A 404 keeps the code and the task names that a server of ours gave, so that it means the same to all."""
    code, public = missing, {}
    if answer.content_type == "application/problem+json":
        with suppress(DecodeError, BadId, TypeError, AttributeError):
            document = codec.decode_json(await answer.content.read(codec.MAX_JSON))
            given, names = document.get("code"), document.get("tasks")
            if given in CODES and CODES[given].status == 404:
                code = given
            if isinstance(names, list):
                public = {"tasks": [parse_name(str(name)) for name in names[:256]]}
    return NotFound(f"{answer.url.path} is not there", code=code, public=public)


_ADVICE = {
    9: "its certificate is not valid yet: look at the clocks of both machines",
    10: "its certificate has expired; whoever runs it makes a new one (`nearshard trust cert`)",
    18: "its certificate is from a CA that is not known here; name its CA (--ca, NEARSHARD_CA, a service's tls_ca)",
    62: "its certificate is for another host name; ask it by one of its names, or make one with --dns",
    64: "its certificate is for another address; ask it by one of its names, or make one with --ip",
}
_ADVICE |= dict.fromkeys((19, 20, 21), _ADVICE[18])
"""What to do, by OpenSSL's verdict on a certificate (X509_V_ERR_...)."""


def _about_tls(error: BaseException | None) -> tuple[str, str] | None:
    """Code and advice where TLS is what failed: by the server's certificate, or by what it says of this side's."""
    while error is not None and error.__cause__ is not None:
        error = error.__cause__  # what the HTTP library makes of it claims to be an SSLError too, but has no reason
    if isinstance(error, ssl.SSLCertVerificationError):
        advice = _ADVICE.get(error.verify_code, f"its certificate is not acceptable: {error.verify_message}")
        return "bad_certificate", advice
    reason = (error.reason or "") if isinstance(error, ssl.SSLError) else ""
    if "ALERT" in reason and ("CERTIFICATE" in reason or "UNKNOWN_CA" in reason):
        return "bad_certificate", f"it does not take this side's certificate ({reason.lower()})"
    if reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
        return "upstream_error", "it does not speak TLS; is it http://?"
    return None


@contextmanager
def translated(url: str) -> Iterator[None]:
    """aiohttp's errors as ours: no foreign exception leaves the session."""
    try:
        yield
    except NearshardError:
        raise  # some of ours are ValueErrors too
    except TimeoutError as error:
        raise UpstreamError(f"{url} did not answer in time", code="upstream_timeout") from error
    except (ProxyError, ProxyConnectionError, ProxyTimeoutError) as error:
        raise UpstreamError(f"{url} failed: the proxy: {error}") from error
    except aiohttp.ClientHttpProxyError as error:
        raise UpstreamError(f"{url} failed: the proxy refused with {error.status}") from error
    except (aiohttp.ClientError, OSError, ValueError) as error:
        if trouble := _about_tls(error):
            raise UpstreamError(f"{url} failed: {trouble[1]}", code=trouble[0]) from error
        if isinstance(error, aiohttp.ServerDisconnectedError) and url.startswith("https:"):
            # asyncio closes a handshake that it refuses without an alert, and TLS 1.3 says so only here
            raise UpstreamError(f"{url} closed the connection; does it take this side's certificate?") from error
        reason = error.os_error.strerror if isinstance(error, aiohttp.ClientConnectorError) else str(error)
        if isinstance(error, aiohttp.ClientProxyConnectionError):
            reason = f"the proxy: {reason}"
        code = "busy" if isinstance(error, OSError) and error.errno in SHORT else None  # ours, not the source's
        raise UpstreamError(f"{url} failed: {reason or type(error).__name__}", code=code) from error
