"""A file that is to be at a second place of this disk: without a second copy of its bytes where that can be.

First a reflink (copy on write: Btrfs, XFS), else a hard link, else a copy. Files that people edit, which are small, are
never hard-linked; larger ones are read-only, so nobody writes into what they share with the repository by accident.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shared.errors import DiskError, DiskFull

FICLONE = 0x40049409
"""The ioctl of Linux that makes a file share another's blocks, linux/fs.h."""
SMALL = 1 << 20
"""Bytes up to which a file is copied rather than hard-linked."""


@contextmanager
def on_disk() -> Iterator[None]:
    """The system's errors as ours: raises DiskError."""
    try:
        yield
    except OSError as error:
        kind = DiskFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else DiskError
        raise kind(f"{error.filename or 'the disk'}: {error.strerror}") from error


@on_disk()
def place(source: Path, target: Path) -> None:
    """Have the bytes of ``source`` at ``target`` for a user, in place of what is there. Raises DiskError."""
    _replace(source, target, [_reflink, _copy] if source.stat().st_size <= SMALL else [_reflink, _link, _copy])


@on_disk()
def link(source: Path, target: Path) -> None:
    """Have ``target`` be the same file as ``source``; a copy where there are no hard links. Raises DiskError."""
    if not (target.exists() and target.samefile(source)):
        _replace(source, target, [_link, _reflink, _copy])


@on_disk()
def copy_file(source: Path, target: Path) -> None:
    """Have a file of its own with the same bytes. Raises DiskError."""
    _replace(source, target, [_reflink, _copy])


def _replace(source: Path, target: Path, ways: list[Callable[[Path, Path], None]]) -> None:
    """The first way that works, under another name first. Raises OSError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(4)}.part")
    try:
        for way in ways[:-1]:
            with suppress(OSError):
                way(source, temporary)
                break
            temporary.unlink(missing_ok=True)
        else:
            ways[-1](source, temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _link(source: Path, target: Path) -> None:
    target.hardlink_to(source)


def _reflink(source: Path, target: Path) -> None:
    with source.open("rb") as have, target.open("xb") as want:
        fcntl.ioctl(want.fileno(), FICLONE, have.fileno())


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as have, target.open("xb") as want:
        shutil.copyfileobj(have, want, 1 << 20)
        want.flush()
        os.fsync(want.fileno())
