"""A mirror of another hub: what this origin lacks is fetched from there when it is first asked for, and published.

One fetch a revision, however many ask: a task of the origin, which outlives its askers. Files come to disk
(``origin.spool``), are checked by what the hub says of them, and are published as any model is, signed with the
mirror's own key: that says "this is what the hub gave", and no more. Until that signature is in force nothing is to be
seen of the model here; who asks is told how far it is (``Mirroring``). A ref that was mirrored is confirmed at the hub
when its lifetime ends, and goes on to mean what it did while the hub is away. What was published here by hand is never
touched.

Where a ref was taken from is in its signed metadata, so nothing else has to be remembered.
"""

from __future__ import annotations

import asyncio
import fnmatch
import math
import shutil
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from structlog.typing import FilteringBoundLogger

from origin.audit import Audit
from origin.commit import LocalSink, publisher_keyids
from origin.config import MirrorSettings
from origin.deltas import Making
from origin.hub_client import Hub
from origin.hub_listing import HubFile, HubRevision, without
from origin.keyring import Keyring
from origin.publish import publish
from origin.signing import Ref, Source, key_id
from origin.spool import Held, Spool
from origin.trust_store import TrustStore
from shared.clock import Clock
from shared.errors import Mirroring, NearshardError, NotFound, PublishError
from shared.ids import is_commit, is_revision
from shared.keys import NodeKey
from shared.layout import Layout
from shared.metrics import Metrics
from shared.outcome import Outcome, cache_status
from shared.parcel import Effort
from shared.tasks import end
from shared.trust_names import org_of
from shared.web.asking import Asking

COMMIT_REF = "commit-"
"""How a ref for one commit of the hub begins, which never moves: 40 hex digits alone are no ref."""
PATIENCE, LONGEST = 2.0, 30
"""Seconds that who asks for what is not here waits for it before being told to come back, and until when at most."""
AGAIN, MISSING = 5.0, 60.0
"""Seconds after which what failed is tried again, and what the hub has not is asked for again."""
REMEMBERED = 10_000
"""Failures that are remembered."""
CHECKS = 4
"""Refs that are confirmed at a time."""
ABANDONED = 7 * 86400.0
"""Seconds after which what an earlier fetch left on disk is dropped."""


def ref_of(revision: str) -> str:
    """What a hub's branch, tag or commit is called here."""
    return COMMIT_REF + revision if is_commit(revision) else revision


@dataclass
class Fetch:
    """One ref that is being fetched. ``private``: for those with a token only."""

    model: str
    ref: str
    spool: Spool
    private: bool
    began: float
    task: asyncio.Task[None] | None = field(default=None, repr=False)

    @property
    def found(self) -> HubRevision:
        """What the hub has."""
        return self.spool.found


