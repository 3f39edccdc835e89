"""Whether files fit on their filesystems: asked before their first byte is."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from nearshard.placing import on_disk
from shared.errors import DiskFull


@on_disk()
def check_room(needed: Mapping[Path, int], linked: Path | None = None) -> None:
    """``needed``: bytes by path of what is to be written; nothing need be there yet.
    ``linked``: what is on this one's filesystem needs no room, since it is linked.

    Raises DiskFull, which names what is needed and what is free, or DiskError.
    """
    total: Counter[int] = Counter()
    folders: dict[int, Path] = {}
    for path, size in needed.items():
        folder = _existing(path.absolute().parent)
        device = folder.stat().st_dev
        if linked and device == _existing(linked.absolute()).stat().st_dev:
            continue
        total[device] += size
        folders.setdefault(device, folder)
    for device, folder in folders.items():
        disk = os.statvfs(folder)
        free = disk.f_bavail * disk.f_frsize
        if total[device] > free and disk.f_blocks:  # some network filesystems say 0 of everything
            raise DiskFull(
                f"{folder}: {total[device]} bytes are needed and {free} are free on its filesystem: make room for"
                f" {total[device] - free} more, or choose another place",
                public={"needed": total[device], "free": free},
            )


def _existing(folder: Path) -> Path:
    return folder if folder.exists() else _existing(folder.parent)
