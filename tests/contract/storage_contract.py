"""What every store under the origin must do. Subclass it with a ``storage`` fixture."""

from __future__ import annotations

import asyncio
import random
from datetime import UTC, datetime

import pytest

from origin.objects import READ, Version
from origin.storage import Storage
from shared.digest import Digest, digest_of
from shared.errors import DiskError, NotFound, StoreError
from shared.manifest import Manifest

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
DATA = bytes(range(256)) * 40
DIGEST = digest_of(DATA)
NOTHING = digest_of(b"")


def manifest(model: str = "acme/tiny", *sizes: int) -> Manifest:
    """A small manifest, told apart by its shards."""
    return Manifest(model, {digest_of(bytes([n])): n for n in sizes or (1,)}, {}, {})


async def read(storage: Storage, digest: Digest, offset: int, length: int, model: str = "") -> bytes:
    """A part of a shard, joined."""
    return b"".join([bytes(part) async for part in storage.stream_blob(digest, offset, length, model)])


class StorageContract:
    """One behaviour for all stores."""

    async def test_a_stored_shard_is_read_back_whole_and_in_ranges(self, storage: Storage) -> None:
        assert await storage.ensure_blob(DIGEST, DATA)
        await storage.sync()
        assert await storage.blob_size(DIGEST) == len(DATA)
        assert await read(storage, DIGEST, 0, len(DATA)) == DATA
        assert await read(storage, DIGEST, 255, 3) == b"\xff\x00\x01"
        assert await read(storage, DIGEST, 5, 0) == b""

    async def test_a_large_shard_comes_in_small_parts(self, storage: Storage) -> None:
        data = random.Random(1).randbytes(5 * READ + 17)
        digest = digest_of(data)
        await storage.ensure_blob(digest, data)
        parts = [part async for part in storage.stream_blob(digest, 3, len(data) - 3)]
        assert b"".join(parts) == data[3:]
        assert max(len(part) for part in parts) < 2 * READ and len(parts) >= 3

    async def test_a_shard_that_is_shorter_than_it_should_be_is_an_error(self, storage: Storage) -> None:
        """Cut off in the middle of what is asked for, and before it."""
        await storage.ensure_blob(DIGEST, DATA)
        with pytest.raises((DiskError, StoreError)):
            await read(storage, DIGEST, 10, len(DATA))
        with pytest.raises((DiskError, StoreError)):
            await read(storage, DIGEST, len(DATA) + 1, 10)

    async def test_a_private_shard_is_elsewhere_than_a_public_one(self, storage: Storage) -> None:
        await storage.ensure_blob(DIGEST, DATA, "acme/secret")
        assert await storage.blob_size(DIGEST, "acme/secret") == len(DATA)
        assert await read(storage, DIGEST, 0, 256, "acme/secret") == DATA[:256]
        for model in ("", "acme/other"):
            with pytest.raises(NotFound) as error:
                await storage.blob_size(DIGEST, model)
            assert error.value.error_code == "unknown_blob"
        assert await storage.ensure_blob(DIGEST, DATA)

    async def test_an_object_is_created_once(self, storage: Storage) -> None:
        path = "trust/1.acme~public.json"
        assert await storage.create(path, b"first")
        assert not await storage.create(path, b"second")
        assert (await storage.get(path))[0] == b"first"
        assert [found async for found in storage.paths("trust")] == [path]

    async def test_of_many_that_create_one_object_one_does(self, storage: Storage) -> None:
        made = await asyncio.gather(*(storage.create("trust/1.root.json", b"%d" % n) for n in range(20)))
        assert made.count(True) == 1
        assert (await storage.get("trust/1.root.json"))[0] == b"%d" % made.index(True)

    async def test_an_object_is_replaced_if_it_is_what_was_expected(self, storage: Storage) -> None:
        path = "trust/timestamp.json"
        assert await storage.replace(path, b"0", Version("0")) is None
        with pytest.raises(NotFound):
            await storage.get(path)
        first = await storage.replace(path, b"1", None)
        assert await storage.get(path) == (b"1", first)
        second = await storage.replace(path, b"2", first)
        assert second not in (None, first)
        assert await storage.replace(path, b"3", first) is None
        assert await storage.get(path) == (b"2", second)
        assert await storage.replace(path, b"4", None)
        assert (await storage.get(path))[0] == b"4"

    async def test_of_many_that_replace_one_version_one_does(self, storage: Storage) -> None:
        path = "trust/timestamp.json"
        first = await storage.replace(path, b"first", None)
        made = await asyncio.gather(*(storage.replace(path, b"%d" % n, first) for n in range(20)))
        (winner,) = [n for n, version in enumerate(made) if version]
        assert await storage.get(path) == (b"%d" % winner, made[winner])

    async def test_a_shard_that_is_there_is_not_stored_again(self, storage: Storage) -> None:
        assert await storage.ensure_blob(DIGEST, DATA)
        assert not await storage.ensure_blob(DIGEST, DATA)

    async def test_what_is_not_there_is_not_found_by_its_own_code(self, storage: Storage) -> None:
        with pytest.raises(NotFound) as error:
            await storage.blob_size(NOTHING)
        assert error.value.error_code == "unknown_blob"
        with pytest.raises(NotFound) as error:
            await read(storage, NOTHING, 0, 1)
        assert error.value.error_code == "unknown_blob"
        with pytest.raises(NotFound) as error:
            await storage.manifest("acme/tiny", NOTHING)
        assert error.value.error_code == "unknown_revision"

    async def test_manifests_are_kept_by_revision(self, storage: Storage) -> None:
        first, second = manifest("acme/tiny", 1), manifest("acme/tiny", 1, 2)
        for made in (first, second):
            await storage.put_manifest(made)
        assert await storage.revisions("acme/tiny") == sorted([first.revision, second.revision])
        assert (await storage.manifest("acme/tiny", first.revision)).encoded == first.encoded
        assert await storage.has_manifest("acme/tiny", first.revision)
        assert not await storage.has_manifest("acme/tiny", NOTHING)
        assert await storage.names() == ["acme/tiny"]
