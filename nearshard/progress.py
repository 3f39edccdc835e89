"""What a command shows of a transfer while it runs: a bar on a terminal, JSON lines for a program, or nothing.

A JSON line is one event, an object with ``event``; docs/clients.md describes them for whoever reads them. Fields may
be added, and those that are there keep their meaning.
"""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from shared.clock import Clock, SystemClock
from shared.errors import NearshardError

OnProgress = Callable[[int, int], None]
"""Bytes had, of the total."""

EVERY = 1.0
"""Seconds between two lines of progress."""
SPAN = 10.0
"""Seconds that the rate is the mean of."""


@contextmanager
def shown(name: str, *, quiet: bool) -> Iterator[OnProgress | None]:
    """A bar with rate and time left where stderr is a terminal, gone at the end; nothing anywhere else."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console  # takes long to import, and a script has no terminal
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if console.is_dumb_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(binary_units=True))
    with Progress(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=console, transient=True) as bar:
        row = bar.add_task(name, total=None)
        yield lambda had, total: bar.update(row, completed=had, total=total)


class Events:
    """The JSON lines of one transfer. ``write`` takes a line and its end."""

    def __init__(self, write: Callable[[str], object], clock: Clock) -> None:
        self._write, self._clock = write, clock
        self._seen: deque[tuple[float, int]] = deque()
        """Moments, and the bytes had by then."""

    def __repr__(self) -> str:
        return f"<Events, {len(self._seen)} seen>"

    def begin(self, what: str) -> None:
        """The first event."""
        self._line("begin", {"what": what})

    def progress(self, had: int, total: int) -> None:
        """At most one event in EVERY seconds, however often this is called."""
        now = self._clock.monotonic()
        if self._seen and now - self._seen[-1][0] < EVERY:
            return
        while self._seen and now - self._seen[0][0] > SPAN:
            self._seen.popleft()
        since, before = self._seen[0] if self._seen else (now, had)
        rate = max(0.0, (had - before) / (now - since)) if now > since else 0.0
        self._seen.append((now, had))
        left = round((total - had) / rate, 1) if rate else None
        self._line("progress", {"had": had, "total": total, "rate": round(rate), "seconds_left": left})

    def done(self, result: Mapping[str, object]) -> None:
        """The last event of what worked."""
        self._line("done", result)

    def failed(self, error: NearshardError) -> None:
        """The last event of what failed."""
        told = {"code": error.error_code, "exit_code": error.exit_code, "message": str(error)}
        self._line("error", {**error.public, **told})

    def _line(self, event: str, fields: Mapping[str, object]) -> None:
        self._write(json.dumps({"event": event, **fields}) + "\n")


@contextmanager
def told(what: str) -> Iterator[Events]:
    """Events on stdout, with the error's where one ends it."""
    events = Events(_to_stdout, SystemClock())
    events.begin(what)
    try:
        yield events
    except NearshardError as error:
        events.failed(error)
        raise


def _to_stdout(line: str) -> None:
    """Whoever reads may have heard enough; what is being fetched is still wanted."""
    try:
        sys.stdout.write(line)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails as it ends
