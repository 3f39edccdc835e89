"""A publisher that signs the deltas a test gives it, right or wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
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
from shared import parcel
from shared.digest import Digest, digest_of, parse_digest
from shared.layout import Slice
from shared.manifest import Delta, Manifest
from shared.parcel import Run

MODEL = "acme/tiny"
LAYERS = 6
Encode = Callable[[bytes, bytes], bytes]
"""The parcel of a shard upon another one."""


def encoded(target: bytes, base: bytes) -> bytes:
    """As it should be."""
    return parcel.encode(memoryview(target), memoryview(base), [Run(len(target), based=True)])


def write_model(directory: Path, version: int, elements: int = 30_000) -> None:
    """A model of tensors that can be compressed well; each version changes a few numbers of each tensor."""
    tensors = {}
    for layer in range(LAYERS):
        rng = np.random.default_rng(layer)
        tensor = rng.integers(0, 4, elements).astype(np.float32)
        tensor[:version] += 1
        tensors[f"layer.{layer}.weight"] = tensor
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors")


@dataclass(frozen=True)
class Signed:
    """A revision with deltas."""

    revision: Digest
    file: bytes
    """The model's one file."""
    parcels: dict[Digest, int]
    manifest: Manifest


def sign_deltas(
    store: Path, directory: Path, old: str, new: str, encode: Encode = encoded, ref: str = "main"
) -> Signed:
    """Give revision ``new`` of the model in ``store`` a delta from ``old`` for each shard that changed, and sign it.

    Shards are from those in the same place of the file.
    """
    return asyncio.run(_sign(Storage(str(store)), directory, parse_digest(old), parse_digest(new), encode, ref))


async def _sign(storage: Storage, directory: Path, old: Digest, new: Digest, encode: Encode, ref: str) -> Signed:
    before, after = [await storage.manifest(MODEL, revision) for revision in (old, new)]
    others, deltas = dict[Digest, int](), list[Delta]()
    pairs = zip(before.files["model.safetensors"].slices, after.files["model.safetensors"].slices, strict=True)
    for was, part in dict(pairs).items():
        if was.digest == part.digest or was.length != part.length:
            continue
        target, base = [await _read(storage, digest) for digest in (part.digest, was.digest)]
        data = encode(target, base)
        await storage.ensure_blob(digest_of(data), data, "")
        others |= {digest_of(data): len(data), was.digest: len(base)}
        deltas.append(Delta(part.digest, digest_of(data), (Slice(was.digest, 0, len(base)),)))
    others = {digest: size for digest, size in others.items() if digest not in after.shards}
    made = replace(after, parent=old, deltas=tuple(deltas), others=others)
    trust, ring = TrustStore(storage), load_ring([Path(storage.location).parent / "keys"])
    await delegate_any(trust, ring, "acme", datetime.now(UTC))
    sink = LocalSink(trust, ring, lambda: datetime.now(UTC))
    meant = await sink.begin(MODEL, ref, private=False)
    assert await sink.put_manifest(made)
    await sink.move_ref(MODEL, ref, made, meant, private=False)
    parcels = {delta.parcel: others[delta.parcel] for delta in deltas}
    return Signed(made.revision, (directory / "model.safetensors").read_bytes(), parcels, made)


async def _read(storage: Storage, digest: Digest) -> bytes:
    return b"".join([bytes(part) async for part in storage.stream_blob(digest, 0, await storage.blob_size(digest))])
