"""Copies in the local repository, kept up to date: what ``nearshard sync`` does.

Each subscription has its own schedule; those that are due together are one round. What a round begins and cannot end
(no link, the hours are over, the process is killed) the next one goes on with: ``get`` and ``pull`` do.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import random
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from nearshard.client import Got
from nearshard.placing import on_disk
from nearshard.repository import InUse, Repository
from nearshard.transfer import Progress
from shared.clock import Clock
from shared.codec import encode_json
from shared.digest import Digest
from shared.errors import NearshardError, UpstreamError
from shared.files import replace_file
from shared.ids import TaskId, parse_task_id
from shared.schedule import Schedule
from shared.tasks import end

LONGEST = 300.0
"""Seconds of one sleep, at most: a clock that was set, or a machine that slept, is noticed."""


class Fetches(Protocol):
    """A client, as far as it is used here."""

    async def get(self, task_id: TaskId, *, progress: Progress) -> Got:
        """Have a task in the repository."""
        ...

    async def pull(self, model: str, ref: str, *, progress: Progress) -> Got:
        """Have all files of a model there."""
        ...

    @property
    def unconfirmed(self) -> UpstreamError | None:
        """Why it is not known whether that is the newest."""
        ...


class _HoursOver(Exception):
    """The hours ended while something was being fetched."""


@dataclass
class Subscription:
    """What is kept up to date, and how that went. Bytes and moments (seconds since 1970) are of this process."""

    what: str
    """As it was said: ``org/name[:task][@ref]``."""
    task_id: TaskId
    whole: bool
    """Whether it is all files of the model."""
    schedule: Schedule
    revision: Digest | None = None
    moved: int = 0
    saved: int = 0
    """Bytes of new revisions that needed not be moved."""
    under_way: int = 0
    """Bytes that came of what is not whole yet."""
    synced: float | None = None
    """When it was last found, or made, up to date."""
    error: NearshardError | None = None
    """Why it is not; None where it is."""

    def status(self) -> dict[str, object]:
        """For programs."""
        error = {"code": self.error.error_code, "message": str(self.error)} if self.error else None
        return {
            "what": self.what,
            "revision": self.revision,
            "moved": self.moved,
            "saved": self.saved,
            "last_synced": said(self.synced),
            "last_error": error,
            "failures": self.schedule.failures,
            "next_run": said(self.schedule.due),
        }


@dataclass
class Totals:
    """Of all rounds of this process."""

    rounds: int = 0
    moved: int = 0
    saved: int = 0
    failures: int = 0
    last_round: float | None = None


Tell = Callable[[str, Mapping[str, object]], None]
"""Told each event by its name and fields: ``synced``, ``failed``, ``paused``, ``round``."""


class Sync:
    """The subscriptions of one repository."""

    def __init__(
        self,
        what: Sequence[str],
        opened: Callable[[], AbstractAsyncContextManager[Fetches]],
        repository: Repository,
        clock: Clock,
        rng: random.Random,
        *,
        every: float,
        hours: Sequence[str] = (),
        tell: Tell,
        status_file: Path | None = None,
    ) -> None:
        """``opened``: a client for each round. ``every``: seconds between two looks at each. ``hours``: local times of
        day in which anything is asked for at all; none: always. Raises BadId."""
        self._opened, self._repository, self._clock, self._tell = opened, repository, clock, tell
        self._status_file = status_file
        self.totals = Totals()
        self.subscriptions = [
            Subscription(
                text, parse_task_id(text), ":" not in text.partition("@")[0], Schedule(every, hours, clock, rng)
            )
            for text in dict.fromkeys(what)
        ]

    def __repr__(self) -> str:
        return f"<Sync of {', '.join(found.what for found in self.subscriptions)}>"

    async def run(self, *, once: bool = False) -> NearshardError | None:
        """Round after round until it is cancelled. ``once``: one round of all, inside the hours; the first error of it.

        Raises InUse where another process keeps this repository up to date; DiskError for the status file.
        """
        with self._alone():
            while True:
                self._write_status("waiting")
                await self._until_due(all_of_them=once)
                self._write_status("running")
                await self._round([found for found in self.subscriptions if once or not found.schedule.wait()])
                if once and not self._paused():
                    self._write_status("ended")
                    return next((found.error for found in self.subscriptions if found.error), None)

    def status(self, state: str) -> dict[str, object]:
        """For programs."""
        return {
            "pid": os.getpid(),
            "state": state,
            "rounds": self.totals.rounds,
            "last_round": said(self.totals.last_round),
            "next_round": said(min(found.schedule.due for found in self.subscriptions)),
            "moved": self.totals.moved,
            "saved": self.totals.saved,
            "failures": self.totals.failures,
            "models": [found.status() for found in self.subscriptions],
        }

    def stopped(self) -> None:
        """It was told to end: leave that in the status file. Raises DiskError."""
        self._write_status("ended")

    # A round

    async def _until_due(self, *, all_of_them: bool) -> None:
        pick = max if all_of_them else min
        while wait := pick(found.schedule.wait() for found in self.subscriptions):
            await self._clock.sleep(min(wait, LONGEST))

    async def _round(self, due: Sequence[Subscription]) -> None:
        before = self.totals.moved, self.totals.saved, self.totals.failures
        try:
            async with self._opened() as client:
                for found in due:
                    await self._bring(found, client)
        finally:
            self.totals.rounds += 1
            self.totals.last_round = self._clock.time()
        moved, saved, failures = before
        self._tell(
            "round",
            {
                "looked_at": len(due),
                "failed": self.totals.failures - failures,
                "moved": self.totals.moved - moved,
                "saved": self.totals.saved - saved,
                "total_moved": self.totals.moved,
                "total_saved": self.totals.saved,
                "next_round": said(min(found.schedule.due for found in self.subscriptions)),
            },
        )

    async def _bring(self, found: Subscription, client: Fetches) -> None:
        """Bring one up to date. What goes wrong is told, and tried again when its schedule says."""
        asked, came = found.task_id, 0

        def progress(had: int, _: int) -> None:
            nonlocal came
            came = had

        if found.whole:
            work = client.pull(asked.model, asked.ref, progress=progress)
        else:
            work = client.get(asked, progress=progress)
        try:
            got = await self._inside_hours(found.schedule, work)
        except (NearshardError, _HoursOver) as error:
            found.under_way += came
            self._count(found, moved=came, saved=0)
            self._say_why(found, error)
        else:
            if client.unconfirmed:  # what is here is whole, and may be old by now
                self._count(found, moved=got.moved, saved=0)
                self._say_why(found, client.unconfirmed)
            else:
                self._note(found, got)
        self._write_status("running")

    def _say_why(self, found: Subscription, error: NearshardError | _HoursOver) -> None:
        """It is not up to date."""
        if isinstance(error, _HoursOver):
            found.schedule.closed()
            self._tell("paused", {"what": found.what, "until": said(found.schedule.due)})
            return
        found.error = error
        found.schedule.failed()
        self.totals.failures += 1
        told = {"code": error.error_code, "message": str(error), "next_run": said(found.schedule.due)}
        self._tell("failed", {"what": found.what, **told})

    def _note(self, found: Subscription, got: Got) -> None:
        """It is up to date. Nothing was saved where nothing was to be done."""
        came = got.moved + found.under_way
        changed = bool(came) or found.revision not in (None, got.revision)
        saved = max(0, got.size - came) if changed else 0
        found.revision, found.synced, found.error, found.under_way = got.revision, self._clock.time(), None, 0
        self._count(found, moved=got.moved, saved=saved)
        found.schedule.done()
        told = {"revision": got.revision, "moved": got.moved, "saved": saved, "seconds": round(got.seconds, 3)}
        self._tell("synced", {"what": found.what, **told})

    def _count(self, found: Subscription, *, moved: int, saved: int) -> None:
        found.moved, found.saved = found.moved + moved, found.saved + saved
        self.totals.moved, self.totals.saved = self.totals.moved + moved, self.totals.saved + saved

    async def _inside_hours(self, schedule: Schedule, work: Coroutine[Any, Any, Got]) -> Got:
        """What ``work`` gives. Raises _HoursOver where the hours end before it, once what came is kept."""
        left = schedule.left()
        if left == float("inf"):
            return await work
        fetching = asyncio.create_task(work)
        closing = asyncio.create_task(self._clock.sleep(left))
        try:
            await asyncio.wait([fetching, closing], return_when=asyncio.FIRST_COMPLETED)
            if not fetching.done():
                raise _HoursOver
            return fetching.result()
        finally:
            await end([fetching, closing])

    def _paused(self) -> bool:
        """Whether the hours ended before all was brought."""
        return any(found.synced is None and found.error is None for found in self.subscriptions)

    # On disk

    def _write_status(self, state: str) -> None:
        if self._status_file:
            with on_disk():
                replace_file(self._status_file, encode_json(self.status(state)))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Two that keep one repository would fetch everything in turns. Raises InUse, DiskError."""
        with on_disk():
            self._repository.root.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._repository.root / "sync.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InUse(f"another nearshard sync keeps {self._repository.root} up to date already") from None
            yield
        finally:
            os.close(descriptor)


def said(moment: float | None) -> str | None:
    """A moment (seconds since 1970) as ISO 8601 in UTC."""
    return None if moment is None else datetime.fromtimestamp(moment, UTC).isoformat(timespec="seconds")
