from __future__ import annotations

from pathlib import Path

import pytest

from origin.seen import Seen
from shared.errors import DiskError, RollbackDetected


def test_versions_never_go_below_what_was_seen(tmp_path: Path) -> None:
    file = tmp_path / "trust" / "seen.json"
    Seen(file).check({"acme~public": 3, "acme~private": 0})
    Seen(file).check({"acme~public": 3})
    Seen(file).check({"acme~public": 7})
    for older in ({"acme~public": 6}, {"acme~private": 5, "acme~public": 0}):
        with pytest.raises(RollbackDetected):
            Seen(file).check(older)
    Seen(file).check({"acme~public": 7, "acme~private": 1})


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'{"acme~public": "x"}', b"\xff"])
def test_a_damaged_file_is_no_licence_to_begin_anew(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "seen.json").write_bytes(damage)
    with pytest.raises(DiskError):
        Seen(tmp_path / "seen.json").check({"acme~public": 1})


def test_what_cannot_be_remembered_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DiskError):
        Seen(tmp_path / "file" / "seen.json").check({"acme~public": 1})
