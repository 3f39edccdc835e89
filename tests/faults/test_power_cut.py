"""Power cuts, under an origin's store and a user's repository: what was acknowledged is there, and nothing under its
name is wrong."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nearshard import Repository, SyncClient
from nearshard.activation import Activation
from nearshard.switches import Switches
from nearshard.verifying import choose, verify
from origin.storage import Storage, digest_at
from origin.trust_store import TrustStore
from shared.digest import Digest, digest_of
from shared.errors import NotFound
from shared.ids import commit_of
from tests.harness import Lab, make_model, make_trust

SIZE = 96 << 20
MODEL = "acme/tiny"

Mounted = Callable[[Path, Path], None]

PUBLISHER = """
import os, subprocess, sys, threading
image, copies, model, store, keys, at = sys.argv[1:7]
real, calls, one = os.fsync, [], threading.Lock()
def fsync(descriptor):
    real(descriptor)
    with one:
        calls.append(descriptor)
        if len(calls) in eval(at):
            subprocess.run(["cp", image, f"{copies}/{len(calls)}"], check=True)
os.fsync = fsync
from origin.publish_command import main
sys.argv = ["publish", model, "acme/tiny", "--store", store, "--keys", keys]
try:
    main()
finally:
    subprocess.run(["cp", image, f"{copies}/acknowledged"], check=True)
"""
"""Publishes; as it does, and the moment it has, the disk is copied: that is what a power cut would leave."""


@pytest.fixture
def mounted(need: Callable[[str], str]) -> Iterator[Mounted]:
    """Mounts an ext4 file system that is in a file; all are gone at the end."""
    program, places = need("mount"), []
    if os.geteuid():
        pytest.skip("only root can mount a file system")

    def mount(image: Path, where: Path) -> None:
        where.mkdir()
        done = subprocess.run([program, "-o", "loop", str(image), str(where)], capture_output=True, text=True)
        if done.returncode and os.environ.get("CI") != "true":
            pytest.skip(f"mount: {done.stderr.strip()}")
        assert done.returncode == 0, done.stderr
        places.append(where)

    yield mount
    for where in reversed(places):
        subprocess.run(["umount", str(where)], check=True)


async def revision_after(store: Path) -> str:
    """What the ref means in a store, every object of which is looked at; empty where there is none."""
    storage = Storage(str(store))
    async for entry in storage.blobs():
        assert digest_of((store / entry.path).read_bytes()) == digest_at(entry.path), "torn under its name"
    async for entry in storage.manifests(MODEL):
        manifest = await storage.manifest(MODEL, digest_at(entry.path))
        for digest, size in manifest.shards.items():
            assert await storage.blob_size(digest) == size, "a manifest names what is missing"
    try:
        revision = await TrustStore(storage).resolve(MODEL, "main")
    except NotFound:
        return ""
    await storage.manifest(MODEL, revision)
    return str(revision)


@pytest.mark.parametrize(
    "at", ["{1, 7, 20}", pytest.param("range(1, 60, 2)", marks=pytest.mark.long)], ids=["some", "many"]
)
async def test_an_acknowledged_publish_survives_a_power_cut(
    tmp_path: Path, mounted: Mounted, need: Callable[[str], str], at: str
) -> None:
    """F4: at moments of a second publish, and right after it."""
    image, copies = tmp_path / "disk", tmp_path / "copies"
    copies.mkdir()
    with image.open("wb") as file:
        file.truncate(SIZE)
    subprocess.run([need("mkfs.ext4"), "-q", "-F", str(image)], check=True)
    mounted(image, tmp_path / "live")
    store, revisions = tmp_path / "live" / "store", []
    keys, _ = await asyncio.to_thread(make_trust, store)
    for seed, moments in ((1, "()"), (2, at)):
        await asyncio.to_thread(make_model, tmp_path / "model", seed=seed)
        words = [str(image), str(copies), str(tmp_path / "model"), str(store), str(keys), moments]
        done = await asyncio.to_thread(
            subprocess.run, [sys.executable, "-c", PUBLISHER, *words], capture_output=True, text=True, timeout=100
        )
        assert done.returncode == 0, done.stderr
        revisions.append(str(await TrustStore(Storage(str(store))).resolve(MODEL, "main")))
    cuts = sorted(copies.iterdir())
    assert len(cuts) >= 4
    for copy in cuts:
        mounted(copy, tmp_path / f"after-{copy.name}")
        found = await revision_after(tmp_path / f"after-{copy.name}" / "store")
        assert found == revisions[1] if copy.name == "acknowledged" else found in revisions


ACTIVATION = """
import os, subprocess, sys
from pathlib import Path
from nearshard.activation import Activation
from nearshard.repository import Repository
image, copies, root, revision = sys.argv[1:]
real, calls = os.fsync, []
def fsync(descriptor):
    real(descriptor)
    calls.append(descriptor)
    subprocess.run(["cp", image, f"{copies}/{len(calls)}"], check=True)
os.fsync = fsync
Activation(Repository(Path(root)), "acme/tiny").activate(revision, "main")
subprocess.run(["cp", image, f"{copies}/acknowledged"], check=True)
"""


def test_an_activation_leaves_the_old_or_the_new_revision_to_a_power_cut(
    lab: Lab, tmp_path: Path, mounted: Mounted, need: Callable[[str], str]
) -> None:
    """F4: whole, with what was before it; at the last moments before the acknowledgement, and right after it."""
    image, copies, live = tmp_path / "disk", tmp_path / "copies", tmp_path / "live"
    copies.mkdir()
    with image.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run([need("mkfs.ext4"), "-q", "-F", str(image)], check=True)
    mounted(image, live)
    revisions = []
    for seed in (1, 2):
        make_model(tmp_path / "model", seed=seed, width=64)
        revisions.append(Digest(lab.publish(tmp_path / "model", MODEL, "--ref", f"v{seed}")))
    client = SyncClient(lab.origin().url, repository=live / "repository")
    client.pull(MODEL, str(revisions[0]))
    Activation(Repository(live / "repository"), MODEL).activate(revisions[0], "main")
    client.pull(MODEL, str(revisions[1]))
    words = [str(image), str(copies), str(live / "repository"), revisions[1]]
    subprocess.run([sys.executable, "-c", ACTIVATION, *words], check=True)
    seen = set()
    for copy in sorted(copies.iterdir(), key=lambda file: file.stat().st_mtime_ns)[-6:]:
        mounted(copy, tmp_path / f"after-{copy.name}")
        repository = Repository(tmp_path / f"after-{copy.name}" / "repository")
        now = Switches(repository.root, MODEL).all()["main"]
        seen.add((now.active, now.previous))
        assert Switches(repository.root, MODEL).path("main").resolve().name == commit_of(now.active)
        assert verify(repository, choose(repository, MODEL, str(now.active))).damages == ()
        assert copy.name != "acknowledged" or now.active == revisions[1]
    assert seen == {(revisions[0], None), (revisions[1], revisions[0])}
