"""How garbage collection and publishing keep out of each other's way, in any store and on any machines.

A shard that nothing refers to is old, a publish finds it there and goes on to refer to it, and ``gc`` sweeps it: that
must not happen. So each says what it does before it looks at what the other one said:

* A publish, once its shards are stored, leaves a **note** of all digests that it will refer to. It then waits for the
  **sweeps** that were announced before, looks whether all its shards are still there (else it stores them again), and
  only then stores the manifest and moves the ref. The note stays: ``gc`` removes it when it is a day old.
* ``gc`` announces a sweep before each batch that it deletes, reads all notes, deletes what is in none, and withdraws
  the announcement.

Whoever spoke second has heard the first, as stores are consistent. A ``gc`` that was killed leaves an announcement: a
sweep ends within ``SWEEP`` seconds, or gives up, so nobody waits for longer. What is said is never cached.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from datetime import datetime, timedelta

from origin.objects import Entry
from origin.storage import Storage
from shared.digest import SIZE, Digest, raw_of
from shared.errors import DiskError, NotFound
from shared.manifest import Manifest

NOTES, SWEEPS = "gc/notes", "gc/sweeps"
NOTE_LIFE = timedelta(days=1)
SWEEP = 30.0
"""Seconds after which an announced sweep is over: no delete of it is under way any more."""
LOOK = 0.5
"""Seconds between two looks at sweeps that are waited for."""

Sleep = Callable[[float], Awaitable[None]]


async def claim(storage: Storage, manifest: Manifest, model: str = "", sleep: Sleep = asyncio.sleep) -> list[Digest]:
    """Have ``gc`` spare all that a manifest needs, from now on for a day; gives the shards that are not there.

    To be called when its shards are stored and before the manifest is; where some are not there (any more), they are to
    be stored, and claimed again. ``model``: as of ``Storage.ensure_blob``.
    """
    path = f"{NOTES}/{secrets.token_hex(8)}"
    wanted = [raw_of(manifest.revision), *(raw_of(digest) for digest in manifest.stored)]
    await storage.create(path, b"".join(wanted))
    await _await_sweeps(storage, (await storage.objects.head(path)).modified, sleep)
    return await storage.lacks(manifest.stored, model)


async def _await_sweeps(storage: Storage, noted: datetime, sleep: Sleep) -> None:
    """Until the sweeps that were announced by now are over."""
    over = noted - timedelta(seconds=SWEEP)
    before = {entry.path async for entry in storage.objects.entries(SWEEPS) if entry.modified >= over}
    for _ in range(int(SWEEP / LOOK)):
        if not before:
            return
        await sleep(LOOK)
        before &= {path async for path in storage.paths(SWEEPS)}


class Notes:
    """The digests in all notes. 32 bytes each, and some hundred with what Python adds."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._read: set[str] = set()
        self._digests: set[bytes] = set()

    async def renew(self) -> None:
        """Read those that came since the last time."""
        async for entry in self._storage.objects.entries(NOTES):
            if entry.path in self._read:
                continue
            try:
                data, _ = await self._storage.get(entry.path)
            except NotFound:
                continue  # it is a day old, and another gc was here
            self._digests.update(split(data))
            self._read.add(entry.path)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._digests


def split(data: bytes) -> Iterable[bytes]:
    """Digests of 32 bytes, joined. Raises DiskError."""
    if len(data) % SIZE:
        raise DiskError("a note of a publish in the store is damaged")
    return (data[start : start + SIZE] for start in range(0, len(data), SIZE))


@asynccontextmanager
async def sweep(storage: Storage) -> AsyncIterator[Entry]:
    """Announce a sweep, and withdraw it at the end. Gives the announcement, which has the store's time."""
    path = f"{SWEEPS}/{secrets.token_hex(8)}"
    await storage.create(path, b"")
    try:
        yield await storage.objects.head(path)
    finally:
        await storage.objects.delete([path])
