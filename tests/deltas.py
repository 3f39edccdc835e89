"""A publisher that signs the deltas a test gives it, right or wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from origin.commit import LocalSink
from origin.keyring import load_ring
from origin.storage import Storage
from origin.trust_setup import delegate_any
from origin.trust_store import TrustStore
from shared.deltas import bytes_moved, ways
from shared.digest import Digest, digest_of, parse_digest
from shared.layout import Slice
from shared.manifest import Delta, Manifest

MODEL, FILE = "acme/tiny", "model.safetensors"
LAYERS = 6
Encode = Callable[[bytes, bytes], bytes]
"""The parcel of a shard upon another one."""


def write_model(directory: Path, version: int, elements: int = 30_000) -> None:
    """A model of tensors that can be compressed well; each version changes a few numbers of each tensor."""
    tensors = {}
    for layer in range(LAYERS):
        rng = np.random.default_rng(layer)
        tensor = rng.integers(0, 4, elements).astype(np.float32)
        tensor[:version] += 1
        tensors[f"layer.{layer}.weight"] = tensor
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / FILE)


@dataclass(frozen=True)
class Signed:
    """A revision with deltas from an earlier one."""

    manifest: Manifest
    before: Manifest
    file: bytes
    """The model's one file."""

    @property
    def revision(self) -> Digest:
        """Its name."""
        return self.manifest.revision

    @property
    def ways(self) -> Mapping[Digest, tuple[Delta, ...]]:
        """Shards that are new in it, and what makes them of the earlier revision's."""
        new = self.manifest.shards.keys() - self.before.shards.keys()
        return ways(self.manifest, new, self.before.shards.__contains__)

    @property
    def parcels(self) -> set[Digest]:
        """What is taken for that."""
        return {delta.parcel for steps in self.ways.values() for delta in steps}

    @property
    def bytes(self) -> int:
        """What has to be moved for it."""
        return bytes_moved(self.manifest, self.ways)

    @property
    def saved(self) -> int:
        """What has not."""
        return sum(self.manifest.shards[digest] for digest in self.ways) - self.bytes


def signed(store: Path, directory: Path, old: str, new: str, encode: Encode | None = None) -> Signed:
    """Revision ``new`` of the model in ``store``, which was published over ``old``. With ``encode``, its deltas are
    others: one for each shard that changed, from that in the same place of the file; and ``main`` means that."""
    return asyncio.run(_signed(Storage(str(store)), directory, parse_digest(old), parse_digest(new), encode))


async def _signed(storage: Storage, directory: Path, old: Digest, new: Digest, encode: Encode | None) -> Signed:
    before, after = [await storage.manifest(MODEL, revision) for revision in (old, new)]
    file = (directory / FILE).read_bytes()
    if encode is None:
        return Signed(after, before, file)
    others, deltas = dict[Digest, int](), list[Delta]()
    pairs = dict(zip(before.files[FILE].slices, after.files[FILE].slices, strict=True))
    for was, part in pairs.items():
        if was.digest != part.digest:
            data = encode(await storage.read_blob(part.digest), await storage.read_blob(was.digest))
            await storage.ensure_blob(digest_of(data), data)
            others |= {digest_of(data): len(data), was.digest: before.shards[was.digest]}
            deltas.append(Delta(part.digest, digest_of(data), (Slice(was.digest, 0, was.length),)))
    others = {digest: size for digest, size in others.items() if digest not in after.shards}
    made = replace(after, parent=old, deltas=tuple(deltas), others=others)
    trust, ring = TrustStore(storage), load_ring([Path(storage.location).parent / "keys"])
    await delegate_any(trust, ring, "acme", datetime.now(UTC))
    sink = LocalSink(trust, ring, lambda: datetime.now(UTC))
    meant = await sink.begin(MODEL, "main", private=False)
    assert await sink.put_manifest(made)
    await sink.move_ref(MODEL, "main", made, meant, private=False)
    return Signed(made, before, file)
