"""Plain requests: answered on the connection itself, before the HTTP library sees them.

aiohttp spends some 300 microseconds a request, on what most requests do not need. So a service may look at what
arrives first, and answer what it can by itself. What is looked at is exactly one complete, plain GET: one line each
for a handful of harmless fields, nothing unusual in any of them. Everything else goes to aiohttp untouched: other
methods and fields, HTTP/1.0, bodies, pipelined or half-received requests; and so does what the service passes on.

A service that answers by itself answers with the same bytes as it would through aiohttp. A test of each holds both.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from aiohttp.helpers import rfc822_formatted_time

from shared.clock import Clock
from shared.view import EPOCH
from shared.web.server import Connection
from shared.web.tls import peer_of

MAX_REQUEST = 4096
"""Bytes of a request that is still plain."""
REQUESTS = 4_000
"""Requests, and blocks of fields, that are kept with what they mean."""
_REQUEST_LINE = re.compile(rb"GET (/[!-~]+) HTTP/1\.1")
_FIELD = re.compile(rb"([A-Za-z-]+):[ \t]*([ -~]*?)[ \t]*")
_ID = b"\r\nX-Request-Id: "
_ALONE = re.compile(rb"\r\nX-Request-Id: [ -~]*\r\n\r\n")
_IN_TRACE = re.compile(rb"\r\nX-Request-Id: [ -~]*(?:\r\ntraceparent: [ -~]*(?:\r\ntracestate: [ -~]*)?)?\r\n\r\n")
"""What goes along from tier to tier, as our sessions send it: last, so that it is found without a look at the rest."""
_PLAIN = frozenset(
    (b"host", b"user-agent", b"accept", b"accept-encoding", b"accept-language", b"connection", b"if-none-match")
)


@dataclass(frozen=True, slots=True)
class PlainFields:
    """What matters in the fields of a plain request."""

    accept: bytes
    if_none_match: bytes
    region: bytes
    """``Nearshard-Region``, for those who find that harmless."""
    also: Mapping[bytes, bytes]
    """Those that are harmless to this service, by their names in lower case."""


def parse_line(data: bytes) -> tuple[bytes, bytes] | None:
    """The target, and the block of fields, of the one plain GET that ``data`` is, whole.

    None for everything else, which is left to aiohttp to judge.
    """
    if len(data) > MAX_REQUEST or not data.endswith(b"\r\n\r\n"):
        return None
    line, _, block = data.partition(b"\r\n")
    request = _REQUEST_LINE.fullmatch(line)
    return (request[1], block) if request else None


def parse_fields(block: bytes, also: frozenset[bytes] = frozenset()) -> PlainFields | None:
    """The fields of a plain request, from its block with the empty line at its end; None if it is not plain.

    ``also``: names, in lower case, of fields that are harmless to this service.
    """
    fields: dict[bytes, bytes] = {}
    for line in block[:-4].split(b"\r\n"):
        match = _FIELD.fullmatch(line)
        if match is None:
            return None
        name = match[1].lower()
        if name in fields or (name not in _PLAIN and name not in also):
            return None
        fields[name] = match[2]
    if not fields.get(b"host") or fields.get(b"connection", b"keep-alive").lower() != b"keep-alive":
        return None
    return PlainFields(
        fields.get(b"accept", b"*/*"),
        fields.get(b"if-none-match", b""),
        fields.get(b"nearshard-region", b""),
        {name: value for name, value in fields.items() if name in also},
    )


class PlainRequests:
    """The parser of a service's plain requests. What is hot is asked for in the same words: those are parsed once."""

    def __init__(self, also: Iterable[bytes] = (), *, traced: bool = False) -> None:
        """``also``: names, in lower case, of fields that are harmless to this service. ``traced``: requests that are
        part of a trace are not plain."""
        self._also = frozenset(also)
        self._passing = _ALONE if traced else _IN_TRACE
        """Fields that are others for each request, and make no difference to what is answered here."""
        self._requests: dict[bytes, tuple[bytes, PlainFields]] = {}
        self._blocks: dict[bytes, PlainFields] = {}
        """Clients ask for different things, but each with the same fields."""

    def parse(self, data: bytes) -> tuple[bytes, PlainFields] | None:
        """Target and fields of the plain request that ``data`` is, whole; None where it is none."""
        if known := self._requests.get(data):
            return known
        line = parse_line(data)
        if line is None:
            return None
        target, block = line
        fields = self._blocks.get(block)
        if fields is None:
            end = block.find(_ID)
            if end >= 0 and self._passing.fullmatch(block, end):
                bare = block[:end] + b"\r\n\r\n"
                fields = self._blocks.get(bare) or self._learn(bare)
                return (target, fields) if fields else None  # nobody asks in these words again
            fields = self._learn(block)
            if fields is None:
                return None
        if len(self._requests) >= REQUESTS:
            self._requests.clear()
        found = self._requests[data] = target, fields
        return found

    def _learn(self, block: bytes) -> PlainFields | None:
        fields = parse_fields(block, self._also)
        if fields is not None:
            if len(self._blocks) >= REQUESTS:
                self._blocks.clear()
            self._blocks[block] = fields
        return fields


