"""``nearshard sync``."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sys
from collections.abc import Mapping
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from nearshard.client import Client
from nearshard.commands import repository as repository_commands
from nearshard.commands.access import access, manners
from nearshard.commands.options import (
    ROUTERS,
    AcceptExpired,
    Ca,
    JsonLines,
    LimitRate,
    Metered,
    Proxy,
    Quiet,
    Region,
    Router,
    Token,
    TrustRoot,
    Windows,
)
from nearshard.commands.repository import Where
from nearshard.repository import Repository
from nearshard.sync import Sync, Tell
from shared.clock import SystemClock
from shared.errors import RequestError
from shared.link import parse_window
from shared.schedule import parse_interval

Models = Annotated[
    list[str], typer.Argument(metavar="MODEL[:TASK][@REF]...", help="Models, whole, or single tasks of them.")
]
Every = Annotated[str, typer.Option("--every", help="How often each is looked at, like 30m, 1h or 7d.")]
Once = Annotated[bool, typer.Option("--once", help="One round, for who has a scheduler; its first error ends it.")]
Only = Annotated[
    list[str] | None,
    typer.Option("--only", help="HH:MM-HH:MM, local hours in which it may run at all; again for more."),
]
StatusFile = Annotated[
    Path | None, typer.Option("--status-file", help="JSON file with how it goes, replaced in one step.")
]


def add_to(app: typer.Typer) -> None:
    """Add this word to the command."""
    app.command("sync", epilog="Example: nearshard sync demo/minilm demo/asr:small@v2 --every 6h --only 22:00-06:00")(
        sync_command
    )


def sync_command(
    model: Models,
    every: Every = "1h",
    once: Once = False,
    only: Only = None,
    status_file: StatusFile = None,
    router: Router = ROUTERS,
    region: Region = None,
    token: Token = None,
    trust_root: TrustRoot = None,
    ca: Ca = None,
    accept_expired: AcceptExpired = None,
    repository: Where = None,
    limit_rate: LimitRate = "0",
    window: Windows = None,
    metered: Metered = False,
    proxy: Proxy = "",
    quiet: Quiet = False,
    as_json: JsonLines = False,
) -> None:
    """Keep the local repository's copies up to date; a failure is told, and tried again later."""
    where = repository_commands.directory(repository)
    link = manners(limit_rate, window, metered, proxy)
    opened = partial(
        Client, **access(router, region, trust_root, token, ca, accept_expired), repository=where, manners=link
    )
    opened()  # what cannot be used is said now, and not in an hour
    try:
        interval, hours = parse_interval(every), [parse_window(text) for text in only or []]
    except ValueError as error:
        raise RequestError(str(error)) from error
    sync = Sync(
        model,
        opened,
        Repository(where),
        SystemClock(),
        random.Random(),  # noqa: S311 - to spread sites, not a secret
        every=interval,
        hours=hours,
        tell=_teller(quiet=quiet, as_json=as_json),
        status_file=status_file,
    )
    asyncio.run(_run(sync, once=once))


async def _run(sync: Sync, *, once: bool) -> None:
    """Until it is told to end: what came by then is kept, and the next run goes on with it."""
    running = asyncio.current_task()
    assert running is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
    try:
        error = await sync.run(once=once)
    except asyncio.CancelledError:
        sync.stopped()
        running.uncancel()
        raise SystemExit(0) from None
    if error:
        raise error


def _teller(*, quiet: bool, as_json: bool) -> Tell:
    def tell(event: str, fields: Mapping[str, object]) -> None:
        if as_json:
            sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
        elif event == "failed":
            sys.stderr.write(f"{_now()} {_line(event, fields)}\n")
        elif not quiet and (event != "synced" or fields["moved"] or fields["saved"]):
            sys.stdout.write(f"{_now()} {_line(event, fields)}\n")
        sys.stdout.flush()

    return tell


def _line(event: str, fields: Mapping[str, object]) -> str:
    """For people. One that was up to date already has none: the round's line counts it."""
    if event == "round":
        return (
            f"round: {fields['looked_at']} looked at, {fields['failed']} failed, {_mb(fields['moved'])} moved,"
            f" {_mb(fields['saved'])} saved; in all {_mb(fields['total_moved'])} moved,"
            f" {_mb(fields['total_saved'])} saved; next {fields['next_round']}"
        )
    if event == "failed":
        return f"{fields['what']}: {fields['message']} ({fields['code']}); tried again {fields['next_run']}"
    if event == "paused":
        return f"{fields['what']}: its hours are over; it goes on {fields['until']}"
    return (
        f"{fields['what']}: {str(fields['revision'])[:19]}, {_mb(fields['moved'])} moved, {_mb(fields['saved'])} saved"
    )


def _mb(size: object) -> str:
    return f"{float(str(size)) / 1e6:.1f} MB"


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
