"""The short path: plain cache hits, answered before aiohttp sees them (``shared.web.plain`` says what is plain).

Where a plain request is for something immutable that is held whole in memory or on disk, the answer is written here,
with the same bytes that the long path would send. Ranges, refs and misses go to aiohttp, as what is not plain does.

1. known?     ``/blobs/<digest>``, or a path of a pinned revision that the long path has answered before
              of a public model; what is private goes to aiohttp, and is never known here
2. held?      every slice is in memory or on disk now; they are opened (pinned) with no await in between
3. send       small bodies with their head in one write; the rest by sendfile on a duplicate of the socket, which the
              event loop can watch (its own descriptor belongs to the transport); with TLS, aiohttp sends those

While an answer is being sent, what else arrives on the connection waits its turn in ``_held_back``.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from edge_node.account import MODEL, About, Account
from edge_node.cache import Cache, DiskReader, MemoryReader
from edge_node.peers import AS_IS, HOP
from edge_node.shard_key import ShardKey, shard_key
from shared.clock import Clock
from shared.conditional import Conditions, NotModified, Whole, evaluate
from shared.deltas import WANTED_FOR
from shared.digest import parse_digest
from shared.errors import BadId, LocalError
from shared.layout import Slice
from shared.outcome import Outcome, cache_status, dearest
from shared.representation import Representation, of_blob
from shared.usage import at_once
from shared.web.plain import DatedEnd, PlainConnection, PlainFields, PlainRequests
from shared.web.send import SMALL, STALL, UNREADABLE, fields_of
from shared.web.wire import duplicate, is_encrypted

MAX_HELD_BACK = 64 << 10
"""Bytes that may arrive while an answer is being sent; then reading stops."""
OPEN = 32
"""Slices, so files, that one answer may hold open; the long path opens the many of a large model one by one."""
KNOWN = 20_000
"""Paths kept with their fields."""
SAID = 8
"""Models that are told apart of those that are named for one shard, between two folds."""
TURN = 4 << 20
"""Bytes sent for one connection before others get their turn."""
LEAST = 10_000 * int(STALL)
"""Bytes that a client must take in STALL seconds: 10 KB/s."""
_BLOBS = b"/blobs/"
_HOP, _MODEL, _WANTED_FOR = (name.lower().encode() for name in (HOP, MODEL, WANTED_FOR))
_HARMLESS = [_HOP, _MODEL, _WANTED_FOR, AS_IS.lower().encode()]
"""Fields, besides those that are harmless to all: what is held is sent to a peer as to anybody, whatever it is for."""


@dataclass(slots=True)
class Known:
    """Something immutable that can be answered here, once its slices are held."""

    shown: Representation
    slices: tuple[Slice, ...]
    model: str
    """The model that it is of; empty for a shard."""
    fields: Mapping[str, str]
    """Fields beside those of the representation (Vary)."""
    any_accept: bool
    """Whether Accept makes no difference to it."""
    quoted: bytes
    """The entity tag as a field has it."""
    about: About
    """What is counted for it is counted so."""
    answered: dict[bytes, int] = field(default_factory=dict)
    """Times that all of it was answered at once since the account was folded, by what was said of its model."""
    heads: dict[Outcome | None, bytes] = field(default_factory=dict)
    """Status line and fields of a 200, up to the date, by outcome."""
    heads_304: dict[Outcome | None, bytes] = field(default_factory=dict)
    """The same of a 304."""


class ShortPath:
    """What a node can answer without aiohttp: shared by its connections."""

    def __init__(
        self,
        cache: Cache,
        node: str,
        server: str,
        clock: Clock,
        count: Callable[[Outcome, int], None],
        epoch: Callable[[], int],
        known_public: Callable[[str], bool],
        account: Account,
        *,
        traced: bool = False,
    ) -> None:
        """``count`` is told of each slice that was sent: how it was had, and its bytes. ``epoch`` of the membership, 0
        while none is known. ``known_public``: whether a model is known to be for all. ``traced``: requests
        of a trace are left to aiohttp, which is where they are recorded."""
        self.cache, self.count, self.account = cache, count, account
        self.requests = PlainRequests(_HARMLESS, traced=traced)
        self._end = DatedEnd(server, clock, epoch)
        self._node, self._known_public = node, known_public
        self._known: OrderedDict[bytes, Known] = OrderedDict()
        self._answered: list[Known] = []
        account.before_fold.append(self._tell_account)

    def learn(self, target: str, model: str, shown: Representation, fields: Mapping[str, str]) -> None:
        """The long path has answered ``target``, a task or a file of a public model, which will never mean anything
        else."""
        slices = tuple(shown.layout.cut(shown.layout.whole))
        quoted = f'"{shown.etag}"'.encode()
        known = Known(shown, slices, model, fields, any_accept=False, quoted=quoted, about=About(model))
        self._remember(target.encode(), known)

    def find(self, target: bytes, fields: PlainFields) -> Known | None:
        """What a request asks for, where it can be answered here."""
        known = self._known.get(target)
        if known is None and target.startswith(_BLOBS):
            known = self._blob(target)
        if known is None or not (known.any_accept or fields.accept == b"*/*"):
            return None
        return known if not known.model or self._known_public(known.model) else None

    def small(self, known: Known) -> bytes | None:
        """The whole answer, where the body is small and in memory; it is written at once, so nothing is pinned."""
        if known.shown.layout.size > SMALL:
            return None
        parts = []
        for piece in known.slices:
            view = self.cache.memory.peek(_key(piece))
            if view is None:
                return None
            parts.append(view[piece.offset : piece.offset + piece.length])
        for part in parts:
            self.count(Outcome.HIT_MEMORY, len(part))
        return b"".join((self.head(known, Whole(), Outcome.HIT_MEMORY), *parts))

    def open(self, known: Known) -> list[Held] | None:
        """Every slice, pinned; None (and nothing pinned) where one is not held whole right now."""
        if len(known.slices) > OPEN:
            return None
        opened: list[Held] = []
        for piece in known.slices:
            try:
                reader = self.cache.open_held(_key(piece))
            except LocalError:
                reader = None  # no descriptor for it: the long path says so
            if reader is None:
                for held in opened:
                    held.reader.close()
                return None
            opened.append(Held(piece, reader))
        return opened

    def head(self, known: Known, decision: Whole | NotModified, outcome: Outcome | None) -> bytes:
        """Status line and fields, as the long path has them."""
        heads = known.heads if isinstance(decision, Whole) else known.heads_304
        head = heads.get(outcome)
        if head is None:
            stamp = {"Cache-Status": cache_status(self._node, outcome)} if outcome else {}
            whole = known.shown.layout.whole
            status, fields = fields_of(known.shown, decision, whole, {**stamp, **known.fields})
            lines = [f"HTTP/1.1 {status} {'OK' if status == 200 else 'Not Modified'}"]
            lines += [f"{name}: {value}" for name, value in fields.items()]
            head = heads[outcome] = "\r\n".join([*lines, "Date: "]).encode()
        return head + self._end.now()

    def tally(self, known: Known, fields: PlainFields) -> None:
        """Count an answer that was written at once: one addition, the rest is done when the account is folded."""
        also, said = fields.also, b""
        if also:
            if _HOP in also:
                return
            said = also.get(_MODEL) or also.get(_WANTED_FOR, b"")
        answered = known.answered
        if not answered:
            self._answered.append(known)
        elif len(answered) > SAID:
            said = b""
        answered[said] = answered.get(said, 0) + 1

    def _tell_account(self) -> None:
        for known in self._answered:
            for said, count in known.answered.items():
                self.account.add(_about(known, said), at_once(count, known.shown.layout.size))
            known.answered.clear()
        self._answered.clear()

    def about(self, known: Known, fields: PlainFields) -> About | None:
        """What an answer is counted to; None for one to a peer, which counts what it sends on."""
        if _HOP in fields.also:
            return None
        return _about(known, fields.also.get(_MODEL) or fields.also.get(_WANTED_FOR, b""))

    def _blob(self, target: bytes) -> Known | None:
        try:
            digest = parse_digest(target[len(_BLOBS) :].decode())
        except BadId:
            return None
        size = self.cache.known_size(shard_key(digest))
        if size is None:
            return None
        shown = of_blob(digest, size)
        quoted, about = f'"{shown.etag}"'.encode(), About.shard(shard_key(digest))
        known = Known(shown, shown.layout.slices, "", {}, any_accept=True, quoted=quoted, about=about)
        self._remember(target, known)
        return known

    def _remember(self, target: bytes, known: Known) -> None:
        self._known[target] = known
        while len(self._known) > KNOWN:
            self._known.popitem(last=False)


def _about(known: Known, said: bytes) -> About:
    return About.shard(known.about.key, said.decode()) if said and not known.model else known.about


def _key(piece: Slice) -> ShardKey:
    """Only public shards are looked for here."""
    return shard_key(piece.digest)


@dataclass(frozen=True, slots=True)
class Held:
    """An open slice."""

    piece: Slice
    reader: MemoryReader | DiskReader


class ShortConnection(PlainConnection):
    """A client connection whose plain hits are answered here."""

    __slots__ = ("_held_back", "_path", "_sending", "_socket")

    def __init__(self, path: ShortPath, manager: web.Server, **options: Any) -> None:
        super().__init__(path.requests, manager, **options)
        self._path = path
        self._sending: _Sending | None = None
        self._held_back = b""
        self._socket: socket.socket | None = None

    def connection_lost(self, exc: BaseException | None) -> None:
        """The client is gone: let go of everything."""
        if self._sending is not None:
            self._sending.stop()
            self._sending = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        super().connection_lost(exc)

    def _process_keepalive(self) -> None:
        """aiohttp's timer for idle connections: one that is being sent to is not idle."""
        if self._sending is not None:
            self.wait_for_next()
        super()._process_keepalive()

    async def shutdown(self, timeout: float | None = 15.0) -> None:
        """Let an answer that is being sent end, within ``timeout``, before the connection is closed."""
        if self._sending is not None:
            await asyncio.wait([self._sending.done], timeout=timeout)
        await super().shutdown(timeout)

    def answer(self, transport: asyncio.Transport, target: bytes, fields: PlainFields) -> bool:
        """Steps 1 to 3. False where the request is not for here; nothing has happened then."""
        path = self._path
        known = path.find(target, fields)
        if known is None:
            return False
        if fields.if_none_match:
            if fields.if_none_match == known.quoted:
                return self._not_modified(transport, known)
            asked = Conditions("GET", if_none_match=(fields.if_none_match.decode(),))
            decision = evaluate(asked, known.shown.etag, None)
            if isinstance(decision, NotModified):
                return self._not_modified(transport, known)
        if answer := path.small(known):
            transport.write(answer)
            path.tally(known, fields)
            return True
        if is_encrypted(transport):
            return False
        try:
            if self._socket is None:
                self._socket = duplicate(transport)
        except OSError:
            return False  # no descriptor for it
        opened = path.open(known)
        if opened is None:
            return False
        outcome = dearest([held.reader.outcome for held in opened])
        head = path.head(known, Whole(), outcome)
        self._sending = _Sending(self, path, self._socket, head, opened, path.about(known, fields))
        self.busy = True
        self._sending.go_on()
        return True

    def _not_modified(self, transport: asyncio.Transport, known: Known) -> bool:
        outcome = Outcome.HIT_MEMORY if known.shown.revision else None  # as the long path: a shard needs no look-up
        transport.write(self._path.head(known, NotModified(), outcome))
        return True

    def sent(self) -> None:
        """An answer is out: take what arrived meanwhile."""
        self._sending = None
        self.busy = False
        self.wait_for_next()
        data, self._held_back = self._held_back, b""
        if self.transport is not None:
            self.transport.resume_reading()
            if data:
                self.data_received(data)

    def hold_back(self, data: bytes) -> None:
        """What arrives while an answer is being sent waits its turn."""
        self._held_back += data
        if len(self._held_back) > MAX_HELD_BACK and self.transport is not None:
            self.transport.pause_reading()


