"""The signed metadata as it is now: fetched from whoever has it, verified (``shared.trust``), kept, and served on.

What was confirmed is fresh for ``lifetime`` seconds; then the timestamp is asked for with If-None-Match, which is all
where nothing has changed. A source that sends what is not to be believed is left for the next one, and what was
believed stays. While no source answers, it goes on being used, marked stale, until it expires. Roles of organisations
are loaded when a model of theirs is asked for. With a file, what is believed survives a restart.

What has expired is an error, but where the operator accepts it by the model's name and until a day
(``shared.acceptance``). Then the same files are taken up once more, with expiry judged at a moment before it:
python-tuf checks signatures, versions and hashes as ever. Such a state is never what is believed (``_trust``); it
answers for what was accepted, and each answer is counted and told.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlencode

import aiohttp

from shared import trust, trust_chain
from shared.acceptance import Acceptance
from shared.clock import Clock
from shared.digest import Digest, digest_of, hex_of
from shared.errors import (
    DiskError,
    MetadataExpired,
    MetadataTooLarge,
    MixedMetadata,
    NotFound,
    RollbackDetected,
    TrustError,
    UpstreamError,
)
from shared.metrics import Metrics
from shared.outcome import Outcome, cache_status
from shared.paths import TrustPath
from shared.tokens import NOBODY, AccessList
from shared.trust import LIMITS, NEVER, Target, Trust, Wanted, roles_of
from shared.trust_file import TrustFile
from shared.trust_names import (
    ACCESS,
    ROOT,
    SNAPSHOT,
    TARGETS,
    TIMESTAMP,
    TIMESTAMP_FILE,
    file_name,
    org_of,
    parse_file_name,
    private_org,
    public_role,
)
from shared.web.asking import Asking
from shared.web.reads import Listing
from shared.web.session import Answered, Fetched, NotLetIn, Sessions, fetch

if TYPE_CHECKING:  # a client has no use for it, and it takes long to import
    from structlog.typing import FilteringBoundLogger

AHEAD = 0.75
"""Of the lifetime, after which what is asked for often is confirmed before it ends."""
RETRY = 1.0
"""Seconds after a failure in which nobody is asked again."""
SAY_EVERY = 60.0
"""Seconds between two lines of the log on the same use of expired metadata; it is counted each time."""
MAX_FILES, MAX_FILES_BYTES = 256, 32 << 20
"""Files of earlier states that are kept for clients who are on their way through one."""


class Sources(Protocol):
    """Who may have the metadata. Nobody of them is believed."""

    def bases(self) -> Sequence[str]:
        """Base URLs, best first."""
        ...

    def session(self, base: str) -> aiohttp.ClientSession:
        """For a base URL."""
        ...

    def answered(self, base: str, answer: Fetched) -> None:
        """``base`` gave this answer."""
        ...

    def failed(self, base: str, error: UpstreamError) -> None:
        """``base`` did not answer, or with what is not to be believed (TrustError), or wants another token."""
        ...

    def credentials(self, base: str) -> Mapping[str, str]:
        """The field with a token, for what is private; none where there is no token for ``base``."""
        ...


class Upstreams:
    """The upstreams of a service: in one order, and what is wrong with them is counted and logged."""

    def __init__(self, sessions: Sessions, bases: Sequence[str], metrics: Metrics, log: FilteringBoundLogger) -> None:
        self._sessions, self._bases, self._metrics, self._log = sessions, list(bases), metrics, log
        self._said: dict[str, str] = {}

    def bases(self) -> Sequence[str]:
        """As they were given."""
        return self._bases

    def session(self, base: str) -> aiohttp.ClientSession:
        """The one with the upstream's proxy."""
        return self._sessions.of(base)

    def answered(self, base: str, answer: Fetched) -> None:
        """It is well again."""
        self._said.pop(base, None)

    def credentials(self, base: str) -> Mapping[str, str]:
        """This service's own."""
        return self._sessions.token.fields()

    def failed(self, base: str, error: UpstreamError) -> None:
        """Count it; log it once until something else happens there."""
        if isinstance(error, TrustError):
            self._metrics.refused_metadata.labels(base, error.error_code).inc()
        if self._said.get(base) != error.error_code:
            self._said[base] = error.error_code
            self._log.warning("no metadata from a source", source=base, code=error.error_code, reason=str(error))


