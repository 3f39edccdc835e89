"""The files of ``nearshard doctor --apply``."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearshard.doctor.facts import Finding, Setting, Status
from nearshard.doctor.mending import SYSCTL_FILE, UDEV_FILE, files_of, is_ours, is_safe, sealed, wanted

RMEM = Setting("proc/sys/net/ipv4/tcp_rmem", "4096 131072 2500000")
BBR = Setting("proc/sys/net/ipv4/tcp_congestion_control", "bbr")
DEPTH = Setting("sys/block/sda/queue/nr_requests", "64")
SCHEDULER = Setting("sys/block/sda/queue/scheduler", "mq-deadline")


def test_sysctls_and_disks_have_a_file_each() -> None:
    files = files_of([RMEM, BBR, DEPTH, SCHEDULER])
    assert files[SYSCTL_FILE].splitlines()[1:] == [
        "net.ipv4.tcp_congestion_control = bbr",
        "net.ipv4.tcp_rmem = 4096 131072 2500000",
    ]
    assert files[UDEV_FILE].splitlines()[1:] == [
        'ACTION=="add|change", SUBSYSTEM=="block", KERNEL=="sda", ATTR{queue/scheduler}="mq-deadline"',
        'ACTION=="add|change", SUBSYSTEM=="block", KERNEL=="sda", ATTR{queue/nr_requests}="64"',
    ], "a scheduler comes with a number of requests of its own, so it is set first"
    assert files_of([BBR]).keys() == {SYSCTL_FILE}
    assert files_of([]) == {}


def test_nothing_is_set_that_is_well() -> None:
    findings = [
        Finding("a", "", Status.OK, "x", "", (RMEM,)),
        Finding("b", "", Status.SLOW, "x", "do", (BBR,)),
        Finding("c", "", Status.SLOW, "x", "do", (BBR,)),
    ]
    assert wanted(findings) == (BBR,)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("proc/sys/../../etc/passwd", "1"),
        ("proc/sys/net/ipv4/..", "1"),
        ("/proc/sys/net", "1"),
        ("etc/passwd", "1"),
        ("sys/block/sda/queue/scheduler", 'none", RUN+="/bin/sh'),
        ("sys/block/sda/queue/scheduler", "none\nx"),
        ('sys/block/a"b/queue/scheduler', "none"),
        ("proc/sys/net/ipv4/tcp_sack", ""),
        ("proc/sys/net/ipv4/tcp_sack", "1\n"),
        ("proc/sys/net/ipv4/tcp_sack\n", "1"),
    ],
)
def test_no_name_of_a_disk_and_no_value_leads_elsewhere(path: str, value: str) -> None:
    assert not is_safe(Setting(path, value))


@given(st.text())
def test_a_file_of_ours_is_known_again_until_somebody_changes_it(text: str) -> None:
    ours = sealed(text)
    assert is_ours(ours)
    assert not is_ours(ours + "#")
    assert not is_ours(text) or text.startswith("# By nearshard")
