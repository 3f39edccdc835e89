"""Garbage collection: mark what is kept, sweep the rest. Beside publishing, and beside itself.

1. **Mark**: of each model the revisions that refs mean, the last ``keep`` published ones, and those younger than the
   grace period. All digests of their shards are kept in memory: about 100 bytes each, so 100 MB for a million.
2. **Sweep** manifests first, then public shards, then those of private models: what is not marked and older than the
   grace period, in batches that are announced (``origin.keeping``). Listings are streamed.

A manifest goes before its shards, so one that is killed leaves no manifest that names what is missing. Whatever cannot
be read (a damaged manifest, a ref that means a missing one) ends it before anything is swept. The time is the store's:
a clock of this machine that is wrong sweeps nothing young. A digest that any marked manifest names is spared in the
public namespace too, since a private model may have been public.

Signed metadata goes last: versions that were superseded 7 days ago. Whoever still has the timestamp of then, which has
expired, cannot ask for them. Roots stay, as clients go from one to the next; so does what is newer than what is in
force, as it comes into force yet, or its number is spent.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Container, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import pairwise
from types import MappingProxyType
from typing import Protocol

from origin.keeping import NOTE_LIFE, NOTES, SWEEP, SWEEPS, Notes, sweep
from origin.objects import DELETE, Entry
from origin.storage import Storage, digest_at
from origin.trust_store import FOLDER
from shared.clock import Clock
from shared.digest import Digest, raw_of
from shared.errors import DiskError, StoreError
from shared.trust_names import ROOT, parse_file_name

BATCH = 200
"""Objects deleted under one announcement: one request to an object store."""
SUPERSEDED = timedelta(days=7)
"""For so long metadata is kept after its next version came; a timestamp that leads to it is good for less."""


@dataclass
class Swept:
    """What went, or would go."""

    kept_revisions: int = 0
    kept_shards: int = 0
    """Of all models, counted once where several share them."""
    revisions: list[str] = field(default_factory=list)
    """``org/name@digest`` of the manifests that went."""
    shards: int = 0
    metadata: int = 0
    """Files of signed metadata."""
    size: int = 0
    """Bytes of all that went."""
    left: int = 0
    """Objects that the store failed to delete: the next gc will."""


class Show(Protocol):
    """Is told of each object that goes, or would go."""

    def __call__(self, entry: Entry) -> None: ...


async def collect(
    storage: Storage,
    refs: Mapping[str, Collection[Digest]],
    clock: Clock,
    *,
    keep: int,
    grace: float,
    in_force: Mapping[str, int] = MappingProxyType({}),
    dry_run: bool = False,
    show: Show = lambda entry: None,
) -> Swept:
    """Sweep a store. ``refs``: by model the revisions that its refs mean now; a publish that comes after they were
    read has left its note. ``keep``: revisions of each model; ``grace``: seconds. ``in_force``: by role the version of
    its metadata; that of other roles stays.

    With ``dry_run`` nothing but gc's own announcements is written. Raises DiskError, StoreError or ManifestInvalid;
    what was swept until then was garbage.
    """
    async with sweep(storage) as announced:
        now = announced.modified
    old = now - timedelta(seconds=grace)
    kept, doomed = await _choose(storage, refs, keep, old)
    marked: set[bytes] = set()
    for model, revisions in kept.items():
        marked |= await _shards(storage, model, revisions)
    done = Swept(sum(map(len, kept.values())), len(marked))
    sweeper = _Sweeper(storage, clock, done, dry_run, show)
    for model, entries in doomed.items():
        async for entry in sweeper.sweep(_each(entries), old, ()):
            done.revisions.append(f"{model}@{digest_at(entry.path)}")
    async for _ in sweeper.sweep(storage.blobs(), old, marked):
        done.shards += 1
    for model, revisions in kept.items():
        if await anext(storage.blobs(model), None):
            own = await _shards(storage, model, revisions)
            async for _ in sweeper.sweep(storage.blobs(model), old, own):
                done.shards += 1
    done.metadata = await sweeper.sweep_metadata(in_force, now)
    if not dry_run:
        await _tidy(storage, now)
    return done


async def _choose(
    storage: Storage, refs: Mapping[str, Collection[Digest]], keep: int, old: datetime
) -> tuple[dict[str, list[Digest]], dict[str, list[Entry]]]:
    """Of every model the revisions to keep, and the manifests of the others. Raises DiskError."""
    kept: dict[str, list[Digest]] = {}
    doomed: dict[str, list[Entry]] = {}
    names = await storage.names()
    if unknown := refs.keys() - set(names):
        raise DiskError(f"{min(unknown)} has refs, and nothing is there of it: nothing is swept")
    for model in names:
        meant = set(refs.get(model, ()))
        entries = sorted([entry async for entry in storage.manifests(model)], key=lambda entry: entry.modified)
        if lost := meant - {digest_at(entry.path) for entry in entries}:
            raise DiskError(f"a ref of {model} means {min(lost)}, which is not there: nothing is swept")
        last = entries[-keep:] if keep and meant else []
        young = [entry for entry in entries if entry.modified >= old]
        spared = meant.union(digest_at(entry.path) for entry in (*last, *young))
        kept[model] = sorted(spared)
        doomed[model] = [entry for entry in entries if digest_at(entry.path) not in spared]
    if not refs and any(doomed.values()):
        raise DiskError("models in the store have revisions, but none has a ref: nothing is swept")
    return kept, doomed


async def _shards(storage: Storage, model: str, revisions: Iterable[Digest]) -> set[bytes]:
    """The shards that revisions of a model need, parcels of their deltas among them; not what those are upon."""
    found: set[bytes] = set()
    for revision in revisions:
        found.update(raw_of(digest) for digest in (await storage.manifest(model, revision)).stored)
    return found


class _Sweeper:
    """Deletes in batches, each announced and held against the notes of publishes."""

    def __init__(self, storage: Storage, clock: Clock, done: Swept, dry_run: bool, show: Show) -> None:
        self._storage, self._clock, self._done, self._dry_run, self._show = storage, clock, done, dry_run, show
        self._notes = Notes(storage)
        self._end = clock.monotonic() + NOTE_LIFE.total_seconds() / 2

    async def sweep(
        self, entries: AsyncIterator[Entry], old: datetime, marked: Container[bytes]
    ) -> AsyncIterator[Entry]:
        """Delete those that are not marked and not younger than ``old``; gives those that went."""
        batch: list[Entry] = []
        async for entry in entries:
            if entry.modified < old and raw_of(digest_at(entry.path)) not in marked:
                batch.append(entry)
            if len(batch) == BATCH:
                for gone in await self._delete(batch):
                    yield gone
                batch = []
        for gone in await self._delete(batch):
            yield gone

    async def _delete(self, batch: list[Entry]) -> list[Entry]:
        if not batch:
            return []
        begun = self._clock.monotonic()
        if begun > self._end:
            raise DiskError("gc ran for so long that notes of publishes may be gone: run it again")
        async with sweep(self._storage):
            await self._notes.renew()
            chosen = [entry for entry in batch if raw_of(digest_at(entry.path)) not in self._notes]
            if self._clock.monotonic() - begun > SWEEP / 2 - DELETE.total_seconds():
                self._done.left += len(chosen)  # a publish may go on soon without waiting for this sweep
                return []
            return await self._remove(chosen)

    async def sweep_metadata(self, in_force: Mapping[str, int], now: datetime) -> int:
        """Delete superseded metadata; gives how many files went. No publish finds it and goes on to refer to it, so
        there are no notes of it."""
        entries = [entry async for entry in self._storage.objects.entries(FOLDER)]
        doomed, gone = _superseded(entries, in_force, now - SUPERSEDED), 0
        for start in range(0, len(doomed), BATCH):
            async with sweep(self._storage):
                gone += len(await self._remove(doomed[start : start + BATCH]))
        return gone

    async def _remove(self, chosen: list[Entry]) -> list[Entry]:
        try:
            if not self._dry_run:
                await self._storage.objects.delete([entry.path for entry in chosen])
        except StoreError as error:
            if error.error_code == "store_denied":
                raise
            self._done.left += len(chosen)
            return []
        for entry in chosen:
            self._done.size += entry.size
            self._show(entry)
        return chosen


def _superseded(entries: Iterable[Entry], in_force: Mapping[str, int], old: datetime) -> list[Entry]:
    """The files of metadata whose next version is in force, or was, and came before ``old``."""
    versions: dict[str, list[tuple[int, Entry]]] = {}
    for entry in entries:
        role, version = parse_file_name(entry.path.rpartition("/")[2]) or (ROOT, 0)
        if role != ROOT and version <= in_force.get(role, 0):
            versions.setdefault(role, []).append((version, entry))
    doomed = []
    for found in versions.values():
        found.sort(key=lambda one: one[0])
        doomed += [entry for (_, entry), (_, later) in pairwise(found) if later.modified < old]
    return doomed


async def _each(entries: Iterable[Entry]) -> AsyncIterator[Entry]:
    for entry in entries:
        yield entry


async def _tidy(storage: Storage, now: datetime) -> None:
    """Remove notes that are a day old, announcements of a gc that was killed, and abandoned temporary files."""
    await storage.sweep(now)
    for folder, life in ((NOTES, NOTE_LIFE), (SWEEPS, timedelta(seconds=2 * SWEEP))):
        stale = [entry.path async for entry in storage.objects.entries(folder) if entry.modified < now - life]
        for start in range(0, len(stale), BATCH):
            await storage.objects.delete(stale[start : start + BATCH])
