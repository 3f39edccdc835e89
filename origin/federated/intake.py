"""What sites send, taken in: the requests below ``/federated`` (``shared.federated`` says what is asked and answered).

A body comes to a file of this machine, a part at a time, and is counted when all of it is there and was found right:
first it is put into the store, then the round's record names it. So a site that dies leaves a part that nobody counts,
an origin that dies between the two leaves a body that nobody counts, and what is counted is there. A part stays for who
goes on with it, until its round ends.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
import secrets
import shutil
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import web
from structlog.typing import FilteringBoundLogger

from origin.audit import Audit
from origin.config import FederatedSettings
from origin.federated import sites as book
from origin.federated.admission import (
    OLDEST,
    TOO_LARGE,
    Duplicate,
    Takes,
    check_site,
    check_takes,
    judge,
    reference_norm,
)
from origin.federated.documents import Entry, Rejection, Round
from origin.federated.records import Records, update_path
from origin.federated.transitions import State
from shared.clock import Clock
from shared.digest import hex_of
from shared.enrolment import SIGNATURE_FIELD
from shared.errors import DecodeError, DiskError, NonFinite, NotFound, RequestError, SchemaMismatch
from shared.federated import (
    LENGTH_FIELD,
    MAX_ROUNDS,
    OFFSET_FIELD,
    PART_TYPE,
    PREFIX,
    Counted,
    FederatedPath,
    Offer,
    OpenRound,
    PastRound,
    Rounds,
    Statement,
    check_signed,
    encode_counted,
    encode_offer,
    encode_rounds,
    parse_authorization,
    parse_federated_path,
    parse_offset,
    parse_statement,
    taken,
    upload_path,
)
from shared.metrics import Metrics
from shared.paths import ModelPath
from shared.publishing import LEAST_RATE, UPLOAD_GRACE
from shared.updates.document import Update, check_schema, open_update
from shared.web.access import Gate
from shared.web.middleware import KIND, read_body, refuse_expectation

if TYPE_CHECKING:
    from shared.updates.codec import Floats

IDLE = 10.0
"""Seconds between two reads of a body."""
BATCH = 1 << 20
"""Bytes of a body that are held before they are written."""
CHECKS = 2
"""Bodies that are looked through at a time."""
OFFERS = 4096
"""Uploads that are remembered; the one that was not used for longest goes, and is asked for again."""
BURST = 8
"""Statements of a site that may come at once."""
REJECTIONS = 1000
"""Refusals that a round's record lists."""
LISTED = 8
"""Rounds that sites are told of."""
STRIKES = frozenset({"non_finite", "norm_exceeded", "too_large"})
"""What no honest site's program sends."""


