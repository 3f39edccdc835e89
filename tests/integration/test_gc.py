"""Garbage collection on a directory and on a real S3-speaking server: what goes, what stays, and beside what."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from origin import keeping
from origin.commit import LocalSink
from origin.gc import BATCH, Swept, collect
from origin.keeping import NOTES, SWEEPS, claim, sweep
from origin.keyring import load_ring
from origin.publish import publish
from origin.storage import Storage
from origin.trust_setup import delegate_any
from origin.trust_store import TrustStore
from shared.clock import Clock, SystemClock
from shared.digest import Digest, digest_of
from shared.errors import DiskError, ManifestInvalid, NotFound
from shared.layout import Slice
from shared.manifest import Delta, Manifest
from shared.trust_names import file_name
from tests.harness import command, make_model, make_trust

DAY = 86_400.0
MODEL = "acme/tiny"


class Store(Storage):
    """A store, and what its refs mean: signed only where the test calls ``sign``."""

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self.refs: dict[tuple[str, str], Manifest] = {}

    def meant(self) -> dict[str, set[Digest]]:
        """As ``TrustStore.meant``."""
        found: dict[str, set[Digest]] = {}
        for (model, _), manifest in self.refs.items():
            found.setdefault(model, set()).add(manifest.revision)
        return found


@pytest.fixture(params=["directory", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store."""
    if request.param == "directory":
        return Store(str(tmp_path / "store"))
    return Store(request.getfixturevalue("s3"))


@pytest.fixture
def directory(tmp_path: Path) -> Store:
    """An empty store in a directory, whose objects can be made old."""
    return Store(str(tmp_path / "store"))


@pytest.fixture
def signed(directory: Store) -> Store:
    """The same with keys beside it."""
    make_trust(Path(directory.location))
    return directory


async def publisher(store: Storage) -> LocalSink:
    """Publishes with the keys beside a store."""
    trust, ring = TrustStore(store), load_ring([Path(store.location).parent / "keys"])
    await delegate_any(trust, ring, "acme", datetime.now(UTC))
    return LocalSink(trust, ring, lambda: datetime.now(UTC))


async def sign(store: Store) -> None:
    """Sign what the refs of a store mean."""
    sink = await publisher(store)
    for (model, ref), made in store.refs.items():
        before = await sink.begin(model, ref, private=False)
        await sink.move_ref(model, ref, made, before, private=False)


def age(storage: Storage, days: float) -> None:
    """All that is in a directory is so many days old."""
    for path in Path(storage.location).rglob("*"):
        when = path.stat().st_mtime - days * DAY
        os.utime(path, (when, when))


async def put(storage: Store, *contents: str, model: str = MODEL, ref: str = "", private: bool = False) -> Manifest:
    """A revision of these shards, with a ref that means it or none."""
    space = model if private else ""
    made = Manifest(model, {digest_of(text.encode()): len(text) for text in contents}, {}, {})
    for text in contents:
        await storage.ensure_blob(digest_of(text.encode()), text.encode(), space)
    await storage.put_manifest(made)
    if ref:
        storage.refs[model, ref] = made
    return made


async def blobs(storage: Storage, *models: str) -> set[str]:
    """The shards that are there, public or of a private model."""
    return {entry.path for model in models or ("",) async for entry in storage.blobs(model)}


def named(text: str) -> str:
    """A part of the path of a shard."""
    return digest_of(text.encode())[7:]


async def run(
    store: Store, *, keep: int = 8, grace: float = 0.0, dry_run: bool = False, clock: Clock | None = None
) -> Swept:
    """One gc."""
    return await collect(store, store.meant(), clock or SystemClock(), keep=keep, grace=grace, dry_run=dry_run)


async def settle(storage: Storage) -> None:
    """Until the store's clock, which may have whole seconds only, is past all that was stored."""
    begun: datetime | None = None
    async with asyncio.timeout(10):
        while True:
            async with sweep(storage) as announced:
                begun = begun or announced.modified
                if announced.modified > begun:
                    return


async def test_what_no_ref_needs_goes_and_the_rest_stays(storage: Store) -> None:
    old = await put(storage, "shared", "old", ref="main")
    new = await put(storage, "shared", "new", ref="main")
    await put(storage, "other", model="acme/other", ref="v1")
    await storage.ensure_blob(digest_of(b"stray"), b"stray")
    await settle(storage)
    shown = await run(storage, keep=0, dry_run=True)
    assert len(await blobs(storage)) == 5, "a dry run removes nothing"
    done = await run(storage, keep=0)
    assert (done.revisions, done.shards, done.left) == ([f"{MODEL}@{old.revision}"], 2, 0)
    assert (shown.revisions, shown.shards, shown.size) == (done.revisions, done.shards, done.size)
    left = await blobs(storage)
    assert {path.rpartition("/")[2] for path in left} == {named("shared"), named("new"), named("other")}
    assert await storage.revisions(MODEL) == [new.revision]
    assert (await run(storage, keep=0)).shards == 0
    assert [path async for path in storage.paths(SWEEPS)] == []