@dataclass(frozen=True, slots=True)
class Brought:
    """What a ref means by metadata that was carried here, and the signed file that says so."""

    target: Target
    evidence: bytes


class ExpiredUse:
    """Of a service: answers by what has expired and is accepted are counted, and logged once a minute each."""

    def __init__(self, clock: Clock, metrics: Metrics, log: FilteringBoundLogger) -> None:
        self._clock, self._metrics, self._log = clock, metrics, log
        self._said: dict[str, float] = {}

    def tell(self, accepted: Acceptance) -> None:
        """One more."""
        self._metrics.expired_metadata_used.inc()
        now = self._clock.monotonic()
        if now - self._said.get(accepted.text, float("-inf")) >= SAY_EVERY:
            self._said[accepted.text] = now
            self._log.warning("answering by metadata that has expired, as accepted", accepted=accepted.text)


class Trusted:
    """The signed metadata of one process."""

    def __init__(
        self,
        root: bytes,
        sources: Sources,
        clock: Clock,
        *,
        lifetime: float,
        name: str,
        file: TrustFile | None = None,
        eager: Sequence[str] = (ACCESS,),
        asker: bool = False,
        accepted: Sequence[Acceptance] = (),
        accepting: Callable[[Acceptance], None] = lambda _: None,
    ) -> None:
        """``root``: what is trusted from the beginning. ``lifetime``: seconds. ``eager``: roles that are always loaded.
        ``asker``: of one client. Where a source lies and nobody tells the truth it says so, rather than go on by what
        is believed; and it is content with what a source could not confirm itself, as long as that is good: to say so
        is that source's courtesy. Raises TrustError for a root that is none."""
        self._sources, self._clock, self._lifetime, self._name = sources, clock, lifetime, name
        self._file, self._eager, self._asker = file, eager, asker
        self._trust = trust.begin(root, None, clock.time())
        self._root = root
        self._loaded = file is None
        self._confirmed = self._retry_at = float("-inf")
        self._news = 0
        """Times that something was announced."""
        self._stale = False
        self._failure: UpstreamError | None = None
        self._refused: dict[str, tuple[TrustError, float]] = {}
        """Roles of which nobody has metadata that verifies, and until when nobody is asked again."""
        self._were_public: Mapping[str, frozenset[str]] = {}
        """Models by the public role that said so and is not to be believed any more."""
        self._files: OrderedDict[str, bytes] = OrderedDict()
        self._access_fields: Mapping[str, object] | None = None
        """What ``_access_list`` was made of."""
        self._access_list = NOBODY
        self._org = ""
        """Whose models were asked for last."""
        self._ahead: tuple[str, dict[str, bytes | None]] = "", {}
        """Files that a source sent along with its timestamp; None: it has no such file."""
        self._accepted, self._accepting = accepted, accepting
        self._uses = Counter[Acceptance]()
        self._expired: tuple[Trust | None, Trust | None] = (None, None)
        """What was believed when it was last taken up without regard to expiry, and that."""
        self._moving = asyncio.Lock()
        """Held by who moves what is believed on."""
        self.asking = Asking()

    def __repr__(self) -> str:
        return f"<Trusted {self._trust}>"

    def start(self) -> None:
        """Ask already, beside: following the metadata to its end takes a handful of round trips, one after another,
        and the first client need not wait for them."""
        self.asking.begin(TIMESTAMP, self._refresh)

    async def close(self) -> None:
        """End what is under way."""
        await self.asking.close()

    # Answers

    async def target(self, model: str, ref: str) -> Target:
        """What a ref means now. Raises NotFound, TrustError, UpstreamError."""
        self._org = org_of(model)
        try:
            return await self._target(model, ref)
        except MetadataExpired as error:
            accepted, found = await self._accept(model, ref, error)
            for role in roles_of(model):
                await self._load_expired(found, role)
                if target := found.target(model, ref, NEVER):
                    self._used(accepted)
                    return target
            raise

    async def _target(self, model: str, ref: str) -> Target:
        await self.current()
        for role in roles_of(model):  # the public one says it for most, and costs a client one request
            await self._load(role)
            target = self._trust.target(model, ref, self._clock.time())
            if target is not None:
                return target
        known = bool(self._trust.refs(model))
        raise NotFound(f"{model} has no such ref", code="unknown_revision" if known else "unknown_model")

    def evidence(self, model: str) -> bytes:
        """The signed file by which ``target`` answers for a model, for who keeps it; empty where none is loaded."""
        return (self._trust if self._trust.complete else self._expired[1] or self._trust).evidence(model)

    def at_hand(self, model: str, ref: str) -> Target | None:
        """The same, where nobody needs to be asked and there is such a ref; else None. Metadata that is asked for near
        the end of its lifetime is confirmed meanwhile, so that nobody has to wait."""
        found = self._trust
        if not self._usable(self._clock.monotonic()) or not found.complete or not found.expires > self._clock.time():
            return None
        self._confirm_ahead()
        if not found.loaded(roles_of(model)[0]):  # which counts first
            return None
        with suppress(MetadataExpired):
            return found.target(model, ref, self._clock.time())
        return None

    def known_public(self, model: str) -> bool:
        """Whether a model is for everybody, and that is known here.

        What all have seen is not made private by waiting for an upstream: this needs no confirmation, so that what is
        asked for by its revision costs no round trip. It is sought meanwhile. Nor is it made private by a role that
        turns out to be signed by somebody who may not: what refs mean is not known then, revisions go on.
        """
        found, role = self._trust, public_role(org_of(model))
        public = found.is_public(model) or (not found.loaded(role) and model in self._were_public.get(role, ()))
        if public:
            self._confirm_ahead()
        return public

    def _confirm_ahead(self) -> None:
        """Have what is known confirmed, beside, where its lifetime ends soon."""
        now = self._clock.monotonic()
        if now - self._confirmed > AHEAD * self._lifetime and now >= self._retry_at:
            self.asking.begin(TIMESTAMP, self._refresh)

    async def refs(self, model: str) -> Mapping[str, Target]:
        """A model's refs by name; none for a model that there is not. Raises TrustError, UpstreamError."""
        try:
            return (await self._of_model(model)).refs(model)
        except MetadataExpired as error:
            accepted, found = await self._accept(model, "", error)
            self._used(accepted)
            return {ref: target for ref, target in found.refs(model).items() if accepted.ref in ("", ref)}

    def rollouts(self) -> Mapping[str, Mapping[str, Target]]:
        """By public model and ref what is being rolled out, as far as it is known here."""
        return self._trust.rollouts()

    def on_trial(self, model: str) -> frozenset[Digest]:
        """The revisions of a public model that are in a rollout, new and old, as far as it is known here."""
        return self._trust.on_trial(model)

    async def models(self) -> Sequence[str]:
        """The names of all models, private ones too where there is a token for them.

        Raises TrustError, UpstreamError.
        """
        for role in (await self.current()).delegated():
            with suppress(NotLetIn):
                await self._load(role)
        return self._trust.models()

    async def is_public(self, model: str) -> bool:
        """Whether a model is for everybody; False for one that there is not. Raises TrustError, UpstreamError."""
        if self.known_public(model):
            return True
        try:
            await self.current()
            await self._load(public_role(org_of(model)))
        except MetadataExpired as error:
            _, found = await self._accept(model, "", error)
            await self._load_expired(found, public_role(org_of(model)))
            return found.is_public(model)
        return self._trust.is_public(model)

    def access(self) -> Mapping[str, object] | None:
        """Whose tokens are good, as it is known now; None where nothing is known, or not any more."""
        now = self._clock.time()
        return self._trust.access(now) if now < self._trust.expires else None

    async def access_list(self) -> AccessList:
        """The same, confirmed within the lifetime, so that a token that was revoked is refused. Raises TrustError,
        UpstreamError: without it no token is good, and none is called bad."""
        await self.current()
        await self._load(ACCESS)
        fields = self.access()
        if fields is None:
            raise MetadataExpired("nothing that is good now says which tokens are")
        if fields is not self._access_fields:
            self._access_fields, self._access_list = fields, AccessList.parse(fields)
        return self._access_list

    def fields(self) -> dict[str, str]:
        """Age (RFC 9111 §5.1) of what is known, and Cache-Status where it could not be confirmed."""
        age = self._clock.monotonic() - self._confirmed
        fields = {"Age": str(max(0, int(age)))} if age < float("inf") else {}
        if self._stale:
            fields["Cache-Status"] = cache_status(self._name, Outcome.STALE)
        return fields

    @property
    def stale(self) -> bool:
        """Whether the last try to confirm it failed."""
        return self._stale

    @property
    def unconfirmed(self) -> UpstreamError | None:
        """Why the last try to confirm it failed; None where it did not."""
        return self._failure if self._stale else None

    def expiries(self) -> Mapping[str, float]:
        """When each role that is known here expires, in seconds since 1970."""
        return self._trust.expiries()

    def status(self) -> Mapping[str, object]:
        """For people: versions, when it expires, and what was wrong last."""
        expires = self._trust.expires
        return {
            "versions": self._trust.versions(),
            "signed_ago": round(signed) if (signed := self.age()) is not None else None,
            "expires_in": round(expires - self._clock.time()) if self._trust.complete else None,
            "stale": self._stale,
            "error": self._failure.error_code if self._failure else None,
            "accepted_expired": [
                {
                    "what": one.text if self._is_seen(one.model) else "(private)",
                    "in_force": self._clock.time() < one.until,
                    "used": self._uses[one],
                }
                for one in self._accepted
            ],
        }

    def _is_seen(self, model: str) -> bool:
        """Whether everybody may know of a model: a status page is for all."""
        found = self._expired[1]
        return self._trust.is_public(model) or (found is not None and found.is_public(model))

    def age(self) -> float | None:
        """Seconds since the newest metadata that is known was signed; None before the first."""
        signed = self._trust.signed_at
        return None if signed is None else self._clock.time() - signed

    def forget(self) -> None:
        """Something was published: what is known is no longer fresh."""
        self._news += 1
        self._confirmed = self._retry_at = float("-inf")

    async def file(self, path: TrustPath) -> Listing:
        """A file to serve on: verified, the timestamp fresh. Where some of it is accepted although it has expired,
        whoever asks here may accept it too: they check by themselves. Raises NotFound, TrustError, UpstreamError."""
        try:
            return await self._fresh_file(path)
        except MetadataExpired:
            found = self._beyond_expiry() if self._accepts(self._clock.time()) else None
            name = TIMESTAMP_FILE if path.role == TIMESTAMP else path.file
            if found is None:
                raise
            if not (data := found.file(name)):
                raise NotFound(f"there is no {name} here", code="unknown_metadata") from None
            return Listing(data, self.fields() if path.role == TIMESTAMP else {})

    async def _fresh_file(self, path: TrustPath) -> Listing:
        if path.role == TIMESTAMP:
            found = await self.current()
            return Listing(found.timestamp, self.fields())
        for _ in range(2):
            if data := self._files.get(path.file) or self._trust.file(path.file):
                return Listing(data)
            found = await self.current()
            if not found.loaded(path.role) and found.wanted(path.role).name == path.file:
                await self._load(path.role)
        raise NotFound(f"there is no {path.file} here", code="unknown_metadata")

    # What has expired and is accepted

    def _accepts(self, now: float) -> bool:
        """Whether anything is accepted now that has expired."""
        return any(now < one.until for one in self._accepted)

    async def _accept(self, model: str, ref: str, error: MetadataExpired) -> tuple[Acceptance, Trust]:
        """By what the operator accepts this now, and the state that answers then. Raises ``error``, ClockSkew."""
        now = self._clock.time()
        accepted = next((one for one in self._accepted if one.covers(model, ref, now)), None)
        found = await asyncio.to_thread(self._beyond_expiry) if accepted else None
        if accepted is None or found is None:
            raise error
        found.check_clock(now)
        return accepted, found

    def _used(self, accepted: Acceptance) -> None:
        self._uses[accepted] += 1
        self._accepting(accepted)

    def _beyond_expiry(self) -> Trust | None:
        """What is believed but for its expiry, also after a restart; None where there is no such."""
        before, found = self._expired
        if before is not self._trust or found is None:
            made = trust.begin(self._root, self._trust.kept(), NEVER)
            found = made if made.complete else None
            self._expired = self._trust, found
        return found

    async def _load_expired(self, found: Trust, role: str) -> None:
        """Have a role in a state that is beyond its expiry, where somebody has it."""
        if not found.loaded(role):
            with suppress(UpstreamError):
                await self._fetch_role(found, role, expired=True)
                await self._keep(found)

    async def _keep_expired(self, found: Trust) -> None:
        """Remember a newer state that has expired: nothing older is taken from now on, and it may be accepted."""
        await self._keep(found)
        self._trust = await asyncio.to_thread(trust.begin, self._root, found.kept(), self._clock.time())
        self._expired = self._trust, found

    # What is carried here, and away

    async def carry(self, model: str, ref: str) -> tuple[Target, Mapping[str, bytes]]:
        """What a ref means, and the files that say so to who knows an older root, as far back as somebody has them.

        Of other organisations' roles there is none in them. Raises as ``target``.
        """
        await self.target(model, ref)
        with suppress(UpstreamError):
            await self._load(ACCESS)
        found = self._trust if self._trust.complete else self._beyond_expiry() or self._trust
        target = found.target(model, ref, NEVER)
        assert target is not None
        wanted = {ROOT, TIMESTAMP, SNAPSHOT, TARGETS, ACCESS, *_roles_needed(found, model)}
        files = {name: data for name, data in found.files().items() if (parse_file_name(name) or ("", 0))[0] in wanted}
        return target, await self._older_roots(found.kept().roots) | files

    async def _older_roots(self, roots: Sequence[bytes]) -> dict[str, bytes]:
        """Those before the first of ``roots``, of which each leads to the next."""
        files: dict[str, bytes] = {}
        first = trust.root_version(roots[0])
        for version in range(first - 1, max(0, first - trust.MAX_ROTATIONS), -1):
            for base in self._sources.bases():
                with suppress(NotFound, UpstreamError):
                    data = (await self._get(base, Wanted(file_name(ROOT, version), LIMITS[ROOT]))).body
                    if trust.leads_to(data, roots[0]):
                        files[file_name(ROOT, version)], roots = data, [data]
                        break
            else:
                break
        return files

    async def bring(self, files: Mapping[str, bytes], model: str, ref: str, *, keep: bool) -> Brought:
        """What a ref means by metadata that came by other ways than from a source, by file name; ``keep``: and go by it
        from now on.

        It is checked as a source's is, against what is believed here. Where more is known here already, that counts.
        Raises NotFound, TrustError, DiskError where it cannot be kept.
        """
        refused: RollbackDetected | None = None
        async with self._moving:
            if not self._loaded:
                await self._take_up()
            try:
                found = await self._move(files, model, ref)
                if keep:
                    await self._go_by(found)
            except RollbackDetected as error:  # what is known is newer: it says what the ref means, if it does
                refused, found = error, self._trust
                if not found.complete and (expired := await asyncio.to_thread(self._beyond_expiry)):
                    found = expired
        if target := self._says(found, model, ref):
            return Brought(target, found.evidence(model))
        raise refused or NotFound(f"the metadata says nothing of {model}@{ref}", code="unknown_revision")

    async def _move(self, files: Mapping[str, bytes], model: str, ref: str) -> Trust:
        """What would be believed by these files. Raises TrustError."""
        now, before = self._clock.time(), self._trust
        try:
            return await asyncio.to_thread(_follow_files, before, files, model, now, expired=False)
        except MetadataExpired:
            if not any(one.covers(model, ref, now) for one in self._accepted):
                raise
            start = await asyncio.to_thread(self._beyond_expiry) or before
            return await asyncio.to_thread(_follow_files, start, files, model, now, expired=True)

    async def _go_by(self, found: Trust) -> None:
        """Raises DiskError."""
        try:
            found.check(self._clock.time())
        except MetadataExpired:
            await self._keep_expired(found)
        else:
            await self._keep(found)
            self._trust = found
        if self._file is not None:
            try:
                await asyncio.to_thread(self._file.save, found.kept())
            except OSError as error:
                raise DiskError(f"{self._file}: {error.strerror}") from error

    def _says(self, found: Trust, model: str, ref: str) -> Target | None:
        """What a ref means by what is loaded; nobody is asked. Raises MetadataExpired, ClockSkew."""
        if found.complete and not found.loaded(roles_of(model)[0]):  # which counts first
            return None
        now = self._clock.time()
        try:
            found.check(now)
            return found.target(model, ref, now)
        except MetadataExpired:
            accepted = next((one for one in self._accepted if one.covers(model, ref, now)), None)
            if accepted is None or not found.complete:
                raise
            found.check_clock(now)
            self._used(accepted)
            return found.target(model, ref, NEVER)

    # What is believed

    async def current(self) -> Trust:
        """What is believed, confirmed within its lifetime. Raises TrustError, UpstreamError."""
        news = -1
        while news != self._news and not self._usable(self._clock.monotonic()):
            news = self._news  # if something is announced while the question is under way, it is asked again
            await self.asking.once(TIMESTAMP, self._refresh)
        self._check(self._trust)
        return self._trust

    async def _of_model(self, model: str) -> Trust:
        """With the roles that may say something of a model; the private one is not asked for without need."""
        await self.current()
        for role in roles_of(model):
            if role in _roles_needed(self._trust, model):
                await self._load(role)
        return self._trust

    def _usable(self, now: float) -> bool:
        return now - self._confirmed <= self._lifetime or now < self._retry_at

    def _check(self, found: Trust) -> None:
        """Raises what stands in the way of using this now."""
        try:
            found.check(self._clock.time())
        except TrustError as error:
            known = isinstance(self._failure, TrustError) or not found.complete
            raise (self._failure or error if known else error) from error

    async def _refresh(self) -> None:
        """Have the present metadata confirmed or replaced. Raises TrustError or UpstreamError where there is none."""
        async with self._moving:
            await self._ask_all()

    async def _ask_all(self) -> None:
        if not self._loaded:
            await self._take_up()
        refusal: TrustError | None = None
        failure: UpstreamError | None = None
        news = self._news
        for base in self._sources.bases():
            try:
                await self._ask(base)
                self._confirm(news)
                return
            except UpstreamError as error:
                self._sources.failed(base, error)
                failure = error
                refusal = refusal or (error if isinstance(error, TrustError) else None)
        failure = failure or UpstreamError("no source of metadata is configured", code="no_nodes")
        self._failure = refusal or await self._expiry() or failure
        self._stale, self._retry_at = True, self._clock.monotonic() + RETRY
        if (refusal and self._asker) or not self._trust.complete:
            raise self._failure
        self._check(self._trust)

    async def _expiry(self) -> MetadataExpired | None:
        """The error that what an earlier process kept has expired; None where that is not all that is wrong."""
        if not self._trust.complete and (found := await asyncio.to_thread(self._beyond_expiry)):
            try:
                found.check(self._clock.time())
            except MetadataExpired as error:
                return error
        return None

    def _confirm(self, news: int) -> None:
        self._stale, self._failure = False, None
        self._refused.clear()
        if news == self._news:  # else this may be what was before the news
            self._confirmed = self._clock.monotonic()

    async def _ask(self, base: str) -> None:
        """Have one source confirm or replace what is believed. Raises TrustError, UpstreamError."""
        before, now = self._trust, self._clock.time()
        fields = {}
        if before.complete and now < before.expires:
            fields["If-None-Match"] = f'"{hex_of(digest_of(before.timestamp))}"'
        self._ahead = base, {}
        wanted = Wanted(TIMESTAMP_FILE, LIMITS[TIMESTAMP])
        answer = await (self._get(base, wanted, fields) if before.complete else self._get_chain(base, wanted))
        self._sources.answered(base, answer)
        try:
            if answer.status == 304 or (before.complete and answer.body == before.timestamp):
                before.check(now)
            else:
                await self._follow(base, before, answer.body)
        except MetadataExpired as error:
            if self._accepts(now):
                await self._follow_expired(base, answer.body)
            raise trust.skewed(error, answer.headers.get("Date"), now) from error
        except TrustError as error:
            raise trust.skewed(error, answer.headers.get("Date"), now) from error
        if not self._asker and "stale" in answer.headers.get("Cache-Status", ""):
            raise Answered(f"{base} has only a stale answer itself")

    async def _follow_expired(self, base: str, timestamp: bytes) -> None:
        """Take up what has expired, for what of it is accepted. What is good now is never left for it."""
        before = await asyncio.to_thread(self._beyond_expiry) or self._trust
        if timestamp and timestamp != before.timestamp and not before.expires > self._clock.time():
            await self._keep_expired(await self._steps(base, before, timestamp, expired=True))

    async def _follow(self, base: str, before: Trust, timestamp: bytes) -> None:
        """Move on to a new timestamp, with all roles that were loaded."""
        step = await self._steps(base, before, timestamp, expired=False)
        for role in dict.fromkeys((*before.roles, *self._eager)):
            if not step.loaded(role):
                await self._bring_along(step, role)
        await self._keep(step)
        were = {**self._were_public, **before.public()}
        self._were_public = {role: models for role, models in were.items() if not step.loaded(role)}
        self._trust = step

    async def _steps(self, base: str, before: Trust, timestamp: bytes, *, expired: bool) -> Trust:
        """What is believed by a new timestamp of ``base``. Raises TrustError, UpstreamError."""
        steps = trust.refresh(before, timestamp, self._clock.time(), expired=expired)
        step = await asyncio.to_thread(_step, steps, None)
        while isinstance(step, Wanted):
            try:
                data: bytes | None = (await self._get(base, step)).body
            except NotFound as error:
                if not step.optional:
                    raise Answered(f"{base} has no {step.name}") from error
                data = None
            step = await asyncio.to_thread(_step, steps, data)
        return step

    async def _bring_along(self, found: Trust, role: str) -> None:
        """Load a role that was loaded before. Raises UpstreamError where nobody has it: then all stays as it was.

        Where that is not to be believed any more, the new state counts without the role; so it does where what somebody
        has of it is not to be believed, or our token for it is not good (any more): whoever asks for it will hear.
        """
        try:
            await self._fetch_role(found, role)
        except (TrustError, NotLetIn):
            pass
        except UpstreamError:
            if not found.revoked(role):
                raise

    async def _load(self, role: str) -> None:
        """Have a role. Raises TrustError, UpstreamError."""
        error, until = self._refused.get(role, (None, 0.0))
        if error is not None and self._clock.monotonic() < until:
            raise error
        while not self._trust.loaded(role):  # a refresh meanwhile may have put another in its place
            await self.asking.once(role, lambda: self._add_role(self._trust, role))

    async def _add_role(self, found: Trust, role: str) -> None:
        try:
            await self._fetch_role(found, role)
        except TrustError as error:
            self._refused[role] = error, self._clock.monotonic() + max(RETRY, self._lifetime)
            raise
        await self._keep(found)

    async def _fetch_role(self, found: Trust, role: str, *, expired: bool = False) -> None:
        """Load a role from the first source that has it right. Raises TrustError, UpstreamError."""
        refusal: TrustError | None = None
        failure: UpstreamError | None = None
        wanted, judged = found.wanted(role), NEVER if expired else self._clock.time()
        for base in self._sources.bases():
            try:
                answer = await self._get(base, wanted, self._sources.credentials(base) if private_org(role) else None)
                found.add(role, await asyncio.to_thread(found.verify, role, answer.body, judged))
                return
            except NotFound:
                failure = failure or Answered(f"{base} has no {wanted.name}")
            except UpstreamError as error:
                self._sources.failed(base, error)
                failure = error
                refusal = refusal or (error if isinstance(error, TrustError) else None)
        raise refusal or failure or UpstreamError("no source of metadata is configured", code="no_nodes")

    async def _get(self, base: str, wanted: Wanted, fields: Mapping[str, str] | None = None) -> Fetched:
        """A file from one source, to its limit and no further. Raises NotFound, TrustError, UpstreamError."""
        if self._ahead[0] == base and wanted.name in self._ahead[1]:
            data = self._ahead[1].pop(wanted.name)
            if data is None:
                raise NotFound(f"{base} has no {wanted.name}", code="unknown_metadata")
            if len(data) > wanted.limit:
                raise MetadataTooLarge(f"{base} sent a {wanted.name} of more than {wanted.limit} bytes")
            return Fetched(200, data, {})
        try:
            return await fetch(
                self._sources.session(base),
                f"{base}/trust/{wanted.name}",
                limit=wanted.limit,
                headers=fields,
                missing="unknown_metadata",
                too_long=MetadataTooLarge,
            )
        except NotFound as error:
            if wanted.name.startswith(TIMESTAMP_FILE):
                raise Answered(f"{base} has no signed metadata") from error
            raise

    async def _get_chain(self, base: str, wanted: Wanted) -> Fetched:
        """The timestamp, with all that it leads to where the source can: to whom nothing is known yet, each file alone
        is a round trip, one after the other. Raises as ``_get``."""
        asked = {"root": str(self._trust.versions()[ROOT]), **({"org": self._org} if self._org else {})}
        named = Wanted(f"{wanted.name}?{urlencode(asked)}", trust_chain.MAX_BODY)
        answer = await self._get(base, named, {"Accept": f"{trust_chain.MEDIA_TYPE}, application/json"})
        body = answer.body
        if answer.headers.get("Content-Type") == trust_chain.MEDIA_TYPE:
            files = trust_chain.decode(body)
            self._ahead = base, files
            body = files.pop(TIMESTAMP_FILE) or b""
        if len(body) > wanted.limit:
            raise MetadataTooLarge(f"{base} sent a {wanted.name} of more than {wanted.limit} bytes")
        return replace(answer, body=body)

    # What is kept

    async def _take_up(self) -> None:
        assert self._file is not None
        kept = await asyncio.to_thread(self._file.load)
        self._trust = await asyncio.to_thread(trust.begin, self._root, kept, self._clock.time())
        self._loaded = True

    async def _keep(self, found: Trust) -> None:
        """Note what was verified before anybody is told of it. A disk that refuses costs the next process a refresh."""
        for name, data in found.files().items():
            self._files[name] = data
            self._files.move_to_end(name)
        total = sum(map(len, self._files.values()))
        while len(self._files) > MAX_FILES or total > MAX_FILES_BYTES:
            total -= len(self._files.popitem(last=False)[1])
        self._files.pop(TIMESTAMP_FILE, None)
        if self._file is not None:
            with suppress(OSError):
                await asyncio.to_thread(self._file.save, found.kept())


def _roles_needed(found: Trust, model: str) -> Sequence[str]:
    """The roles that must be loaded to know what a model's refs mean."""
    public, private = roles_of(model)
    return [public] if found.is_public(model) else [public, private]


def _step(steps: Generator[Wanted, bytes | None, Trust], data: bytes | None) -> Wanted | Trust:
    """One step of a refresh; a StopIteration cannot leave a thread."""
    try:
        return steps.send(data)
    except StopIteration as stop:
        made: Trust = stop.value
        return made


def _follow_files(before: Trust, files: Mapping[str, bytes], model: str, now: float, *, expired: bool) -> Trust:
    """What is believed by these files, with the roles that say something of a model. Raises TrustError."""
    steps = trust.refresh(before, files.get(TIMESTAMP_FILE, b""), now, expired=expired)
    step = _step(steps, None)
    while isinstance(step, Wanted):
        data = files.get(step.name)
        if data is None and not step.optional:
            raise MixedMetadata(f"{step.name} is not among the files")
        step = _step(steps, data)
    for role in (*roles_of(model), ACCESS):
        if not step.loaded(role) and (data := files.get(step.wanted(role).name)):
            step.take(role, data, NEVER if expired else now)
    return step
