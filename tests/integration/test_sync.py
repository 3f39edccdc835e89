"""Keeping copies up to date, with time in the test's hands and a client that does as it is told."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from nearshard.client import Got
from nearshard.repository import Repository
from nearshard.sync import Sync
from nearshard.transfer import Progress
from shared.digest import digest_of
from shared.errors import NearshardError, UpstreamError
from shared.ids import TaskId
from shared.schedule import BACKOFF
from tests.clock import HandClock

HOUR = 3600.0
SIZE = 100


class Enough(Exception):
    """The test has seen what it wanted."""


def got(version: bytes, moved: int) -> Got:
    """What a fetch of a model of SIZE bytes did."""
    return Got("acme/tiny", digest_of(version), (), SIZE, moved, 0.5)


@dataclass
class Scripted:
    """Does what is next in ``acts`` for each fetch; its clock is moved by them."""

    clock: HandClock
    acts: list[Got | NearshardError | float]
    """A number: so many bytes come, and then none any more."""
    asked: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    unconfirmed: UpstreamError | None = None

    async def get(self, task_id: TaskId, *, progress: Progress) -> Got:
        """A task."""
        return await self._act(str(task_id), progress)

    async def pull(self, model: str, ref: str, *, progress: Progress) -> Got:
        """A model."""
        return await self._act(f"{model}@{ref}", progress)

    async def _act(self, what: str, progress: Progress) -> Got:
        self.asked.append(what)
        self.times.append(self.clock.time())
        if not self.acts:
            raise Enough
        act = self.acts.pop(0)
        if isinstance(act, Got):
            return act
        progress(30, SIZE)
        if isinstance(act, NearshardError):
            raise act
        await asyncio.Event().wait()
        raise AssertionError


async def run(
    folder: Path, acts: Sequence[Got | NearshardError | float], *what: str, hours: Sequence[str] = (), noon: bool = True
) -> tuple[Scripted, Sync, list[tuple[str, Mapping[str, object]]]]:
    """Rounds until the acts are over."""
    start = datetime(2027, 1, 5, 12 if noon else 23).astimezone().timestamp()
    clock = HandClock(start)
    client, told = Scripted(clock, list(acts)), list[tuple[str, Mapping[str, object]]]()

    @asynccontextmanager
    async def opened() -> AsyncIterator[Scripted]:
        yield client

    sync = Sync(
        what or ["acme/tiny"], opened, Repository(folder / "repository"), clock, random.Random(1), every=HOUR,
        hours=hours, tell=lambda event, fields: told.append((event, fields)), status_file=folder / "status.json",
    )  # fmt: skip
    try:
        await sync.run()
    except Enough:
        client.times = [moment - start for moment in client.times]
        return client, sync, told
    raise AssertionError("it ended")


async def test_rounds_come_at_their_interval_and_count_what_was_moved_and_saved(tmp_path: Path) -> None:
    acts = [got(b"1", 100), got(b"1", 0), got(b"2", 20), got(b"1", 0)]
    client, _, told = await run(tmp_path, acts)
    assert [event for event, _ in told] == ["synced", "round"] * 4
    counted = [(fields["moved"], fields["saved"]) for event, fields in told if event == "synced"]
    assert counted == [(100, 0), (0, 0), (20, 80), (0, 100)], "the last one went back to what was held"
    gaps = [after - before for before, after in zip(client.times, client.times[1:], strict=False)]
    assert all(0.9 * HOUR <= gap <= 1.1 * HOUR for gap in gaps) and len(set(gaps)) == 4
    assert told[-1][1]["total_moved"] == 120 and told[-1][1]["total_saved"] == 180


async def test_a_failure_ends_nothing_and_is_tried_again_soon(tmp_path: Path) -> None:
    broken = UpstreamError("nobody answers")
    acts: list[Got | NearshardError | float] = [broken, got(b"1", 100), broken, got(b"2", 50)]
    client, sync, told = await run(tmp_path, acts, "acme/tiny", "acme/other:embed@v2")
    assert client.asked[:4] == ["acme/tiny@main", "acme/other:embed@v2", "acme/tiny@main", "acme/tiny@main"]
    assert client.times[2] <= BACKOFF and client.times[3] > client.times[2]
    failed = [fields for event, fields in told if event == "failed"]
    assert [fields["code"] for fields in failed] == ["upstream_error"] * 2
    first = sync.subscriptions[0]
    assert first.error is None and first.moved == 30 + 30 + 50, "what came of failed tries was moved too"
    assert first.saved == 0, "and it was of this revision"
    status = json.loads((tmp_path / "status.json").read_bytes())
    assert status["failures"] == 2 and status["models"][0]["last_error"] is None
    assert status["models"][0]["revision"] == digest_of(b"2") and status["next_round"] >= status["last_round"]


async def test_what_its_hours_interrupt_goes_on_when_they_begin_again(tmp_path: Path) -> None:
    client, _, told = await run(tmp_path, [1.0, got(b"1", 70)], hours=["23:00-06:00"], noon=False)
    assert [event for event, _ in told] == ["paused", "round", "synced", "round"]
    assert 24 * HOUR <= client.times[1] <= 24 * HOUR + 600
    assert told[2][1]["saved"] == 0 and told[3][1]["total_moved"] == 100
