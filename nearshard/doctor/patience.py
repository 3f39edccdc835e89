"""Calls that may never come back (a resolver, a file system of a server that is gone), for as long as there is time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def begin(work: Callable[[], T], name: str) -> Future[T]:
    """Do ``work`` in a thread of its own that nobody waits for: when the program ends, it is left behind.

    Threads of a pool are waited for at the end, so one call that hangs would hold up everything."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()  # whoever has waited long enough cannot cancel it: the thread settles it

    def run() -> None:
        try:
            result = work()
        except Exception as error:  # noqa: BLE001 - it is raised again where the result is asked for
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, daemon=True, name=name).start()
    return future


async def within(seconds: float, work: Callable[[], T], name: str) -> T:
    """The result of ``work``, which blocks. Raises TimeoutError, and what ``work`` raises."""
    async with asyncio.timeout(seconds):
        return await asyncio.wrap_future(begin(work, name))
