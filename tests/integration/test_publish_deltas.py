"""Publishing over an earlier revision: which deltas are made and listed, and that each leads where it says."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from origin import deltas as making_deltas
from origin.deltas import Making
from origin.publish import Published
from origin.storage import Storage
from shared.deltas import MAX_CHAIN, bytes_moved, ways
from shared.digest import Digest, digest_of
from shared.errors import PublishError
from shared.manifest import Manifest
from shared.parcel import decode
from tests.harness import make_model, make_trust
from tests.integration.test_publish import put, read

ONLY_DELTAS = Making(compress=False)
WHOLE = Making(deltas=False, compress=False)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """A new store, with keys beside it."""
    make_trust(tmp_path / "store")
    return Storage(str(tmp_path / "store"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Where the next version of a small model is."""
    return tmp_path / "model"


async def version(storage: Storage, model: Path, step: float, **options: Any) -> tuple[Published, Manifest]:
    """Publish a model whose tensors are all other than in every other version, and have few values."""
    tensors = {name: np.round(values) + np.float32(step) for name, values in make_model(model, width=128).items()}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return await put(storage, model, **options)


async def rebuilt(storage: Storage, manifest: Manifest, held: Mapping[Digest, int]) -> dict[Digest, bytes]:
    """What comes of all ways to a revision's shards, for who holds some shards."""
    made: dict[Digest, bytes] = {}
    for digest, steps in ways(manifest, manifest.shards, held.__contains__).items():
        for step in steps:
            base = b"".join(
                [
                    made[part.digest][part.offset : part.offset + part.length]
                    if part.digest not in held
                    else await read(storage, [part])
                    for part in step.base
                ]
            )
            parcel = await storage.read_blob(step.parcel)
            made[step.target] = decode(memoryview(parcel), memoryview(base), manifest.size_of(step.target))
        assert digest in made or not steps
    return made


async def test_every_version_is_had_by_deltas_from_those_before_it_until_a_chain_is_too_long(
    storage: Storage, model: Path
) -> None:
    published = [await version(storage, model, step, making=ONLY_DELTAS) for step in range(MAX_CHAIN + 2)]
    done, last = published[-1]
    assert done.parent == published[-2][1].revision and 0 < done.moved_bytes < done.new_bytes
    for age, (_, before) in enumerate(reversed(published[:-1]), 1):
        chosen = ways(last, last.shards, before.shards.__contains__)
        long = {len(steps) for steps in chosen.values() if steps}
        assert long == ({age} if age <= MAX_CHAIN else set()), age
        made = await rebuilt(storage, last, before.shards)
        assert all(digest_of(data) == digest for digest, data in made.items())
        assert age > 1 or len(made) == len([d for d in last.shards if chosen[d]]) > 2
    assert bytes_moved(last, chosen) == sum(size for d, size in last.shards.items()), "the oldest: all of it whole"


@pytest.mark.parametrize("target", [8192, 5001])
async def test_a_delta_is_upon_the_same_part_of_the_same_tensor_however_either_was_cut(
    storage: Storage, model: Path, target: int
) -> None:
    _, old = await version(storage, model, 0, making=WHOLE)
    _, new = await version(storage, model, 1, making=ONLY_DELTAS, target=target, limit=target)
    based = [delta for delta in new.deltas if delta.base]
    assert len(based) > 50
    for delta in based:
        before, after = await read(storage, delta.base), await storage.read_blob(delta.target)
        assert {part.digest for part in delta.base} <= old.shards.keys() and len(before) == len(after)
        if target % 4 == 0:
            assert np.array_equal(np.frombuffer(before, np.float32) + np.float32(1), np.frombuffer(after, np.float32))


async def test_publishing_the_same_files_again_keeps_the_revision_whatever_its_deltas(
    storage: Storage, model: Path
) -> None:
    first, _ = await version(storage, model, 0)
    second, manifest = await version(storage, model, 1, making=ONLY_DELTAS)
    assert second.changed and manifest.parent == first.revision
    for options in ({}, {"making": WHOLE}, {"base": first.revision}, {"ref": "v2"}):
        again, _ = await put(storage, model, **options)
        assert (again.revision, again.changed, again.stored) == (second.revision, "ref" in options, 0), options
    third, manifest = await version(storage, model, 2, making=WHOLE)
    assert third.changed and not any(delta.base for delta in manifest.deltas)


async def test_a_base_can_be_named_and_one_that_is_not_there_is_refused(storage: Storage, model: Path) -> None:
    first, _ = await version(storage, model, 0)
    await version(storage, model, 1)
    done, manifest = await version(storage, model, 2, base=first.revision, making=ONLY_DELTAS)
    assert manifest.parent == done.parent == first.revision
    with pytest.raises(PublishError, match="nothing"):
        await version(storage, model, 3, base="nothing")


async def test_a_first_download_is_compressed_where_that_pays_and_stays_so(storage: Storage, model: Path) -> None:
    make_model(model, width=128)
    words = " ".join(random.Random(1).choices(["edge", "shard", "model", "origin"], k=50_000))
    (model / "vocab.txt").write_text(words)
    (model / "noise.bin").write_bytes(random.Random(2).randbytes(3_000_000))
    first, manifest = await put(storage, model)
    alone = ways(manifest, manifest.shards, lambda _: False)
    text, noise = (manifest.files[name].slices for name in ("vocab.txt", "noise.bin"))
    assert all(alone[part.digest] for part in text) and not any(alone[part.digest] for part in noise)
    assert first.first_bytes < first.shard_bytes - len(words) / 2
    assert await rebuilt(storage, manifest, {})
    (model / "config.json").write_text("{}")
    _, after = await put(storage, model)
    assert [steps for digest, steps in alone.items() if digest in after.shards] == [
        steps for digest, steps in ways(after, after.shards, lambda _: False).items() if digest in alone
    ], "shards that did not change keep their parcels"
    assert (await put(storage, model, "plain", base=first.revision, making=Making(compress=False)))[0].changed


async def test_random_bytes_cost_next_to_nothing(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    real = making_deltas.encode

    def counted(target: memoryview, *rest: Any) -> bytes:
        encoded.append(len(target))
        return real(target, *rest)

    monkeypatch.setattr(making_deltas, "encode", counted)
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "model.gguf").write_bytes(random.Random(2).randbytes(20_000_000))
    done, manifest = await put(storage, tmp_path / "g")
    assert done.parcels == 0 == len(manifest.deltas) and 0 < sum(encoded) < 2_000_000


async def test_what_cannot_be_read_of_the_parent_has_no_delta_and_that_is_said(storage: Storage, model: Path) -> None:
    _, old = await version(storage, model, 0, making=WHOLE)
    largest = max(old.shards, key=old.shards.__getitem__)
    (path,) = (Path(storage.location) / "blobs").glob(f"*/{largest[7:]}")
    path.write_bytes(bytes(old.shards[largest]))
    done, manifest = await version(storage, model, 1, making=ONLY_DELTAS)
    assert done.changed and done.unread == 1 and manifest.deltas
    assert all(largest not in {part.digest for part in delta.base} for delta in manifest.deltas)


async def test_parcels_of_a_private_model_are_private(storage: Storage, model: Path) -> None:
    await version(storage, model, 0, private=True)
    _, manifest = await version(storage, model, 1, private=True)
    parcels = {delta.parcel: manifest.size_of(delta.parcel) for delta in manifest.deltas}
    assert parcels and not await storage.lacks(parcels, "acme/tiny")
    assert set(await storage.lacks(parcels)) == parcels.keys()
