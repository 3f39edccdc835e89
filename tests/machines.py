"""Another machine, made of files: what the doctor reads and writes below a root of a test."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

SYSCTLS: Mapping[str, str] = {
    "kernel/osrelease": "6.1.0-test",
    "net/ipv4/tcp_rmem": "4096\t131072\t212992",
    "net/ipv4/tcp_wmem": "4096\t16384\t4194304",
    "net/ipv4/tcp_moderate_rcvbuf": "1",
    "net/ipv4/tcp_window_scaling": "1",
    "net/ipv4/tcp_timestamps": "1",
    "net/ipv4/tcp_sack": "0",
    "net/ipv4/tcp_congestion_control": "cubic",
    "net/ipv4/tcp_allowed_congestion_control": "reno cubic",
    "net/ipv4/tcp_available_congestion_control": "reno cubic",
    "net/ipv4/tcp_slow_start_after_idle": "1",
    "net/ipv4/tcp_mtu_probing": "0",
    "net/core/rmem_max": "212992",
    "net/core/wmem_max": "212992",
    "net/core/default_qdisc": "pfifo_fast",
    "fs/file-nr": "1000\t0\t9223372036854775807",
}
QUEUE: Mapping[str, str] = {
    "queue/rotational": "1",
    "queue/scheduler": "[none] mq-deadline",
    "queue/nr_requests": "64",
    "queue/read_ahead_kb": "128",
    "device/queue_depth": "1",
}


def make_machine(root: Path, disk_of: Path, *, mapped: bool = False) -> Path:
    """A machine that needs mending: its disk ``sda``, whose partition (``mapped``: a mapper on it) has the directory
    ``disk_of``, which is there."""
    for name, text in SYSCTLS.items():
        write(root / "proc/sys" / name, text)
    write(root / "proc/meminfo", "MemTotal:       8000000 kB\nMemAvailable:   4000000 kB\n")
    write(root / "proc/self/mountinfo", "20 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n")
    write(root / "lib/modules/6.1.0-test/modules.dep", "kernel/net/ipv4/tcp_bbr.ko.xz:\n")
    disk = root / "sys/devices/pci0/sda"
    for name, text in QUEUE.items():
        write(disk / name, text)
    write(disk / "sda1/partition", "1")
    _link(root / "sys/block/sda", disk)
    number = disk_of.stat().st_dev
    mounted = disk / "sda1"
    if mapped:
        mounted = root / "sys/devices/virtual/block/dm-0"
        write(mounted / "queue/read_ahead_kb", "64")
        _link(mounted / "slaves/sda1", disk / "sda1")
        _link(root / "sys/block/dm-0", mounted)
    _link(root / f"sys/dev/block/{os.major(number)}:{os.minor(number)}", mounted)
    return root


def write(file: Path, text: str) -> None:
    """A file, with the folders that it is in."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text + "\n")


def _link(link: Path, target: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(os.path.relpath(target, link.parent))


def tree(root: Path) -> dict[str, str]:
    """Every file below a root, but for the lock; links are not followed. Values without the line's end, which the
    kernel gives and nobody sets, and with single spaces."""
    return {
        str(file.relative_to(root)): " ".join(file.read_text().split())
        for file in sorted(root.rglob("*"))
        if file.is_file() and not file.is_symlink() and file.suffix != ".lock"
    }