async def test_a_private_models_shards_are_swept_by_its_own_revisions(storage: Store) -> None:
    await put(storage, "a", "b", ref="main", private=True)
    kept = await put(storage, "a", "c", ref="main", private=True)
    await put(storage, "b", model="acme/public", ref="main")
    await settle(storage)
    assert (await run(storage, keep=0)).shards == 1, "that a public model has b does not keep the private one"
    for digest in kept.shards:
        assert await storage.blob_size(digest, MODEL)
    assert {path.rpartition("/")[2] for path in await blobs(storage, MODEL)} == {named("a"), named("c")}
    assert await storage.blob_size(digest_of(b"b"))


async def test_parcels_of_a_kept_revision_stay_and_what_they_are_upon_may_go(directory: Store) -> None:
    await put(directory, "the old shard", ref="main")
    old, new, parcel = (digest_of(text) for text in (b"the old shard", b"the new shard", b"parcel"))
    made = Manifest(
        MODEL, {new: 13}, {}, {}, deltas=(Delta(new, parcel, (Slice(old, 0, 13),)),), others={parcel: 6, old: 13}
    )
    for text in (b"the new shard", b"parcel"):
        await directory.ensure_blob(digest_of(text), text)
    assert await claim(directory, made) == []
    await directory.put_manifest(made)
    directory.refs[MODEL, "main"] = made
    age(directory, 2)
    assert (await run(directory, keep=0)).shards == 1
    assert {path.rpartition("/")[2] for path in await blobs(directory)} == {named("the new shard"), named("parcel")}
    await directory.objects.delete([path for path in await blobs(directory) if named("parcel") in path])
    assert await claim(directory, made) == [parcel]


async def test_more_than_a_batch_goes(storage: Store) -> None:
    await put(storage, "kept", ref="main")
    for n in range(BATCH + 5):
        await storage.ensure_blob(digest_of(b"%d" % n), b"%d" % n)
    await settle(storage)
    assert (await run(storage)).shards == BATCH + 5
    assert len(await blobs(storage)) == 1


async def test_the_last_published_revisions_stay(directory: Store) -> None:
    made = []
    for n in range(5):
        made.append(await put(directory, f"shard {n}", ref="main"))
        age(directory, 2)
    directory.refs[MODEL, "stable"] = made[0]
    done = await run(directory, keep=2, grace=DAY)
    assert set(await directory.revisions(MODEL)) == {made[n].revision for n in (0, 3, 4)}
    assert (done.kept_revisions, done.kept_shards, done.shards) == (3, 3, 2)


async def test_what_is_young_stays(directory: Store) -> None:
    await put(directory, "first", ref="main")
    await directory.ensure_blob(digest_of(b"old"), b"old")
    age(directory, 2)
    young = await put(directory, "not referred to yet")
    await directory.ensure_blob(digest_of(b"uploaded"), b"uploaded")
    assert (await run(directory, keep=0, grace=DAY)).shards == 1
    assert young.revision in await directory.revisions(MODEL)
    assert {path.rpartition("/")[2] for path in await blobs(directory)} == {
        named("first"), named("uploaded"), named("not referred to yet"),
    }  # fmt: skip


async def test_the_stores_clock_counts_and_not_ours(directory: Store) -> None:
    class Ahead(SystemClock):
        def time(self) -> float:
            return super().time() + 365 * DAY

    await put(directory, "first", ref="main")
    await directory.ensure_blob(digest_of(b"young"), b"young")
    done = await run(directory, grace=DAY, clock=Ahead())
    assert done.shards == 0


async def test_a_damaged_manifest_ends_it_before_anything_is_swept(directory: Store) -> None:
    made = await put(directory, "a", ref="main")
    await directory.ensure_blob(digest_of(b"stray"), b"stray")
    age(directory, 2)
    path = Path(directory.location) / f"models/{MODEL}/manifests/{made.revision[7:]}"
    path.write_bytes(b"\x80")
    with pytest.raises(ManifestInvalid):
        await run(directory)
    path.unlink()
    with pytest.raises(DiskError, match="not there"):
        await run(directory)
    assert len(await blobs(directory)) == 2


