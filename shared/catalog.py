"""What refs mean: manifests and listings from upstream, kept, and served stale when they must be.

What a ref means, the signed metadata says (``shared.web.trusted``): which manifest, and how long it is. Its bytes may
then come from anybody. A revision never changes: once its bytes match its digest it is good for ever. A listing is
fresh for ``lifetime`` seconds; then it is revalidated with If-None-Match (RFC 9111 §4.3). While no upstream answers,
what was known goes on being served, marked stale (RFC 5861 §4). Whoever asks for the same thing at the same time shares
one request. With a directory, manifests survive a restart: ``manifests/<64 hex>``.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared import manifest as manifests
from shared.clock import Clock
from shared.digest import Digest, digest_of, hex_of, parse_digest
from shared.errors import BadId, IntegrityError, ManifestTooLarge, NotFound, UpstreamError, WrongModel
from shared.files import replace_file
from shared.ids import as_revision, commit_of, is_commit, is_revision
from shared.manifest import MAX_MANIFEST, Manifest
from shared.outcome import Outcome, cache_status
from shared.paths import ModelPath, ModelsPath, manifest_path
from shared.pins import NO_PINS, Pins, pinned
from shared.rollout import NOBODY, Subject
from shared.web.asking import Asking
from shared.web.reads import Listing, Resolved
from shared.web.session import Sessions, fetch
from shared.web.trusted import Trusted

MAX_LISTING = 16 << 20
RETRY = 1.0
"""Seconds after a failed revalidation in which what is stale is served without asking again."""
STALE_LIMIT = 86_400.0
"""Seconds that a listing may be served stale."""
KEEP_MANIFESTS = 256
KEEP_LISTINGS = 10_000


@dataclass
class _Known:
    """A listing as it was last confirmed. Times are of the monotonic clock."""

    body: bytes
    etag: str
    confirmed: float
    retry_at: float = 0.0
    stale: bool = False
    """Whether the last try to confirm it failed."""


class Catalog:
    """Manifests and listings of one process, from ordered upstreams, by metadata that is verified."""

    def __init__(
        self,
        sessions: Sessions,
        upstreams: Sequence[str],
        trusted: Trusted,
        clock: Clock,
        name: str,
        *,
        lifetime: float,
        directory: Path | None = None,
        pins: Pins = NO_PINS,
    ) -> None:
        """``pins``: refs that mean one revision here, whatever is signed."""
        self._pins = pins
        self._sessions = sessions
        self._upstreams = list(upstreams)
        self._trusted = trusted
        self._clock = clock
        self._name = name
        self._lifetime = lifetime
        self._directory = directory
        self._listings: OrderedDict[str, _Known] = OrderedDict()
        self._manifests: OrderedDict[Digest, Manifest] = OrderedDict()
        self._asking = Asking()

    def __repr__(self) -> str:
        return f"<Catalog {len(self._manifests)} manifests>"

    async def resolve(self, model: str, ref: str, who: Subject = NOBODY) -> Resolved:
        """The manifest that a ref (to ``who``), revision or commit means now. Raises NotFound, UpstreamError
        (TrustError)."""
        if is_commit(ref):
            return Resolved(await self._of_commit(model, ref), known_as=ref)
        if is_revision(ref):
            return Resolved(await self._manifest(model, as_revision(ref)))
        if stays_at := pinned(self._pins, model, ref, who.site):
            return Resolved(await self._manifest(model, stays_at))
        target = (await self._trusted.target(model, ref)).meant_for(model, ref, who)
        try:
            manifest = await self._manifest(model, target.revision, target.length)
        except NotFound as error:  # somebody signed for it, so it is their trouble and not the client's
            raise UpstreamError(f"nobody has what {model}@{ref} means", code="upstream_missing") from error
        fields, stale = self._trusted.fields(), self._trusted.stale
        return Resolved(manifest, fields, stale=stale, known_as=target.commit)

    def at_hand(self, model: str, ref: str, who: Callable[[], Subject] = lambda: NOBODY) -> Manifest | None:
        """The same, where it is in memory and fresh; else None, whatever ``resolve`` would say."""
        if is_revision(ref):
            revision = as_revision(ref)
        elif self._pins and (stays_at := pinned(self._pins, model, ref, who().site)):
            revision = stays_at
        else:
            target = self._trusted.at_hand(model, ref)
            if target is None:
                return None
            revision = (target.meant_for(model, ref, who()) if target.rollout else target).revision
        manifest = self._manifests.get(revision)
        if manifest is None or manifest.model != model:
            return None
        self._manifests.move_to_end(revision)
        return manifest

    async def listing(self, path: ModelPath | ModelsPath) -> Listing:
        """``/models`` or ``/models/<model>`` as upstream has it. Raises NotFound or UpstreamError."""
        target = f"/models/{path.model}" if isinstance(path, ModelPath) else "/models"
        known = self._listings.get(target)
        if not known or not self._usable(known, self._clock.monotonic()):
            model = path.model if isinstance(path, ModelPath) else ""
            known = await self._asking.once(target, lambda: self._relist(target, model, known))
        return Listing(known.body, self._fields(known))

    async def take_in(self, manifest: Manifest) -> None:
        """Keep a manifest that came by other ways than from upstream, and was verified."""
        await self._write(f"manifests/{hex_of(manifest.revision)}", manifest.encoded)
        _remember(self._manifests, manifest.revision, manifest, KEEP_MANIFESTS)

    def forget(self, _: str) -> None:
        """Take what is known of refs for no longer fresh: something was published."""
        self._trusted.forget()
        self._listings.clear()

    async def close(self) -> None:
        """End requests that are under way."""
        await self._asking.close()

    def _usable(self, known: _Known, now: float) -> bool:
        """Whether to answer with this without asking anybody."""
        return now - known.confirmed <= self._lifetime or now < known.retry_at

    def _fields(self, known: _Known) -> dict[str, str]:
        """Age (RFC 9111 §5.1), and Cache-Status where the answer is stale."""
        age = self._clock.monotonic() - known.confirmed
        fields = {"Age": str(max(0, int(age)))} if age < STALE_LIMIT * 365 else {}
        if known.stale:
            fields["Cache-Status"] = cache_status(self._name, Outcome.STALE)
        return fields

    async def _relist(self, target: str, model: str, known: _Known | None) -> _Known:
        """A listing of a model, or (none is named) of the names of all, private ones too."""
        failure: UpstreamError | None = None
        credentials = await self._credentials(model)
        for upstream in self._upstreams:
            try:
                headers = {**credentials, **({"If-None-Match": known.etag} if known else {})}
                answer = await fetch(
                    self._sessions.of(upstream),
                    upstream + target,
                    limit=MAX_LISTING,
                    headers=headers,
                    missing="unknown_model",
                )
                body = known.body if answer.status == 304 and known else answer.body
                fresh = _Known(body, answer.headers.get("ETag", '""'), self._clock.monotonic())
                _remember(self._listings, target, fresh, KEEP_LISTINGS)
                return fresh
            except NotFound:
                self._listings.pop(target, None)
                raise
            except UpstreamError as error:
                failure = error
        return self._stale(known, failure)

    async def _credentials(self, model: str) -> Mapping[str, str]:
        """This service's own token, where what is asked for is not public."""
        return {} if model and await self._trusted.is_public(model) else self._sessions.token.fields()

    def _stale(self, known: _Known | None, failure: UpstreamError | None) -> _Known:
        """What is known, for a little longer. Raises ``failure`` where nothing is, or it is too old."""
        now = self._clock.monotonic()
        if known is None or now - known.confirmed > STALE_LIMIT:
            raise failure or UpstreamError("no upstream is configured")
        known.retry_at = now + RETRY
        known.stale = True
        return known

    async def _manifest(self, model: str, revision: Digest, length: int | None = None) -> Manifest:
        """A manifest of ``length`` bytes, where that is known. Raises NotFound, UpstreamError, WrongModel."""
        # By model too: who asks for another one's revision must not share its answer, nor spoil it
        asked = (model, revision)
        manifest = await self._asking.once(asked, lambda: self._find_manifest(model, revision, length))
        if length is not None and manifest.model != model:
            raise WrongModel(f"what was signed for {model} is a manifest of {manifest.model}")
        if manifest.model != model:
            raise NotFound(f"{model} has no such revision", code="unknown_revision")
        return manifest

    async def _of_commit(self, model: str, commit: str) -> Manifest:
        """The manifest whose digest begins with a commit: whoever has it, that is the check. Raises as above."""
        revision = next((known for known in self._manifests if commit_of(known) == commit), None)
        revision = revision or await self._known_revision(model, commit)
        if revision is None:
            fetched = await self._asking.once((model, commit), lambda: self._fetch_manifest(model, commit))
            revision = fetched.revision
            _remember(self._manifests, revision, fetched, KEEP_MANIFESTS)
        return await self._manifest(model, revision)

    async def _known_revision(self, model: str, commit: str) -> Digest | None:
        """The revision that a commit (of ours, or of the hub that it was taken from) is of, where a ref means it or its
        manifest is on disk."""
        with suppress(UpstreamError):
            for target in (await self._trusted.refs(model)).values():
                if commit in (commit_of(target.revision), target.commit):
                    return target.revision
                if target.rollout and commit == commit_of(target.rollout.revision):
                    return target.rollout.revision
        if self._directory is not None:
            found = await asyncio.to_thread(list, (self._directory / "manifests").glob(f"{commit}*"))
            with suppress(BadId):
                return parse_digest(f"sha256:{found[0].name}") if found else None
        return None

    async def _find_manifest(self, model: str, revision: Digest, length: int | None) -> Manifest:
        """From memory, disk or upstream; its bytes are checked against its name each time they move."""
        manifest = self._manifests.get(revision)
        if manifest is None:
            stored = await self._read(f"manifests/{hex_of(revision)}")
            if stored is not None and digest_of(stored) == revision:
                manifest = await asyncio.to_thread(manifests.decode, stored)
        if manifest is None:
            manifest = await self._fetch_manifest(model, revision, length)
        _remember(self._manifests, revision, manifest, KEEP_MANIFESTS)
        return manifest

    async def _fetch_manifest(self, model: str, name: str, length: int | None = None) -> Manifest:
        """From upstream, by its revision or commit."""
        failure: Exception = UpstreamError("no upstream is configured")
        fields = await self._credentials(model)
        for upstream in self._upstreams:
            url, session = upstream + manifest_path(model, name), self._sessions.of(upstream)
            try:
                answer = await fetch(
                    session,
                    url,
                    limit=length or MAX_MANIFEST,
                    headers=fields,
                    missing="unknown_revision",
                    too_long=ManifestTooLarge,
                )
                revision = digest_of(answer.body)
                if name not in (revision, commit_of(revision)) or length not in (None, len(answer.body)):
                    raise IntegrityError(f"{url} does not match its digest")
                manifest = await asyncio.to_thread(manifests.decode, answer.body)
                await self._write(f"manifests/{hex_of(revision)}", answer.body)
                return manifest
            except (NotFound, UpstreamError) as error:
                failure = error
        raise failure

    # Disk. Losing any of it costs a request upstream, so errors here are not errors of the reader.

    async def _read(self, name: str) -> bytes | None:
        if self._directory is None:
            return None
        with suppress(OSError):
            return await asyncio.to_thread((self._directory / name).read_bytes)
        return None

    async def _write(self, name: str, data: bytes) -> None:
        if self._directory is not None:
            with suppress(OSError):
                await asyncio.to_thread(_replace, self._directory / name, data)


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, data)


def _remember(table: OrderedDict[Any, Any], key: Any, value: Any, keep: int) -> None:
    table[key] = value
    table.move_to_end(key)
    while len(table) > keep:
        table.popitem(last=False)
