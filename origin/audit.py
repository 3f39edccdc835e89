"""The audit log: who published, rotated, revoked or was refused. Lines of JSON that are only ever added.

A line is one write to a file that was opened for appending, so that several processes can keep one log.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from shared.codec import encode_json
from shared.errors import DiskError


class Audit:
    """The log in one file, made at its first line. Nothing secret goes in: keys are named by their ids."""

    def __init__(self, file: Path, now: Callable[[], datetime]) -> None:
        self._file, self._now = file, now

    def __repr__(self) -> str:
        return f"<Audit {self._file}>"

    def add(self, event: str, who: str, **what: object) -> None:
        """One line. ``who``: the id of the key or the token that did it, or another name of whoever did; empty where
        nobody was proven to. Raises DiskError."""
        at = self._now().astimezone(UTC).isoformat(timespec="milliseconds")
        line = encode_json({"time": at, "event": event, "who": who, **what}) + b"\n"
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                os.write(descriptor, line)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise DiskError(f"{self._file}: {error.strerror}") from error