class Mirror:
    """Of one origin and one hub."""

    def __init__(
        self,
        settings: MirrorSettings,
        folder: Path,
        hub: Hub,
        trust: TrustStore,
        keys: Callable[[], Sequence[NodeKey]],
        audit: Audit,
        tell: Callable[[str], None],
        clock: Clock,
        metrics: Metrics,
        log: FilteringBoundLogger,
    ) -> None:
        """``keys`` gives the mirror's key, then the online keys; ``tell`` says that a model was published."""
        self._settings, self._folder, self._hub, self._trust = settings, folder, hub, trust
        self._keys, self._audit, self._tell = keys, audit, tell
        self._clock, self._metrics, self._log = clock, metrics, log
        self._fetches: dict[tuple[str, str], Fetch] = {}
        self._ended = 0
        """Fetches that have ended."""
        self._spools: dict[tuple[str, str], Spool] = {}
        self._failed: OrderedDict[tuple[str, str], tuple[NearshardError, float]] = OrderedDict()
        self._room = asyncio.Semaphore(settings.at_once)
        self._asking = Asking()
        self._checked: dict[tuple[str, str], float] = {}
        self._etags: dict[tuple[str, str], str] = {}
        self._stale: dict[tuple[str, str], str] = {}
        self._said: set[str] = set()
        """Allowed organisations that the mirror's key may not sign for, and the log says so."""
        self._watcher: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Mirror of {self._hub.url}>"

    def start(self) -> None:
        """Confirm what was mirrored, from now on."""
        self._watcher = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """End what is under way; what was fetched of it is continued by the next who asks."""
        await end([self._watcher] if self._watcher else [])
        await self._asking.close()
        await end([fetch.task for fetch in self._fetches.values() if fetch.task])

    # What is asked for

    def allows(self, model: str) -> bool:
        """Whether a model may be fetched."""
        return any(fnmatch.fnmatchcase(model, glob) for glob in self._settings.allow)

    async def seek(self, model: str, revision: str, may: Callable[[], Awaitable[bool]], name: str = "") -> Fetch | None:
        """The fetch of what a branch, tag or commit is at the hub, begun now or under way; None where that is not this
        mirror's matter, or is here already. ``name``: as the hub spells the model; ``may``: whether who asks may have
        what is not for everybody.

        Raises NotFound for what the hub has not; UpstreamError, PublishError, or whatever its last fetch failed with.
        """
        ref = ref_of(revision)
        if not await self._is_missing(model, ref, revision):
            return None
        key = (model, ref)
        fetch = self._fetches.get(key) or self._of_commit(model, revision)
        if fetch is None:
            self._raise_known(key)
            fetch = await self._asking.once(key, partial(self._look, model, ref, name or model))
        if fetch.private and not await may():
            raise NotFound(f"there is no model {model}", code="unknown_model")
        return self._begin(fetch)

    async def _is_missing(self, model: str, ref: str, revision: str) -> bool:
        """Whether it is this mirror's matter and not here. Looked at again where a fetch has ended meanwhile: else who
        asks as it ends would begin another one."""
        ended = -1
        while ended != self._ended:
            ended = self._ended
            if not await self._is_mine(model, ref) or (is_commit(revision) and await self._published(model, revision)):
                return False
        return True

    def _of_commit(self, model: str, commit: str) -> Fetch | None:
        """What is being fetched already under another ref."""
        running = (fetch for fetch in self._fetches.values() if fetch.model == model)
        return next((fetch for fetch in running if fetch.found.commit == commit), None)

    async def absent(self, model: str, revision: str, may: Callable[[], Awaitable[bool]]) -> bool:
        """Have a model that is asked for and not here; whether it is now. Raises Mirroring while it is not, and what
        ``seek`` does."""
        fetch = await self.seek(model, revision, may)
        if fetch is None:
            return False
        assert fetch.task is not None
        await asyncio.wait([fetch.task], timeout=PATIENCE)
        if not fetch.task.done():
            raise self.under_way(fetch)
        self._raise_known((model, fetch.ref))
        return True

    def under_way(self, fetch: Fetch) -> Mirroring:
        """What to tell who asks meanwhile."""
        done, total = fetch.spool.done, fetch.found.size
        elapsed = self._clock.monotonic() - fetch.began
        left = (total - done) * elapsed / done if done else 1.0
        after = min(LONGEST, max(1, math.ceil(left)))
        return Mirroring(f"{fetch.model}@{fetch.ref} is being fetched", done=done, total=total, retry_after=after)

    def fields(self, model: str, ref: str) -> Mapping[str, str]:
        """Age (RFC 9111 §5.1) of what is known of a mirrored ref; Cache-Status where the hub could not be asked."""
        fields = {}
        if (at := self._checked.get((model, ref))) is not None:
            fields["Age"] = str(max(0, int(self._clock.monotonic() - at)))
        if (model, ref) in self._stale:
            fields["Cache-Status"] = cache_status("origin", Outcome.STALE)
        return fields

    def status(self) -> Mapping[str, object]:
        """For people: what is under way, and what could not be confirmed. Names of what is not for everybody are not
        in it."""
        shown = [fetch for fetch in self._fetches.values() if not fetch.private]
        return {
            "upstream": self._hub.url,
            "fetching": {
                f"{fetch.model}@{fetch.ref}": {"done": fetch.spool.done, "total": fetch.found.size} for fetch in shown
            },
            "stale": len(self._stale),
        }

    async def _is_mine(self, model: str, ref: str) -> bool:
        if is_revision(ref) or not self.allows(model):
            return False
        state, org = await self._trust.state(), org_of(model)
        if key_id(self._keys()[0]) not in publisher_keyids(state, model, private=False):
            if org not in self._said:
                self._said.add(org)
                self._log.warning("not mirrored: nearshard trust add-publisher for the mirror's key", organisation=org)
            return False
        try:
            refs = state.refs(model)
        except NotFound:
            return True
        return ref not in refs and all(self._is_ours(ref) for ref in refs.values())

    def _is_ours(self, ref: Ref) -> bool:
        return ref.source is not None and ref.source.followed and ref.source.hub == self._hub.url

    def _raise_known(self, key: tuple[str, str]) -> None:
        """Raises what failed a moment ago."""
        error, until = self._failed.get(key, (None, 0.0))
        if error and self._clock.monotonic() < until:
            raise error

    def _note(self, key: tuple[str, str], error: NearshardError) -> None:
        wait = MISSING if isinstance(error, NotFound) else AGAIN
        self._failed[key] = error, self._clock.monotonic() + wait
        self._failed.move_to_end(key)
        while len(self._failed) > REMEMBERED:
            self._failed.popitem(last=False)

    # Fetching

    async def _look(self, model: str, ref: str, name: str) -> Fetch:
        """What the hub has. Raises NotFound, UpstreamError, PublishError."""
        try:
            found, _ = await self._hub.revision(name, ref.removeprefix(COMMIT_REF))
            assert found is not None  # no ETag was shown
            return self._plan(model, ref, found)
        except NearshardError as error:
            self._note((model, ref), error)
            raise

    def _plan(self, model: str, ref: str, found: HubRevision) -> Fetch:
        found = without(found, self._settings.exclude)
        if found.size > self._settings.max_size:
            raise PublishError(f"{model}@{ref} has {found.size} bytes, and mirror.max_size is less")
        place = (model, found.commit)
        spool = self._spools.get(place)
        if spool is None:
            spool = Spool(found, self._folder / f"{model.replace('/', '~')}~{found.commit[:16]}")
        private = {"always": True, "never": False, "upstream": found.restricted}[self._settings.private]
        return Fetch(model, ref, spool, private, self._clock.monotonic())

    def _begin(self, fetch: Fetch) -> Fetch:
        key = (fetch.model, fetch.ref)
        if running := self._fetches.get(key):
            return running
        fetch.spool = self._spools.setdefault((fetch.model, fetch.found.commit), fetch.spool)
        self._fetches[key] = fetch
        fetch.task = asyncio.create_task(self._run(fetch), name=f"mirror {fetch.model}@{fetch.ref}")
        return fetch

    async def _run(self, fetch: Fetch) -> None:
        key, result = (fetch.model, fetch.ref), "failed"
        try:
            async with self._room, fetch.spool.lock:
                await self._take(fetch)
            result = "published"
        except NearshardError as error:
            self._note(key, error)
            fetch.spool.fail(error)
            self._log.warning("a model could not be mirrored", model=fetch.model, ref=fetch.ref, reason=str(error))
        except Exception as error:  # noqa: BLE001 - nobody awaits this task, so nobody else would say so
            self._log.error("mirroring failed", model=fetch.model, ref=fetch.ref, exc_info=error)
            self._note(key, NearshardError(str(error)))
            fetch.spool.fail(NearshardError(str(error)))
        finally:
            self._metrics.mirror_fetches.labels(result).inc()
            del self._fetches[key]
            self._ended += 1
            if not any(other.spool is fetch.spool for other in self._fetches.values()):
                self._spools.pop((fetch.model, fetch.found.commit), None)
                if result == "published":
                    await asyncio.to_thread(fetch.spool.remove)

    async def _take(self, fetch: Fetch) -> None:
        """Fetch and publish, or only sign where another ref means the same commit."""
        model, ref, private = fetch.model, fetch.ref, fetch.private
        source = Source(self._hub.url, fetch.found.name, fetch.found.commit, followed=True)
        keys = self._keys()
        ring = Keyring({key_id(key): key for key in keys})
        sink = LocalSink(self._trust, ring, self._now)
        twin = await self._published(model, fetch.found.commit)
        if twin and twin.private == private:
            before = await sink.begin(model, ref, private=private)
            manifest = await self._trust.storage.manifest(model, twin.revision)
            await sink.move_ref(model, ref, manifest, before, source, private=private)
            revision = twin.revision
        else:
            await fetch.spool.fetch(self._hub, self._clock.sleep, await self._held(model))
            done = await publish(
                sink,
                fetch.spool.folder,
                model,
                ref,
                private=private,
                source=source,
                expected=fetch.spool.hashes(),
                making=self._making(),
            )
            revision = done.revision
        self._checked[model, ref] = self._clock.monotonic()
        self._audit.add(
            "mirrored", key_id(keys[0]), model=model, ref=ref, revision=revision, hub=source.hub, commit=source.commit
        )
        self._log.info("mirrored", model=model, ref=ref, commit=source.commit, left_out=fetch.spool.left_out)
        self._tell(model)

    def _making(self) -> Making:
        effort = self._settings.effort
        if effort == "none":
            return Making(deltas=False, compress=False)
        return Making(effort=Effort[effort.upper()])

    async def _held(self, model: str) -> Held:
        """What the store has of a model by the word of its manifests: an older revision has most of a newer one."""
        storage, layouts = self._trust.storage, {}
        with suppress(NotFound):
            for ref in (await self._trust.refs(model)).values():
                manifest = await storage.manifest(model, ref.revision)
                space = model if ref.private else ""
                layouts.update({layout.sha256: (layout, space) for layout in manifest.files.values()})

        async def read(layout: Layout, space: str) -> AsyncIterator[memoryview]:
            for part in layout.slices:
                async for data in storage.stream_blob(part.digest, part.offset, part.length, space):
                    yield data

        def held(file: HubFile) -> AsyncIterator[memoryview] | None:
            return read(*layouts[file.sha256]) if file.sha256 in layouts else None

        return held

    async def _published(self, model: str, commit: str) -> Ref | None:
        try:
            refs = await self._trust.refs(model)
        except NotFound:
            return None
        return next((ref for ref in refs.values() if ref.source and ref.source.commit == commit), None)

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock.time(), UTC)

    # Confirming

    async def _watch(self) -> None:
        await asyncio.to_thread(self._drop_abandoned)
        while True:
            try:
                await self.confirm()
            except NearshardError as error:
                self._log.warning("what was mirrored is not confirmed", reason=str(error))
            await self._clock.sleep(min(60.0, self._settings.lifetime / 4))

    async def confirm(self) -> None:
        """Ask the hub about each ref whose lifetime has ended. Raises ConfigError, MetadataInvalid, DiskError."""
        now, room = self._clock.monotonic(), asyncio.Semaphore(CHECKS)

        async def check(model: str, ref: str, source: Source) -> None:
            async with room:
                await self._confirm(model, ref, source)

        async with asyncio.TaskGroup() as group:
            async for model, ref, source in self._mirrored():
                due = now - self._checked.get((model, ref), float("-inf")) >= self._settings.lifetime
                if due and (model, ref) not in self._fetches:
                    group.create_task(check(model, ref, source))
        self._metrics.mirror_stale.set(len(self._stale))

    async def _mirrored(self) -> AsyncIterator[tuple[str, str, Source]]:
        """The refs that were taken from the hub and may move there."""
        for model, ref, meaning in (await self._trust.state()).all_refs():
            if meaning.source and self._is_ours(meaning) and self.allows(model) and not ref.startswith(COMMIT_REF):
                yield model, ref, meaning.source

    async def _confirm(self, model: str, ref: str, source: Source) -> None:
        key = (model, ref)
        try:
            found, etag = await self._hub.revision(source.model, ref, self._etags.get(key, ""))
            if found and found.commit != source.commit:
                self._raise_known(key)
                self._begin(self._plan(model, ref, found))
                return
            self._etags[key] = etag
        except NearshardError as error:  # also NotFound: what is gone there is not gone here
            if key not in self._stale:
                self._log.warning("a mirrored ref is served as it was", model=model, ref=ref, reason=str(error))
            self._stale[key] = error.error_code
            return
        self._stale.pop(key, None)
        self._checked[key] = self._clock.monotonic()

    def _drop_abandoned(self) -> None:
        """What earlier fetches left that nobody has continued."""
        before = self._clock.time() - ABANDONED
        for folder in self._folder.glob("*~*~*"):
            if folder.stat().st_mtime < before:
                shutil.rmtree(folder, ignore_errors=True)
