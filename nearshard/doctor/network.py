"""Facts of the network: names looked up, handshakes with every address, a few small answers, and one bounded download.

Everything has a deadline, and nothing waits for a thread that a resolver keeps. What fails is a fact, not an error.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from nearshard.doctor.facts import Connect, Network, Outcome, Peer
from nearshard.doctor.patience import within
from shared import codec
from shared.clock import Clock
from shared.errors import NearshardError, UpstreamError
from shared.ids import parse_model, parse_ref_or_revision
from shared.manifest import MAX_MANIFEST
from shared.paths import file_path, trust_path
from shared.trust import LIMITS
from shared.trust_names import TIMESTAMP
from shared.view import MAX_VIEW, NEAR, decode
from shared.web.resolver import AheadResolver
from shared.web.session import Fetched, fetch, make_session, translated

LOOK_UP, CONNECT, ASK, DOWNLOAD = 2.0, 2.0, 2.5, 3.5
"""Seconds for a name, for the handshakes with all its addresses, for the small answers, and for the large ones."""
TOTAL = 12.5
"""Seconds for all of it, whatever happens."""
NODES, ORIGINS, ADDRESSES = 6, 2, 4
"""Nodes and origins of the view that are looked at, and addresses of each family of a host."""
SAMPLE, STREAMS = 4 << 20, 4
"""Bytes that are downloaded at most, and over how many connections: the window of one may be what is too small."""
ENOUGH = 256 << 10
"""Bytes from which on a rate means something."""
MODELS = 3
"""Models that are looked at for a file that is large enough."""

Resolve = Callable[[str, int], Sequence[tuple[int, str]]]
"""Family (4 or 6) and address, for a host and a port; blocks. Raises OSError."""


def resolve(host: str, port: int) -> Sequence[tuple[int, str]]:
    """By the system's resolver. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys((6 if family == socket.AF_INET6 else 4, str(to[0])) for family, _, _, _, to in found))


@dataclass(frozen=True)
class Asking:
    """What may be done, and with what. ``tls``: by ``tls_by``; ``rate``: bytes a second, where it is known."""

    routers: Sequence[str]
    clock: Clock
    resolve: Resolve = resolve
    make_session: Callable[[AheadResolver], aiohttp.ClientSession] = lambda resolver: make_session(resolver=resolver)
    region: str = ""
    rate: float | None = None
    metered: bool = False


@dataclass
class _Found:
    peers: dict[str, Peer] = field(default_factory=dict)
    rate: float | None = None
    rate_of: str = ""
    round_trip: float | None = None
    stalled: str = ""

    def network(self) -> Network:
        return Network(True, tuple(self.peers.values()), self.rate, self.rate_of, self.round_trip, self.stalled)


async def look(asking: Asking) -> Network:
    """Everything, in ``TOTAL`` seconds at most."""
    found = _Found()
    if asking.rate is not None:
        found.rate, found.rate_of = asking.rate, "as given"
    known = _Known()
    with suppress(TimeoutError):
        async with (
            asyncio.timeout(TOTAL),
            asking.make_session(AheadResolver(asking.clock, known)) as session,
        ):
            await _look(asking, found, known, session)
    return found.network()


async def _look(asking: Asking, found: _Found, known: _Known, session: aiohttp.ClientSession) -> None:
    reach = _Reach(asking, found, known)
    await asyncio.gather(*(reach.to(url, "router") for url in asking.routers))
    there = [url for url in asking.routers if found.peers[url].round_trip is not None]
    named = await asyncio.gather(*(_ask(asking, found, session, url) for url in there))
    others = {url: role for members in named for url, role in members.items() if url not in found.peers}
    await asyncio.gather(*(reach.to(url, role) for url, role in others.items()))
    if asking.rate is None and not asking.metered and there:
        await _measure(asking, found, session)


# Reaching


@dataclass(frozen=True)
class _Reach:
    asking: Asking
    found: _Found
    known: _Known

    async def to(self, url: str, role: str) -> None:
        """Look its host up, and connect to all its addresses at once."""
        self.found.peers[url] = peer = Peer(url, role)
        try:
            host, port = _host_and_port(url)
        except ValueError as error:
            self.found.peers[url] = replace(peer, lookup_error=f"not a URL: {error}")
            return
        started = self.asking.clock.monotonic()
        named = not _is_address(host)
        try:
            look_up = partial(self.asking.resolve, host, port)
            addresses = await within(LOOK_UP, look_up, f"look up {host}") if named else [_literal(host)]
        except TimeoutError:
            self.found.peers[url] = replace(peer, lookup_error=f"no answer in {LOOK_UP:.0f} s")
            return
        except (OSError, UnicodeError) as error:  # the latter for a label that is empty or too long
            reason = error.strerror if isinstance(error, OSError) else "not a name"
            self.found.peers[url] = replace(peer, lookup_error=reason or "not found")
            return
        taken = self.asking.clock.monotonic() - started if named else None
        some = [one for family in (4, 6) for one in [a for a in addresses if a[0] == family][:ADDRESSES]]
        connects = await asyncio.gather(*(_connect(self.asking.clock, *one, port) for one in some))
        self.found.peers[url] = replace(peer, named=named, lookup=taken, connects=tuple(connects))
        # What hangs is known by now, so the requests that follow need not find out again.
        good = {one.address for one in connects if one.outcome is Outcome.CONNECTED}
        self.known.hosts[host] = [one for one in some if one[1] in good] or some


