"""Files put together where they are wanted, without a repository: in ``.nearshard`` beside them until they are whole.

That folder stays where a download was ended, so that the next one to the same place goes on from there.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from nearshard.assembly import Assembly, Place, Places, homes, read_shard, same
from nearshard.placing import on_disk
from shared.digest import Digest
from shared.errors import DiskError, LocalError
from shared.layout import Layout
from shared.manifest import Manifest

FOLDER = ".nearshard"


class TargetExists(LocalError):
    """A target is there already, with other bytes; nothing was touched."""

    code = "exists"


@on_disk()
def absent(targets: Mapping[Path, Layout], *, force: bool) -> dict[Path, Layout]:
    """The targets that are not there with the right bytes. Raises TargetExists where other bytes are there (or a
    directory), and are not to be replaced by ``force``; DiskError."""
    found = {}
    for target, layout in targets.items():
        if target.is_dir():
            raise TargetExists(f"{target}: is a directory")
        if force or not target.exists():
            found[target] = layout
        elif not same(target, layout):
            raise TargetExists(f"{target}: is there already, with other bytes; --force replaces it")
    return found


def earlier(targets: Mapping[Path, Layout], before: Manifest) -> Places:
    """Where shards of an earlier revision are in files that are about to be replaced, checked. Raises DiskError."""
    found: dict[Digest, list[Place]] = {}
    layouts = {item.sha256: item for item in (*before.files.values(), *(t.layout for t in before.tasks.values()))}
    with on_disk():
        sizes = {target: target.stat().st_size for target in targets if target.exists()}
    pairs = [(target, item) for target, size in sizes.items() for item in layouts.values() if item.size == size]
    places = [(d, Place(target, at)) for target, item in pairs for d, at in homes(item, before.shards).items()]

    def right(place: tuple[Digest, Place]) -> bool:
        with suppress(OSError, DiskError):  # what cannot be read is not had
            return read_shard(place[1], place[0], before.shards[place[0]]) is not None
        return False

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for (digest, place), is_right in zip(places, pool.map(right, places), strict=True):
            if is_right:
                found.setdefault(digest, []).append(place)
    return found


class Beside(Assembly):
    """An assembly for these targets. A context manager: it holds the folder against other processes."""

    def __init__(self, targets: Mapping[Path, Layout], sizes: Mapping[Digest, int]) -> None:
        with on_disk():
            folder = Path(os.path.commonpath([target.absolute().parent for target in targets])) / FOLDER
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if not _is_mine(self._lock, folder):  # somebody else downloads to the same place: each by itself
                folder = folder.with_name(f"{FOLDER}-{secrets.token_hex(4)}")
        self._folder = folder
        super().__init__(folder, list(targets.values()), sizes)

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or self._folder.name != FOLDER:
            shutil.rmtree(self._folder, ignore_errors=True)
        else:
            with suppress(OSError):
                self._folder.rmdir()
        os.close(self._lock)


def _is_mine(descriptor: int, folder: Path) -> bool:
    """Whether the folder is locked by this descriptor now, and is the one that has the name."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(descriptor).st_ino == folder.stat().st_ino
    except (BlockingIOError, FileNotFoundError):
        return False
