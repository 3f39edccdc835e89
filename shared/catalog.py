"""What refs mean: manifests and listings from upstream, kept, revalidated, and served stale when they must be.

A ref is fresh for ``lifetime`` seconds; then it is revalidated with If-None-Match (RFC 9111 §4.3). While no
upstream answers, what was known goes on being served, marked stale (RFC 5861 §4). A revision never changes:
once its bytes match its digest it is good for ever. Whoever asks for the same thing at the same time shares
one request. With a directory, what is known survives a restart::

    manifests/<64 hex>            a manifest, named by its digest
    refs/<org>/<name>/<ref>       JSON: the revision, and when it was last confirmed
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from shared import manifest as manifests
from shared.clock import Clock
from shared.codec import decode_json, encode_json
from shared.digest import Digest, digest_of, hex_of, parse_digest
from shared.errors import IntegrityError, ManifestInvalid, NotFound, UpstreamError, WrongModel
from shared.files import replace_file
from shared.ids import as_revision, is_revision
from shared.manifest import MAX_MANIFEST, Manifest
from shared.outcome import Outcome, cache_status
from shared.paths import ModelPath, ModelsPath, manifest_path
from shared.web.reads import Listing, Resolved
from shared.web.session import Sessions, fetch

T = TypeVar("T")

MAX_LISTING = 16 << 20
AHEAD = 0.75
"""Of a ref's lifetime, after which what is asked for often is revalidated before it ends."""
RETRY = 1.0
"""Seconds after a failed revalidation in which what is stale is served without asking again."""
STALE_LIMIT = 86_400.0
"""Seconds that a ref may be served stale."""
NOTE = 60.0
"""Seconds between two notes on disk that a ref was confirmed."""
KEEP_MANIFESTS = 256
KEEP_REFS = 10_000


@dataclass
class _Known:
    """A ref or a listing as it was last confirmed. Times are of the monotonic clock."""

    value: Any
    etag: str
    confirmed: float
    retry_at: float = 0.0
    stale: bool = False
    """Whether the last try to confirm it failed."""
    written: float = float("-inf")
    """When this was last noted on disk."""