@dataclass
class _Upload:
    """A body on its way."""

    statement: Statement
    takes: int
    """The number of the round that it would count in."""
    file: Path
    token: str
    offset: int
    turn: int = 0
    """Grows with each request for it: of two, the later one goes on."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def key(self) -> tuple[str, str]:
        """What it is of: one upload a site and model."""
        return self.statement.site, self.statement.model


class Intake:
    """The requests below ``/federated``."""

    def __init__(
        self,
        records: Records,
        settings: FederatedSettings,
        spool: Path,
        gate: Gate,
        audit: Audit,
        complete: Callable[[str], None],
        clock: Clock,
        metrics: Metrics,
        log: FilteringBoundLogger,
    ) -> None:
        """``spool``: the folder for what is on its way. ``complete`` is called with a model all of whose sites have
        delivered."""
        self._records, self._storage, self._settings, self._spool = records, records.storage, settings, spool
        self._gate, self._audit, self._complete = gate, audit, complete
        self._clock, self._metrics, self._log = clock, metrics, log
        self._uploads: OrderedDict[tuple[str, str], _Upload] = OrderedDict()
        self._allowances: dict[str, tuple[float, float]] = {}
        self._bodies = 0
        self._checks = asyncio.Semaphore(CHECKS)

    def add_routes(self, app: web.Application) -> None:
        """Answer below ``/federated``."""
        base = PREFIX + "/{org}/{name}"
        app.router.add_get(base, self._rounds, allow_head=True)
        for method, path, handler in (
            ("POST", "/updates", self._state),
            ("HEAD", "/updates/{digest}", self._head),
            ("PATCH", "/updates/{digest}", self._append),
        ):
            app.router.add_route(method, base + path, handler, expect_handler=refuse_expectation)

    # What is open

    async def _rounds(self, request: web.Request) -> web.Response:
        model = _path(request).model
        await self._gate.enter(request, ModelPath(model))
        shown = [known.shown() for known in await self._newest(model, LISTED)]
        opened = next((known for known in shown if isinstance(known, OpenRound)), None)
        last = tuple(known for known in shown if isinstance(known, PastRound))[:MAX_ROUNDS]
        return _json(encode_rounds(Rounds(model, opened, last)))

    async def _newest(self, model: str, count: int) -> list[Round]:
        """The last rounds of a model, newest first; none where there never was any."""
        try:
            found = [await self._records.newest(model)]
        except NotFound:
            return []
        for number in range(found[0].number - 1, max(0, found[0].number - count), -1):
            found.append(await self._records.round(model, number))
        return found

    # Statements

    async def _state(self, request: web.Request) -> web.Response:
        model = _path(request).model
        body = await read_body(request)
        statement = parse_statement(model, body)
        await self._check_proven(request, statement, body)
        try:
            judged = await self._judge(statement)
        except RequestError as error:
            await self._say_refused(statement, error)
            raise
        if isinstance(judged, Duplicate):
            return _json(encode_offer(Offer(duplicate=True)))
        upload = await self._offer(statement, judged)
        offer = Offer(upload=upload_path(model, statement.digest), token=upload.token, offset=upload.offset)
        return _json(encode_offer(offer), status=201)

    async def _check_proven(self, request: web.Request, statement: Statement, body: bytes) -> None:
        """Whether an enrolled site states this. Raises RequestError (``unknown_site``, ``bad_signature``); NotFound
        where who asks is not to know of the model."""
        site = (await self._records.sites()).get(statement.site)
        try:
            if site is None:
                raise RequestError(code="unknown_site")
            check_signed(body, request.headers.get(SIGNATURE_FIELD, ""), bytes.fromhex(site.key))
        except RequestError as error:
            self._metrics.federated_updates.labels(error.error_code).inc()
            if not await self._gate.sees(request, statement.model):
                raise NotFound(f"there is no model {statement.model}", code="unknown_model") from None
            raise
        self._check_pace(statement.site)
        try:
            check_site(statement, site, self._now())
        except RequestError as error:
            await self._say_refused(statement, error)
            raise

    def _check_pace(self, site: str) -> None:
        """Whether a site has statements left. Raises RequestError (``slow_down``)."""
        now, interval = self._clock.monotonic(), self._settings.interval
        left, at = self._allowances.get(site, (float(BURST), now))
        left = min(float(BURST), left + (now - at) / interval if interval else BURST)
        if left < 1:
            wait = math.ceil((1 - left) * interval)
            raise RequestError(code="slow_down", headers={"Retry-After": str(wait)})
        self._allowances[site] = left - 1, now

    async def _judge(self, statement: Statement) -> Takes | Duplicate:
        rounds = await self._newest(statement.model, 1)
        if rounds and 0 < rounds[0].number - statement.round <= OLDEST:
            rounds = await self._newest(statement.model, rounds[0].number - statement.round + 1)
        return judge(statement, rounds, self._now())

    async def _offer(self, statement: Statement, takes: Takes) -> _Upload:
        """The upload of a body: what is there of it is gone on with. A site has one at a time."""
        number = takes.round.number
        place = self._spool / statement.model.replace("/", "~") / str(number)
        file = place / f"{hex_of(statement.digest)}~{statement.site}"
        known = self._uploads.get((statement.site, statement.model))
        if known and known.file == file:
            async with known.lock:  # what is being written counts
                if self._uploads.get(known.key) is known:
                    known.token, known.statement, known.turn = secrets.token_urlsafe(32), statement, known.turn + 1
                    self._uploads.move_to_end(known.key)
                    return known
        elif known:
            await self._drop(known)
        offset = await asyncio.to_thread(_make_ready, file, statement.site, statement.size)
        upload = _Upload(statement, number, file, secrets.token_urlsafe(32), offset)
        self._uploads[upload.key] = upload
        while len(self._uploads) > OFFERS:
            self._uploads.popitem(last=False)
        return upload

    async def _drop(self, upload: _Upload) -> None:
        """Forget a body that is not all there, or not right."""
        upload.turn += 1
        if self._uploads.get(upload.key) is upload:
            del self._uploads[upload.key]
        async with upload.lock:
            await asyncio.to_thread(upload.file.unlink, missing_ok=True)

    # Bodies

    async def _head(self, request: web.Request) -> web.Response:
        upload = self._upload(request)
        async with upload.lock:  # what is being written counts
            offset = upload.offset
        fields = {OFFSET_FIELD: str(offset), LENGTH_FIELD: str(upload.statement.size)}
        return web.Response(headers={**fields, "Cache-Control": "no-store"})

    async def _append(self, request: web.Request) -> web.Response:
        upload = self._upload(request)
        if "Content-Encoding" in request.headers or request.content_type != PART_TYPE:
            raise RequestError(code="unsupported_type")
        offset, length = parse_offset(request.headers.get(OFFSET_FIELD, "")), request.content_length
        async with upload.lock:  # what an earlier request is writing ends before it is decided where this one begins
            if offset != upload.offset:
                raise _wrong_offset(upload)
            if length is None or length > upload.statement.size - offset:
                raise RequestError("a part of a known length, within the size that was stated", code="too_large")
            upload.turn += 1
            turn = upload.turn
        async with self._room():
            await self._receive(request, upload, turn, length)
        if upload.offset < upload.statement.size:
            return web.Response(status=204, headers={OFFSET_FIELD: str(upload.offset)})
        return _json(encode_counted(await self._finish(upload)))

    def _upload(self, request: web.Request) -> _Upload:
        """The upload that a request names, with its token. Raises NotFound (``unknown_upload``), RequestError
        (``unauthorized``)."""
        path, token = _path(request), parse_authorization(request.headers.get("Authorization", ""))
        for upload in self._uploads.values():
            named = (upload.statement.model, upload.statement.digest) == (path.model, path.digest)
            if named and secrets.compare_digest(upload.token, token):
                return upload
        raise NotFound(code="unknown_upload")

    @asynccontextmanager
    async def _room(self) -> AsyncIterator[None]:
        """One of the bodies that may come at a time. Raises RequestError (``busy``)."""
        if self._bodies >= self._settings.uploads:
            raise RequestError("too many updates are coming in", code="busy")
        self._bodies += 1
        try:
            yield
        finally:
            self._bodies -= 1

    async def _receive(self, request: web.Request, upload: _Upload, turn: int, length: int) -> None:
        """Write a part as it comes; what came stays, also where the rest does not. Raises RequestError (``timed_out``,
        ``wrong_offset`` where a later request goes on), DiskError."""
        batch = bytearray()
        try:
            async with asyncio.timeout(UPLOAD_GRACE + length / LEAST_RATE):
                while True:
                    async with asyncio.timeout(IDLE):
                        chunk = await request.content.readany()
                    if not chunk:
                        break
                    batch += chunk
                    if len(batch) >= BATCH:
                        await self._write(upload, turn, batch)
                        batch = bytearray()
        except TimeoutError:
            raise RequestError(code="timed_out") from None
        finally:
            await self._write(upload, turn, batch)

    async def _write(self, upload: _Upload, turn: int, data: bytearray) -> None:
        async with upload.lock:
            if upload.turn != turn:
                raise _wrong_offset(upload)
            if data:
                await asyncio.to_thread(_append_to, upload.file, upload.offset, data)
                upload.offset += len(data)

    # Counting

    async def _finish(self, upload: _Upload) -> Counted:
        """Look through a body that is all there, and count it. Raises RequestError, as table U has it."""
        statement, turn = upload.statement, upload.turn
        async with self._checks:
            if upload.turn != turn:
                raise _wrong_offset(upload)
            try:
                current = await self._records.round(statement.model, upload.takes)
                check_takes(current, statement, self._now())
                manifest = await self._storage.manifest(statement.model, current.base_revision)
                expected = taken(manifest.tensors, current.tensors)
                norm = await asyncio.to_thread(examine, upload.file, statement, expected)
                _check_norm(norm, current, statement.site)
                counted = await self._count(upload, current, norm)
            except RequestError as error:
                await self._drop(upload)
                await self._refuse(upload, error)
                raise
        await self._drop(upload)
        return counted

    async def _count(self, upload: _Upload, current: Round, norm: float) -> Counted:
        """Store the body, then have the round's record name it."""
        statement = upload.statement
        path = update_path(statement.model, current.number, statement.site, statement.digest)
        entry = Entry(
            digest=statement.digest,
            size=statement.size,
            examples=statement.examples,
            norm=norm,
            round=statement.round,
            path=path,
            time=self._now().isoformat(timespec="seconds"),
            codecs=statement.codecs,
        )
        before: list[Entry | None] = []

        def edit(known: Round) -> Round:
            there = known.updates.get(statement.site)
            before[:] = [there]
            if there and there.digest == statement.digest:
                return known
            check_takes(known, statement, self._now())
            return known.model_copy(update={"updates": {**known.updates, statement.site: entry}})

        await self._storage.objects.put_file(path, upload.file)
        try:
            now = await self._records.change(statement.model, current.number, edit)
        except RequestError:
            await self._storage.objects.delete([path])
            raise
        if before[0] and before[0].digest == statement.digest:
            return Counted(clipped=False, duplicate=True)
        if before[0]:  # the late one whose place it took
            await self._storage.objects.delete([before[0].path])
        usual = reference_norm(now, statement.site)
        clipped = usual is not None and norm > usual
        self._metrics.federated_updates.labels("clipped" if clipped else "counted").inc()
        await self._say("update counted", statement, norm=norm, clipped=clipped)
        if now.updates.keys() >= set(now.sites):
            self._complete(statement.model)
        return Counted(clipped)

    async def _refuse(self, upload: _Upload, error: RequestError) -> None:
        """Note a refusal, and strike the site where no honest one sends that."""
        statement = upload.statement
        await self._say_refused(statement, error)
        rejection = Rejection(
            site=statement.site, code=error.error_code, time=self._now().isoformat(timespec="seconds")
        )

        def edit(known: Round) -> Round:
            if known.state is not State.OPEN or len(known.rejected) >= REJECTIONS:
                return known
            return known.model_copy(update={"rejected": (*known.rejected, rejection)})

        await self._records.change(statement.model, upload.takes, edit)
        if error.error_code in STRIKES:
            struck = await book.strike(self._records, statement.site, self._settings.strikes)
            await self._say("strike", statement, strikes=struck.strikes)
            if struck.quarantined:
                self._metrics.federated_quarantines.inc()
                await self._say("quarantined", statement, strikes=struck.strikes)

    async def clean(self, active: Mapping[str, int]) -> None:
        """Drop what came of rounds that take none any more. ``active``: the round that is open, by model."""
        for upload in list(self._uploads.values()):
            if active.get(upload.statement.model) != upload.takes:
                await self._drop(upload)
        keep = {(model.replace("/", "~"), str(number)) for model, number in active.items()}
        await asyncio.to_thread(_clean, self._spool, keep)

    async def _say_refused(self, statement: Statement, error: RequestError) -> None:
        self._metrics.federated_updates.labels(error.error_code).inc()
        await self._say("update refused", statement, code=error.error_code, reason=str(error))

    async def _say(self, event: str, statement: Statement, **what: object) -> None:
        about = {"model": statement.model, "round": statement.round, "digest": statement.digest, **what}
        self._log.info(event, site=statement.site, **about)
        await asyncio.to_thread(self._audit.add, event, statement.site, **about)

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock.time(), UTC)