class DatedEnd:
    """The end of the heads of all answers: the date, which is the same for a second, the server's name, and the epoch
    of the membership where it is known."""

    def __init__(self, server: str, clock: Clock, epoch: Callable[[], int]) -> None:
        self._server, self._clock, self._epoch = server, clock, epoch
        self._until, self._known, self._dated = 0, 0, b""

    def now(self) -> bytes:
        """What comes after ``Date: ``, and the empty line."""
        now, epoch = self._clock.time(), self._epoch()
        if epoch != self._known or not self._until - 1 <= now < self._until:
            lines = [rfc822_formatted_time(), f"Server: {self._server}"]
            lines += [f"{EPOCH}: {epoch}"] if epoch else []
            self._until, self._known = int(now) + 1, epoch
            self._dated = "\r\n".join([*lines, "", ""]).encode()
        return self._dated


class PlainConnection(Connection):
    """A client connection on which a service may answer plain requests by itself. A base class."""

    __slots__ = ("_clean", "_requests", "busy")

    def __init__(self, requests: PlainRequests, manager: web.Server, **options: Any) -> None:
        super().__init__(manager, **options)
        self._requests = requests
        self._clean = True
        """Whether aiohttp's parser is between two requests, as far as can be told from here."""
        self.busy = False
        """Whether an answer from here is still being sent: what arrives meanwhile goes to ``hold_back``."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Where reading is for nodes only, aiohttp refuses whoever is none: everything is for it."""
        super().connection_made(transport)
        self._clean = not self.limits.nodes_only or peer_of(transport) is not None

    def answer(self, transport: asyncio.Transport, target: bytes, fields: PlainFields) -> bool:
        """Answer a plain request on ``transport``, which takes it at once. False where aiohttp is to do it: then
        nothing has happened."""
        raise NotImplementedError

    def hold_back(self, data: bytes) -> None:
        """Keep what arrived while ``busy``; only called where a service sets that."""
        raise NotImplementedError

    def data_received(self, data: bytes) -> None:
        """Answer a plain request, or give the bytes to aiohttp."""
        if self.busy:
            self.hold_back(data)
            return
        if self._clean:
            plain = self._requests.parse(data)
            if plain is None:
                # A request that came whole leaves the parser between two requests; after any other, it is never sure.
                self._clean = False
            elif (transport := self._free()) is not None and self.answer(transport, *plain):
                self.wait_for_next()
                return
        super().data_received(data)

    def wait_for_next(self) -> None:
        """The time that an idle connection has begins anew."""
        self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout

    def _free(self) -> asyncio.Transport | None:
        """The transport, where aiohttp has nothing to do on it and the client has taken what was sent."""
        if self._messages or self._current_request or self._request_in_progress or self._force_close:
            return None
        transport = self.transport
        return transport if transport and not transport.is_closing() and not transport.get_write_buffer_size() else None
