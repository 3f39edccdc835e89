"""Small files: replaced in one step, so that a reader finds the old one or the new one, never a part; and watched."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

Stamp = tuple[int, int, int]


def stamp(file: Path) -> Stamp:
    """What is another one when a file was changed or replaced. Raises OSError."""
    status = file.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino


def replace_file(file: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Give ``file`` the content ``data``. ``mode`` is taken through the umask. Raises OSError, and leaves nothing then.

    Not synced: after a power cut it may be the old one, or gone.
    """
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}")  # a dot: no name of ours begins with one
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(data)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
