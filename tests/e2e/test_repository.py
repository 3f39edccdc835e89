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
from typing import BinaryIO

import pytest

from nearshard import Got, Repository, SyncClient
from nearshard.repository import InUse
from nearshard.verifying import choose, verify
from shared import manifest as manifests
from shared.digest import hex_of, parse_digest
from shared.manifest import Manifest
from tests.between import Between, between, lying
from tests.harness import Lab, command, make_model, result

MODEL = "acme/tiny"
IN_FLIGHT = 4 * (2 << 20)
"""Bytes that four connections may have had in memory when their process was killed, at the most."""


@dataclass
class Net:
    """An edge behind a proxy, and a model of shards of a quarter of a MiB."""

    lab: Lab
    proxy: Between
    manifest: Manifest
    whole: bytes
    """Of the model's weights."""

    def get(self, home: Path, task: str = "", output: Path | None = None) -> Got:
        """A task, in this process: a command takes a second of a core to start."""
        return SyncClient(self.proxy.url, repository=home).get(f"{MODEL}{task}", output)

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
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # also where tests run in the background
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
        proxy.to = shared_lab.edge(origin, advertise=proxy.url).port
        shared_lab.note(proxy.url)
        (file,) = (shared_lab.store / "models" / MODEL / "manifests").iterdir()
        whole = (folder / "model.safetensors").read_bytes()
        yield Net(shared_lab, proxy, manifests.decode(file.read_bytes()), whole)


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


def sound(home: Path) -> bool:
    """Whether every byte that is held is right."""
    repository = Repository(home)
    return verify(repository, choose(repository)).damages == ()


def test_what_is_fetched_is_in_the_repository_once_and_listed_there(net: Net, home: Path) -> None:
    words = ("--router", net.proxy.url, "--json")
    first = result(command("get", MODEL, *words))
    assert Path(first["paths"][0]).read_bytes() == net.whole and Path(first["paths"][0]).is_relative_to(home)
    pulled = result(command("pull", MODEL, *words))
    shards = {digest for layout in net.manifest.files.values() for digest in layout.shards()}
    assert pulled["moved"] + first["moved"] == sum(net.manifest.shards[digest] for digest in shards)
    assert net.get(home).moved == 0
    assert on_disk(home / "models") <= sum(layout.size for layout in net.manifest.files.values()) + 4096

    (row,) = json.loads(command("ls", "--json").stdout)
    assert (row["model"], row["revision"], row["refs"], row["tasks"]) == (MODEL, first["revision"], ["main"], ["all"])
    assert MODEL in command("ls").stdout and sorted(row["files"]) == sorted(net.manifest.files)
    (shown,) = json.loads(command("show", MODEL, "--json").stdout)
    assert shown["signature"]["signatures"] and shown["revision"] == net.manifest.revision
    assert first["paths"] == shown["tasks"]["all"] and "signed, version" in command("show", MODEL).stdout
    record = json.loads((home / "metadata" / MODEL / f"{hex_of(net.manifest.revision)}.json").read_text())
    assert record["sha256"] == hex_of(net.manifest.revision) and record["size"] == len(net.manifest.encoded)

    assert command("rm", MODEL, check=False).returncode == 2, "it is what programs run"
    assert json.loads(command("rm", MODEL, "--force", "--json").stdout)["freed"] >= len(net.whole)
    assert json.loads(command("ls", "--json").stdout) == [] and on_disk(home / "models") == 0
    assert command("show", MODEL, check=False).returncode == command("rm", MODEL, check=False).returncode == 8


def test_a_second_task_fetches_only_the_shards_that_are_not_there(net: Net, home: Path) -> None:
    assert net.get(home, ":embed").moved == net.bytes_of("embed")
    net.proxy.behave()
    half = net.get(home, ":half")
    missing = net.bytes_of("embed", "half") - net.bytes_of("embed")
    assert half.moved == missing < net.bytes_of("half")
    assert missing <= net.proxy.passed < missing + 64_000, "and that is all that came"
    Repository(home).remove(MODEL, task="embed", force=True)
    assert net.get(home, ":half").moved == 0, "what another task uses stays"
    assert sound(home)


def test_an_output_shares_its_bytes_with_the_repository_and_small_files_are_its_own(
    net: Net, home: Path, tmp_path: Path
) -> None:
    net.get(home, "", tmp_path / "out")
    again = net.get(home, ":half", tmp_path / "half")
    assert net.get(home, "", tmp_path / "again").moved == 0 and again.moved < net.bytes_of("half")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == net.whole
    assert on_disk(tmp_path) < 1.1 * (net.manifest.task("all").layout.size + net.manifest.task("half").layout.size)
    (tmp_path / "half" / "config.json").write_text("mine")
    assert sound(home)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(n, marks=pytest.mark.long) for n in range(2, 60))])
