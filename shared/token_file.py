"""A token in a file: a node's own, or a client's. Mode 0600; read again when it changes, so it can be renewed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from shared.errors import ConfigError, DiskError
from shared.keys import read_private
from shared.tokens import MAX_TOKEN, TokenInvalid, read_claims


def bearer(text: str) -> dict[str, str]:
    """The field that carries a token (RFC 6750 §2.1); none where there is no token."""
    return {"Authorization": f"Bearer {text}"} if text else {}


def read_token(file: Path) -> str:
    """The token in a file. Raises ConfigError (not there, not a token, or others may read it), DiskError."""
    try:
        text = read_private(file, MAX_TOKEN + 2).decode("ascii", "replace").strip()
        read_claims(text)
    except FileNotFoundError:
        raise ConfigError(f"{file}: there is no such file") from None
    except TokenInvalid:
        raise ConfigError(f"{file}: not a token") from None
    return text


def given_token(file: Path | None) -> str:
    """The token in a file or, where none is named, in the environment (NEARSHARD_TOKEN); may be empty. Raises as
    ``read_token`` does."""
    return read_token(file) if file else os.environ.get("NEARSHARD_TOKEN", "")


class TokenFile:
    """A token file that may be replaced at any time."""

    def __init__(self, file: Path | None) -> None:
        """None: there is no token. Raises ConfigError, DiskError."""
        self._file = file
        self._seen = (0, 0, 0)
        self._fields: Mapping[str, str] = {}
        if file is not None:
            self._seen, self._fields = _stamp(file), bearer(read_token(file))

    def __repr__(self) -> str:
        return f"<TokenFile {self._file}>"

    def fields(self) -> Mapping[str, str]:
        """What to send with a request. A file that went bad leaves what was known."""
        if self._file is not None:
            try:
                seen = _stamp(self._file)
                if seen != self._seen:
                    self._fields, self._seen = bearer(read_token(self._file)), seen
            except (ConfigError, DiskError):
                pass
        return self._fields


def _stamp(file: Path) -> tuple[int, int, int]:
    """What changes when a file is replaced. Raises ConfigError."""
    try:
        found = file.stat()
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    return found.st_mtime_ns, found.st_ino, found.st_size
