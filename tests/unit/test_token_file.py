"""Tokens in files: only their owner may read them, and a renewed one is used at once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shared.errors import ConfigError
from shared.keys import NodeKey
from shared.token_file import TokenFile, read_token
from shared.tokens import issue, parse_scopes

KEY = NodeKey.generate()
FIRST, SECOND = (
    issue(KEY, parse_scopes(["*/*:read"]), token_id=name, now=1_800_000_000, lifetime=9) for name in ("a", "b")
)


def written(file: Path, text: str, mode: int = 0o600) -> Path:
    file.write_text(text)
    file.chmod(mode)
    return file


def test_a_token_is_read_with_or_without_the_end_of_its_line(tmp_path: Path) -> None:
    assert read_token(written(tmp_path / "a", FIRST)) == FIRST
    assert read_token(written(tmp_path / "b", FIRST + "\n")) == FIRST


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_a_token_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    """C2."""
    file = written(tmp_path / "t", FIRST, mode)
    for use in (lambda: read_token(file), lambda: TokenFile(file)):
        with pytest.raises(ConfigError) as caught:
            use()
        assert caught.value.exit_code == 3 and FIRST not in str(caught.value)


@pytest.mark.parametrize("text", ["", "x", "a.b.c", FIRST + FIRST, "Bearer " + FIRST])
def test_what_is_no_token_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        TokenFile(written(tmp_path / "t", text))
    with pytest.raises(ConfigError):
        TokenFile(tmp_path / "nothing")


def test_no_file_is_no_token() -> None:
    assert TokenFile(None).fields() == {}


def test_a_renewed_token_is_used_and_a_spoilt_one_is_not(tmp_path: Path) -> None:
    file = written(tmp_path / "t", FIRST)
    own = TokenFile(file)
    assert own.fields() == {"Authorization": f"Bearer {FIRST}"}
    os.replace(written(tmp_path / "new", SECOND), file)
    assert own.fields() == {"Authorization": f"Bearer {SECOND}"}
    os.replace(written(tmp_path / "new", "spoilt"), file)
    assert own.fields() == {"Authorization": f"Bearer {SECOND}"}
    file.unlink()
    assert own.fields() == {"Authorization": f"Bearer {SECOND}"}
