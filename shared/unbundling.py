"""Taking a bundle in: whatever holds shards (a client's repository, a node's cache) gets what was verified.

The metadata is checked by ``Trusted.bring``, against the root that is trusted here; then the manifest is the one that
it names; then each blob is kept once its digest was right. What is in the bundle as parcels is decoded at the end, a
shard at a time, in threads. Only when all is here, what the ref means moves on: whoever is killed on the way has kept
nothing that is wrong, and goes on with the version that is whole.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from shared import manifest as manifests
from shared import parcel
from shared.bundle import BaseMissing, BundleInvalid, Entry, Index, Unpacker, check_blob, rebuilding
from shared.digest import Digest, digest_of
from shared.errors import DecodeError, WrongModel
from shared.manifest import Delta, Manifest
from shared.web.trusted import Brought, Trusted


class Holder(Protocol):
    """Where what is in a bundle goes."""

    async def begin(self, manifest: Manifest, brought: Brought, index: Index) -> None:
        """Make ready for this revision. Raises DiskError."""
        ...

    def wanted(self) -> Sequence[Digest]:
        """The shards that are to be here at the end and are not here now."""
        ...

    def has(self, digest: Digest) -> bool:
        """Whether a shard or a parcel can be read here."""
        ...

    async def put(self, digest: Digest, data: bytes) -> None:
        """Keep one; its digest was right. Raises DiskError."""
        ...

    async def read(self, digest: Digest) -> bytes | None:
        """One that is here; None where it is damaged. Raises DiskError."""
        ...

    async def finish(self) -> None:
        """All is here. Raises DiskError."""
        ...


class Unbundling:
    """One bundle on its way in."""

    def __init__(self, trusted: Trusted, holder: Holder) -> None:
        self._trusted, self._holder = trusted, holder
        self._unpacker = Unpacker()
        self._files: dict[Digest, bytes] = {}
        self.manifest: Manifest | None = None
        """There once it came, and was what the metadata names."""
        self.moved = 0
        """Bytes of blobs that came."""

    def __repr__(self) -> str:
        return f"<Unbundling by {self._unpacker}>"

    @property
    def index(self) -> Index | None:
        """There once it came."""
        return self._unpacker.index

    async def take(self, chunks: AsyncIterator[bytes]) -> Manifest:
        """All of it. Raises BundleInvalid, BaseMissing, TrustError, NotFound, ManifestInvalid, DiskError."""
        async for chunk in chunks:
            for entry in await asyncio.to_thread(self._unpacker.feed, chunk):
                await self._take_entry(entry)
        self._unpacker.end()
        index, manifest = self.index, self.manifest
        assert index is not None and manifest is not None
        await self._rebuild(manifest)
        await self._holder.finish()
        await self._trusted.bring(self._metadata(index), index.model, index.ref, keep=True)
        return manifest

    def _metadata(self, index: Index) -> dict[str, bytes]:
        return {name: self._files[digest] for name, digest in index.trust.items()}

    async def _take_entry(self, entry: Entry) -> None:
        if entry.kind == "trust":
            self._files[entry.digest] = entry.data
        elif entry.kind == "manifests":
            await self._take_manifest(entry)
        elif self.manifest is not None:
            check_blob(self.manifest, entry.digest, len(entry.data))
            self.moved += len(entry.data)
            if not self._holder.has(entry.digest):
                await self._holder.put(entry.digest, entry.data)

    async def _take_manifest(self, entry: Entry) -> None:
        index = self._unpacker.index
        assert index is not None
        brought = await self._trusted.bring(self._metadata(index), index.model, index.ref, keep=False)
        target = brought.target
        if (target.revision, target.length) != (entry.digest, len(entry.data)):
            raise BundleInvalid(
                f"{index.model}@{index.ref} means {target.revision} by what is known here, and the bundle has another"
            )
        manifest = await asyncio.to_thread(manifests.decode, entry.data)
        if manifest.model != index.model:
            raise WrongModel(f"a manifest of {manifest.model} was signed as one of {index.model}")
        for digest, size in index.blobs().items():
            check_blob(manifest, digest, size)
        await self._holder.begin(manifest, brought, index)
        self.manifest = manifest

    async def _rebuild(self, manifest: Manifest) -> None:
        """Decode what did not come as itself."""
        missing = [digest for digest in self._holder.wanted() if not self._holder.has(digest)]
        assert self.index is not None
        for digest, steps in rebuilding(manifest, missing, self.index.blobs(), self._holder.has).items():
            await self._holder.put(digest, await self._decode(manifest, steps))

    async def _decode(self, manifest: Manifest, steps: Sequence[Delta]) -> bytes:
        """The shard that the last of the deltas makes. Raises BundleInvalid, BaseMissing."""
        made: dict[Digest, bytes] = {}
        for delta in steps:
            parts = []
            for piece in delta.base:
                shard = made.get(piece.digest) or await self._holder.read(piece.digest)
                if shard is None:
                    raise BaseMissing("a shard that the bundle is upon is damaged here: repair that revision first")
                parts.append(memoryview(shard)[piece.offset : piece.offset + piece.length])
            packed = await self._holder.read(delta.parcel)
            if packed is None:
                raise BundleInvalid("a parcel of it is damaged here: import it again")
            size = manifest.size_of(delta.target)
            made[delta.target] = await asyncio.to_thread(_decode, packed, parts, size)
            if await asyncio.to_thread(digest_of, made[delta.target]) != delta.target:
                raise BundleInvalid("a parcel of it makes another shard than its manifest says")
        return made[steps[-1].target]


def _decode(packed: bytes, parts: Sequence[memoryview], size: int) -> bytes:
    try:
        return parcel.decode(memoryview(packed), memoryview(b"".join(parts)), size)
    except DecodeError as error:
        raise BundleInvalid(f"a parcel of it cannot be decoded: {error}") from error
