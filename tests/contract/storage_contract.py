"""What every store under the origin must do. Subclass it with a ``storage`` fixture."""

from __future__ import annotations

import asyncio
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
            await storage.trust_file("timestamp.json")
        assert error.value.error_code == "unknown_metadata"
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

    async def test_of_many_who_create_a_trust_file_one_wins(self, storage: Storage) -> None:
        made = [str(n).encode() for n in range(8)]
        won = await asyncio.gather(*(storage.create_trust("2.acme~public.json", data) for data in made))
        assert sum(won) == 1
        assert (await storage.trust_file("2.acme~public.json")).data == made[won.index(True)]
        assert await storage.trust_files() == ["2.acme~public.json"]

    async def test_a_trust_file_is_replaced_only_as_it_was_seen(self, storage: Storage) -> None:
        assert await storage.create_trust("timestamp.json", b"1")
        seen = await storage.trust_file("timestamp.json")
        others = [f"2 by {n}".encode() for n in range(8)]
        won = await asyncio.gather(*(storage.replace_trust("timestamp.json", data, seen) for data in others))
        assert sum(won) == 1
        now = await storage.trust_file("timestamp.json")
        assert now.data == others[won.index(True)]
        assert not await storage.replace_trust("timestamp.json", b"3", seen)
        assert await storage.replace_trust("timestamp.json", b"3", now)
        assert not await storage.replace_trust("none.json", b"x", seen)