class _Sending:
    """One answer on its way out: its head, then its slices, as fast as the client takes them."""

    def __init__(
        self,
        connection: ShortConnection,
        path: ShortPath,
        sock: socket.socket,
        head: bytes,
        opened: list[Held],
        about: About | None,
    ) -> None:
        """``about``: what it is counted to, if at all."""
        self._connection, self._path, self._socket, self._about = connection, path, sock, about
        self._head = memoryview(head)
        self._waiting = deque(opened)
        self._offset = 0
        """Bytes of the first waiting slice that are sent."""
        self._taken = self._sent = 0
        """Bytes that the client has taken since ``_since``, and of the body in all."""
        self._loop = asyncio.get_running_loop()
        self._watched = False
        self._began = self._since = self._loop.time()
        self._deadline = self._loop.call_later(STALL, self._check)
        self.done: asyncio.Future[None] = self._loop.create_future()

    def go_on(self) -> None:
        """Send until the socket takes no more, or others should have their turn."""
        left = TURN
        try:
            while self._head:
                sent = self._socket.send(self._head, socket.MSG_MORE)
                self._head = self._head[sent:]
            while self._waiting and left > 0:
                left -= self._send_some(self._waiting[0], left)
        except BlockingIOError:
            self._watch()
            return
        except OSError:
            self._abort()  # the client is gone, or the file is not what it was
            return
        if self._waiting:
            self._watch()  # it can be written to, so the loop comes back after the others
            return
        self.stop()
        self._connection.sent()

    def stop(self) -> None:
        """Let go of the slices and of the loop's attention."""
        self._deadline.cancel()
        if self._watched:
            self._loop.remove_writer(self._socket.fileno())
        left = len(self._waiting)
        for held in self._waiting:
            held.reader.close()
        self._waiting.clear()
        if not self.done.done():
            self.done.set_result(None)
            if self._about is not None:
                seconds = None if left else self._loop.time() - self._began
                self._path.account.pending(self._about).answered(self._sent, seconds, hit=True)

    def _send_some(self, held: Held, limit: int) -> int:
        piece = held.piece
        offset, size = piece.offset + self._offset, min(piece.length - self._offset, limit)
        if isinstance(held.reader, MemoryReader):
            sent = self._socket.send(held.reader.view[offset : offset + size])
        else:
            try:
                sent = os.sendfile(self._socket.fileno(), held.reader.file.fileno(), offset, size)
                if not sent:
                    raise OSError(errno.EIO, "a cached file is shorter than it was")
            except OSError as error:
                if error.errno in UNREADABLE:
                    held.reader.broken()
                raise
        self._taken += sent
        self._sent += sent
        if self._taken >= LEAST:  # its time begins anew: what socket buffers took at first buys it no more
            self._taken, self._since = 0, self._loop.time()
        self._offset += sent
        if self._offset == piece.length:
            self._waiting.popleft()
            self._offset = 0
            held.reader.close()
            self._path.count(held.reader.outcome, piece.length)
        return sent

    def _watch(self) -> None:
        if not self._watched:
            self._watched = True
            self._loop.add_writer(self._socket.fileno(), self.go_on)

    def _check(self) -> None:
        """A client that took less than LEAST bytes in STALL seconds is cut off."""
        if self._loop.time() - self._since >= STALL:
            self._abort()
        else:
            self._deadline = self._loop.call_at(self._since + STALL, self._check)

    def _abort(self) -> None:
        self.stop()
        if self._connection.transport is not None:
            self._connection.transport.abort()