def _host_and_port(url: str) -> tuple[str, int]:
    """Raises ValueError."""
    parts = urlsplit(url)
    if not parts.hostname:
        raise ValueError("it names no host")
    return parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _literal(host: str) -> tuple[int, str]:
    return ipaddress.ip_address(host).version, host


async def _connect(clock: Clock, family: int, address: str, port: int) -> Connect:
    """Two handshakes, of which the quicker counts: the first may wait for a link that sleeps."""
    started = clock.monotonic()
    best: Connect | None = None
    try:
        async with asyncio.timeout(CONNECT):
            for _ in range(2):
                one = await _handshake(clock, family, address, port)
                best = one if best is None or one.seconds < best.seconds else best
    except TimeoutError:
        hung = Connect(address, family, Outcome.HANGS, clock.monotonic() - started, f"no answer in {CONNECT:.0f} s")
        return best or hung
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)  # asyncio puts words of its own into strerror
        return best or Connect(address, family, Outcome.REFUSED, clock.monotonic() - started, reason)
    assert best is not None
    return best


async def _handshake(clock: Clock, family: int, address: str, port: int) -> Connect:
    sock = socket.socket(socket.AF_INET6 if family == 6 else socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    with sock:
        started = clock.monotonic()
        await asyncio.get_running_loop().sock_connect(sock, (address, port))
        taken = clock.monotonic() - started
        info = _tcp_info(sock)
    one = Connect(address, family, Outcome.CONNECTED, info.round_trip if info else taken)
    if info is None:
        return one
    return replace(
        one,
        path_mtu=info.path_mtu,
        timestamps=bool(info.options & 1),
        sack=bool(info.options & 2),
        window_scaling=bool(info.options & 4),
    )


@dataclass(frozen=True)
class _TcpInfo:
    options: int
    path_mtu: int
    round_trip: float


def _tcp_info(sock: socket.socket) -> _TcpInfo | None:
    """``struct tcp_info`` of ``linux/tcp.h``: options at byte 5, ``tcpi_pmtu`` at 60, ``tcpi_rtt`` (in µs) at 68.

    The kernel's own measure of a handshake is not delayed by other tasks of this process."""
    try:
        data = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
        path_mtu, _, microseconds = struct.unpack_from("=III", data, 60)
    except (AttributeError, OSError, struct.error):  # another system, or a sandbox
        return None
    return _TcpInfo(data[5], path_mtu, microseconds / 1e6) if microseconds else None


class _Known(AbstractResolver):
    """Answers with what was looked up before, so that no request waits for a resolver again."""

    def __init__(self) -> None:
        self.hosts: dict[str, list[tuple[int, str]]] = {}

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        if host not in self.hosts:
            raise OSError(0, "not looked up before")
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if version == 6 else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for version, address in self.hosts[host]
        ]

    async def close(self) -> None:
        """There is nothing to close."""


# Asking


async def _ask(asking: Asking, found: _Found, session: aiohttp.ClientSession, url: str) -> Mapping[str, str]:
    """Its clock, and whom it names: their roles by URL. Nothing where it does not answer in time."""
    named: dict[str, str] = {}
    try:
        async with asyncio.timeout(ASK):
            await _ask_time(asking, found, session, url)
            await asyncio.gather(_ask_expiry(found, session, url), _ask_members(asking, session, url, named))
    except TimeoutError:
        if not found.peers[url].asked:
            found.peers[url] = replace(found.peers[url], asked=True, answer=f"not in {ASK:.1f} s")
    return named


async def _ask_time(asking: Asking, found: _Found, session: aiohttp.ClientSession, url: str) -> None:
    sent = asking.clock.time()
    try:
        answer = await fetch(session, f"{url}/healthz", limit=codec.MAX_JSON)
    except NearshardError as error:
        found.peers[url] = replace(found.peers[url], asked=True, answer=str(error))
        return
    now = asking.clock.time()
    theirs = _date(answer)
    # Date has whole seconds, cut off; when between the two looks at our clock it was taken is not known.
    skew = None if theirs is None else theirs + 0.5 - (sent + now) / 2
    error_either_way = 0.5 + abs(now - sent) / 2
    found.peers[url] = replace(found.peers[url], asked=True, skew=skew, skew_error=error_either_way)


def _date(answer: Fetched) -> float | None:
    try:
        return parsedate_to_datetime(answer.headers["Date"]).timestamp()
    except (KeyError, ValueError, TypeError, OverflowError):
        return None


