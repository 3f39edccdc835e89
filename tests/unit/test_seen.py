from __future__ import annotations

from pathlib import Path

import pytest

from origin.seen import Seen
from shared.errors import DiskError, RollbackDetected


def test_versions_never_go_below_what_was_seen(tmp_path: Path) -> None:
    seen = Seen(tmp_path / "trust" / "seen.json")
    for versions in ({"acme~public": 3, "acme~private": 0}, {"acme~public": 3}, {"acme~public": 7}):
        seen.check(versions, seen.read())
    for older in ({"acme~public": 6}, {"acme~private": 5, "acme~public": 0}):
        with pytest.raises(RollbackDetected):
            seen.check(older, seen.read())
    seen.check({"acme~public": 7, "acme~private": 1}, seen.read())


def test_what_another_saw_while_the_origin_was_asked_is_no_rollback(tmp_path: Path) -> None:
    seen = Seen(tmp_path / "seen.json")
    before = seen.read()
    seen.check({"acme~public": 2}, before)
    seen.check({"acme~public": 1}, before)
    assert seen.read() == {"acme~public": 2}, "and what was seen stays seen"


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'{"acme~public": "x"}', b"\xff"])
def test_a_damaged_file_is_no_licence_to_begin_anew(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "seen.json").write_bytes(damage)
    with pytest.raises(DiskError):
        Seen(tmp_path / "seen.json").check({"acme~public": 1}, {})


def test_what_cannot_be_remembered_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DiskError):
        Seen(tmp_path / "file" / "seen.json").check({"acme~public": 1}, {})
