"""What a publisher has seen of the roles that it signs, in one file of the user's.

A publisher signs the next version of a role on top of what the origin says is in force. An origin that shows an older
state, and calls the versions after it spoilt, would have it sign that all that was published since is gone. So what was
seen once, in force or signed here, is never gone below.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from shared.codec import decode_json, encode_json
from shared.digest import digest_of, hex_of
from shared.errors import DecodeError, DiskError, RollbackDetected
from shared.files import home, locked, replace_file


def seen_file(root: bytes) -> Path:
    """Where it is noted for the network that is known by this root."""
    return home("XDG_DATA_HOME", "~/.local/share") / "trust" / f"{hex_of(digest_of(root))}.signed.json"


class Seen:
    """Versions of roles. Several processes may share the file; methods block on the disk."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __repr__(self) -> str:
        return f"<Seen {self._file}>"

    def check(self, versions: Mapping[str, int], before: Mapping[str, int]) -> None:
        """Hold what an origin says is in force against what was seen ``before`` it was asked, and remember it: others
        who share the file may have seen more meanwhile. A role that the origin leaves out has version 0.

        Raises RollbackDetected, DiskError.
        """
        for role, version in versions.items():
            if version < before.get(role, 0):
                raise RollbackDetected(f"{role} is version {version} there, and was {before[role]}")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with locked(self._file):
                seen = self.read()
                newer = {**seen, **{role: max(version, seen.get(role, 0)) for role, version in versions.items()}}
                if newer != seen:
                    replace_file(self._file, encode_json(newer), sync=True)
        except OSError as error:
            raise DiskError(f"{self._file}: {error.strerror}: what was published cannot be remembered") from error

    def read(self) -> dict[str, int]:
        """What was seen. Raises DiskError."""
        with suppress(FileNotFoundError, NotADirectoryError):
            try:
                document: Any = decode_json(self._file.read_bytes())
                return {str(role): int(version) for role, version in document.items()}
            except (DecodeError, AttributeError, TypeError, ValueError):
                raise DiskError(f"{self._file} is damaged; remove it to begin anew") from None
        return {}
