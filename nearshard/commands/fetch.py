"""``nearshard get``, ``pull`` and ``repair``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from nearshard.client import Client, Got, SyncClient
from nearshard.commands import repository as repository_commands
from nearshard.commands.access import access, manners
from nearshard.commands.options import (
    ROUTERS,
    AcceptExpired,
    Ca,
    Force,
    Json,
    JsonLines,
    LimitRate,
    Metered,
    Pin,
    Proxy,
    Quiet,
    Region,
    Router,
    Token,
    TrustRoot,
    Windows,
)
from nearshard.commands.repository import MaybeWhat, No, Where
from nearshard.progress import OnProgress, shown, told
from shared.ids import DEFAULT_REF


def add_to(app: typer.Typer) -> None:
    """Add these words to the command."""
    app.command("get", epilog="Example: nearshard get demo/minilm:embed-3l@v2 -o embed-3l/")(get_command)
    app.command("pull", epilog="Example: nearshard pull demo/minilm@v2 -o minilm/")(pull_command)
    app.command("repair", epilog="Example: nearshard repair demo/minilm")(repair_command)


def get_command(
    task_id: Annotated[str, typer.Argument(metavar="TASK_ID", help="org/name[:task][@ref or revision]")],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="Directory, or the body's file name; by default it is in the local repository."
        ),
    ] = None,
    router: Router = ROUTERS,
    region: Region = None,
    token: Token = None,
    trust_root: TrustRoot = None,
    ca: Ca = None,
    accept_expired: AcceptExpired = None,
    repository: Where = None,
    no_repository: No = False,
    limit_rate: LimitRate = "0",
    window: Windows = None,
    metered: Metered = False,
    proxy: Proxy = "",
    pin: Pin = None,
    force: Force = False,
    quiet: Quiet = False,
    as_json: JsonLines = False,
) -> None:
    """Fetch one task, verified, from the nearest nodes."""
    where = repository_commands.directory(repository, none=no_repository, output=output)
    link = manners(limit_rate, window, metered, proxy)
    opened = access(router, region, trust_root, token, ca, accept_expired)
    client = SyncClient(**opened, repository=where, manners=link, pins=pin or ())
    _transfer(task_id, lambda p: client.get(task_id, output, force=force, progress=p), quiet=quiet, as_json=as_json)


def pull_command(
    model: Annotated[str, typer.Argument(metavar="MODEL[@REF]", help="org/name, and a ref or revision.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Directory; by default it is in the local repository.")
    ] = None,
    router: Router = ROUTERS,
    region: Region = None,
    token: Token = None,
    trust_root: TrustRoot = None,
    ca: Ca = None,
    accept_expired: AcceptExpired = None,
    repository: Where = None,
    no_repository: No = False,
    limit_rate: LimitRate = "0",
    window: Windows = None,
    metered: Metered = False,
    proxy: Proxy = "",
    pin: Pin = None,
    force: Force = False,
    quiet: Quiet = False,
    as_json: JsonLines = False,
) -> None:
    """Fetch all files of a model, verified, from the nearest nodes."""
    name, _, found = model.partition("@")
    ref = found or DEFAULT_REF
    where = repository_commands.directory(repository, none=no_repository, output=output)
    link = manners(limit_rate, window, metered, proxy)
    opened = access(router, region, trust_root, token, ca, accept_expired)
    client = SyncClient(**opened, repository=where, manners=link, pins=pin or ())
    _transfer(model, lambda p: client.pull(name, ref, output, force=force, progress=p), quiet=quiet, as_json=as_json)


def repair_command(
    what: MaybeWhat = "",
    router: Router = ROUTERS,
    region: Region = None,
    token: Token = None,
    trust_root: TrustRoot = None,
    ca: Ca = None,
    repository: Where = None,
    limit_rate: LimitRate = "0",
    window: Windows = None,
    metered: Metered = False,
    proxy: Proxy = "",
    as_json: Json = False,
) -> None:
    """Read what the local repository holds, and fetch again the shards that are not right."""
    where = repository_commands.directory(repository)
    link = manners(limit_rate, window, metered, proxy)
    client = Client(**access(router, region, trust_root, token, ca), repository=where, manners=link)
    repository_commands.repair(client, what, as_json=as_json)


def _transfer(what: str, fetch: Callable[[OnProgress | None], Got], *, quiet: bool, as_json: bool) -> None:
    """Fetch, and show on the way what was asked for."""
    if as_json:
        with told(what) as events:
            events.done(_document(fetch(events.progress)))
        return
    with shown(what, quiet=quiet) as progress:
        got = fetch(progress)
    if not quiet:
        _report(got)


def _document(got: Got) -> dict[str, object]:
    """For programs."""
    return {
        "model": got.model,
        "revision": got.revision,
        "paths": [str(path) for path in got.paths],
        "size": got.size,
        "moved": got.moved,
        "saved": got.saved,
        "refused": got.refused,
        "seconds": round(got.seconds, 3),
        "active": str(got.active) if got.active else None,
        "sources": [{"url": url, "outcome": how, "bytes": n} for (url, how), n in got.sources.items()],
    }


def _report(got: Got) -> None:
    """For people."""
    for path in got.paths:
        sys.stdout.write(f"{path}\n")
    served = ", ".join(f"{n / 1e6:.1f} MB {how} from {url}" for (url, how), n in sorted(got.sources.items()))
    sys.stdout.write(
        f"{got.model} {got.revision[:19]}: {got.size / 1e6:.1f} MB in {got.seconds:.2f} s"
        f" ({served or 'all of it was there'})\n"
    )
    if got.moved:
        sys.stdout.write(f"{got.moved / 1e6:.1f} MB moved, {got.saved / 1e6:.1f} MB saved\n")
    if got.refused:
        sys.stdout.write(f"{got.refused} shards came whole: their deltas were wrong, or could not be had or used\n")
