"""Bundles: from a network into a file, and from the file to where there is no network. Real processes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from nearshard.networks import config_dir, state_file
from shared.bundle import Unpacker
from tests.bundles import bundle_of, one_file
from tests.faults import invariants
from tests.harness import Lab, Service, command, make_model, wait_settled
from tests.metadata import Repository

MODEL = "acme/tiny"
DAY = 86_400
NOWHERE = "http://127.0.0.1:9"
"""Nobody listens there."""
SHARDS = ("--deltas", "--shard-target", "256KiB", "--shard-limit", "256KiB")


@dataclass
class Net:
    """Two versions of a model, a bundle of each, and the first one's bytes."""

    lab: Lab
    whole: Path
    delta: Path
    revisions: list[str] = field(default_factory=list)
    weights: list[bytes] = field(default_factory=list)


@pytest.fixture(scope="module")
def net(shared_lab: Lab) -> Iterator[Net]:
    """The origin is stopped once the bundles are made."""
    lab, model = shared_lab, shared_lab.folder / "model"
    made = Net(lab, lab.folder / "v1.tar", lab.folder / "v2.tar")
    tensors = make_model(model)
    origin = lab.origin()

    def publish() -> None:
        made.revisions.append(lab.publish(model, MODEL, *SHARDS))
        made.weights.append((model / "model.safetensors").read_bytes())

    def export(output: Path, *words: str) -> None:
        where = ("--router", origin.url, "--repository", str(lab.folder / "exporting"))
        command("bundle", "export", MODEL, "-o", str(output), *words, *where)

    publish()
    export(made.whole)
    export(lab.folder / "again.tar")
    tensors["encoder.layer.2.weight"] = tensors["encoder.layer.2.weight"] + np.float32(0.5)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    publish()
    export(made.delta, "--from", made.revisions[0])
    origin.stop()
    lab.note(NOWHERE)
    yield made


@pytest.fixture
def home(net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user who has never been on the network: they know its root, and nothing else."""
    config = tmp_path / "config"
    shutil.copytree(config_dir(), config / "nearshard")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(config))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NEARSHARD_REPOSITORY", str(tmp_path / "repository"))
    return tmp_path


def offline(*words: str, check: bool = True) -> tuple[int, str, str]:
    """A command where nobody answers."""
    done = command(*words, "--router", NOWHERE, check=check)
    return done.returncode, done.stdout, done.stderr


def test_a_model_in_the_post_is_had_whole_and_then_by_what_is_new(net: Net, home: Path) -> None:
    assert net.whole.read_bytes() == (net.lab.folder / "again.tar").read_bytes(), "the same bytes each time"
    assert net.delta.stat().st_size < net.whole.stat().st_size / 2
    code, _, said = offline("bundle", "import", str(net.delta), check=False)
    assert code == 8 and "upon another revision" in said
    _, said, _ = offline("bundle", "import", str(net.whole), "--json")
    assert json.loads(said)["revision"] == net.revisions[0]

    output = home / "out"
    offline("pull", MODEL, "-o", str(output / "v1"))
    assert (output / "v1" / "model.safetensors").read_bytes() == net.weights[0]
    offline("bundle", "import", str(net.delta))
    offline("pull", MODEL, "-o", str(output / "v2"))
    assert (output / "v2" / "model.safetensors").read_bytes() == net.weights[1]
    offline("get", MODEL, "-o", str(output / "task.safetensors"))
    code, _, said = offline("pull", f"{MODEL}@v9", check=False)
    assert code != 0
    assert command("verify").stdout.endswith("all right\n")
    code, _, said = offline("bundle", "import", str(net.whole), check=False)
    assert code == 4 and "by what is known here" in said, "the first version is not what main means any more"


def test_a_node_serves_what_was_carried_to_it(net: Net, home: Path) -> None:
    edge = net.lab.edge(NOWHERE, node="posted", ref_lifetime="0.1")
    data = ("--data", str(net.lab.folder / "posted"))
    done = command("bundle", "import", str(net.whole), *data, "--json")
    assert json.loads(done.stdout)["posted"]["revision"] == net.revisions[0]
    assert served(edge) == net.weights[0]
    command("bundle", "import", str(net.delta), *data)
    assert served(edge) == net.weights[1]
    assert edge.status()["upstream_bytes"] == 0
    wait_settled(edge)
    edge.stop()
    edge.start()
    assert served(edge) == net.weights[1], "after a restart too"
    assert edge.status()["trust"]["signed_ago"] < 600
    done = command("bundle", "import", str(net.lab.trust_root), *data, check=False)
    assert done.returncode == 4 and "bundle" in done.stderr


def served(edge: Service) -> bytes:
    """The model's weights, by who checks nothing."""
    with urllib.request.urlopen(f"{edge.url}/models/{MODEL}/files/main/model.safetensors", timeout=20) as answer:
        return bytes(answer.read())


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("truncated", lambda data: data[: len(data) // 2]),
        (
            "a flipped bit",
            lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :],
        ),
        ("a tail", lambda data: data + b"more"),
        ("no tar", lambda data: b"\0" * len(data)),
    ],
)
def test_what_is_damaged_leaves_nothing_wrong(net: Net, home: Path, name: str, spoil: object) -> None:
    assert callable(spoil)
    file = home / "spoilt.tar"
    file.write_bytes(spoil(net.whole.read_bytes()))
    code, _, said = offline("bundle", "import", str(file), check=False)
    assert code == 4 and said.startswith("error: "), said
    assert not list((home / "repository").glob("models/*/*/blobs/*"))
    offline("bundle", "import", str(net.whole))
    assert command("verify").stdout.endswith("all right\n")


