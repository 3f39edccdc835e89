"""Facts of this machine, read from ``/proc``, ``/sys`` and the file systems. What is not there is not known.

``root`` stands for ``/`` where kernel files are looked for, so that another machine's can be looked at. Everything is
small and local, and blocks.
"""

from __future__ import annotations

import concurrent.futures
import fcntl
import hashlib
import os
import platform
import re
import resource
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from nearshard.doctor.facts import Machine, Place, Queue
from nearshard.doctor.patience import begin
from shared.clock import Clock

SYSCTLS = (
    *(
        f"net/ipv4/tcp_{name}"
        for name in (
            "rmem", "wmem", "moderate_rcvbuf", "window_scaling", "timestamps", "sack", "congestion_control",
            "allowed_congestion_control", "available_congestion_control", "slow_start_after_idle", "mtu_probing",
        )
    ),
    "net/core/rmem_max",
    "net/core/wmem_max",
    "net/core/default_qdisc",
    "fs/file-nr",
)  # fmt: skip
"""What is read below ``/proc/sys``."""
ANSWER = 2.0
"""Seconds that a file system has to answer: one of a server that is gone never does."""
HASHED = 4 << 20
"""Bytes that are hashed to see how fast that is: some milliseconds."""
_FICLONE = 0x40049409
_READ, _READS = 1 << 16, 128
"""Bytes of one read (the kernel refuses large ones of its own files), and reads of one file."""
_ESCAPED = re.compile(r"\\([0-7]{3})")


