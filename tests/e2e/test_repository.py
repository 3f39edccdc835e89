"""The local repository, by the command: real processes, a real origin, and a proxy that counts and holds back."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from shared import manifest as manifests
from shared.digest import Digest, hex_of, parse_digest
from shared.manifest import Manifest
from tests.between import Between, between, lying
from tests.harness import Lab, command, make_model, wait_until

MODEL = "acme/tiny"
IN_FLIGHT = 4 * (2 << 20)
"""Bytes that four connections may have had in memory when their process was killed, at the most."""


@dataclass
class Net:
    """An origin behind a proxy, with a model of shards of a quarter of a MiB."""

    lab: Lab
    proxy: Between
    manifest: Manifest

    def get(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command that asks the proxy."""
        return command(*words, "--router", self.proxy.url, check=check)

    def got(self, *words: str) -> dict[str, Any]:
        """The same, its result."""
        return dict(json.loads(self.get(*words, "--json").stdout))

    def bytes_of(self, *tasks: str) -> int:
        """Of the shards of these tasks and their files, each once."""
        digests = {d for name in tasks for d in self.manifest.task(name).layout.shards()}
        digests |= {
            d for name in tasks for f in self.manifest.task(name).files for d in self.manifest.files[f].shards()
        }
        return sum(self.manifest.shards[d] for d in digests)

    @contextmanager
    def held(self, after: int, *words: str) -> Iterator[subprocess.Popen[bytes]]:
        """A command whose bytes are held back by the proxy after so many of them."""
        self.proxy.behave(hold_after=after)
        with subprocess.Popen(
            [sys.executable, "-m", "nearshard", *words, "--router", self.proxy.url],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            try:
                assert self.proxy.holding.wait(60)
                yield process
            finally:
                process.kill()
                self.proxy.behave()


@pytest.fixture(scope="module")
def net(shared_lab: Lab) -> Iterator[Net]:
    folder = shared_lab.folder / "model"
    make_model(folder)
    shared_lab.publish(folder, MODEL, "--shard-target", "256KiB", "--shard-limit", "256KiB")
    origin = shared_lab.origin()
    with between("127.0.0.1") as (proxy,):
        proxy.to = origin.port
        shared_lab.note(proxy.url)
        (file,) = (shared_lab.store / "models" / MODEL / "manifests").iterdir()
        yield Net(shared_lab, proxy, manifests.decode(file.read_bytes()))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The repository of a test."""
    where = tmp_path / "repository"
    monkeypatch.setenv("NEARSHARD_REPOSITORY", str(where))
    return where


def blobs(home: Path) -> list[Path]:
    """All bytes that are held, the largest first."""
    return sorted((home / "models").glob("*/*/blobs/*"), key=lambda file: -file.stat().st_size)


def on_disk(folder: Path) -> int:
    """Bytes of the files in a folder, each once."""
    files = [file.lstat() for file in folder.rglob("*") if file.is_file()]
    return sum({status.st_ino: status.st_size for status in files}.values())


def noted(folder: Path) -> int:
    """How many bytes of shards a download that is not done has, by its own notes."""
    notes = [file.read_bytes() for file in folder.rglob("*.have")]
    return sum(int.from_bytes(note[at : at + 4], "big") for note in notes for at in range(0, len(note), 4))


def test_what_is_fetched_is_in_the_repository_once_and_listed_there(net: Net, home: Path) -> None:
    whole = (net.lab.folder / "model" / "model.safetensors").read_bytes()
    first = net.got("get", MODEL)
    assert Path(first["paths"][0]).read_bytes() == whole and Path(first["paths"][0]).is_relative_to(home)
    pulled = net.got("pull", MODEL)
    assert pulled["moved"] + first["moved"] == sum(net.manifest.shards[d] for d in _shards_of_files(net.manifest))
    assert net.got("get", MODEL)["moved"] == net.got("pull", MODEL)["moved"] == 0
    assert on_disk(home / "models") <= sum(layout.size for layout in net.manifest.files.values()) + 4096

    (row,) = json.loads(command("ls", "--json").stdout)
    assert (row["model"], row["revision"], row["refs"], row["tasks"]) == (MODEL, first["revision"], ["main"], ["all"])
    assert MODEL in command("ls").stdout and sorted(row["files"]) == sorted(net.manifest.files)
    (shown,) = json.loads(command("show", MODEL, "--json").stdout)
    assert shown["signature"]["signatures"] and shown["revision"] == net.manifest.revision
    assert first["paths"] == shown["tasks"]["all"] and "signed, version" in command("show", MODEL).stdout
    metadata = home / "metadata" / MODEL
    record = json.loads((metadata / f"{hex_of(net.manifest.revision)}.json").read_text())
    assert record["sha256"] == hex_of(net.manifest.revision) and record["size"] == len(net.manifest.encoded)

    assert json.loads(command("rm", MODEL, "--json").stdout)["freed"] >= len(whole)
    assert json.loads(command("ls", "--json").stdout) == [] and on_disk(home / "models") == 0
    assert command("show", MODEL, check=False).returncode == command("rm", MODEL, check=False).returncode == 8


def _shards_of_files(manifest: Manifest) -> set[Digest]:
    return {digest for layout in manifest.files.values() for digest in layout.shards()}


def test_a_second_task_fetches_only_the_shards_that_are_not_there(net: Net, home: Path) -> None:
    assert net.got("get", f"{MODEL}:embed")["moved"] == net.bytes_of("embed")
    net.proxy.behave()
    half = net.got("get", f"{MODEL}:half")
    missing = net.bytes_of("embed", "half") - net.bytes_of("embed")
    assert half["moved"] == missing < net.bytes_of("half")
    assert missing <= net.proxy.passed < missing + 64_000, "and that is all that the origin sent"
    command("rm", f"{MODEL}:embed")
    assert net.got("get", f"{MODEL}:half")["moved"] == 0, "what another task uses stays"
    assert json.loads(command("verify", "--json").stdout)["damages"] == []


def test_an_output_shares_its_bytes_with_the_repository_and_small_files_are_its_own(
    net: Net, home: Path, tmp_path: Path
) -> None:
    net.got("pull", MODEL, "-o", str(tmp_path / "out"))
    again = net.got("get", MODEL, "-o", str(tmp_path / "again"))
    assert again["moved"] == 0
    out, config = tmp_path / "out" / "model.safetensors", tmp_path / "out" / "config.json"
    assert out.read_bytes() == (net.lab.folder / "model" / "model.safetensors").read_bytes()
    assert on_disk(tmp_path) < 1.2 * sum(layout.size for layout in net.manifest.files.values())
    config.write_text("mine")
    assert json.loads(command("verify", "--json").stdout)["damages"] == []


@pytest.mark.parametrize("seed", [0, 1, 2, *(pytest.param(n, marks=pytest.mark.long) for n in range(3, 60))])
@pytest.mark.parametrize("where", ["repository", "output"])
def test_a_download_killed_anywhere_goes_on_there(net: Net, home: Path, tmp_path: Path, where: str, seed: int) -> None:
    """F3: kill -9 after any byte; what was noted counts, and nothing of it comes twice."""
    total, out = net.bytes_of("all"), tmp_path / "out"
    words = ["get", MODEL] + (["-o", str(out), "--no-repository"] if where == "output" else [])
    after = random.Random(seed).randrange(20_000, total)
    with net.held(after, *words) as process:
        process.kill()
        process.wait()
        passed = net.proxy.passed
        kept = noted(tmp_path)
    assert not list(tmp_path.rglob("*.safetensors")) and not blobs(home)
    assert kept >= passed - IN_FLIGHT
    got = net.got(*words)
    assert got["moved"] == total - kept
    assert Path(got["paths"][0]).read_bytes() == (net.lab.folder / "model" / "model.safetensors").read_bytes()
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob(".nearshard*"))


def test_what_a_killed_download_left_is_checked_before_it_counts(net: Net, home: Path) -> None:
    with net.held(3_000_000, "get", MODEL) as process:
        process.kill()
        process.wait()
    (part,) = home.rglob("*.part")
    kept = noted(home)
    with part.open("r+b") as opened:
        opened.write(b"other bytes")
    got = net.got("get", MODEL)
    assert got["moved"] > net.bytes_of("all") - kept
    assert Path(got["paths"][0]).read_bytes() == (net.lab.folder / "model" / "model.safetensors").read_bytes()


def test_ctrl_c_ends_at_once_and_the_next_command_goes_on(net: Net, home: Path) -> None:
    """F3."""
    with net.held(2_000_000, "get", MODEL) as process:
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 130 and time.monotonic() - began < 10
        assert b"Traceback" not in said
    kept = noted(home)
    assert kept > 0
    assert net.got("get", MODEL)["moved"] == net.bytes_of("all") - kept


def test_one_flipped_byte_is_named_and_only_its_shard_is_fetched_again(net: Net, home: Path) -> None:
    path = Path(net.got("get", MODEL)["paths"][0])
    blob = blobs(home)[0]
    status = blob.stat()
    blob.chmod(0o644)
    with blob.open("r+b") as opened:
        opened.seek(2_500_000)
        byte = opened.read(1)
        opened.seek(2_500_000)
        opened.write(bytes([byte[0] ^ 1]))
    os.utime(blob, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a disk does it
    done = command("verify", MODEL, "--json", check=False)
    (damage,) = json.loads(done.stdout)["damages"]
    shard = parse_digest(damage["shard"])
    assert done.returncode == 4 and damage["path"] == str(path)
    assert damage["offset"] <= 2_500_000 < damage["offset"] + net.manifest.shards[shard]
    assert damage["shard"] in command("verify", check=False).stdout
    net.proxy.behave()
    (mended,) = json.loads(net.get("repair", MODEL, "--json").stdout)
    assert mended["moved"] == net.manifest.shards[shard]
    assert net.proxy.passed < mended["moved"] + 64_000
    assert path.read_bytes() == (net.lab.folder / "model" / "model.safetensors").read_bytes()
    command("verify", MODEL)


def test_a_file_that_was_changed_is_noticed_by_the_next_get(net: Net, home: Path) -> None:
    path = Path(net.got("get", MODEL)["paths"][0])
    blobs(home)[0].chmod(0o644)
    with blobs(home)[0].open("r+b") as opened:
        opened.truncate(1_000_000)
    got = net.got("get", MODEL)
    assert 0 < got["moved"] < net.bytes_of("all")
    assert path.read_bytes() == (net.lab.folder / "model" / "model.safetensors").read_bytes()


def test_two_processes_that_want_the_same_fetch_it_once(net: Net, home: Path) -> None:
    net.proxy.behave(hold_after=1_000_000)
    words = [sys.executable, "-m", "nearshard", "get", MODEL, "--json", "--router", net.proxy.url]
    running = [subprocess.Popen(words, stdout=subprocess.PIPE) for _ in range(2)]
    assert net.proxy.holding.wait(60)
    assert "being fetched" in command("rm", MODEL, check=False).stderr or not list(home.rglob("*.manifest"))
    net.proxy.release.set()
    moved = [json.loads(process.communicate(timeout=60)[0])["moved"] for process in running]
    assert sorted(moved) == [0, net.bytes_of("all")]
    assert json.loads(command("verify", "--json").stdout)["damages"] == []


@pytest.mark.parametrize("junk", [None, b"", b"\xff" * 100, b'{"format": 1, "models": {"../x": {}}}'])
def test_a_lost_index_costs_nothing_and_is_made_again(net: Net, home: Path, junk: bytes | None) -> None:
    net.got("get", f"{MODEL}:half")
    before = json.loads(command("ls", "--json").stdout)
    index = home / "index.json"
    known = json.loads(index.read_text())
    index.unlink()
    if junk is not None:
        index.write_bytes(junk)
    assert json.loads(command("ls", "--json").stdout) == before
    assert json.loads(command("verify", "--rebuild", "--json").stdout)["damages"] == []
    assert json.loads(index.read_text()) == known
    index.unlink()
    assert net.got("get", f"{MODEL}:half")["moved"] == 0


def test_a_source_that_lies_leaves_nothing_under_a_name(net: Net, home: Path) -> None:
    """F16, F17 from the client's side: exit 4, and what was right of it is kept."""
    manifest_is_there = net.got("get", f"{MODEL}:embed")
    net.proxy.behave(lying)
    with_lies = net.get("get", f"{MODEL}@{manifest_is_there['revision']}", check=False)
    net.proxy.behave()
    assert with_lies.returncode in (4, 6), with_lies.stderr
    assert len(blobs(home)) == 2 and not list((home / "models").rglob("tasks/all"))
    net.got("get", MODEL)


def test_nothing_is_asked_of_anybody_for_a_revision_that_is_held(net: Net, home: Path, tmp_path: Path) -> None:
    revision = net.got("get", MODEL)["revision"]
    words = ("get", f"{MODEL}@{revision}", "-o", str(tmp_path / "out"), "--router", "http://127.0.0.1:9")
    command(*words)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_model_that_is_being_fetched_is_not_removed(net: Net, home: Path) -> None:
    net.got("get", f"{MODEL}:embed")
    with net.held(1_000_000, "get", MODEL):
        wait_until(lambda: list(home.rglob("*.part")), "a download under way")
        done = command("rm", MODEL, check=False)
    assert done.returncode == 2 and "fetching" in done.stderr
