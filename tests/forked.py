"""Starts services and commands in processes that are forked from one which has imported them already.

To import itself takes each a second or more of the processor, and the suite starts some thousand. What runs is
``python -m MODULE`` all the same: its ``__main__``, in a process of its own, with an environment and a log of its own.
That a bare interpreter starts it is shown by what runs elsewhere than here (``Service.within``), by the commands of the
README and by the demonstration.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path

from nearshard.cli import MODULES, PROGRAMS

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["origin.app", "edge_node.app", "router.app", *MODULES, *{module for module, _ in PROGRAMS.values()}]
)


def prepare() -> None:
    """Start what forks, where this thread is: it stays there, and ends with the network namespace that it is in."""
    forkserver.ensure_running()


class Forked:
    """A process, with what is used of ``subprocess.Popen``."""

    def __init__(
        self, module: str, args: Sequence[str], env: Mapping[str, str], out: Path, err: Path | None = None
    ) -> None:
        """``out`` is appended to, with errors where they have no file of their own."""
        what = (module, list(args), dict(env), str(out), str(err or out))
        self._process = _CONTEXT.Process(target=_run, args=what, daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        """The same, once it has ended. Raises TimeoutExpired."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """To the process, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self._process.terminate()

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()


def run(module: str, args: Sequence[str], env: Mapping[str, str], timeout: float) -> subprocess.CompletedProcess[str]:
    """``subprocess.run`` of a module, its output kept as text. Raises TimeoutExpired."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = Forked(module, args, env, out, err)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return subprocess.CompletedProcess([module, *args], code, out.read_text(), err.read_text())


def _run(module: str, args: list[str], env: dict[str, str], out: str, err: str) -> None:
    os.environ.clear()
    os.environ.update(env)
    for number, name in ((1, out), (2, err)):
        with Path(name).open("ab") as file:
            os.dup2(file.fileno(), number)
    warnings.resetwarnings()
    warnings.simplefilter("error")
    sys.argv = [module, *args]
    sys.modules.pop(module, None)  # a program that is one module: it begins as __main__, all that it imports is there
    runpy.run_module(module, run_name="__main__", alter_sys=True)
