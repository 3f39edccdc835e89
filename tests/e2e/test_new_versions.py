"""A new version of a model that is here: what has changed comes, as little of it as can be, and the files are right."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nearshard import Got, Repository, SyncClient
from nearshard.verifying import choose, verify
from shared import manifest as manifests
from shared.digest import Digest, hex_of, parse_digest
from shared.manifest import Manifest
from tests.between import Between, between
from tests.harness import Lab, Service, command, make_model, result

MODEL = "acme/retrained"
SHARDS = ("--deltas", "--compress", "--shard-target", "256KiB", "--shard-limit", "256KiB")


def retrain(old: Path, new: Path) -> None:
    """A model as it is after more training: all of its floats are a little different."""
    shutil.copytree(old, new)
    rng = np.random.default_rng(1)
    tensors = {
        name: data * (1 + rng.standard_normal(data.shape, dtype=np.float32) * np.float32(1e-4))
        for name, data in load_file(old / "model.safetensors").items()
    }
    save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
    (new / "config.json").write_text('{"layers": 3, "retrained": true}')


@dataclass
class Net:
    """An edge behind a proxy, and a model of two versions."""

    lab: Lab
    proxy: Between
    origin: Service
    old: Manifest
    new: Manifest
    wholes: dict[Digest, bytes]
    """Of the versions' weights."""

    def get(self, home: Path, of: Manifest, output: Path | None = None) -> Got:
        """A version, in this process."""
        return SyncClient(self.proxy.url, repository=home).get(f"{MODEL}@{of.revision}", output)

    def check(self, got: Got) -> Got:
        """Its file is right."""
        assert got.paths[0].read_bytes() == self.wholes[got.revision]
        return got

    def blob(self, digest: Digest) -> Path:
        """A shard in the origin's store."""
        (file,) = (file for file in self.lab.store.rglob(f"*{hex_of(digest)[-40:]}") if file.is_file())
        return file

    @contextmanager
    def held(self, after: int, *words: str) -> Iterator[subprocess.Popen[bytes]]:
        """A command whose bytes are held back after so many of them."""
        self.proxy.behave(hold_after=after)
        with subprocess.Popen([sys.executable, "-m", "nearshard", *words, "--router", self.proxy.url]) as process:
            try:
                assert self.proxy.holding.wait(60)
                yield process
            finally:
                process.kill()
                self.proxy.behave()