async def test_a_store_whose_refs_are_all_gone_is_left_alone(directory: Store) -> None:
    await put(directory, "a")
    age(directory, 2)
    with pytest.raises(DiskError, match="none has a ref"):
        await run(directory)
    assert len(await blobs(directory)) == 1


async def test_what_a_publish_found_there_is_not_swept_under_it(storage: Store) -> None:
    """The shard is old and nothing refers to it; a publish claims it between the marking and the sweep, and later."""
    await put(storage, "first", ref="main")
    await storage.ensure_blob(digest_of(b"found"), b"found")
    await settle(storage)
    second = Manifest(MODEL, {digest_of(b"found"): 5}, {}, {})
    real = Storage.blobs
    calls: list[list[Digest]] = []

    async def listing(self: Storage, model: str = "") -> AsyncIterator[object]:
        async for entry in real(self, model):
            if not calls:
                calls.append(await claim(storage, second))
            yield entry

    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.setattr(Storage, "blobs", listing)
        assert (await run(storage)).shards == 0
    assert calls == [[]]
    await storage.put_manifest(second)
    storage.refs[MODEL, "main"] = second
    await run(storage, keep=0)
    assert await storage.blob_size(digest_of(b"found"))


async def test_what_was_swept_before_it_was_claimed_is_told(storage: Store) -> None:
    await put(storage, "first", ref="main")
    await storage.ensure_blob(digest_of(b"found"), b"found")
    await settle(storage)
    await run(storage)
    second = Manifest(MODEL, {digest_of(b"first"): 5, digest_of(b"found"): 5}, {}, {})
    assert await claim(storage, second) == [digest_of(b"found")]


async def test_a_claim_waits_for_a_sweep_that_may_not_have_heard_of_it(storage: Store) -> None:
    """The sweep has read the notes already, and deletes after the publish looked at the shard."""
    digest = digest_of(b"found")
    await storage.ensure_blob(digest, b"found")
    waited: list[float] = []
    async with asyncio.timeout(20):
        announced = sweep(storage)
        await announced.__aenter__()

        async def sleep(seconds: float) -> None:
            waited.append(seconds)
            if len(waited) == 3:
                path = f"blobs/{digest[7:9]}/{digest[7:]}"
                await storage.objects.delete([path])
                await announced.__aexit__(None, None, None)

        assert await claim(storage, Manifest(MODEL, {digest: 5}, {}, {}), sleep=sleep) == [digest]
    assert len(waited) == 3


async def test_nobody_waits_for_long_for_a_gc_that_was_killed(directory: Store) -> None:
    digest = digest_of(b"found")
    await directory.ensure_blob(digest, b"found")
    await directory.create(f"{SWEEPS}/dead", b"")
    waited = 0.0

    async def sleep(seconds: float) -> None:
        nonlocal waited
        waited += seconds

    assert await claim(directory, Manifest(MODEL, {digest: 5}, {}, {}), sleep=sleep) == []
    assert waited == keeping.SWEEP
    age(directory, 0.001)
    waited = 0.0
    assert await claim(directory, Manifest(MODEL, {digest: 5}, {}, {}), sleep=sleep) == []
    assert waited == 0.0
    await put(directory, "x", ref="main")
    await run(directory, grace=DAY)
    assert [path async for path in directory.paths(SWEEPS)] == []


async def test_notes_go_after_a_day(directory: Store) -> None:
    made = await put(directory, "a", ref="main")
    await claim(directory, made)
    age(directory, 1.1)
    await claim(directory, made)
    await run(directory)
    assert len([path async for path in directory.paths(NOTES)]) == 1


async def test_two_at_once_are_harmless(storage: Store) -> None:
    kept = await put(storage, "kept", ref="main")
    for n in range(50):
        await storage.ensure_blob(digest_of(b"%d" % n), b"%d" % n)
    await settle(storage)
    await asyncio.gather(run(storage), run(storage))
    assert {path.rpartition("/")[2] for path in await blobs(storage)} == {named("kept")}
    assert await storage.revisions(MODEL) == [kept.revision]


