"""Reading a machine, changing it and taking that back: on real files, below a root of the test's own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from nearshard.doctor.apply import STATE, NeedsRoot, NotOurs, apply, plan, require_root, undo
from nearshard.doctor.checks import examine
from nearshard.doctor.facts import Facts, Network, Setting, Status
from nearshard.doctor.machine import SYSCTLS, read_machine
from nearshard.doctor.mending import SYSCTL_FILE, UDEV_FILE, is_ours, wanted
from shared.clock import SystemClock
from shared.errors import EXIT_USAGE, DiskError, LocalError
from tests.machines import make_machine, tree, write

SACK = Setting("proc/sys/net/ipv4/tcp_sack", "1")
RMEM = Setting("proc/sys/net/ipv4/tcp_rmem", "4096 131072 2500000")
AHEAD = Setting("sys/block/sda/queue/read_ahead_kb", "2048")
SCHEDULER = Setting("sys/block/sda/queue/scheduler", "mq-deadline")


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A directory that shards are kept in."""
    folder = tmp_path / "kept"
    folder.mkdir()
    return folder


@pytest.fixture
def root(tmp_path: Path, kept: Path) -> Path:
    """A machine that needs mending."""
    return make_machine(tmp_path / "root", kept)


def look(root: Path, kept: Path) -> Facts:
    """The facts of a machine, without a network."""
    return Facts(read_machine(root, [("cache", kept / "not" / "yet")], SystemClock()), Network(asked=False))


# Reading


def test_a_machine_is_read_from_its_files(root: Path, kept: Path) -> None:
    machine = look(root, kept).machine
    assert machine.numbers("net/ipv4/tcp_rmem", 3) == (4096, 131072, 212992)
    assert (machine.kernel, machine.bbr_module) == ("6.1.0-test", True)
    assert (machine.memory, machine.memory_available) == (8_000_000 << 10, 4_000_000 << 10)
    (place,) = machine.places
    assert place.filesystem == "ext4" and place.free and place.writable and place.reflink is not None
    queue = place.queue
    assert queue is not None
    assert (queue.name, queue.rotational, queue.scheduler) == ("sda", True, "none")
    assert (queue.nr_requests, queue.depth, queue.read_ahead) == (64, 1, 128 << 10)
    assert not list(kept.iterdir()), "looking leaves nothing behind"


def test_this_machine_can_be_read(kept: Path) -> None:
    """What a kernel's own files allow is less than what files on a disk do."""
    machine = look(Path("/"), kept).machine
    for name in SYSCTLS:
        assert (name in machine.sysctls) == (Path("/proc/sys") / name).exists(), name
    assert machine.kernel and machine.memory


def test_below_a_mapper_the_disk_counts_and_the_mappers_read_ahead(tmp_path: Path, kept: Path) -> None:
    queue = look(make_machine(tmp_path / "mapped", kept, mapped=True), kept).machine.places[0].queue
    assert queue is not None
    assert (queue.name, queue.scheduler) == ("sda", "none")
    assert (queue.read_ahead_of, queue.read_ahead) == ("dm-0", 64 << 10)


def test_a_device_without_a_number_of_its_own_is_found_by_its_mount(tmp_path: Path, kept: Path, root: Path) -> None:
    (number,) = (root / "sys/dev/block").iterdir()
    number.unlink()
    link = root / "sys/class/block/sda1"
    link.parent.mkdir(parents=True)
    link.symlink_to("../../devices/pci0/sda/sda1")
    queue = look(root, kept).machine.places[0].queue
    assert queue is not None and queue.name == "sda"


def test_the_innermost_mount_is_the_one(root: Path, kept: Path) -> None:
    mounts = root / "proc/self/mountinfo"
    odd = str(kept).replace("kept", r"ke\160t")  # as the kernel writes odd letters
    write(
        mounts, f"{mounts.read_text()}21 20 0:5 / {odd} rw - nfs4 server:/models rw\n22 20 0:6 / {kept}x rw - xfs x rw"
    )
    assert look(root, kept).machine.places[0].filesystem == "nfs4"


def test_where_nothing_can_be_read_nothing_is_an_error(tmp_path: Path, kept: Path) -> None:
    """As in a container that hides ``/proc/sys`` and ``/sys``."""
    facts = look(tmp_path / "empty", kept)
    verdicts = {finding.check: finding.status for finding in examine(facts)}
    for check in ("tcp-receive-buffer", "sack", "congestion-control", "qdisc", "disk-scheduler", "memory", "reach"):
        assert verdicts[check] is Status.UNKNOWN, check
    assert wanted(examine(facts)) == ()