async def _ask_expiry(found: _Found, session: aiohttp.ClientSession, url: str) -> None:
    with suppress(NearshardError, KeyError, TypeError, ValueError, AttributeError, OverflowError):
        answer = await fetch(session, url + trust_path(TIMESTAMP, 0), limit=LIMITS[TIMESTAMP])
        expires = datetime.fromisoformat(codec.decode_json(answer.body, LIMITS[TIMESTAMP])["signed"]["expires"])
        found.peers[url] = replace(found.peers[url], expires=expires.astimezone(UTC).timestamp())


async def _ask_members(asking: Asking, session: aiohttp.ClientSession, url: str, named: dict[str, str]) -> None:
    headers = {"Nearshard-Region": asking.region} if asking.region else {}
    with suppress(NearshardError):  # it is no router
        view = decode((await fetch(session, f"{url}/ring?near={NEAR}", limit=MAX_VIEW, headers=headers)).body)
        named.update(dict.fromkeys([node.url for node in view.nodes if node.id not in view.draining][:NODES], "node"))
        named.update(dict.fromkeys(view.origins[:ORIGINS], "origin"))


# Measuring


async def _measure(asking: Asking, found: _Found, session: aiohttp.ClientSession) -> None:
    """What the nearest one that has files brings: nodes before origins, what was named before nobody."""
    order = {"node": 0, "origin": 1, "router": 2}
    there = [peer for peer in found.peers.values() if peer.round_trip is not None and not peer.answer]
    if not there:
        return
    peer = min(there, key=lambda one: (order[one.role], one.round_trip or 0.0))
    meter = _Meter(asking.clock)
    try:
        async with asyncio.timeout(DOWNLOAD):
            url, size = await _sample(session, peer.url)
            await meter.run(session, url, size)
    except (TimeoutError, NearshardError, KeyError, TypeError, ValueError, AttributeError):
        if meter.asked and not meter.had:
            found.stalled = await _stalled(session, peer.url)
    rate = meter.rate()
    if rate is not None:
        found.rate, found.round_trip = rate, peer.round_trip
        found.rate_of = f"at least, from {peer.url}"


async def _stalled(session: aiohttp.ClientSession, base: str) -> str:
    """The URL, if small answers still come from there."""
    with suppress(NearshardError, TimeoutError):
        async with asyncio.timeout(1.0):
            await fetch(session, f"{base}/healthz", limit=codec.MAX_JSON)
            return base
    return ""


async def _sample(session: aiohttp.ClientSession, base: str) -> tuple[str, int]:
    """URL and size of the largest file of a few public models.

    Raises UpstreamError, NotFound, KeyError, TypeError, ValueError, AttributeError where there is none.
    """
    models = codec.decode_json((await fetch(session, f"{base}/models", limit=MAX_MANIFEST)).body, MAX_MANIFEST)
    files: list[tuple[int, str]] = []
    for model in map(parse_model, models["models"][:MODELS]):
        answer = await fetch(session, f"{base}/models/{model}", limit=MAX_MANIFEST)
        about = codec.decode_json(answer.body, MAX_MANIFEST)
        ref = parse_ref_or_revision(about["ref"])
        sizes = {path: file["size"] for path, file in about["files"].items() if isinstance(file["size"], int)}
        files += [(size, base + file_path(model, ref, path)) for path, size in sizes.items()]
    if not files or max(files)[0] < ENOUGH:
        raise UpstreamError("there is no file that is large enough")
    size, url = max(files)
    return url, size


@dataclass
class _Meter:
    clock: Clock
    asked: bool = False
    had: int = 0
    counted: int = 0
    """Bytes after the first ones: when those came, the clock was started."""
    first: float | None = None
    last: float = 0.0

    async def run(self, session: aiohttp.ClientSession, url: str, size: int) -> None:
        """Fetch the beginning of a file, as several parts at once: a cold node then fetches a shard for it, not many.

        Raises UpstreamError, TimeoutError."""
        part = min(size, SAMPLE) // STREAMS
        self.asked = True
        await asyncio.gather(*(self._part(session, url, n * part, (n + 1) * part) for n in range(STREAMS)))

    async def _part(self, session: aiohttp.ClientSession, url: str, start: int, stop: int) -> None:
        with translated(url):
            headers = {"Range": f"bytes={start}-{stop - 1}"}
            async with session.get(url, headers=headers, allow_redirects=False) as answer:
                if answer.status != 206:
                    raise UpstreamError(f"{url} answered {answer.status}")
                left = stop - start
                while left > 0 and (chunk := await answer.content.readany()):
                    left -= len(chunk)
                    self._count(len(chunk))

    def _count(self, size: int) -> None:
        self.had += size
        if self.first is None:
            self.first = self.clock.monotonic()
        else:
            self.counted += size
            self.last = self.clock.monotonic()

    def rate(self) -> float | None:
        """Bytes a second; None where too few came."""
        if self.first is None or self.had < ENOUGH or self.last <= self.first:
            return None
        return self.counted / (self.last - self.first)
