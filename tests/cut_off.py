"""``python -m tests.cut_off DIR MACHINE``: ``apply`` and ``undo`` are killed before each of their steps on files.

For each step a fresh copy of MACHINE is changed by a child process, which kills itself with SIGKILL before that step;
then ``undo`` has to bring back what was there. Prints the number of steps of either; the exit code says whether it did.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from nearshard.doctor.apply import apply, undo
from nearshard.doctor.facts import Setting
from tests.machines import tree

SETTINGS = (
    Setting("proc/sys/net/ipv4/tcp_sack", "1"),
    Setting("proc/sys/net/ipv4/tcp_rmem", "4096 131072 2500000"),
    Setting("sys/block/sda/queue/read_ahead_kb", "2048"),
)
STEPS = ("open", "os.rename", "os.remove", "os.mkdir")


def killed_at(step: int, work: Callable[[], object], root: Path) -> bool:
    """Do it in a child that dies before its step of this number; whether it came so far."""
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event: str, words: tuple[object, ...]) -> None:
            nonlocal count
            if event in STEPS and str(words[0]).startswith(str(root)):
                count += 1
                if count > step:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        work()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "it failed by itself"
    return False


def main(folder: Path, machine: Path) -> None:
    """See above."""
    wanted = tree(machine)
    for name, applied_before in (("apply", False), ("undo", True)):
        step, more = 0, True
        while more:
            root = folder / f"{name}-{step}"
            shutil.copytree(machine, root, symlinks=True)
            if applied_before:
                apply(root, SETTINGS)
            work = partial(undo, root) if applied_before else partial(apply, root, SETTINGS)
            more = killed_at(step, work, root)
            undo(root)
            found = tree(root)
            assert found == wanted, f"{name}, killed before step {step}: {found.items() ^ wanted.items()}"
            shutil.rmtree(root)
            step += 1
        sys.stdout.write(f"{name} {step - 1}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
