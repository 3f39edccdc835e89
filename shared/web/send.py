"""Sending: the one streaming function. Files, tasks, shards and ranges of any of them leave through here."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import BinaryIO

from aiohttp import web

from shared.conditional import Conditions, Decision, NotModified, Partial, evaluate
from shared.errors import DiskError
from shared.layout import Span
from shared.representation import BINARY, Representation, disposition
from shared.web.middleware import BODY_BEGUN
from shared.web.wire import Wire, is_encrypted

UNIT = 256 << 10
"""Bytes handed to the kernel at a time; a client has STALL seconds to take them."""
COPIED = 32 << 10
"""Bytes of memory handed to the transport at a time: it copies what the socket does not take, for each reader."""
STALL = 25.0
"""Seconds: below 10 KB/s a reader is cut off."""
SMALL = 64 << 10
"""Bodies up to this many bytes go out with their head in one write."""


@dataclass(frozen=True, slots=True)
class FileRegion:
    """``length`` bytes of an open file from ``offset`` on, sent without passing through Python."""

    file: BinaryIO
    offset: int
    length: int
    broken: Callable[[], None] | None = None
    """Called where the disk fails to give these bytes: they are not to be relied on any more."""


Piece = memoryview | FileRegion
UNREADABLE = (errno.EIO, errno.ESTALE, errno.EBADMSG)
"""What the kernel says where it is the file, not the client, that fails."""


@contextmanager
def reading(region: FileRegion) -> Iterator[None]:
    """Reads of a file: where the disk fails, its owner is told. Raises DiskError."""
    try:
        yield
    except (OSError, DiskError) as error:
        if isinstance(error, OSError) and error.errno not in UNREADABLE:
            raise
        if region.broken:
            region.broken()
        raise DiskError(f"a cached file cannot be read: {error}") from error


def conditions(request: web.Request) -> Conditions:
    """The fields of a request that decide what is sent."""
    fields = request.headers
    return Conditions(
        request.method,
        fields.getall("Range", ()),
        fields.getall("If-Range", ()),
        fields.getall("If-Match", ()),
        fields.getall("If-None-Match", ()),
    )


def decide(request: web.Request, representation: Representation) -> tuple[Decision, Span]:
    """What to send of a representation, and its span. Raises RequestError (412, 416)."""
    decision = evaluate(conditions(request), representation.etag, representation.layout.size)
    return decision, decision.span if isinstance(decision, Partial) else representation.layout.whole


def fields_of(
    representation: Representation, decision: Decision, span: Span, fields: Mapping[str, str]
) -> tuple[int, dict[str, str]]:
    """Status and fields of an answer with ``span`` of a representation. Pure; the same on every path."""
    headers = {**representation.headers(), **fields}
    if isinstance(decision, NotModified):
        return 304, headers
    headers["Content-Type"] = representation.content_type
    headers["X-Content-Type-Options"] = "nosniff"
    if representation.filename and representation.content_type == BINARY:
        headers["Content-Disposition"] = disposition(representation.filename)
    if isinstance(decision, Partial):
        headers["Content-Range"] = f"bytes {span.start}-{span.stop - 1}/{representation.layout.size}"
    headers["Content-Length"] = str(span.length)
    return 206 if isinstance(decision, Partial) else 200, headers


async def send(
    request: web.Request,
    representation: Representation,
    decision: Decision,
    span: Span,
    pieces: AsyncIterator[Piece],
    fields: Mapping[str, str],
) -> web.StreamResponse:
    """Answer with ``span`` of a representation, whose bytes ``pieces`` gives in order.

    ``pieces`` is left unread for HEAD and 304. An error before the first piece is an answer of its own; after
    it, whatever ``pieces`` raises ends the connection (``shared.web.middleware``).
    """
    status, headers = fields_of(representation, decision, span, fields)
    if isinstance(decision, NotModified) or request.method == "HEAD":
        return web.Response(status=status, headers=headers)
    if span.length <= SMALL:
        return web.Response(status=status, headers=headers, body=await _collect(pieces))
    first = await anext(pieces)
    response = web.StreamResponse(status=status, headers=headers)
    transport = request.transport
    if transport is None:
        raise ConnectionResetError("the client left")
    # Before the head: without a descriptor for it, there is an error to answer with. The kernel does not encrypt.
    with nullcontext() if is_encrypted(transport) else Wire(transport) as wire:
        request[BODY_BEGUN] = response
        await response.prepare(request)
        # So that drain() means: all is with the kernel. With TLS 0 would mean never, and one byte is as good.
        transport.set_write_buffer_limits(0 if wire else 1)
        await _send_piece(request, transport, response, wire, first)
        async for piece in pieces:
            await _send_piece(request, transport, response, wire, piece)
    await response.write_eof()
    return response


async def _collect(pieces: AsyncIterator[Piece]) -> bytes:
    parts = []
    async for piece in pieces:
        parts.append(piece if isinstance(piece, memoryview) else _read(piece))
    return b"".join(parts)


def _read(region: FileRegion) -> bytes:
    return bytes(_read_unit(region, 0, region.length))


async def _send_piece(
    request: web.Request, transport: asyncio.Transport, response: web.StreamResponse, wire: Wire | None, piece: Piece
) -> None:
    length = len(piece) if isinstance(piece, memoryview) else piece.length
    for start in range(0, length, UNIT):
        size = min(UNIT, length - start)
        try:
            async with asyncio.timeout(STALL):
                if isinstance(piece, FileRegion) and wire:
                    await request.writer.drain()
                    with reading(piece):
                        await wire.sendfile(piece.file, piece.offset + start, size)
                    continue
                unit = piece[start : start + size] if isinstance(piece, memoryview) else _read_unit(piece, start, size)
                for at in range(0, size, COPIED):
                    await response.write(unit[at : at + COPIED])
        except TimeoutError:
            transport.abort()  # nothing is being read at the other end: there is nobody to be polite to
            raise ConnectionResetError("the client reads too slowly") from None


def _read_unit(region: FileRegion, start: int, size: int) -> memoryview:
    with reading(region):
        data = os.pread(region.file.fileno(), size, region.offset + start)
        if len(data) != size:
            raise DiskError("a cached file is shorter than it was")
    return memoryview(data)