class Catalog:
    """Refs, manifests and listings of one process, from ordered upstreams."""

    def __init__(
        self,
        sessions: Sessions,
        upstreams: Sequence[str],
        clock: Clock,
        name: str,
        *,
        lifetime: float,
        directory: Path | None = None,
    ) -> None:
        self._sessions = sessions
        self._upstreams = list(upstreams)
        self._clock = clock
        self._name = name
        self._lifetime = lifetime
        self._directory = directory
        self._refs: OrderedDict[tuple[str, str], _Known] = OrderedDict()
        self._listings: OrderedDict[str, _Known] = OrderedDict()
        self._manifests: OrderedDict[Digest, Manifest] = OrderedDict()
        self._asking: dict[object, asyncio.Task[Any]] = {}

    def __repr__(self) -> str:
        return f"<Catalog {len(self._refs)} refs, {len(self._manifests)} manifests>"

    async def resolve(self, model: str, ref: str) -> Resolved:
        """The manifest that a ref or revision means now. Raises NotFound, UpstreamError or ManifestInvalid."""
        if is_revision(ref):
            revision = as_revision(ref)
            return Resolved(await self._once(revision, lambda: self._manifest(model, revision)))
        known = self._refs.get((model, ref)) or await self._restored(model, ref)
        if known and self._usable(known, self._clock.monotonic()):
            return await self._resolved(model, known)
        known = await self._once((model, ref), lambda: self._revalidate(model, ref, known))
        return await self._resolved(model, known)

    def at_hand(self, model: str, ref: str) -> Manifest | None:
        """The same, where it is in memory and fresh; else None, whatever ``resolve`` would say.

        A ref that is asked for near the end of its lifetime is revalidated meanwhile, so that nobody has to wait.
        """
        if is_revision(ref):
            revision = as_revision(ref)
        else:
            known, now = self._refs.get((model, ref)), self._clock.monotonic()
            if known is None or not self._usable(known, now):
                return None
            if now - known.confirmed > AHEAD * self._lifetime and now >= known.retry_at:
                self._ask((model, ref), lambda: self._revalidate(model, ref, known))
            revision = known.value
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
            known = await self._once(target, lambda: self._relist(target, known))
        return Listing(known.value, self._fields(known))

    def forget(self, model: str) -> None:
        """Take what is known of a model's refs for no longer fresh: something was published."""
        for key, known in self._refs.items():
            if key[0] == model:
                known.confirmed = known.retry_at = float("-inf")
        self._listings.clear()

    async def close(self) -> None:
        """End requests that are under way."""
        tasks = list(self._asking.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _resolved(self, model: str, known: _Known) -> Resolved:
        revision: Digest = known.value
        manifest = await self._once(revision, lambda: self._manifest(model, revision))
        return Resolved(manifest, self._fields(known), stale=known.stale)

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

    async def _once(self, key: object, ask: Callable[[], Awaitable[T]]) -> T:
        """One request for the same thing at a time. It outlives its askers: another may be waiting too."""
        result: T = await asyncio.shield(self._ask(key, ask))
        return result

    def _ask(self, key: object, ask: Callable[[], Awaitable[Any]]) -> asyncio.Task[Any]:
        task = self._asking.get(key)
        if task is None:
            task = self._asking[key] = asyncio.ensure_future(ask())
            task.add_done_callback(lambda done: self._asked(key, done))
        return task

    def _asked(self, key: object, task: asyncio.Task[Any]) -> None:
        self._asking.pop(key, None)
        if not task.cancelled():
            task.exception()  # marks it as seen where every asker has left

    async def _revalidate(self, model: str, ref: str, known: _Known | None) -> _Known:
        etag = known.etag if known else ""
        failure: UpstreamError | None = None
        for upstream in self._upstreams:
            try:
                answer = await fetch(
                    self._sessions.of(upstream),
                    upstream + manifest_path(model, ref),
                    limit=MAX_MANIFEST,
                    headers={"If-None-Match": f'"{etag}"'} if etag else {},
                    missing="unknown_revision",
                )
                if answer.status == 304 and known:
                    revision: Digest = known.value
                else:
                    revision = digest_of(answer.body)
                    await self._keep(model, revision, answer.body)
                if "stale" in answer.headers.get("Cache-Status", ""):
                    raise UpstreamError(f"{upstream} has only a stale answer itself")
                return await self._confirm(model, ref, revision)
            except NotFound:
                self._refs.pop((model, ref), None)
                await self._forget_stored(model, ref)
                raise
            except UpstreamError as error:
                failure = error
        return self._stale(known, failure)

    async def _relist(self, target: str, known: _Known | None) -> _Known:
        failure: UpstreamError | None = None
        for upstream in self._upstreams:
            try:
                headers = {"If-None-Match": known.etag} if known else {}
                answer = await fetch(
                    self._sessions.of(upstream),
                    upstream + target,
                    limit=MAX_LISTING,
                    headers=headers,
                    missing="unknown_model",
                )
                body = known.value if answer.status == 304 and known else answer.body
                fresh = _Known(body, answer.headers.get("ETag", '""'), self._clock.monotonic())
                _remember(self._listings, target, fresh, KEEP_REFS)
                return fresh
            except NotFound:
                self._listings.pop(target, None)
                raise
            except UpstreamError as error:
                failure = error
        return self._stale(known, failure)

    def _stale(self, known: _Known | None, failure: UpstreamError | None) -> _Known:
        """What is known, for a little longer. Raises ``failure`` where nothing is, or it is too old."""
        now = self._clock.monotonic()
        if known is None or now - known.confirmed > STALE_LIMIT:
            raise failure or UpstreamError("no upstream is configured")
        known.retry_at = now + RETRY
        known.stale = True
        return known

    async def _manifest(self, model: str, revision: Digest) -> Manifest:
        """A manifest from memory, disk or upstream; its bytes are checked against its name each time they move."""
        manifest = self._manifests.get(revision)
        if manifest is None:
            stored = await self._read(f"manifests/{hex_of(revision)}")
            if stored is not None and digest_of(stored) == revision:
                manifest = await self._decode(model, revision, stored)
        if manifest is None:
            manifest = await self._fetch_manifest(model, revision)
        if manifest.model != model:
            raise NotFound(f"{model} has no such revision", code="unknown_revision")
        _remember(self._manifests, revision, manifest, KEEP_MANIFESTS)
        return manifest

    async def _fetch_manifest(self, model: str, revision: Digest) -> Manifest:
        failure: Exception = UpstreamError("no upstream is configured")
        for upstream in self._upstreams:
            url = upstream + manifest_path(model, revision)
            try:
                answer = await fetch(self._sessions.of(upstream), url, limit=MAX_MANIFEST, missing="unknown_revision")
                if digest_of(answer.body) != revision:
                    raise IntegrityError(f"{url} does not match its digest")
                return await self._keep(model, revision, answer.body)
            except (NotFound, UpstreamError) as error:
                failure = error
        raise failure

    async def _keep(self, model: str, revision: Digest, data: bytes) -> Manifest:
        manifest = await self._decode(model, revision, data)
        _remember(self._manifests, revision, manifest, KEEP_MANIFESTS)
        await self._write(f"manifests/{hex_of(revision)}", data)
        return manifest

    async def _decode(self, model: str, revision: Digest, data: bytes) -> Manifest:
        manifest = await asyncio.to_thread(manifests.decode, data)
        if manifest.model != model:
            raise WrongModel(f"a manifest of {manifest.model} came where {model} was asked for")
        return manifest

    async def _confirm(self, model: str, ref: str, revision: Digest) -> _Known:
        now = self._clock.monotonic()
        known = _Known(revision, hex_of(revision), now)
        before = self._refs.get((model, ref))
        if before is not None and before.value == revision:
            known.written = before.written
        _remember(self._refs, (model, ref), known, KEEP_REFS)
        if now - known.written > NOTE:
            known.written = now
            record = {"revision": revision, "confirmed": self._clock.time()}
            await self._write(f"refs/{model}/{ref}", encode_json(record))
        return known

    async def _restored(self, model: str, ref: str) -> _Known | None:
        """A ref from an earlier run: known, but to be confirmed before it counts as fresh."""
        stored = await self._read(f"refs/{model}/{ref}")
        if stored is None:
            return None
        with suppress(KeyError, TypeError, ValueError, ManifestInvalid):
            record = decode_json(stored)
            revision = parse_digest(record["revision"])
            age = max(self._lifetime + 1, self._clock.time() - float(record["confirmed"]))
            return _Known(revision, hex_of(revision), self._clock.monotonic() - age)
        return None

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

    async def _forget_stored(self, model: str, ref: str) -> None:
        if self._directory is not None:
            with suppress(OSError):
                await asyncio.to_thread((self._directory / "refs" / model / ref).unlink, missing_ok=True)


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, data)


def _remember(table: OrderedDict[Any, Any], key: Any, value: Any, keep: int) -> None:
    table[key] = value
    table.move_to_end(key)
    while len(table) > keep:
        table.popitem(last=False)
