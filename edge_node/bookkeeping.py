"""Keeps a node's account: folds it every few seconds, and has it on disk. A kill costs a minute of it at most."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

from aiohttp import web
from structlog.typing import FilteringBoundLogger

from edge_node.account import Account
from shared import codec
from shared.clock import Clock
from shared.errors import DecodeError, NearshardError
from shared.files import replace_file
from shared.tasks import end
from shared.tokens import EVERYTHING, Right
from shared.usage import PATH, as_document, day_of, days_before, parse_day
from shared.web.access import Gate
from shared.web.middleware import KIND
from shared.web.reads import get
from shared.web.trusted import Trusted

LOOK, KEEP = 5.0, 60.0
"""Seconds between two folds, and between two writes of the file."""
ASK = 20
"""Models that were named and are not known that are looked up in the metadata at one time."""
PATIENCE = 2.0
"""Seconds that this takes at most: where nobody can be asked, they are counted to no model."""
DAYS = 30
"""Days that are answered where nobody says since when."""


class Bookkeeper:
    """Of one node."""

    def __init__(self, account: Account, trusted: Trusted, data: Path, clock: Clock, log: FilteringBoundLogger) -> None:
        self.account, self._trusted = account, trusted
        self._file, self._clock, self._log = data / "usage.msgpack", clock, log
        self._kept_at, self._kept = float("-inf"), 0
        self._failing = False
        self._task: asyncio.Task[None] | None = None
        self._take_up()

    def __repr__(self) -> str:
        return f"<Bookkeeper of {self._file}>"

    def start(self) -> None:
        """Begin."""
        self._task = asyncio.create_task(self._run(), name="bookkeeping")

    async def close(self) -> None:
        """Stop; all is on disk."""
        await end([self._task] if self._task else [])
        self.account.fold()
        await self._keep()

    async def settle(self) -> None:
        """Fold what was counted, once it is known which of the models that were named are public."""
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                for model in sorted(self.account.unknown())[:ASK]:
                    with suppress(NearshardError):
                        if await self._trusted.is_public(model):
                            self.account.learn_public(model)
        self.account.fold()

    def _take_up(self) -> None:
        try:
            self.account.take_up(self._file.read_bytes())
        except FileNotFoundError:
            pass
        except (OSError, DecodeError) as error:
            self._log.warning(
                "the account of usage cannot be read: begun anew", file=str(self._file), reason=str(error)
            )

    async def _run(self) -> None:
        while True:
            await self._clock.sleep(LOOK)
            await self.settle()
            if self._clock.monotonic() - self._kept_at >= KEEP:
                await self._keep()

    async def _keep(self) -> None:
        """Write the file, where there is something new. A disk that refuses is told of once, and tried again."""
        changes = self.account.changes
        if changes == self._kept:
            return
        self._kept_at = self._clock.monotonic()
        data = self.account.encode()
        try:
            await asyncio.to_thread(replace_file, self._file, data, mode=0o600)
        except OSError as error:
            if not self._failing:
                self._log.warning("the account of usage cannot be written", reason=str(error))
            self._failing = True
        else:
            self._kept, self._failing = changes, False


def add_usage_route(
    app: web.Application, books: Bookkeeper, gate: Gate, clock: Clock, *, node: str, region: str
) -> None:
    """``GET /usage?since=YYYY-MM-DD``: the days from that one on, per model; the last 30 by default. Who shows a token
    for ``*/*:admin`` sees the names of private models."""

    async def usage(request: web.Request) -> web.Response:
        request[KIND] = "usage"
        token = await gate.token(request)
        today = day_of(clock.time())
        since = parse_day(request.query.get("since", days_before(today, DAYS - 1)))
        await books.settle()
        everything = token is not None and token.may(Right.ADMIN, EVERYTHING)
        days = books.account.since(since, everything=everything)
        document = {"node": node, "region": region, "since": since, "today": today, "days": as_document(days)}
        body = await asyncio.to_thread(codec.encode_json, document)
        return web.Response(body=body, content_type="application/json", headers={"Cache-Control": "no-store"})

    get(app, PATH, usage)
