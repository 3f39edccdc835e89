"""The origin's side of publishing from afar (``shared.publishing`` says what is asked and answered).

Nothing is stored for who is not a publisher of the organisation, nothing under a name that its bytes do not have, and
no manifest before its shards. What is visible changes by one PUT of metadata, checked here as clients will check it.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from aiohttp import web
from structlog.typing import FilteringBoundLogger
from tuf.api.metadata import Targets

from origin import signing
from origin.audit import Audit
from origin.commit import check_visibility, publisher_keyids, role_of, store_manifest
from origin.signing import State
from origin.trust_store import TrustStore
from shared import codec
from shared.clock import Clock
from shared.digest import Digest, digest_of, parse_digest
from shared.enrolment import SIGNATURE_FIELD
from shared.errors import Conflict, ManifestInvalid, MetadataInvalid, NotFound, RequestError
from shared.ids import parse_model
from shared.keys import NodeKey
from shared.manifest import MAX_MANIFEST, MAX_SHARD, decode
from shared.nonces import Nonces
from shared.publishing import (
    LEAST_RATE,
    PREFIX,
    SCHEME,
    SESSION_TIME,
    UPLOAD_GRACE,
    Opening,
    parse_opening,
    parse_shards,
)
from shared.tokens import Right, Token, TokenError
from shared.trust_names import parse_file_name
from shared.web.access import Gate
from shared.web.middleware import KIND, read_body, refuse_expectation

UPLOADS = 8
"""Shards that are taken in at a time; each is in memory until its digest was right."""
IDLE = 10.0
"""Seconds between two reads of an upload."""
SESSIONS = 1024
REFUSED = 60
"""Refusals a minute that are written to the audit log."""
EARLY = timedelta(days=1)
"""By how much a publisher's metadata may outlive what it should: clocks differ."""
_TOKEN = re.compile(rf"{SCHEME} ([A-Za-z0-9_-]{{43}})", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Session:
    """A publisher that has proven itself, for one model."""

    opening: Opening
    key_id: str
    ends: float
    token: Token | None = None
    """What was shown to begin it, where that is asked for."""

    @property
    def model(self) -> str:
        """What is published."""
        return self.opening.model

    @property
    def role(self) -> str:
        """The role that is signed in the end."""
        return role_of(self.model, private=self.opening.private)

    @property
    def space(self) -> str:
        """The model whose private shards are stored; empty for public ones."""
        return self.model if self.opening.private else ""

    @property
    def by(self) -> Mapping[str, str]:
        """Who was given the token, for the log."""
        return {"token_id": self.token.id, "subject": self.token.subject} if self.token else {}


class Sessions:
    """Who may upload what, for an hour."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.nonces = Nonces(now, lambda: secrets.token_hex(16))
        self._open: OrderedDict[str, Session] = OrderedDict()

    def begin(self, opening: Opening, key_id: str, token: Token | None = None) -> str:
        """A new session's name, which is its holder's secret."""
        name = secrets.token_urlsafe(32)
        self._open[name] = Session(opening, key_id, self._now() + SESSION_TIME, token)
        while len(self._open) > SESSIONS:
            self._open.popitem(last=False)
        return name

    def find(self, model: str, authorization: str) -> Session:
        """The session of a request. Raises RequestError (``no_session``)."""
        match = _TOKEN.fullmatch(authorization)
        session = self._open.get(match[1]) if match else None
        if session is None or session.model != model or self._now() >= session.ends:
            raise RequestError(code="no_session", headers={"WWW-Authenticate": SCHEME})  # RFC 9110 §15.5.2
        return session


class Uploads:
    """The requests below ``/publish``."""

    def __init__(
        self,
        trust: TrustStore,
        online: Callable[[], Sequence[NodeKey]],
        audit: Audit,
        tell: Callable[[str], None],
        clock: Clock,
        log: FilteringBoundLogger,
        *,
        gate: Gate | None = None,
    ) -> None:
        """``online``: the online key, ConfigError where there is none. ``tell`` is called with a model that changed.
        ``gate``: where a token is asked for besides the publisher's signature."""
        self._trust, self._storage, self._online = trust, trust.storage, online
        self._audit, self._tell, self._clock, self._log = audit, tell, clock, log
        self._gate = gate
        self._sessions = Sessions(clock.monotonic)
        self._room = asyncio.Semaphore(UPLOADS)
        self._committing = asyncio.Lock()
        self._minute, self._refused = 0, 0

    def add_routes(self, app: web.Application) -> None:
        """Answer below ``/publish``."""
        base = PREFIX + "/{org}/{name}"
        for method, path, handler in (
            ("GET", "/nonce", self._nonce),
            ("POST", "/session", self._begin),
            ("POST", "/missing", self._missing),
            ("PUT", "/blobs/{digest}", self._put_blob),
            ("PUT", "/manifests/{digest}", self._put_manifest),
            ("GET", "/trust/{file}", self._get_trust),
            ("PUT", "/trust/{file}", self._put_trust),
        ):
            app.router.add_route(method, base + path, handler, expect_handler=refuse_expectation)

    async def _nonce(self, request: web.Request) -> web.Response:
        _model(request)
        return _json({"nonce": self._sessions.nonces.current()})

    async def _begin(self, request: web.Request) -> web.Response:
        model = _model(request)
        token = await self._check_token(self._gate, request, model) if self._gate else None
        opening = parse_opening(model, await read_body(request), request.headers.get(SIGNATURE_FIELD, ""))
        if not self._sessions.nonces.fresh(opening.nonce):
            raise RequestError(code="stale_nonce", headers={"WWW-Authenticate": SCHEME})
        key_id = signing.key_of(opening.key).keyid
        await self._check_publisher(model, opening, key_id)
        check_visibility(await self._trust.state(), model, private=opening.private)
        return _json({"session": self._sessions.begin(opening, key_id, token), "seconds": SESSION_TIME})

    async def _missing(self, request: web.Request) -> web.Response:
        session = await self._session(request)
        shards = parse_shards(await read_body(request))
        return _json({"missing": await self._storage.lacks(shards, session.space)})

    async def _put_blob(self, request: web.Request) -> web.Response:
        session, digest = await self._session(request), _digest(request)
        async with self._room:
            data = await _receive(request, MAX_SHARD, digest)
            await self._storage.ensure_blob(digest, data, session.space)
        return web.Response(status=201)

    async def _put_manifest(self, request: web.Request) -> web.Response:
        session, revision = await self._session(request), _digest(request)
        data = await _receive(request, MAX_MANIFEST, revision)
        try:
            manifest = await asyncio.to_thread(decode, data)
        except ManifestInvalid as error:
            raise RequestError(str(error), code="bad_manifest") from error
        if manifest.model != session.model or manifest.revision != revision:
            raise RequestError("a manifest of another model, or not in its one form", code="bad_manifest")
        if not await store_manifest(self._storage, manifest, session.space):
            raise RequestError("a shard of the manifest is missing", code="incomplete")
        return web.Response(status=201)

    async def _get_trust(self, request: web.Request) -> web.Response:
        session = await self._session(request)
        role, version = _file(request)
        top = "~" not in role
        if not top and role != session.role and role not in signing.roles_of_org(session.model):
            raise NotFound(code="unknown_metadata")
        body = await self._trust.file(role, version)
        return web.Response(body=body, content_type="application/json", headers={"Cache-Control": "no-store"})

    async def _put_trust(self, request: web.Request) -> web.Response:
        session = await self._session(request)
        role, version = _file(request)
        if role not in signing.roles_of_org(session.model):
            raise MetadataInvalid("only the organisation's own roles are signed here")
        data = await _receive(request, signing.MAX_METADATA)
        async with self._committing:
            try:
                await self._commit(session, role, version, data)
            except RequestError as error:
                await self._say_refused(session.key_id, model=session.model, role=role, code=error.error_code)
                raise
        return web.Response(status=201)

    async def _commit(self, session: Session, role: str, version: int, data: bytes) -> None:
        online, now = self._online(), self._now()
        await self._trust.roll_forward(online, now, [role])
        if await self._trust.probe(role, version) == data:
            return  # sent again: the answer was lost
        state = await self._trust.state()
        await self._check_publisher(session.model, session.opening, session.key_id)
        signed = signing.check(data, Targets, role, version, [state.targets])
        signing.check_refs(signed, session.model.partition("/")[0])
        if signed.expires > signing.until(now, role) + EARLY:
            raise MetadataInvalid("it would be good for too long")
        await self._check_on_top(state, role, signed)
        changed = await self._check_changed(state, session, role, signed)
        await self._trust.create([(role, version, data)])
        await self._trust.roll_forward(online, now, [role])
        for ref, revision in changed.items():
            what = {"model": session.model, "ref": ref, "revision": revision, "role": role, **session.by}
            await self._say("published", session.key_id, **what)
        if changed:
            self._tell(session.model)

    async def _check_on_top(self, state: State, role: str, signed: Targets) -> None:
        """Whether it is the next version of what is in force. Raises Conflict: ``ref_conflict`` where a ref that it
        moves was moved since what it was signed on top of, ``stale_metadata`` where another was."""
        current = state.roles.get(role)
        following = await self._trust.next_version(role, current.version if current else 0)
        if signed.version == following:
            return
        if current is not None and signed.version <= current.version:
            base = await self._trust.probe(role, signed.version - 1)
            before = signing.parse(base, Targets)[0].targets if base else {}
            for path in signing.changed_targets(before, signed.targets):
                if before.get(path) != current.targets.get(path):
                    raise Conflict("the ref was moved by somebody else meanwhile", code="ref_conflict")
        raise Conflict(f"version {following} of the role is next")

    async def _check_changed(self, state: State, session: Session, role: str, signed: Targets) -> dict[str, Digest]:
        """What it changes: refs of the session's model, to revisions that are here, whole. Raises RequestError."""
        check_visibility(state, session.model, private=session.opening.private)
        current = state.roles.get(role)
        before = current.targets if current else {}
        changed = {}
        for path in signing.changed_targets(before, signed.targets):
            model, _, ref = path.rpartition("/")
            if model != session.model or role != session.role or path not in signed.targets:
                raise MetadataInvalid("it changes more than the refs of the model that is published")
            meaning = signing.ref_of(signed.targets[path])
            await self._check_whole(session, meaning.revision, meaning.size)
            if meaning.rollout:
                await self._check_whole(session, meaning.rollout.revision, meaning.rollout.size)
            changed[ref] = meaning.revision
        return changed

    async def _check_whole(self, session: Session, revision: Digest, size: int) -> None:
        """Whether a revision of the session's model is here, with all of its shards. Raises RequestError."""
        try:
            manifest = await self._storage.manifest(session.model, revision)
        except NotFound:
            raise RequestError("the manifest is missing", code="incomplete") from None
        if len(manifest.encoded) != size:
            raise MetadataInvalid("the manifest has another size")
        if await self._storage.lacks(manifest.stored, session.space):
            raise RequestError("a shard of the manifest is missing", code="incomplete")

    async def _session(self, request: web.Request) -> Session:
        request[KIND] = "publish"
        session = self._sessions.find(_model(request), request.headers.get("Authorization", ""))
        await self._check_publisher(session.model, session.opening, session.key_id)  # it may be revoked by now
        if self._gate and session.token:  # and so may this; that it expires ends no upload
            await self._gate.check_not_revoked(session.token)
        return session

    async def _check_token(self, gate: Gate, request: web.Request, model: str) -> Token:
        who = ""
        try:
            token = await gate.shown(request)
            who = token.id
            token.require(Right.PUBLISH, model)
        except TokenError as error:
            await self._say_refused(who, model=model, code=error.error_code)
            raise
        return token

    async def _check_publisher(self, model: str, opening: Opening, key_id: str) -> None:
        if key_id not in publisher_keyids(await self._trust.state(), model, private=opening.private):
            await self._say_refused(key_id, model=model, code="not_publisher")
            raise RequestError("the key may not publish for the organisation", code="not_publisher")

    async def _say(self, event: str, who: str, **what: object) -> None:
        self._log.info(event, key=who[:16], **what)
        await asyncio.to_thread(self._audit.add, event, who, **what)

    async def _say_refused(self, who: str, **what: object) -> None:
        """The same of who was refused: a bounded number a minute, since anybody can have that written."""
        minute = int(self._clock.monotonic() // 60)
        if minute != self._minute:
            self._minute, self._refused = minute, 0
        self._refused += 1
        if self._refused <= REFUSED:
            await self._say("refused", who, **what)

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock.time(), UTC)


async def _receive(request: web.Request, limit: int, digest: Digest | None = None) -> bytes:
    """A body, in time. Raises RequestError: ``unsupported_type``, ``too_large``, ``timed_out``, ``digest_mismatch``."""
    length = request.content_length
    if "Content-Encoding" in request.headers:
        raise RequestError(code="unsupported_type")
    if length is None or length > limit:
        raise RequestError(f"a body of a known length, at most {limit} bytes", code="too_large")
    body = bytearray()
    try:
        async with asyncio.timeout(UPLOAD_GRACE + length / LEAST_RATE):
            while True:
                async with asyncio.timeout(IDLE):
                    chunk = await request.content.readany()
                if not chunk:
                    break
                body += chunk
    except TimeoutError:
        raise RequestError(code="timed_out") from None
    if len(body) != length:
        raise RequestError("the body ended early")
    data = bytes(body)
    if digest and await asyncio.to_thread(digest_of, data) != digest:
        raise RequestError(code="digest_mismatch")
    return data


def _model(request: web.Request) -> str:
    request[KIND] = "publish"
    return parse_model(f"{request.match_info['org']}/{request.match_info['name']}")


def _digest(request: web.Request) -> Digest:
    return parse_digest(request.match_info["digest"])


def _file(request: web.Request) -> tuple[str, int]:
    found = parse_file_name(request.match_info["file"])
    if found is None:
        raise NotFound(code="unknown_metadata")
    return found


def _json(document: object) -> web.Response:
    return web.Response(
        body=codec.encode_json(document), content_type="application/json", headers={"Cache-Control": "no-store"}
    )
