"""Whoever asks for the same thing at the same time shares one question."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Any, TypeVar

from shared.tasks import end

T = TypeVar("T")


class Asking:
    """Questions under way, by what is asked."""

    def __init__(self) -> None:
        self._tasks: dict[Hashable, asyncio.Task[Any]] = {}

    def __len__(self) -> int:
        return len(self._tasks)

    async def once(self, key: Hashable, ask: Callable[[], Awaitable[T]]) -> T:
        """The answer to one question. It outlives its askers: another may be waiting too."""
        result: T = await asyncio.shield(self.begin(key, ask))
        return result

    def begin(self, key: Hashable, ask: Callable[[], Awaitable[T]]) -> asyncio.Task[T]:
        """Ask, and do not wait."""
        task = self._tasks.get(key)
        if task is None:
            task = self._tasks[key] = asyncio.ensure_future(ask())
            task.add_done_callback(lambda done: self._done(key, done))
        return task

    def _done(self, key: Hashable, task: asyncio.Task[Any]) -> None:
        self._tasks.pop(key, None)
        if not task.cancelled():
            task.exception()  # marks it as seen where every asker has left

    async def close(self) -> None:
        """End what is under way."""
        await end(self._tasks.values())