@pytest.fixture(scope="module")
def net(shared_lab: Lab) -> Iterator[Net]:
    old, new = shared_lab.folder / "old", shared_lab.folder / "new"
    make_model(old)
    retrain(old, new)
    revisions = [shared_lab.publish(folder, MODEL, *SHARDS) for folder in (old, new)]
    origin = shared_lab.origin()
    with between("127.0.0.1") as (proxy,):
        proxy.to = shared_lab.edge(origin, advertise=proxy.url).port
        shared_lab.note(proxy.url)
        documents = {
            file.name: file.read_bytes() for file in (shared_lab.store / "models" / MODEL / "manifests").iterdir()
        }
        made = [manifests.decode(documents[hex_of(parse_digest(revision))]) for revision in revisions]
        wholes = {
            item.revision: (folder / "model.safetensors").read_bytes()
            for item, folder in zip(made, (old, new), strict=True)
        }
        assert made[1].deltas
        yield Net(shared_lab, proxy, origin, made[0], made[1], wholes)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository that holds the old version."""
    where = tmp_path / "repository"
    monkeypatch.setenv("NEARSHARD_REPOSITORY", str(where))
    return where


@pytest.fixture
def with_old(net: Net, home: Path) -> Path:
    """The same, with the old version in it."""
    net.check(net.get(home, net.old))
    net.proxy.behave()
    return home


def sound(home: Path) -> bool:
    """Whether every byte that is held is right."""
    repository = Repository(home)
    return verify(repository, choose(repository)).damages == ()


def test_a_new_version_moves_less_than_it_has_and_is_right(net: Net, with_old: Path, tmp_path: Path) -> None:
    cold = net.check(net.get(tmp_path / "cold", net.new))
    net.proxy.behave()
    warm = net.check(net.get(with_old, net.new))
    assert warm.moved < cold.moved and warm.refused == 0
    assert warm.moved <= net.proxy.passed < warm.moved + 64_000, "and that is all that came"
    assert warm.saved == sum(net.new.shards[d] for d in _shards(net.new)) - warm.moved
    assert net.get(with_old, net.new).moved == 0 and sound(with_old)


def _shards(manifest: Manifest) -> set[Digest]:
    task = manifest.task("all")
    return {d for layout in (task.layout, *(manifest.files[f] for f in task.files)) for d in layout.shards()}


def test_killed_in_the_middle_it_goes_on_there_and_nothing_comes_twice(net: Net, with_old: Path) -> None:
    """F3: but what was on its way."""
    whole = net.check(net.get(with_old, net.new)).moved
    Repository(with_old).remove(MODEL, net.new.revision)
    with net.held(whole // 2, "get", f"{MODEL}@{net.new.revision}") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    landed = [digest for digest in _landed(with_old, net.new) if digest not in net.old.shards]
    assert landed
    rest = net.check(net.get(with_old, net.new))
    assert rest.moved <= whole - sum(_least(net.new, digest) for digest in landed)
    assert sound(with_old)


def _landed(home: Path, manifest: Manifest) -> list[Digest]:
    """The shards that are whole in what a command left."""
    (noted,) = (file.read_bytes() for file in home.rglob("*.have") if file.stat().st_size > 4 * 8)
    had = [int.from_bytes(noted[at : at + 4], "big") for at in range(0, len(noted), 4)]
    shards = manifest.task("all").layout.shards()
    return [digest for digest, count in zip(shards, had, strict=True) if count == manifest.shards[digest]]


def _least(manifest: Manifest, digest: Digest) -> int:
    """The fewest bytes that a shard is moved in."""
    parcels = [manifest.size_of(delta.parcel) for delta in manifest.deltas if delta.target == digest]
    return min([manifest.shards[digest], *parcels])


def test_without_a_repository_the_file_that_is_replaced_is_used(net: Net, home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("-o", str(out), "--no-repository", "--json", "--router", net.proxy.url)
    first = result(command("get", f"{MODEL}@{net.old.revision}", *words))
    second = result(command("get", f"{MODEL}@{net.new.revision}", *words, "--force"))
    assert (out / "model.safetensors").read_bytes() == net.wholes[net.new.revision]
    assert 0 < second["moved"] < first["moved"] and second["refused"] == 0
    assert not home.exists()


def test_what_is_damaged_here_is_no_base_and_no_error(net: Net, with_old: Path) -> None:
    blob = max(with_old.rglob("blobs/*"), key=lambda file: file.stat().st_size)
    blob.chmod(0o644)
    rng = random.Random(3)
    with blob.open("r+b") as opened:
        for _ in range(5):
            opened.seek(rng.randrange(1_000_000, 3_000_000))
            opened.write(b"other bytes")
    got = net.check(net.get(with_old, net.new))
    assert bool(got.refused) == any(delta.base for delta in net.new.deltas)
    assert got.moved < net.new.task("all").layout.size, "all others came as they should"
    command("repair", MODEL, "--router", net.proxy.url)
    assert sound(with_old)


def test_a_parcel_that_nobody_has_costs_one_whole_shard(net: Net, with_old: Path) -> None:
    usual = net.get(with_old, net.new).moved
    Repository(with_old).remove(MODEL, net.new.revision)
    target = net.new.files["model.safetensors"].slices[5].digest
    gone = {delta.parcel for delta in net.new.deltas if delta.target == target}
    away = {net.blob(digest): net.blob(digest).read_bytes() for digest in gone}
    for file in away:
        file.unlink()
    try:
        got = net.check(SyncClient(net.origin.url, repository=with_old).get(f"{MODEL}@{net.new.revision}"))
    finally:
        for file, data in away.items():
            file.write_bytes(data)
    assert got.refused == 1
    assert got.moved == usual - _least(net.new, target) + net.new.shards[target]


def test_what_is_repaired_is_made_of_what_is_right(net: Net, with_old: Path) -> None:
    path = net.get(with_old, net.new).paths[0]
    path.chmod(0o644)
    with path.open("r+b") as opened:
        opened.seek(2_000_000)
        opened.write(b"other bytes")
    rows = json.loads(command("repair", MODEL, "--json", "--router", net.proxy.url).stdout)
    moved = {row["revision"]: row["moved"] for row in rows}
    assert moved[net.old.revision] == 0 < moved[net.new.revision] < 256 << 10
    assert path.read_bytes() == net.wholes[net.new.revision] and sound(with_old)


def test_reading_in_a_new_version_moves_deltas_too(net: Net, with_old: Path) -> None:
    with SyncClient(net.proxy.url, repository=with_old).open(f"{MODEL}@{net.new.revision}") as file:
        assert file.read(file.size) == net.wholes[net.new.revision]
    assert net.proxy.passed < len(net.wholes[net.new.revision])


def test_parcels_of_a_private_model_are_where_its_shards_are(net: Net, home: Path) -> None:
    folders = [net.lab.folder / name for name in ("old", "new")]
    old, new = (net.lab.publish(folder, "acme/secret", "--private", *SHARDS) for folder in folders)
    client = SyncClient(net.proxy.url, repository=home, token=net.lab.token("acme/secret:read"))
    first = client.get(f"acme/secret@{old}")
    second = client.get(f"acme/secret@{new}")
    assert second.moved < first.moved < first.size and (first.refused, second.refused) == (0, 0)
    assert second.paths[0].read_bytes() == net.wholes[net.new.revision]