SEEDS = [0, *(pytest.param(n, marks=pytest.mark.long) for n in range(1, 40))]


@contextmanager
def carried(bundle: Path, seed: int, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """An import that has been given some of a bundle, and waits for more. What is read from a pipe has no size."""
    data, pipe = bundle.read_bytes(), bundle.parent / f"pipe-{seed}"
    os.mkfifo(pipe)
    line = [sys.executable, "-m", "nearshard", "bundle", "import", str(pipe), *words]
    try:
        with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            with pipe.open("wb", buffering=0) as end:
                end.write(data[: random.Random(seed).randrange(1, len(data))])
                yield process
            process.wait(30)
    finally:
        pipe.unlink()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("which", ["whole", "delta"])
def test_an_import_killed_anywhere_leaves_what_was_there_and_can_be_repeated(
    net: Net, home: Path, which: str, seed: int
) -> None:
    """F3, without a network."""
    if which == "delta":
        offline("bundle", "import", str(net.whole))
    bundle, after = (net.delta, 1) if which == "delta" else (net.whole, 0)
    with carried(bundle, seed, "--router", NOWHERE) as process:
        process.kill()
    assert command("verify").stdout.endswith("all right\n")
    held = json.loads(command("ls", "--json").stdout)
    assert [row["revision"] for row in held] == net.revisions[:after], "what was whole before, and nothing else"
    offline("bundle", "import", str(bundle))
    offline("pull", MODEL, "-o", str(home / "out"))
    assert (home / "out" / "model.safetensors").read_bytes() == net.weights[after]
    assert command("verify").stdout.endswith("all right\n")
    assert not list((home / "repository").rglob("*.part"))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_node_killed_while_it_takes_a_bundle_in_serves_what_it_had(net: Net, home: Path, seed: int) -> None:
    """F1, without a network."""
    name = f"killed-{seed}"
    edge, data = net.lab.edge(NOWHERE, node=name, ref_lifetime="0.1"), net.lab.folder / name
    command("bundle", "import", str(net.whole), "--data", str(data))
    with carried(net.delta, seed, "--data", str(data)) as process:
        edge.kill()
    assert process.returncode not in (0, None)
    invariants.nothing_wrong_is_kept(data)
    edge.start()
    assert served(edge) == net.weights[0]
    command("bundle", "import", str(net.delta), "--data", str(data))
    assert served(edge) == net.weights[1]
    invariants.nothing_wrong_is_kept(data)


def test_another_networks_bundle_is_refused(net: Net, home: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = Lab(tmp_path_factory.mktemp("other"))
    done = command(
        "bundle", "import", str(net.whole), "--trust-root", str(other.trust_root), "--router", NOWHERE, check=False
    )
    assert done.returncode == 4, done.stderr
    assert not (home / "repository" / "metadata").exists()
    assert not state_file(other.trust_root.read_bytes()).exists()
    unpacker = Unpacker()
    entries = unpacker.feed(net.whole.read_bytes())
    unpacker.end()
    assert all(hashlib.sha256(entry.data).hexdigest() == entry.digest[7:] for entry in entries)


def test_weeks_later_it_is_served_as_far_as_the_operator_accepts_it(home: Path, lab: Lab) -> None:
    metadata = Repository(now=time.time() - 10 * DAY)
    shard = os.urandom(100_000)
    manifest = one_file(MODEL, shard)
    metadata.publish(MODEL, "main", manifest.encoded)
    file, root = home / "old.tar", home / "root.json"
    file.write_bytes(bundle_of(metadata, manifest, shard))
    root.write_bytes(metadata.root)
    until = datetime.now(UTC) + timedelta(days=30)
    accepted = f"{MODEL}@main until {until:%Y-%m-%d}"

    data = ("--data", str(lab.folder / "late"))
    edge = lab.edge(NOWHERE, node="late", trust_root=str(root), words=["--trust-root", str(root)])
    done = command("bundle", "import", str(file), *data, check=False)
    assert done.returncode == 4 and "expired" in done.stderr
    edge.stop()
    edge.args += ["--accept-expired", json.dumps([accepted])]
    edge.start()
    command("bundle", "import", str(file), *data)
    edge.stop()
    edge.start()
    with urllib.request.urlopen(f"{edge.url}/models/{MODEL}/files/main/w.bin", timeout=20) as answer:
        assert answer.read() == shard
    shown = edge.status()["trust"]
    assert 9.9 * DAY < shown["signed_ago"] < 10.1 * DAY
    assert shown["accepted_expired"][0]["what"] == accepted and shown["accepted_expired"][0]["used"] >= 1
    assert "answering by metadata that has expired" in edge.text()

    words = ("pull", MODEL, "--trust-root", str(root), "--router", edge.url)
    done = command(*words, "-o", str(home / "no"), check=False)
    assert done.returncode == 4 and "expired" in done.stderr, "who asks it decides by themselves"
    done = command(*words, "-o", str(home / "yes"), "--accept-expired", accepted)
    assert (home / "yes" / "w.bin").read_bytes() == shard
    assert "signed 10.0 days ago" in done.stderr and accepted in done.stderr
    far = f"{MODEL} until {until + timedelta(days=90):%Y-%m-%d}"
    done = command(*words, "--accept-expired", far, check=False)
    assert done.returncode == 3 and "90 days ahead" in done.stderr
