"""The running origin's upkeep of the signed metadata: what was left behind is put in force, and what is signed online
is signed anew long before it expires."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime

from structlog.typing import FilteringBoundLogger

from origin.trust_store import TrustStore
from shared.clock import Clock
from shared.errors import NearshardError
from shared.keys import NodeKey
from shared.tasks import end

EVERY = 300.0
"""Seconds between two looks; a timestamp is signed anew when it is an hour old."""


class Renewal:
    """One task. Trouble is said in the log, and tried again: what is in force is good for days."""

    def __init__(
        self, trust: TrustStore, online: Callable[[], Sequence[NodeKey]], clock: Clock, log: FilteringBoundLogger
    ) -> None:
        """``online`` gives the online key, read anew each time since it may be rotated; ConfigError without one."""
        self._trust, self._online, self._clock, self._log = trust, online, clock, log
        self._task: asyncio.Task[None] | None = None
        self.expiries: Mapping[str, float] = {}
        """When each role expires, in seconds since 1970, as it was at the last look."""

    def start(self) -> None:
        """From now on."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """No longer."""
        await end([self._task] if self._task else [])

    async def once(self) -> bool:
        """One look. Gives whether anything was signed. Raises ConfigError, Conflict, MetadataInvalid, DiskError."""
        now = datetime.fromtimestamp(self._clock.time(), UTC)
        return await self._trust.roll_forward(self._online(), now, renew=True)

    async def _run(self) -> None:
        while True:
            try:
                if await self.once():
                    self._log.info("signed metadata put in force")
            except NearshardError as error:
                self._log.warning("the signed metadata is not kept fresh", reason=str(error))
            with suppress(NearshardError):  # it was said just now
                self.expiries = (await self._trust.state()).expiries()
            await self._clock.sleep(EVERY)