@pytest.mark.parametrize("call", [1, 3, 7, 9])
async def test_one_that_is_killed_leaves_nothing_wrong(signed: Store, call: int) -> None:
    """SIGKILL as it deletes one object after another: no manifest names what is missing; a repeat ends it."""
    for n in range(4):
        await put(signed, "shared", f"shard {n}", ref="main")
        await put(signed, f"other {n}", model="acme/other", ref="main")
    await sign(signed)
    age(signed, 2)
    script = (
        "import os, signal, sys\nfrom origin import gc_command, gc, objects\n"
        "gc.BATCH = 2\nreal, calls = os.unlink, []\n"
        "def unlink(path, **options):\n"
        "    calls.append(path)\n"
        f"    if len([c for c in calls if len(os.path.basename(c)) == 64]) == {call}:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(path, **options)\n"
        "os.unlink = unlink\n"
        f"gc_command.app(['--store', {signed.location!r}, '--keep', '1'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    for model in (MODEL, "acme/other"):
        for revision in await signed.revisions(model):
            for digest, size in (await signed.manifest(model, revision)).shards.items():
                assert await signed.blob_size(digest) == size
    await run(signed, keep=1, grace=DAY)
    assert [len(await signed.revisions(model)) for model in (MODEL, "acme/other")] == [1, 1]
    assert len(await blobs(signed)) == 3


async def test_publishing_beside_it_all_the_time_loses_nothing(signed: Store, tmp_path: Path) -> None:
    """No grace at all: shards go while they are published, and are stored again; what is visible is always whole."""
    make_model(tmp_path / "model", width=64)
    over = asyncio.Event()

    async def sweeping() -> None:
        while not over.is_set():
            await collect(signed, await TrustStore(signed).meant(), SystemClock(), keep=0, grace=0)

    await put(signed, "first", ref="main", model="acme/first")
    await sign(signed)
    sink = await publisher(signed)
    sweeper = asyncio.create_task(sweeping())
    published = 0
    for seed in range(8):
        make_model(tmp_path / "model", seed=seed, width=64)
        try:
            done = await publish(sink, tmp_path / "model", MODEL, "main")
        except DiskError as error:
            assert "without a grace period" in str(error)
            continue
        published += 1
        manifest = await signed.manifest(MODEL, done.revision)
        for digest, size in manifest.shards.items():
            assert await signed.blob_size(digest) == size
    over.set()
    await sweeper
    assert published


async def test_metadata_goes_a_week_after_it_was_superseded(signed: Store) -> None:
    """Not what is in force, however old; nor roots; nor what was in force until lately; nor what comes into force."""
    folder = Path(signed.location) / "trust"
    await put(signed, "a", ref="main")
    await sign(signed)
    first = await files_in_force(signed)
    age(signed, 10)
    await put(signed, "b", ref="main")
    await sign(signed)
    second = await files_in_force(signed)
    assert len(first - second) == 2, "the snapshot and the role"
    (folder / "2.access.json").write_bytes(b"not in force")
    age(signed, 6)
    gone = await collect_signed(signed)
    assert gone and not gone & (first | second), "16 days old, but superseded 6 days ago"
    age(signed, 2)
    assert await collect_signed(signed, dry_run=True) == first - second
    assert await collect_signed(signed) == first - second
    left = {path.name for path in folder.iterdir()}
    assert left == {"1.root.json", "2.access.json", "timestamp.json"} | second
    assert await TrustStore(signed).meant() == signed.meant()


async def files_in_force(store: Store) -> set[str]:
    """The names of the metadata that the timestamp leads to."""
    return {file_name(role, version) for role, version in (await TrustStore(store).in_force()).items()}


async def collect_signed(store: Store, *, dry_run: bool = False) -> set[str]:
    """The names of the metadata that a gc removes."""
    shown: list[str] = []
    in_force = await TrustStore(store).in_force()
    done = await collect(
        store, store.meant(), SystemClock(), keep=8, grace=DAY, in_force=in_force, dry_run=dry_run,
        show=lambda entry: shown.append(entry.path),
    )  # fmt: skip
    found = {path.removeprefix("trust/") for path in shown if path.startswith("trust/")}
    assert done.metadata == len(found)
    return found


def test_the_command_shows_removes_and_says_so(signed: Store) -> None:

    async def fill() -> Digest:
        await put(signed, "a", ref="main")
        kept = await put(signed, "b", ref="main")
        await sign(signed)
        return kept.revision

    kept = asyncio.run(fill())
    age(signed, 2)
    words = ("gc", "--store", signed.location, "--keep", "1")
    assert "would remove 1 revisions and 1 shards" in (shown := command(*words, "--dry-run").stdout)
    assert named("a") in shown and named("b") not in shown
    listed = json.loads(command(*words, "--dry-run", "--json").stdout)
    assert listed["shards"] == 1 and len(listed["objects"]) == 2 and listed["dry_run"]
    done = json.loads(command(*words, "--json").stdout)
    assert (len(done["revisions"]), done["shards"]) == (1, 1) and "objects" not in done
    assert asyncio.run(signed.revisions(MODEL)) == [kept]
    with pytest.raises(NotFound):
        asyncio.run(signed.blob_size(digest_of(b"a")))
    assert command("gc", "--store", signed.location, "--keep", "-1", check=False).returncode == 3
