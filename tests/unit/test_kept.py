"""The file of a view: whole or not there, and nobody's word for anything."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearshard.kept import MAX_AGE, MAX_FILE, MAX_FILES, Kept, Stored, cache_file
from shared.codec import encode_json
from shared.node import Node
from shared.view import View
from tests.unit.strategies import few

NOW = 1_800_000_000.0
VIEW = View(3, "paris", ("paris",), (Node("a", "http://a:1", "paris", 1),), origins=("http://o:1",))
STORED = Stored(VIEW, f'"{"a" * 64}"', "http://router:8700", NOW)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where one would be."""
    return tmp_path / "cache" / "nearshard" / "rings" / "x.json"


def test_what_is_saved_is_there_for_the_next_process(file: Path) -> None:
    Kept(file).save(STORED)
    assert Kept(file).load(NOW + 5) == STORED
    assert [path.name for path in file.parent.iterdir()] == ["x.json"]
    assert file.stat().st_mode & 0o777 == 0o600 and file.parent.stat().st_mode & 0o777 == 0o700


def test_in_memory_it_needs_no_file() -> None:
    kept = Kept()
    assert kept.load(NOW) is None
    kept.save(STORED)
    assert kept.load(NOW) == STORED


def test_what_is_too_old_is_nothing(file: Path) -> None:
    kept = Kept(file)
    kept.save(STORED)
    assert Kept(file).load(NOW + MAX_AGE - 1) == STORED
    assert Kept(file).load(NOW + MAX_AGE + 1) is None
    assert kept.load(NOW + MAX_AGE + 1) is None


def write(file: Path, data: bytes) -> None:
    """Some other hand's file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)


@few
@given(data=st.binary(max_size=60))
def test_junk_is_nothing(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    file = tmp_path_factory.mktemp("junk") / "x.json"
    write(file, data)
    assert Kept(file).load(NOW) is None


GOOD = {"view": VIEW.record(), "etag": "", "source": "http://r:1", "at": NOW}


@pytest.mark.parametrize(
    "document",
    [
        {**GOOD, "view": {}}, {**GOOD, "view": {**VIEW.record(), "origins": ["file:///etc/passwd"]}},
        {**GOOD, "etag": "x\r\nX: y"}, {**GOOD, "etag": 5}, {**GOOD, "source": None}, {**GOOD, "at": "soon"},
        {**GOOD, "at": None}, [], {}, {**GOOD, "at": {}},
    ],
)  # fmt: skip
def test_a_file_is_checked_like_an_answer(file: Path, document: object) -> None:
    write(file, encode_json(GOOD))
    assert Kept(file).load(NOW) is not None
    write(file, encode_json(document))
    assert Kept(file).load(NOW) is None


def test_only_a_plain_file_of_ours_is_read(file: Path, tmp_path: Path) -> None:
    Kept(tmp_path / "elsewhere").save(STORED)
    file.parent.mkdir(parents=True)
    file.symlink_to(tmp_path / "elsewhere")
    assert Kept(file).load(NOW) is None
    file.unlink()
    os.mkfifo(file)
    assert Kept(file).load(NOW) is None, "and nobody waits for a pipe"
    file.unlink()
    file.mkdir()
    assert Kept(file).load(NOW) is None
    file.rmdir()
    write(file, encode_json(GOOD) + b" " * MAX_FILE)
    assert Kept(file).load(NOW) is None


def test_a_disk_that_refuses_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    kept = Kept(tmp_path / "file" / "x.json")
    kept.save(STORED)
    assert kept.load(NOW) == STORED


def test_a_failed_write_leaves_what_was_there(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Kept(file).save(STORED)

    def refuse(*_: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(Path, "replace", refuse)
    Kept(file).save(Stored(VIEW, "", "http://other", NOW + 1))
    assert [path.name for path in file.parent.iterdir()] == ["x.json"]
    assert Kept(file).load(NOW) == STORED


def test_the_files_are_few(file: Path) -> None:
    for number in range(MAX_FILES + 5):
        path = file.with_name(f"{number}.json")
        Kept(path).save(STORED)
        os.utime(path, (1000 + number, 1000 + number))
    assert {path.name for path in file.parent.iterdir()} >= {f"{MAX_FILES + 4}.json"}
    assert len(list(file.parent.iterdir())) == MAX_FILES
    assert not file.with_name("0.json").exists()


def test_a_file_is_of_routers_and_a_region(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = {cache_file(["http://a"], None), cache_file(["http://a", "http://b"], None), cache_file(["http://a"], "x")}
    assert len(found) == 3 and all(path.parent == tmp_path / "nearshard" / "rings" for path in found)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_file(["http://a"], None).parent == Path.home() / ".cache" / "nearshard" / "rings"
