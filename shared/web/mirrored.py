"""What a node or router does with a model that it does not know: an origin may mirror another hub, and get it there."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

from aiohttp import web

from shared.clock import Clock
from shared.errors import Mirroring, NotFound, UpstreamError
from shared.manifest import MAX_MANIFEST
from shared.paths import manifest_path
from shared.token_file import bearer
from shared.web.access import token_text
from shared.web.asking import Asking
from shared.web.session import Sessions, fetch

MISSING = 5.0
"""Seconds after which what no origin has is asked for again."""
REMEMBERED = 10_000
"""Such answers that are remembered."""


class Mirrored:
    """Asks origins. One question for all who want the same thing with the same token."""

    def __init__(self, sessions: Sessions, origins: Sequence[str], clock: Clock, forget: Callable[[str], None]) -> None:
        """``forget``: called with a model that is there after all, so that what is known is looked up anew."""
        self._sessions, self._origins, self._clock, self._forget = sessions, list(origins), clock, forget
        self._missing: OrderedDict[tuple[str, str, str], float] = OrderedDict()
        self._asking = Asking()

    async def absent(self, request: web.Request, model: str, ref: str) -> bool:
        """As of ``shared.web.reads.Absent``. Raises Mirroring."""
        token = token_text(request)
        key = (model, ref, token)
        if self._clock.monotonic() < self._missing.get(key, float("-inf")):
            return False
        there = await self._asking.once(key, partial(self._ask, model, ref, token))
        if there:
            self._forget(model)
            return True
        self._missing[key] = self._clock.monotonic() + MISSING
        self._missing.move_to_end(key)
        while len(self._missing) > REMEMBERED:
            self._missing.popitem(last=False)
        return False

    async def close(self) -> None:
        """End what is under way."""
        await self._asking.close()

    async def _ask(self, model: str, ref: str, token: str) -> bool:
        path = manifest_path(model, ref)
        for base in self._origins:
            try:
                await fetch(self._sessions.of(base), base + path, limit=MAX_MANIFEST, headers=bearer(token))
            except Mirroring:
                raise
            except (NotFound, UpstreamError):  # which is what was known before
                continue
            return True
        return False