@pytest.mark.parametrize("where", ["repository", "output"])
def test_a_download_killed_anywhere_goes_on_there(net: Net, home: Path, tmp_path: Path, where: str, seed: int) -> None:
    """F3: kill -9 after any byte; what was noted counts, and nothing of it comes twice."""
    total, out = net.bytes_of("all"), tmp_path / "out" if where == "output" else None
    words = ["-o", str(out), "--no-repository"] if out else []
    with net.held(random.Random(seed).randrange(20_000, total), "get", MODEL, *words) as process:
        process.kill()
        process.wait()
        passed, kept = net.proxy.passed, noted(tmp_path)
    assert not list(tmp_path.rglob("*.safetensors")) and not blobs(home)
    assert kept >= passed - IN_FLIGHT
    got = net.get(home, "", out) if out is None else SyncClient(net.proxy.url).get(MODEL, out)
    assert got.moved == total - kept
    assert got.paths[0].read_bytes() == net.whole
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob(".nearshard*"))


def test_what_a_killed_download_left_is_checked_before_it_counts(net: Net, home: Path) -> None:
    with net.held(3_000_000, "get", MODEL) as process:
        process.kill()
        process.wait()
    part = max(home.rglob("*.part"), key=lambda file: file.stat().st_size)
    kept = noted(home)
    with part.open("r+b") as opened:
        opened.write(b"other bytes")
    got = net.get(home)
    assert got.moved > net.bytes_of("all") - kept
    assert got.paths[0].read_bytes() == net.whole


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
    assert net.get(home).moved == net.bytes_of("all") - kept


def test_one_flipped_byte_is_named_and_only_its_shard_is_fetched_again(net: Net, home: Path) -> None:
    path = net.get(home).paths[0]
    blob = blobs(home)[0]
    status = blob.stat()
    with writable(blob) as opened:
        opened.seek(2_500_000)
        byte = opened.read(1)
        opened.seek(2_500_000)
        opened.write(bytes([byte[0] ^ 1]))
    os.utime(blob, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a disk does it
    done = command("verify", MODEL, "--json", check=False)
    (damage,) = json.loads(done.stdout)["damages"]
    size = net.manifest.shards[parse_digest(damage["shard"])]
    assert done.returncode == 4 and damage["path"] == str(path)
    assert damage["offset"] <= 2_500_000 < damage["offset"] + size
    assert damage["shard"] in command("verify", check=False).stdout
    net.proxy.behave()
    (mended,) = json.loads(command("repair", MODEL, "--json", "--router", net.proxy.url).stdout)
    assert mended["moved"] == size
    assert net.proxy.passed < mended["moved"] + 64_000
    assert path.read_bytes() == net.whole and sound(home)


def test_a_file_that_was_changed_is_noticed_by_the_next_get(net: Net, home: Path) -> None:
    path = net.get(home).paths[0]
    with writable(blobs(home)[0]) as opened:
        opened.truncate(1_000_000)
    assert 0 < net.get(home).moved < net.bytes_of("all")
    assert path.read_bytes() == net.whole


@contextmanager
def writable(file: Path) -> Iterator[BinaryIO]:
    """A file that is read-only, opened to be changed."""
    file.chmod(0o644)
    with file.open("r+b") as opened:
        yield opened


def test_two_processes_that_want_the_same_fetch_it_once_and_nobody_removes_it(net: Net, home: Path) -> None:
    net.get(home, ":embed")
    net.proxy.behave(hold_after=500_000)
    words = [sys.executable, "-m", "nearshard", "get", MODEL, "--json", "--router", net.proxy.url]
    running = [subprocess.Popen(words, stdout=subprocess.PIPE) for _ in range(2)]
    assert net.proxy.holding.wait(60)
    with pytest.raises(InUse):
        Repository(home).remove(MODEL)
    net.proxy.release.set()
    moved = [json.loads(process.communicate(timeout=60)[0].splitlines()[-1])["moved"] for process in running]
    assert sorted(moved) == [0, net.bytes_of("all", "embed") - net.bytes_of("embed")]
    assert sound(home)


@pytest.mark.parametrize("junk", [None, b"", b"\xff" * 100, b'{"format": 1, "models": {"../x": {}}}'])
def test_a_lost_index_costs_nothing_and_is_made_again(net: Net, home: Path, junk: bytes | None) -> None:
    net.get(home, ":half")
    repository, index = Repository(home), home / "index.json"
    before, known = repository.index(), json.loads(index.read_text())
    index.unlink()
    if junk is not None:
        index.write_bytes(junk)
    assert repository.index()[MODEL].revisions == before[MODEL].revisions
    if junk is None:
        command("verify", "--rebuild")
    else:
        repository.rebuild()
        assert sound(home)
    assert json.loads(index.read_text()) == known
    index.unlink()
    assert net.get(home, ":half").moved == 0


def test_a_source_that_lies_is_left_for_the_next_and_nothing_of_it_is_kept(net: Net, home: Path) -> None:
    """F16 from the client's side; the origin is the next. F17 is in test_network."""
    revision = net.get(home, ":embed").revision
    net.proxy.behave(lying)
    got = SyncClient(net.proxy.url, repository=home).get(f"{MODEL}@{revision}")
    net.proxy.behave()
    assert len({url for url, _ in got.sources}) == 2, "the one that lies, and the origin"
    assert got.moved > net.bytes_of("all", "embed") - net.bytes_of("embed")
    assert got.paths[0].read_bytes() == net.whole and sound(home)


def test_nothing_is_asked_of_anybody_for_a_revision_that_is_held(net: Net, home: Path, tmp_path: Path) -> None:
    revision = net.get(home).revision
    SyncClient("http://127.0.0.1:9", repository=home).get(f"{MODEL}@{revision}", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == net.whole