def _check_norm(norm: float, current: Round, site: str) -> None:
    usual = reference_norm(current, site)
    if usual is not None and norm > TOO_LARGE * usual:
        raise RequestError(f"a norm of {norm:.4g}, where {usual:.4g} is usual", code="norm_exceeded")


def examine(file: Path, statement: Statement, expected: Mapping[str, tuple[int, ...]]) -> float:
    """Look through a body: is it what was stated, are its tensors those of the round, is every value finite. Gives its
    L2 norm. Memory: a few segments. Raises RequestError: ``digest_mismatch``, ``bad_update``, ``schema_mismatch``,
    ``non_finite``, ``too_large``; DiskError."""
    import numpy as np  # takes long to import, and most origins never need it

    try:
        with file.open("rb") as opened:
            if "sha256:" + hashlib.file_digest(opened, "sha256").hexdigest() != statement.digest:
                raise RequestError(code="digest_mismatch")
            update = open_update(opened, statement.size)
            check_schema(update, expected)
            if not update.codecs() <= set(statement.codecs):
                raise RequestError("written with other codecs than was stated", code="bad_update")
            squares = 0.0
            for name, head in update.tensors.items():
                for number in range(len(head.segments)):
                    squares += float(np.square(_segment(update, name, number), dtype=np.float64).sum())
    except DecodeError as error:
        if error.error_code == "too_large":
            raise
        raise RequestError(str(error), code="bad_update") from error
    except OSError as error:
        raise DiskError(f"{file}: {error.strerror}") from error
    if not math.isfinite(squares):
        raise NonFinite("its norm is not finite")
    return math.sqrt(squares)


