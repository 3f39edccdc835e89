"""What is believed of the signed metadata, on disk: one file, so that nobody finds parts of two states."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from shared import trust
from shared.errors import ConfigError, DecodeError, TrustError
from shared.files import locked, replace_file
from shared.trust import Kept

MAX_ROOT = trust.LIMITS["root"]


class TrustFile:
    """Kept metadata. Several processes may share it; its methods block on the disk."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __repr__(self) -> str:
        return f"<TrustFile {self._file}>"

    def load(self) -> Kept | None:
        """What was saved; None where there is nothing, or nothing that can be used."""
        with suppress(OSError, DecodeError):
            return Kept.decode(self._file.read_bytes())
        return None

    def save(self, kept: Kept) -> None:
        """Save this, where nothing newer was saved meanwhile; there after a power cut too. Raises OSError."""
        data = kept.encode()
        self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with locked(self._file):
            there = self.load()
            if there is None or trust.supersedes(kept, there):
                replace_file(self._file, data, mode=0o600, sync=True)


def read_root(file: Path, now: float, what: str) -> bytes:
    """A trusted root from its file. Raises ConfigError, which begins with ``what``."""
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_ROOT + 1)
        trust.begin(data, None, now)
    except OSError as error:
        raise ConfigError(f"{what}: {file}: {error.strerror}") from error
    except TrustError as error:
        raise ConfigError(f"{what}: {file} is no root of trust: {error}") from error
    return data
