"""Child processes that end with us: started, watched, and stopped together."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

GRACE = 10.0
"""Seconds a process has to end after SIGTERM."""
_PR_SET_PDEATHSIG = 1


class Processes:
    """Named child processes. An async context manager: none is left when it ends."""

    def __init__(self, on_exit: Callable[[str, int], None]) -> None:
        """``on_exit`` is told the name and the exit code of one that ended by itself."""
        self._on_exit = on_exit
        self._running: dict[str, Process] = {}
        self._watching: set[asyncio.Task[None]] = set()
        self._last: set[str] = set()
        self._stopping = False

    async def __aenter__(self) -> Processes:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def pid(self, name: str) -> int:
        """The process id of a running child. Raises KeyError."""
        return self._running[name].pid

    def alive(self, name: str) -> bool:
        """Whether a child is running."""
        return name in self._running

    async def start(
        self,
        name: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
        last: bool = False,
    ) -> None:
        """Start a child in a session of its own, so that Ctrl-C reaches us and not it.

        ``log``: a file for its output, ours by default. ``last``: it is stopped after the others.
        """
        if last:
            self._last.add(name)
        output: IO[bytes] | None = await asyncio.to_thread(log.open, "ab") if log else None
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **(env or {})},
                start_new_session=True,
                preexec_fn=_die_with(os.getpid()),
            )
        finally:
            if output:
                output.close()
        self._running[name] = process
        task = asyncio.create_task(self._watch(name, process))
        self._watching.add(task)
        task.add_done_callback(self._watching.discard)

    async def stop(self) -> None:
        """SIGTERM to all, SIGKILL to those that do not go."""
        self._stopping = True
        await self._stop([name for name in self._running if name not in self._last])
        await self._stop(list(self._running))

    async def _stop(self, names: Sequence[str]) -> None:
        processes = [self._running[name] for name in names if name in self._running]
        _signal(processes, signal.SIGTERM)
        try:
            async with asyncio.timeout(GRACE):
                await asyncio.gather(*(process.wait() for process in processes))
        except TimeoutError:
            _signal(processes, signal.SIGKILL)
            await asyncio.gather(*(process.wait() for process in processes))

    async def _watch(self, name: str, process: Process) -> None:
        code = await process.wait()
        self._running.pop(name, None)
        if not self._stopping:
            self._on_exit(name, code)


def _signal(processes: Sequence[Process], number: int) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            process.send_signal(number)


def _die_with(parent: int) -> Callable[[], None] | None:
    """What a child runs before its program: the kernel ends it when we die, even by SIGKILL (Linux)."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before prctl
            os._exit(1)

    return prepare
