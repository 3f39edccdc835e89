"""A client whose disk is full or read-only: a typed error, nothing lost, and the next command goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from shared.errors import EXIT_DISK
from tests.between import between
from tests.faults.conftest import Mount
from tests.harness import Lab, command, make_model, result


@pytest.fixture
def url(lab: Lab, tmp_path: Path) -> str:
    """An origin that has a model of 5 MB."""
    make_model(tmp_path / "model")
    lab.publish(tmp_path / "model", "acme/tiny", "--shard-target", "256KiB", "--shard-limit", "256KiB")
    return lab.origin().url


def get(url: str, *words: str, check: bool = True) -> tuple[int, dict[str, Any], str]:
    """Exit code, what it printed, and what it said."""
    done = command("get", "acme/tiny", "--json", "--router", url, *words, check=check)
    return done.returncode, result(done), done.stderr


@pytest.mark.parametrize("where", ["repository", "output"])
def test_a_full_disk_is_a_typed_error_and_the_rest_is_fetched_once_there_is_room(
    url: str, mount: Mount, tmp_path: Path, where: str
) -> None:
    """F11 from the client's side."""
    disk = tmp_path / "disk"
    mount(disk, "size=3m")
    words = ["--repository", str(disk)] if where == "repository" else ["--no-repository", "-o", str(disk / "out")]
    code, error, said = get(url, *words, check=False)
    assert code == EXIT_DISK and "bytes are needed and" in said, "before the first byte"
    assert error["code"] == "disk_full" and error["needed"] > error["free"] and "moved" not in error
    assert not list(disk.rglob("*.safetensors"))
    mount(disk, "size=16m")
    _, got, _ = get(url, *words)
    whole = (tmp_path / "model" / "model.safetensors").read_bytes()
    assert Path(str(got["paths"][0])).read_bytes() == whole


def test_a_disk_that_becomes_full_on_the_way_ends_it_and_what_came_is_not_fetched_again(
    lab: Lab, mount: Mount, tmp_path: Path
) -> None:
    """F11: somebody else took the room that was there."""
    disk, words = tmp_path / "disk", ["--repository", str(tmp_path / "disk")]
    mount(disk, "size=16m")
    make_model(tmp_path / "model")
    lab.publish(tmp_path / "model", "acme/tiny", "--shard-target", "256KiB", "--shard-limit", "256KiB")
    with between("127.0.0.2") as [proxy]:
        proxy.to = lab.edge(lab.origin(), advertise=proxy.url).port
        lab.note(proxy.url)
        proxy.behave(hold_after=3 << 20)
        fetch = [sys.executable, "-m", "nearshard", "get", "acme/tiny", "--router", proxy.url, *words]
        with subprocess.Popen(fetch, stderr=subprocess.PIPE) as run:
            assert run.stderr and proxy.holding.wait(30)
            with suppress(OSError), (disk / "theirs").open("wb", buffering=0) as filler:
                while filler.write(bytes(1 << 12)):
                    pass
            proxy.release.set()
            said = run.stderr.read().decode()
            assert (run.wait(60), "No space left" in said) == (EXIT_DISK, True), said
        (disk / "theirs").unlink()
        proxy.behave()
        _, got, _ = get(proxy.url, *words)
    assert 0 < got["moved"] < got["size"] - 500_000


def test_no_inode_left_is_a_typed_error(url: str, mount: Mount, tmp_path: Path) -> None:
    """F12."""
    disk = tmp_path / "disk"
    mount(disk, "nr_inodes=5")
    assert get(url, "--repository", str(disk), check=False)[0] == EXIT_DISK
    mount(disk, "nr_inodes=100")
    get(url, "--repository", str(disk))


def test_a_read_only_repository_gives_what_it_has_and_says_so_of_the_rest(
    url: str, mount: Mount, tmp_path: Path
) -> None:
    """F12: also for who shares one that others fill."""
    disk = tmp_path / "disk"
    mount(disk, "size=16m")
    where = ["--repository", str(disk)]
    command("get", "acme/tiny:embed", "--router", url, *where)
    mount(disk, "ro")
    command("get", "acme/tiny:embed", "--router", url, *where, "-o", str(tmp_path / "out"))
    assert (tmp_path / "out" / "tokenizer.json").exists()
    code, _, said = get(url, *where, check=False)
    assert code == EXIT_DISK and "Read-only" in said
    assert json.loads(command("verify", "--json", *where).stdout)["damages"] == []
    assert "acme/tiny" in command("ls", *where).stdout
    assert command("rm", "acme/tiny", "--force", *where, check=False).returncode == EXIT_DISK
    mount(disk, "rw")
    get(url, *where)
