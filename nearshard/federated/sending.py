"""Asking an origin about rounds, and sending it an update: straight, or through a node that passes it on.

An update is sent in one go from the byte on that is there; when the link or who is asked breaks off, HEAD tells how
far it came, and it goes on there. Who is asked may be another node or origin then: the statement opens the way again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import aiohttp

from shared import codec
from shared.clock import Clock
from shared.codec import MAX_JSON
from shared.enrolment import SIGNATURE_FIELD
from shared.errors import CODES, DecodeError, NearshardError, NotFound, RequestError, SiteClock, UpstreamError
from shared.federated import (
    MAX_SKEW,
    OFFSET_FIELD,
    PART_TYPE,
    STATEMENT_TYPE,
    Counted,
    Offer,
    Rounds,
    authorization,
    check_url,
    parse_counted,
    parse_offer,
    parse_offset,
    parse_rounds,
    rounds_path,
    updates_path,
)
from shared.link import Link
from shared.web.session import CONNECT, FIRST_BYTE, Sessions, read_whole, translated

T = TypeVar("T")

CHUNK = 1 << 16
"""Bytes that are read from the disk and sent at a time."""
CHECKING = 300.0
"""Seconds that an origin may take to check an update whose last byte it has."""
TRIES = 5
"""Times in a row that all who can be asked may fail, without one byte more there, before it is given up."""
PAUSE, PAUSE_MAX = 0.5, 30.0
"""Seconds between two such times: at first, doubled each time, at most."""
_LOST = ("unauthorized", "unknown_upload", "wrong_offset")
"""Of an upload: its token ended, or it is not known where we ask now. The statement opens it again."""
_LATER = ("slow_down", "timed_out", "try_again")
"""What may go well a little later."""


@dataclass(frozen=True)
class Upload:
    """A body on its way."""

    model: str
    size: int
    file: Path
    state: Callable[[], tuple[bytes, str]]
    """The statement that opens the way, signed now, and its signature."""


class Rejected(RequestError):
    """What the origin has refused; ``error_code`` says why."""

    def __init__(self, message: str, *, code: str, retry_after: float = 0.0) -> None:
        """``retry_after``: seconds until it may be asked again, where it has said so."""
        self.retry_after = retry_after
        super().__init__(message, code=code)


class Sender:
    """Of one client. ``bases``: base URLs of those to ask, best first."""

    def __init__(
        self,
        sessions: Sessions,
        bases: Callable[[], Sequence[str]],
        credentials: Callable[[str], Mapping[str, str]],
        clock: Clock,
        link: Link,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """``credentials``: the field of the client's token, for who is of its network. ``progress``: told bytes that
        are there, and bytes in all."""
        self._sessions, self._bases, self._credentials = sessions, bases, credentials
        self._clock, self._link, self._progress = clock, link, progress

    async def rounds(self, model: str) -> Rounds:
        """What there is of a model. Raises NotFound, RequestError, UpstreamError."""

        async def ask(base: str) -> Rounds:
            answer = await self._exchange("GET", base, rounds_path(model), headers=self._credentials(base))
            found = parse_rounds(answer.body)
            if found.model != model:
                raise UpstreamError(f"{base} answered about another model")
            return found

        return await self._persist(ask)

    async def send(self, upload: Upload) -> Counted:
        """Have an update counted: once, whatever is lost on the way. Raises Rejected where it never will be as it is
        stated; UpstreamError where nobody could be asked to the end: what became of it is open then."""
        return await self._persist(lambda base: self._send_to(base, upload))

    async def ask(self, upload: Upload) -> Offer:
        """What the origin says to a statement; nothing of the body is sent. Raises as ``send``."""
        return await self._persist(lambda base: self._open(base, upload))

    async def _send_to(self, base: str, upload: Upload) -> Counted:
        offer = await self._open(base, upload)
        if offer.duplicate:
            return Counted(clipped=False, duplicate=True)
        offset = offer.offset
        while True:
            self._tell(offset, upload)
            try:
                answer = await self._append(base, offer, offset, upload)
            except Rejected as error:
                if error.error_code in (*_LOST, *_LATER):
                    raise _Broken(offset, error) from error
                raise
            except UpstreamError as error:
                reached = await self._reached(base, offer, offset)
                if reached <= offset or reached >= upload.size:  # all of it is there: the statement tells what became
                    raise _Broken(reached, error) from error
                offset = reached
                continue
            if answer.status == 200:
                self._tell(upload.size, upload)
                return parse_counted(answer.body)
            offset = parse_offset(answer.headers.get(OFFSET_FIELD, ""))

    async def _open(self, base: str, upload: Upload) -> Offer:
        statement, signature = upload.state()
        fields = {"Content-Type": STATEMENT_TYPE, SIGNATURE_FIELD: signature}
        answer = await self._exchange("POST", base, updates_path(upload.model), headers=fields, body=statement)
        offer = parse_offer(answer.body)
        if offer.offset > upload.size:
            raise UpstreamError(f"{base} has more of the update than there is")
        return offer

    async def _append(self, base: str, offer: Offer, offset: int, upload: Upload) -> Answer:
        fields = {
            "Authorization": authorization(offer.token),
            "Content-Type": PART_TYPE,
            OFFSET_FIELD: str(offset),
            "Content-Length": str(upload.size - offset),
        }
        return await self._exchange("PATCH", base, offer.upload, headers=fields, body=self._chunks(upload.file, offset))

    async def _reached(self, base: str, offer: Offer, offset: int) -> int:
        """How many bytes are there; those that are known to be where that cannot be told."""
        fields = {"Authorization": authorization(offer.token)}
        with suppress(RequestError, UpstreamError):
            answer = await self._exchange("HEAD", base, offer.upload, headers=fields)
            return parse_offset(answer.headers.get(OFFSET_FIELD, ""))
        return offset

    async def _chunks(self, file: Path, offset: int) -> AsyncIterator[bytes]:
        """From a byte of a file on, held to the link's policy. Nothing is left open between two of them: who breaks off
        leaves this to the garbage collector."""
        while chunk := await asyncio.to_thread(_read, file, offset):
            await self._link.take(len(chunk))
            yield chunk
            offset += len(chunk)

    def _tell(self, offset: int, upload: Upload) -> None:
        if self._progress:
            self._progress(offset, upload.size)

    # Who is asked

    async def _persist(self, ask: Callable[[str], Awaitable[T]]) -> T:
        """What the first of those to ask makes of it; again a little later where all fail."""
        reached, failed, pause = 0, 0, PAUSE
        while True:
            wait = 0.0
            try:
                return await self._first(ask)
            except UpstreamError as broken:
                error: NearshardError = broken.reason if isinstance(broken, _Broken) else broken
                if isinstance(broken, _Broken) and broken.reached > reached:
                    reached, failed, pause = broken.reached, 0, PAUSE  # it goes on: tries are counted anew
            except Rejected as refused:
                if refused.error_code not in _LATER:
                    raise
                error, wait = refused, min(refused.retry_after, PAUSE_MAX)
            failed += 1
            if failed >= TRIES:
                raise error
            await self._clock.sleep(max(pause, wait))
            pause = min(PAUSE_MAX, 2 * pause)

    async def _first(self, ask: Callable[[str], Awaitable[T]]) -> T:
        """What the first of those to ask makes of it. Raises the last UpstreamError; RequestError at once, but for who
        does not know such paths."""
        failure: NearshardError = UpstreamError(code="no_nodes")
        for base in self._secret_bases():
            try:
                return await ask(base)
            except UpstreamError as error:
                failure = failure if isinstance(failure, _Broken) else error
            except Rejected as error:
                if error.error_code not in ("unknown_path", "method_not_allowed"):
                    raise
                failure = UpstreamError(
                    f"{base} takes part in no federated rounds: it is no origin, and no node of one"
                )
        raise failure

    def _secret_bases(self) -> list[str]:
        """Those that updates may be sent to. Raises RequestError where all who are known would be sent it in clear."""
        found, refused = [], None
        for base in self._bases():
            try:
                found.append(check_url(base))
            except RequestError as error:
                refused = error
        if refused and not found:
            raise refused
        return found

    async def _exchange(
        self,
        method: str,
        base: str,
        path: str,
        *,
        headers: Mapping[str, str],
        body: bytes | AsyncIterator[bytes] | None = None,
    ) -> Answer:
        """Raises Rejected, ClockSkew, UpstreamError."""
        url = base + path
        long = body is not None and not isinstance(body, bytes)
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT, sock_read=CHECKING if long else 3 * FIRST_BYTE
        )
        with translated(url):
            async with self._sessions.of(base).request(
                method, url, data=body, headers=headers, allow_redirects=False, timeout=timeout
            ) as answer:
                try:
                    if answer.status >= 300 and method == "HEAD":
                        raise UpstreamError(f"{url} answered {answer.status}")
                    data = b"" if method == "HEAD" else await read_whole(answer, url, MAX_JSON)
                finally:
                    if answer.status >= 300:
                        answer.close()  # it has answered before the end: the rest of a body is not for it
                if answer.status >= 300:
                    raise _refused(url, answer, data)
                return Answer(answer.status, data, answer.headers)


@dataclass(frozen=True)
class Answer:
    """A small answer, read whole."""

    status: int
    body: bytes
    headers: Mapping[str, str]


class _Broken(UpstreamError):
    """An upload that broke off at a byte."""

    def __init__(self, reached: int, reason: NearshardError) -> None:
        super().__init__(str(reason))
        self.reached, self.reason = reached, reason


def _refused(url: str, answer: aiohttp.ClientResponse, body: bytes) -> NearshardError:
    """What was answered, as the error that it was there."""
    status, after, document = answer.status, answer.headers.get("Retry-After", "0"), {}
    with suppress(DecodeError):
        found = codec.decode_json(body)
        document = found if isinstance(found, dict) else {}
    code = str(document.get("code"))
    if status == 401 and code == SiteClock.code:
        return SiteClock(_clocks(document.get("seconds_ahead")))
    known = code if code in CODES and CODES[code].status == status else None
    if known is None or status >= 500:
        return UpstreamError(f"{url} answered {status}{f': {CODES[known].title}' if known else ''}", code=known)
    if status == 404 and known == "unknown_model":
        return NotFound(f"{CODES[known].title} ({url})", code=known)
    seconds = float(after) if after.isdecimal() and len(after) < 6 else 0.0
    return Rejected(f"{CODES[known].title} ({url})", code=known, retry_after=seconds)


def _clocks(ahead: object) -> str:
    """What is said of a statement that is from another time. ``ahead``: by how many seconds, if the origin said so."""
    by = f"{abs(ahead)} s {'ahead of' if ahead > 0 else 'behind'}" if type(ahead) is int else "far from"
    return (
        f"this machine's clock is {by} the origin's, and {MAX_SKEW:.0f} s are allowed: set the one that is wrong, and"
        " submit again; the update is kept"
    )


def _read(file: Path, offset: int) -> bytes:
    """The next chunk (blocking: for a thread)."""
    with file.open("rb", buffering=0) as opened:
        opened.seek(offset)
        return opened.read(CHUNK)