def test_odd_contents_are_not_known(root: Path, kept: Path) -> None:
    for name in ("net/ipv4/tcp_rmem", "net/ipv4/tcp_sack", "fs/file-nr"):
        (root / "proc/sys" / name).write_bytes(b"\xff\x00 what\n")
    (root / "sys/block/sda/queue/read_ahead_kb").write_text("-1\n")
    (root / "proc/self/mountinfo").write_text("not a mount\n - \n")
    verdicts = {finding.check: finding.status for finding in examine(look(root, kept))}
    for check in ("tcp-receive-buffer", "sack", "system-files", "read-ahead", "filesystem"):
        assert verdicts[check] is Status.UNKNOWN, check


def test_a_file_system_that_does_not_answer_holds_nothing_up(
    root: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of a server that is gone: the others are looked at, and the program can end."""
    gone = threading.Event()
    statvfs = os.statvfs
    monkeypatch.setattr("nearshard.doctor.machine.ANSWER", 0.2)
    monkeypatch.setattr(os, "statvfs", lambda path: gone.wait(30) and statvfs(path) if path == kept else statvfs(path))
    machine = read_machine(root, [("cache", kept), ("repository", root)], SystemClock())
    gone.set()
    assert [place.hangs for place in machine.places] == [True, False]


def test_what_needs_mending_is_found_and_mended(root: Path, kept: Path) -> None:
    settings = wanted(examine(look(root, kept)))
    by_path = {one.path: one.value for one in settings}
    assert by_path["proc/sys/net/ipv4/tcp_sack"] == "1"
    assert by_path["proc/sys/net/core/default_qdisc"] == "fq"
    assert by_path["proc/sys/net/ipv4/tcp_congestion_control"] == "bbr"
    assert by_path["sys/block/sda/queue/scheduler"] == "mq-deadline"
    assert by_path["sys/block/sda/queue/read_ahead_kb"] == "2048"
    assert by_path["sys/block/sda/device/queue_depth"] == "32"
    apply(root, settings)
    write(root / "sys/block/sda/queue/scheduler", "none [mq-deadline]")  # as the kernel shows what was written
    assert wanted(examine(look(root, kept))) == ()


# Changing


def test_apply_writes_both_files_and_the_values(root: Path) -> None:
    changed = apply(root, [SACK, RMEM, AHEAD])
    assert changed.files == (SYSCTL_FILE, UDEV_FILE) and changed.values == (SACK, RMEM, AHEAD) and not changed.refused
    assert is_ours((root / SYSCTL_FILE).read_text()) and is_ours((root / UDEV_FILE).read_text())
    assert "net.ipv4.tcp_sack = 1" in (root / SYSCTL_FILE).read_text()
    assert 'KERNEL=="sda", ATTR{queue/read_ahead_kb}="2048"' in (root / UDEV_FILE).read_text()
    for one in (SACK, RMEM, AHEAD):
        assert (root / one.path).read_text().split() == one.value.split()
    assert (root / SYSCTL_FILE).stat().st_mode & 0o777 == 0o644


def test_only_what_is_needed_has_a_file(root: Path) -> None:
    apply(root, [SACK])
    assert (root / SYSCTL_FILE).exists() and not (root / UDEV_FILE).exists()


def test_undo_takes_back_all_of_several_calls(root: Path) -> None:
    """The second call keeps what the first one set, also in the file, and knows what was there before the first."""
    before = tree(root)
    apply(root, [SACK, RMEM])
    assert "tcp_sack" in plan(root, [AHEAD])[SYSCTL_FILE]
    apply(root, [Setting(RMEM.path, "4096 131072 5000000"), AHEAD])
    text = (root / SYSCTL_FILE).read_text()
    assert "net.ipv4.tcp_sack = 1" in text and "5000000" in text and "2500000" not in text
    undo(root)
    assert tree(root) == before
    assert undo(root).files == (), "the second time there is nothing to do"
    assert tree(root) == before


def test_undo_leaves_what_somebody_has_set_since(root: Path) -> None:
    apply(root, [SACK, RMEM])
    write(root / RMEM.path, "4096 131072 9000000")
    changed = undo(root)
    assert list(changed.refused) == [RMEM.path] and "9000000" in changed.refused[RMEM.path]
    assert (root / RMEM.path).read_text() == "4096 131072 9000000\n"
    assert (root / SACK.path).read_text().strip() == "0"


def test_the_scheduler_that_was_in_use_comes_back(root: Path) -> None:
    apply(root, [SCHEDULER])
    write(root / SCHEDULER.path, "none [mq-deadline]")
    assert undo(root).values == (Setting(SCHEDULER.path, "none"),)


@pytest.mark.parametrize("name", [SYSCTL_FILE, UDEV_FILE])
@pytest.mark.parametrize("change", ["theirs", "edited", "link"])
def test_a_file_that_is_not_ours_is_left_alone(root: Path, name: str, change: str) -> None:
    file = root / name
    if change == "edited":
        apply(root, [SACK, AHEAD])
        file.write_text(file.read_text() + "# and mine\n")
    elif change == "link":
        write(root / "elsewhere", "x")
        file.parent.mkdir(parents=True)
        file.symlink_to(root / "elsewhere")
    else:
        write(file, "vm.swappiness = 1")
    before = tree(root)
    with pytest.raises(NotOurs, match=file.name):
        apply(root, [SACK, RMEM, AHEAD])
    with pytest.raises(NotOurs, match=file.name):
        undo(root)
    assert tree(root) == before and file.exists()


def test_a_real_kernel_takes_what_is_written(tmp_path: Path) -> None:
    """In a network namespace of its own, whose settings are nobody else's; it ends with the process."""
    if os.geteuid() != 0:
        pytest.skip("a network namespace needs root")
    (tmp_path / "proc/sys").mkdir(parents=True)
    (tmp_path / "proc/sys/net").symlink_to("/proc/sys/net")
    code = """if True:
        import sys
        from pathlib import Path
        from nearshard.doctor.apply import apply, undo
        from nearshard.doctor.facts import Setting
        root = Path(sys.argv[1])
        sack, nonsense = Setting("proc/sys/net/ipv4/tcp_sack", "0"), "proc/sys/net/ipv4/tcp_congestion_control"
        read = lambda: Path("/proc/sys/net/ipv4/tcp_sack").read_text().strip()
        before = read()
        changed = apply(root, [sack, Setting(nonsense, "nonsense")])
        assert changed.values == (sack,) and list(changed.refused) == [nonsense], changed
        assert (before, read()) == ("1", "0")
        undo(root)
        assert read() == before
    """
    words = ["unshare", "--net", sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def test_what_the_kernel_refuses_is_told_and_the_rest_is_set(root: Path) -> None:
    gone = Setting("proc/sys/net/core/default_qdisc", "fq")
    (root / gone.path).unlink()
    changed = apply(root, [gone, SACK])
    assert changed.refused == {gone.path: "No such file or directory"} and changed.values == (SACK,)
    assert not (root / gone.path).exists(), "nothing is created that the kernel has not"


def test_without_the_state_our_files_still_go(root: Path) -> None:
    apply(root, [SACK])
    (root / STATE).unlink()
    assert apply(root, [RMEM]).files == (SYSCTL_FILE,)
    undo(root)
    assert "tcp_sack" in (root / SYSCTL_FILE).read_text(), "what was there before that call"


@pytest.mark.parametrize(
    "state",
    [
        b"{",
        b"[]",
        b'{"before": {"../../etc/passwd": "x"}, "settings": {}, "files": {}}',
        b'{"before": {}, "settings": {}, "files": {"etc/passwd": null}}',
        b'{"before": {}, "settings": {"proc/sys/kernel/core_pattern": "|/tmp/x"}, "files": {}}',
    ],
)
def test_a_damaged_state_is_an_error_that_changes_nothing(root: Path, state: bytes) -> None:
    (root / STATE).parent.mkdir(parents=True)
    (root / STATE).write_bytes(state)
    before = tree(root)
    with pytest.raises(LocalError, match="damaged"):
        apply(root, [SACK])
    with pytest.raises(LocalError, match="damaged"):
        undo(root)
    assert tree(root) == before


def test_only_root_changes_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NeedsRoot, match="sudo") as raised:
        require_root(Path("/"))
    assert (raised.value.error_code, raised.value.exit_code) == ("needs_root", EXIT_USAGE)
    require_root(tmp_path)


def test_a_disk_that_refuses_is_an_error_of_ours(root: Path) -> None:
    (root / "var").write_text("a file in the way")
    with pytest.raises(DiskError):
        apply(root, [SACK])


def test_whoever_is_killed_between_two_steps_can_undo(root: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.cut_off", str(tmp_path / "copies"), str(root)],
        capture_output=True, text=True, check=False, timeout=100, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    steps = dict(line.split() for line in done.stdout.splitlines())
    assert int(steps["apply"]) > 10 and int(steps["undo"]) > 5, steps
