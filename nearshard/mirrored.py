"""Waiting for a model that a network does not have yet: its origin may be fetching it from the hub that it mirrors."""

from __future__ import annotations

import sys
from collections.abc import Callable

from nearshard.guide import Guide
from shared.clock import Clock
from shared.errors import Mirroring, NotFound, RequestError, UpstreamError
from shared.manifest import MAX_MANIFEST
from shared.paths import manifest_path
from shared.web.session import Fetched

Waiting = Callable[[Mirroring], None]
"""Told each time how far it is."""


def say_waiting(error: Mirroring) -> None:
    """Tell a terminal how far it is; nothing where nobody looks."""
    if sys.stderr.isatty():
        share = 100 * error.done // error.total if error.total else 0
        sys.stderr.write(f"\rthe network is fetching this from another hub: {share} % of {error.total / 1e6:.0f} MB ")


async def await_mirror(guide: Guide, model: str, ref: str, clock: Clock, waiting: Waiting) -> bool:
    """Whether the network has a ref now that it did not know of; waits while it is being fetched. An end to waiting is
    the caller's to set. Raises what the fetch failed with where that says more than that there is nothing."""

    async def take(url: str, answer: Fetched) -> bool:
        return True

    heard = False
    while True:
        try:
            return await guide.ask(manifest_path(model, ref), take, key=model, limit=MAX_MANIFEST)
        except Mirroring as error:
            heard = True
            waiting(error)
            await clock.sleep(error.retry_after)
        except (NotFound, UpstreamError, RequestError) as error:
            if heard and not isinstance(error, NotFound):
                raise
            return False
