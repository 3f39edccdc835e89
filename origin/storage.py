"""Where the origin keeps things: one object store, a directory by default.

The tree, with every path made here::

    blobs/<2 hex>/<64 hex>                          a public shard, named by its digest
    models/<org>/<name>/blobs/<2 hex>/<64 hex>      a shard of a private model
    models/<org>/<name>/manifests/<64 hex>          a revision's manifest, named by its digest
    trust/<file>                                    signed metadata: what refs mean (origin.trust_store)
    tmp/<random>                                    a write in progress (directories only)

Objects but ``trust/timestamp.json`` are never overwritten with other bytes. What a shard is, its digest says: never
the store's ETag.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta

from origin.objects import TMP, Buffer, Entry, Objects, Version, open_objects, shown
from shared.digest import Digest, digest_of, hex_of, parse_digest
from shared.errors import BadId, IntegrityError, NotFound
from shared.ids import parse_model
from shared.manifest import Manifest, decode

AT_ONCE = 64
"""Shards that are looked for at a time."""
ABANDONED = timedelta(days=1)
"""A temporary file older than this belongs to no living publish."""


class Storage:
    """Shards, manifests and signed metadata in an object store. Safe to use from several processes.

    ``model`` of a shard is the private model whose shard it is; empty for a public one. Every method raises DiskError
    or StoreError where the store fails.
    """

    def __init__(self, location: str) -> None:
        """``location``: a directory, or a URL (``origin.objects.open_objects``). Raises ConfigError."""
        self.location = location
        self.objects: Objects = open_objects(location)

    def __repr__(self) -> str:
        return f"<Storage {shown(self.location)}>"

    # Objects by path

    async def get(self, path: str) -> tuple[bytes, Version]:
        """A small object and its version. Raises NotFound."""
        return await self.objects.get(path)

    async def create(self, path: str, data: Buffer) -> bool:
        """Store an object if there is none at this path; durable on return. Gives whether it was stored."""
        return await self.objects.create(path, data)

    async def replace(self, path: str, data: Buffer, expected: Version | None) -> Version | None:
        """Put an object in the place of ``expected`` (None: of whatever is there); durable on return.

        Gives its version; None where something else, or nothing, is there.
        """
        return await self.objects.replace(path, data, expected)

    async def paths(self, prefix: str) -> AsyncIterator[str]:
        """The paths below a folder, in no order that means anything."""
        async for entry in self.objects.entries(prefix):
            yield entry.path

    # Shards

    async def blob_size(self, digest: Digest, model: str = "") -> int:
        """Bytes of a shard. Raises NotFound."""
        with _missing("unknown_blob"):
            return (await self.objects.head(_blob(digest, model))).size

    async def stream_blob(self, digest: Digest, offset: int, length: int, model: str = "") -> AsyncIterator[memoryview]:
        """``length`` bytes of a shard from ``offset`` on, about 1 MiB at a time. Raises NotFound."""
        with _missing("unknown_blob"):
            async for part in self.objects.read(_blob(digest, model), offset, length):
                yield part

    async def verify_blob(self, digest: Digest, model: str = "") -> None:
        """Read all of a shard. Raises IntegrityError where its bytes are not what it is named by; NotFound."""
        found = hashlib.sha256()
        async for part in self.stream_blob(digest, 0, await self.blob_size(digest, model), model):
            await asyncio.to_thread(found.update, part)
        if found.hexdigest() != hex_of(digest):
            raise IntegrityError(f"the store has other bytes under {digest}")

    async def read_blob(self, digest: Digest, model: str = "") -> bytes:
        """All of a shard, checked. Raises IntegrityError where its bytes are not what it is named by; NotFound."""
        size = await self.blob_size(digest, model)
        data = b"".join([bytes(part) async for part in self.stream_blob(digest, 0, size, model)])
        if await asyncio.to_thread(digest_of, data) != digest:
            raise IntegrityError(f"the store has other bytes under {digest}")
        return data

    async def has_blob(self, digest: Digest, size: int, model: str = "") -> bool:
        """Whether a shard of ``size`` bytes is there; if so, it is durable after the next ``sync``."""
        with suppress(NotFound):
            if await self.blob_size(digest, model) == size:
                self.objects.to_be_synced(_blob(digest, model))
                return True
        return False

    async def lacks(self, shards: Mapping[Digest, int], model: str = "") -> list[Digest]:
        """Those of these shards (digest to size) that are not there; the others are durable after the next ``sync``."""
        room = asyncio.Semaphore(AT_ONCE)

        async def lacking(digest: Digest, size: int) -> Digest | None:
            async with room:
                return None if await self.has_blob(digest, size, model) else digest

        found = await asyncio.gather(*(lacking(digest, size) for digest, size in shards.items()))
        return [digest for digest in found if digest]

    async def ensure_blob(self, digest: Digest, data: Buffer, model: str = "") -> bool:
        """Store a shard that the caller has hashed, unless it is there. Gives whether it was stored.

        Durable after the next ``sync``, also where an earlier publish was killed before its own.
        """
        if await self.has_blob(digest, len(data), model):
            return False
        await self.objects.put(_blob(digest, model), data)
        return True

    # Manifests

    async def put_manifest(self, manifest: Manifest) -> None:
        """Store a manifest. Every shard that it lists must be stored and synced before."""
        await self.objects.put(_manifest(manifest.model, manifest.revision), manifest.encoded)

    async def manifest(self, model: str, revision: Digest) -> Manifest:
        """A stored manifest. Raises NotFound; ManifestInvalid where the store is damaged."""
        with _missing("unknown_revision"):
            return decode((await self.get(_manifest(model, revision)))[0])

    async def has_manifest(self, model: str, revision: Digest) -> bool:
        """Whether a revision is there."""
        try:
            await self.objects.head(_manifest(model, revision))
        except NotFound:
            return False
        return True

    async def names(self) -> list[str]:
        """The models of which there is anything, sorted: also those that no ref makes visible."""
        found = []
        for org in await self.objects.folders("models"):
            found += [f"{org}/{name}" for name in await self.objects.folders(f"models/{org}")]
        return [parse_model(model) for model in found]

    async def revisions(self, model: str) -> list[Digest]:
        """The stored revisions of a model, in no order that means anything."""
        return sorted([digest_at(entry.path) async for entry in self.manifests(model)])

    # What is stored, with its time

    async def manifests(self, model: str) -> AsyncIterator[Entry]:
        """The manifests of a model; their time is when they were first published."""
        async for entry in self._named(f"{_model(model)}/manifests"):
            yield entry

    async def blobs(self, model: str = "") -> AsyncIterator[Entry]:
        """All shards; ``model`` as everywhere."""
        async for entry in self._named(f"{_model(model)}/blobs" if model else "blobs"):
            yield entry

    async def _named(self, prefix: str) -> AsyncIterator[Entry]:
        """The objects that are named by a digest. Others are not ours."""
        async for entry in self.objects.entries(prefix):
            with suppress(BadId):
                digest_at(entry.path)
                yield entry

    # Durability

    async def sync(self) -> None:
        """Make every name that was written before durable. The bytes behind the names are already."""
        await self.objects.sync()

    async def sweep(self, now: datetime) -> int:
        """Drop temporary files that no living publish can own. Gives how many."""
        paths = [entry.path async for entry in self.objects.entries(TMP) if entry.modified < now - ABANDONED]
        await self.objects.delete(paths)
        return len(paths)


@contextmanager
def _missing(code: str) -> Iterator[None]:
    """What is not there, by its own code."""
    try:
        yield
    except NotFound as error:
        raise NotFound(str(error), code=code) from None


def digest_at(path: str) -> Digest:
    """The digest that an object is named by. Raises BadId."""
    return parse_digest("sha256:" + path.rpartition("/")[2])


def _blob(digest: Digest, model: str = "") -> str:
    name = hex_of(digest)
    return f"{_model(model)}/blobs/{name[:2]}/{name}" if model else f"blobs/{name[:2]}/{name}"


def _model(model: str) -> str:
    return f"models/{model}"


def _manifest(model: str, revision: Digest) -> str:
    return f"{_model(model)}/manifests/{hex_of(revision)}"
