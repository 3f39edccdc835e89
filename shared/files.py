"""Small files: replaced in one step, so that a reader finds the old one or the new one, never a part; watched. And
where a user has ours."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

Stamp = tuple[int, int, int]


def stamp(file: Path) -> Stamp:
    """What is another one when a file was changed or replaced. Raises OSError."""
    status = file.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino


def replace_file(file: Path, data: bytes, *, mode: int = 0o666, sync: bool = False) -> None:
    """Give ``file`` the content ``data``. ``mode`` is taken through the umask. Raises OSError, and leaves nothing then.

    ``sync``: when this returns it is there also after a power cut; otherwise it may then be the old one, or gone.
    """
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}")  # a dot: no name of ours begins with one
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(data)
            if sync:
                opened.flush()
                os.fsync(opened.fileno())
        temporary.replace(file)
        if sync:
            sync_folder(file.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder survive a power cut. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """While others who read ``file`` to replace it wait: for the block. Raises OSError."""
    lock = file.with_name(f"{file.name}.lock")
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def home(variable: str, default: str) -> Path:
    """Our folder in one of the user's directories, as the XDG Base Directory Specification names them."""
    folder = Path(os.environ.get(variable, ""))
    return (folder if folder.is_absolute() else Path(default).expanduser()) / "nearshard"
