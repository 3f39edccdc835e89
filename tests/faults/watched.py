"""``python -m tests.faults.watched MODULE ...``: a service that notes its asyncio tasks once a second, in a file beside
its ready file. The kernel tells memory and descriptors of a process, and nobody outside tells its tasks."""

from __future__ import annotations

import asyncio
import gc
import runpy
import sys
import threading
from pathlib import Path

EVERY = 1.0


def watch(file: Path) -> None:
    """Note them for ever."""
    waiting, loop = threading.Event(), None
    while not waiting.wait(EVERY):
        loop = loop or running_loop()
        if loop is not None:
            file.write_text(str(len(asyncio.all_tasks(loop))))


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The loop that this process runs."""
    for thing in gc.get_objects():
        if issubclass(type(thing), asyncio.AbstractEventLoop) and thing.is_running():
            return thing  # type: ignore[no-any-return]
    return None


if __name__ == "__main__":
    module = sys.argv.pop(1)
    noted = Path(sys.argv[sys.argv.index("--ready-file") + 1]).with_suffix(".tasks")
    threading.Thread(target=watch, args=[noted], daemon=True).start()
    runpy.run_module(module, run_name="__main__", alter_sys=True)