def read_machine(root: Path, places: Sequence[tuple[str, Path]], clock: Clock) -> Machine:
    """Everything. ``places``: role and directory of each place that shards are kept in; it need not be there yet."""
    sysctls = {name: text for name in SYSCTLS if (text := _text(root / "proc/sys" / name)) is not None}
    memory = _memory(root)
    soft, hard = (
        None if limit == resource.RLIM_INFINITY else limit for limit in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    kernel = _text(root / "proc/sys/kernel/osrelease") or ""
    return Machine(
        sysctls,
        platform.system(),
        kernel,
        platform.python_version(),
        _has_bbr(root, kernel),
        memory.get("MemTotal"),
        memory.get("MemAvailable"),
        soft,
        hard,
        _hashing(clock),
        tuple(_places(root, places)),
    )


def _text(file: Path) -> str | None:
    """A small text file; None where there is none, or it may not be read."""
    try:
        with file.open("rb", buffering=0) as opened:
            parts = iter(lambda: opened.read(_READ), b"")
            return b"".join(islice(parts, _READS)).decode("utf-8", "replace").strip()
    except OSError:
        return None


def _number(file: Path) -> int | None:
    text = _text(file) or ""
    return int(text) if text.isascii() and text.isdecimal() else None


def _memory(root: Path) -> dict[str, int]:
    found = re.findall(r"^(\w+):\s+(\d{1,18}) kB$", _text(root / "proc/meminfo") or "", re.MULTILINE)
    return {name: int(kib) << 10 for name, kib in found}


def _has_bbr(root: Path, kernel: str) -> bool | None:
    """Whether tcp_bbr is in the kernel or among its modules; None where its list of modules is not here."""
    if (root / "sys/module/tcp_bbr").is_dir():
        return True
    lists = [_text(root / "lib/modules" / kernel / name) for name in ("modules.builtin", "modules.dep")]
    if not kernel or all(text is None for text in lists):
        return None
    return any("/tcp_bbr.ko" in (text or "") for text in lists)


def _hashing(clock: Clock) -> float | None:
    data = bytes(HASHED)
    started = clock.monotonic()
    hashlib.sha256(data).digest()
    taken = clock.monotonic() - started
    return HASHED / taken if taken > 0 else None


# Places


def _places(root: Path, places: Sequence[tuple[str, Path]]) -> Iterator[Place]:
    looking = [begin(partial(_place, root, role, path), f"look at {path}") for role, path in places]
    concurrent.futures.wait(looking, ANSWER)
    for (role, path), future in zip(places, looking, strict=True):
        yield future.result() if future.done() else Place(role, str(path), hangs=True)


def _place(root: Path, role: str, path: Path) -> Place:
    folder = _existing(path)
    free, files = None, None
    with suppress(OSError):
        status = os.statvfs(folder)
        free = status.f_bavail * status.f_frsize
        files = status.f_favail if status.f_files else None
    mount = _mount_of(root, folder)
    return Place(
        role,
        str(path),
        free,
        files,
        mount.filesystem if mount else None,
        *_trial(folder),
        _queue(root, folder, mount),
    )


def _existing(path: Path) -> Path:
    """The directory, or the nearest one above it that is there: it would be made on the same disk."""
    path = path.absolute()
    for folder in (path, *path.parents):
        with suppress(OSError):
            if folder.is_dir():
                return folder.resolve()
    return Path("/")


def _trial(folder: Path) -> tuple[bool | None, bool | None]:
    """Whether files there can share blocks, and be written at all; tried with two that have no name, so that nothing
    stays behind."""
    flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
    try:
        source = os.open(folder, flags, 0o600)
    except OSError:  # some network file systems have no files without names
        return None, os.access(folder, os.W_OK)
    try:
        target = os.open(folder, flags, 0o600)
        try:
            os.write(source, bytes(1 << 16))
            fcntl.ioctl(target, _FICLONE, source)
            return True, True
        finally:
            os.close(target)
    except OSError:
        return False, True
    finally:
        os.close(source)


@dataclass(frozen=True)
class _Mount:
    point: str
    filesystem: str
    source: str


def _mount_of(root: Path, folder: Path) -> _Mount | None:
    """Of the mounts that the path is under the innermost one, and the last of those."""
    found: _Mount | None = None
    for mount in _mounts(root):
        if (folder == Path(mount.point) or Path(mount.point) in folder.parents) and (
            found is None or len(mount.point) >= len(found.point)
        ):
            found = mount
    return found


def _mounts(root: Path) -> Iterator[_Mount]:
    for line in (_text(root / "proc/self/mountinfo") or "").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(" "), after.split(" ")
        if len(fields) >= 6 and len(kind) >= 2:
            yield _Mount(_unescaped(fields[4]), kind[0], _unescaped(kind[1]))


def _unescaped(text: str) -> str:
    return _ESCAPED.sub(lambda match: chr(int(match[1], 8)), text)


def _queue(root: Path, folder: Path, mount: _Mount | None) -> Queue | None:
    device = _block_device(root, folder, mount)
    if device is None:
        return None
    disk = _lowest(device)
    queue = disk / "queue"
    current, known = _scheduler(_text(queue / "scheduler") or "")
    ahead = _number(device / "queue/read_ahead_kb")
    turns = _number(queue / "rotational")
    return Queue(
        disk.name,
        None if turns is None else bool(turns),
        current,
        known,
        _number(queue / "nr_requests"),
        _number(disk / "device/queue_depth"),
        None if ahead is None else ahead << 10,
        device.name,
    )


def _block_device(root: Path, folder: Path, mount: _Mount | None) -> Path | None:
    """The whole device that is mounted, in ``/sys``. By its number; file systems that have numbers of their own (btrfs,
    overlayfs) tell its name at most."""
    number = folder.stat().st_dev
    device = root / "sys/dev/block" / f"{os.major(number)}:{os.minor(number)}"
    if not device.exists() and mount and mount.source.startswith("/dev/"):
        device = root / "sys/class/block" / Path(mount.source).name
    if not device.exists():
        return None
    device = device.resolve()
    return device.parent if (device / "partition").exists() else device


def _lowest(device: Path) -> Path:
    """The first disk below mappers, RAIDs and the like."""
    for _ in range(8):  # nobody stacks more; a loop would be endless
        below = sorted((device / "slaves").iterdir()) if (device / "slaves").is_dir() else []
        if not below:
            return device
        device = below[0].resolve()
        if (device / "partition").exists():
            device = device.parent
    return device


def _scheduler(text: str) -> tuple[str | None, tuple[str, ...]]:
    """The scheduler in use, and all of them, of ``none [mq-deadline]``."""
    names = tuple(word.strip("[]") for word in text.split())
    current = re.search(r"\[([\w-]+)\]", text)
    return (current[1] if current else None), names
