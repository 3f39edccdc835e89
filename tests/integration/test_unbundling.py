"""Bundles with parcels, taken into a real repository by real signed metadata; no network."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from nearshard.bundling import import_bundle
from nearshard.client import Client
from shared import parcel
from shared.bundle import BaseMissing, BundleInvalid
from shared.digest import digest_of
from shared.errors import MetadataExpired, NearshardError
from shared.layout import Slice
from shared.manifest import Delta, Manifest
from tests.bundles import bundle_of, one_file
from tests.clock import HandClock
from tests.metadata import NOW, Repository

MODEL = "acme/tiny"
NOWHERE = "http://127.0.0.1:9"
RNG = random.Random(5)
FIRST = [RNG.randbytes(60_000), bytes(50_000)]
MIDDLE, SECOND = bytes(49_999) + b"\1", bytes(49_998) + b"\1\1"


def encoded(target: bytes, base: bytes) -> bytes:
    """A parcel."""
    run = parcel.Run(len(target), based=True)
    return parcel.encode(memoryview(target), memoryview(base), [run])


@dataclass
class Place:
    """Where bundles come from, and where they go."""

    folder: Path
    metadata: Repository
    clock: HandClock

    def bundle(self, manifest: Manifest, *blobs: bytes) -> Path:
        """One of what ``main`` means now."""
        file = self.folder / "bundle.tar"
        file.write_bytes(bundle_of(self.metadata, manifest, *blobs))
        return file

    def take(self, file: Path, *accepted: str) -> int:
        """Take it in; the bytes of blobs that came."""
        return asyncio.run(self._take(file, accepted))

    async def _take(self, file: Path, accepted: tuple[str, ...]) -> int:
        async with self.client(*accepted) as client:
            return (await import_bundle(client, file)).size

    def client(self, *accepted: str) -> Client:
        """Of a user without a network."""
        root = self.folder / "root.json"
        root.write_bytes(self.metadata.root)
        home = self.folder / "repository"
        return Client(NOWHERE, trust_root=root, repository=home, clock=self.clock, accept_expired=accepted)

    def had(self, *accepted: str) -> bytes:
        """What ``main`` is now."""

        async def get() -> bytes:
            async with self.client(*accepted) as client:
                return (await client.pull(MODEL)).paths[0].read_bytes()

        return asyncio.run(get())


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """With the first version taken in."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    made = Place(tmp_path, Repository(), HandClock(NOW))
    first = one_file(MODEL, *FIRST)
    made.metadata.publish(MODEL, "main", first.encoded)
    assert made.take(made.bundle(first, *FIRST)) == 110_000
    return made


def second(wrong: bool = False) -> tuple[Manifest, list[bytes]]:
    """The next version, two deltas away, and the parcels; ``wrong``: the last makes something else."""
    parcels = [encoded(MIDDLE, FIRST[1]), encoded(FIRST[1] if wrong else SECOND, MIDDLE)]
    deltas = (
        Delta(digest_of(SECOND), digest_of(parcels[1]), (Slice(digest_of(MIDDLE), 0, len(MIDDLE)),)),
        Delta(digest_of(MIDDLE), digest_of(parcels[0]), (Slice(digest_of(FIRST[1]), 0, len(FIRST[1])),)),
    )
    return one_file(MODEL, FIRST[0], SECOND, deltas=deltas, others=(*parcels, MIDDLE, FIRST[1])), parcels


def test_a_chain_of_parcels_is_decoded_upon_what_is_held(place: Place) -> None:
    manifest, parcels = second()
    place.metadata.publish(MODEL, "main", manifest.encoded)
    assert place.take(place.bundle(manifest, *parcels)) < 1000
    assert place.had() == FIRST[0] + SECOND
    assert not list(place.folder.glob("repository/models/*/*/partial/*"))


def test_a_parcel_of_something_else_leaves_the_version_that_is_whole(place: Place) -> None:
    manifest, parcels = second(wrong=True)
    place.metadata.publish(MODEL, "main", manifest.encoded)
    with pytest.raises(BundleInvalid):
        place.take(place.bundle(manifest, *parcels))
    assert place.had() == b"".join(FIRST), "the ref has not moved on either"


@pytest.mark.parametrize("error", [BaseMissing, BundleInvalid])
def test_a_bundle_that_lacks_something_or_has_more_changes_nothing(place: Place, error: type[NearshardError]) -> None:
    manifest, parcels = second()
    place.metadata.publish(MODEL, "main", manifest.encoded)
    blobs = parcels[:1] if error is BaseMissing else [*parcels, b"stowaway"]
    with pytest.raises(error):
        place.take(place.bundle(manifest, *blobs))
    assert place.had() == b"".join(FIRST)


def test_a_bundle_that_was_long_in_the_post_is_accepted_by_name_only(place: Place) -> None:
    manifest, parcels = second()
    place.metadata.publish(MODEL, "main", manifest.encoded)
    file = place.bundle(manifest, *parcels)
    place.clock.now += 9 * 86_400
    with pytest.raises(MetadataExpired):
        place.take(file)
    with pytest.raises(MetadataExpired):
        place.take(file, "acme/other until 2027-02-28")
    accepted = f"{MODEL}@main until 2027-02-28"
    place.take(file, accepted)
    with pytest.raises(MetadataExpired):
        place.had()
    assert place.had(accepted) == FIRST[0] + SECOND
