"""The storage contract on a directory and on a real S3-speaking server; and what a directory adds."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pytest

from origin.storage import ABANDONED, Storage
from shared.errors import ConfigError, DiskError
from tests.contract.storage_contract import DATA, DIGEST, NOW, StorageContract


class TestDirectory(StorageContract):
    """The default."""

    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        """In a new directory."""
        return Storage(str(tmp_path / "store"))

    async def test_bytes_are_durable_before_they_have_their_name(
        self, storage: Storage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Temporary file, fsync, rename; then, by ``sync``, the folders that lead to the name."""
        synced: list[str] = []
        real = os.fsync

        def fsync(descriptor: int) -> None:
            synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        await storage.ensure_blob(DIGEST, DATA)
        assert len(synced) == 1 and "/tmp/" in synced[0].removeprefix(storage.location)
        await storage.sync()
        assert any(path.endswith(f"blobs/{DIGEST[7:9]}") for path in synced)
        assert storage.location in synced

    async def test_a_shard_that_another_publish_left_is_made_durable_too(
        self, storage: Storage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await Storage(storage.location).ensure_blob(DIGEST, DATA)  # and killed before its sync
        synced: list[str] = []
        monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
        await storage.ensure_blob(DIGEST, DATA)
        await storage.sync()
        assert any(path.endswith(f"blobs/{DIGEST[7:9]}") for path in synced)

    async def test_a_failed_fsync_leaves_nothing_and_is_an_error(
        self, storage: Storage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fsync(_: int) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(DiskError):
            await storage.ensure_blob(DIGEST, DATA)
        assert not [path for path in Path(storage.location).rglob("*") if path.is_file()]

    async def test_a_truncated_shard_is_written_again(self, storage: Storage) -> None:
        await storage.ensure_blob(DIGEST, DATA)
        path = Path(storage.location) / "blobs" / DIGEST[7:9] / DIGEST[7:]
        path.write_bytes(DATA[:10])
        assert await storage.ensure_blob(DIGEST, DATA)
        assert path.read_bytes() == DATA

    async def test_abandoned_temporary_files_go_and_young_ones_stay(self, storage: Storage) -> None:
        folder = Path(storage.location) / "tmp"
        folder.mkdir()
        for name, age in (("old", ABANDONED + timedelta(minutes=1)), ("young", timedelta(0))):
            (folder / name).write_bytes(b"x")
            os.utime(folder / name, ((NOW - age).timestamp(),) * 2)
        assert await storage.sweep(NOW) == 1
        assert [path.name for path in folder.iterdir()] == ["young"]

    async def test_created_and_replaced_objects_are_durable_on_return(
        self, storage: Storage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        synced: list[str] = []
        monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
        await storage.create("trust/timestamp.json", b"1")
        assert "/tmp/" in synced[0] and f"{storage.location}/trust" in synced[1:]
        synced.clear()
        await storage.replace("trust/timestamp.json", b"2", (await storage.get("trust/timestamp.json"))[1])
        assert "/tmp/" in synced[0] and f"{storage.location}/trust" in synced[1:]
        assert not list((Path(storage.location) / "tmp").iterdir())


class TestS3(StorageContract):
    """An object store by URL, below a prefix of a bucket."""

    @pytest.fixture
    def storage(self, s3: str) -> Storage:
        """On a real server."""
        return Storage(s3)


@pytest.mark.parametrize("location", ["nonsense://x", "/proc/nope/x"])
def test_a_store_that_cannot_be_opened_is_a_setting_to_mend(location: str) -> None:
    with pytest.raises(ConfigError):
        Storage(location)