def _segment(update: Update, name: str, number: int) -> Floats:
    """A segment's values. Raises SchemaMismatch for bytes that are none of its shape: indices that are out of range or
    order, too few values; DecodeError (``too_large``), NonFinite."""
    try:
        return update.read(name, number)
    except DecodeError as error:
        if error.error_code == "too_large":
            raise
        raise SchemaMismatch(f"{name}: {error}") from error


def _make_ready(file: Path, site: str, size: int) -> int:
    """A place for a body, without others of the site; how many bytes of it are there."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        for other in file.parent.glob(f"*~{site}"):
            if other != file:
                other.unlink()
        if shutil.disk_usage(file.parent).free < size:
            raise DiskError(f"{file.parent}: there is no room for {size} bytes", code="disk_full")
        with file.open("ab") as opened:
            if opened.tell() > size:
                opened.truncate(0)
            return opened.seek(0, os.SEEK_END)
    except OSError as error:
        raise DiskError(f"{file}: {error.strerror}") from error


def _append_to(file: Path, offset: int, data: bytearray) -> None:
    try:
        with file.open("r+b") as opened:
            opened.seek(offset)
            opened.write(data)
    except OSError as error:
        raise DiskError(f"{file}: {error.strerror}") from error


def _clean(spool: Path, keep: set[tuple[str, str]]) -> None:
    for folder in spool.glob("*/*"):
        if (folder.parent.name, folder.name) not in keep:
            shutil.rmtree(folder, ignore_errors=True)
    for folder in spool.glob("*"):
        with suppress(OSError):
            folder.rmdir()


def _wrong_offset(upload: _Upload) -> RequestError:
    return RequestError(code="wrong_offset", headers={OFFSET_FIELD: str(upload.offset)})


def _path(request: web.Request) -> FederatedPath:
    request[KIND] = "federated"
    return parse_federated_path(request.rel_url.raw_path)


def _json(body: bytes, status: int = 200) -> web.Response:
    return web.Response(
        body=body, status=status, content_type="application/json", headers={"Cache-Control": "no-store"}
    )
