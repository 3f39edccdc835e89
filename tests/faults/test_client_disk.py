"""A client whose disk is full or read-only: a typed error, nothing lost, and the next command goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shared.errors import EXIT_DISK
from tests.faults.conftest import Mount
from tests.harness import Lab, command, make_model


@pytest.fixture
def url(lab: Lab, tmp_path: Path) -> str:
    """An origin that has a model of 5 MB."""
    make_model(tmp_path / "model")
    lab.publish(tmp_path / "model", "acme/tiny", "--shard-target", "256KiB", "--shard-limit", "256KiB")
    return lab.origin().url


def get(url: str, *words: str, check: bool = True) -> tuple[int, dict[str, int], str]:
    """Exit code, what it printed, and what it said."""
    done = command("get", "acme/tiny", "--json", "--router", url, *words, check=check)
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


@pytest.mark.parametrize("where", ["repository", "output"])
def test_a_full_disk_is_a_typed_error_and_the_rest_is_fetched_once_there_is_room(
    url: str, mount: Mount, tmp_path: Path, where: str
) -> None:
    """F11 from the client's side."""
    disk = tmp_path / "disk"
    mount(disk, "size=3m")
    words = ["--repository", str(disk)] if where == "repository" else ["--no-repository", "-o", str(disk / "out")]
    code, _, said = get(url, *words, check=False)
    assert code == EXIT_DISK and "No space left" in said
    assert not list(disk.rglob("*.safetensors"))
    mount(disk, "size=16m")
    _, got, _ = get(url, *words)
    assert 0 < got["moved"] < got["size"] - 1_000_000, "what came before is not fetched again"
    whole = (tmp_path / "model" / "model.safetensors").read_bytes()
    assert Path(str(got["paths"][0])).read_bytes() == whole  # type: ignore[index]


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
    assert command("rm", "acme/tiny", *where, check=False).returncode == EXIT_DISK
    mount(disk, "rw")
    get(url, *where)
