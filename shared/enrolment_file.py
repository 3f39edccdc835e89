"""Changing the file that says which nodes may join (``shared.enrolment`` says what is in it)."""

from __future__ import annotations

from pathlib import Path

from shared.enrolment import Enrolled, change_enrolment
from shared.errors import ConfigError, DecodeError, DiskError
from shared.files import locked, replace_file


def change_file(file: Path, node: str, enrolled: Enrolled | None) -> None:
    """Put the node's line into the file, or take it out (None); the file is made where there is none.

    It changes in one step, so that a router never reads half of it, and what others change at the same time stays.
    Raises DiskError, ConfigError for a file that is no enrolment, RequestError.
    """
    try:
        with locked(file):
            text = file.read_text(encoding="utf-8") if file.exists() else ""
            replace_file(file, change_enrolment(text, node, enrolled).encode(), sync=True)
    except OSError as error:
        raise DiskError(f"{file}: {error.strerror}") from error
    except (UnicodeDecodeError, DecodeError) as error:
        raise ConfigError(f"{file}: {error}") from error
