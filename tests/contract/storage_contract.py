"""What every store under the origin must do. Subclass it with a ``storage`` fixture."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from origin.storage import Storage
from shared.digest import digest_of
from shared.errors import NotFound
from shared.manifest import Manifest

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
DATA = bytes(range(256)) * 40
DIGEST = digest_of(DATA)
NOTHING = digest_of(b"")


def manifest(model: str = "acme/tiny", *sizes: int) -> Manifest:
    """A small manifest, told apart by its shards."""
    return Manifest(model, {digest_of(bytes([n])): n for n in sizes or (1,)}, {}, {})


class StorageContract:
    """One behaviour for all stores."""

    async def test_a_stored_shard_is_read_back_whole_and_in_ranges(self, storage: Storage) -> None:
        assert await storage.ensure_blob(DIGEST, DATA)
        await storage.sync()
        assert await storage.blob_size(DIGEST) == len(DATA)
        assert bytes(await storage.read_blob(DIGEST, 0, len(DATA))) == DATA
        assert bytes(await storage.read_blob(DIGEST, 255, 3)) == b"\xff\x00\x01"

    async def test_a_shard_that_is_there_is_not_stored_again(self, storage: Storage) -> None:
        assert await storage.ensure_blob(DIGEST, DATA)
        assert not await storage.ensure_blob(DIGEST, DATA)

    async def test_what_is_not_there_is_not_found_by_its_own_code(self, storage: Storage) -> None:
        with pytest.raises(NotFound) as error:
            await storage.blob_size(NOTHING)
        assert error.value.error_code == "unknown_blob"
        with pytest.raises(NotFound) as error:
            await storage.read_blob(NOTHING, 0, 1)
        assert error.value.error_code == "unknown_blob"
        with pytest.raises(NotFound) as error:
            await storage.ref("acme/tiny", "main")
        assert error.value.error_code == "unknown_model"
        with pytest.raises(NotFound) as error:
            await storage.refs("acme/tiny")
        assert error.value.error_code == "unknown_model"
        await storage.put_ref("acme/tiny", "main", NOTHING, NOW)
        with pytest.raises(NotFound) as error:
            await storage.ref("acme/tiny", "v2")
        assert error.value.error_code == "unknown_revision"
        with pytest.raises(NotFound) as error:
            await storage.manifest("acme/tiny", NOTHING)
        assert error.value.error_code == "unknown_revision"

    async def test_a_ref_moves_and_says_since_when(self, storage: Storage) -> None:
        first, second = manifest("acme/tiny", 1), manifest("acme/tiny", 1, 2)
        for made in (first, second):
            await storage.put_manifest(made)
            await storage.put_ref("acme/tiny", "main", made.revision, NOW)
            assert await storage.resolve("acme/tiny", "main") == made.revision
        assert (await storage.ref("acme/tiny", "main")).published == "2026-01-02T03:04:05+00:00"
        assert await storage.revisions("acme/tiny") == sorted([first.revision, second.revision])
        assert (await storage.manifest("acme/tiny", first.revision)).encoded == first.encoded
        assert await storage.has_manifest("acme/tiny", first.revision)
        assert await storage.resolve("acme/tiny", first.revision) == first.revision

    async def test_models_are_listed_once_each_in_order(self, storage: Storage) -> None:
        assert await storage.models() == []
        for model in ("b/one", "a/two", "a/one"):
            await storage.put_ref(model, "main", NOTHING, NOW)
            await storage.put_ref(model, "v2", NOTHING, NOW)
        assert await storage.models() == ["a/one", "a/two", "b/one"]
        assert list(await storage.refs("a/one")) == ["main", "v2"]
