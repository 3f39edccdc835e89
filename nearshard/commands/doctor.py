"""``nearshard doctor``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nearshard.commands.options import DEFAULT_DATA, ROUTERS, Ca, Json, Region, Router
from nearshard.doctor.command import Options, run
from nearshard.repository import default_repository


def add_to(app: typer.Typer) -> None:
    """Add these words to the command."""
    app.command("doctor", epilog="Example: nearshard doctor --router http://router:8700 --rate 12MB")(doctor_command)


def doctor_command(
    router: Router = ROUTERS,
    region: Region = None,
    ca: Ca = None,
    rate: Annotated[
        str | None, typer.Option(help="Bytes a second that the link brings, as 12MB; measured by default.")
    ] = None,
    cache: Annotated[Path, typer.Option(help="A node's data directory.", envvar="NEARSHARD_DATA")] = DEFAULT_DATA,
    repository: Annotated[
        Path | None, typer.Option(help="Where models are kept.", envvar="NEARSHARD_REPOSITORY")
    ] = None,
    metered: Annotated[bool, typer.Option("--metered", help="Download nothing to measure with.")] = False,
    no_network: Annotated[bool, typer.Option("--no-network", help="Look at this machine only.")] = False,
    apply: Annotated[
        bool, typer.Option("--apply", help="Set what was judged to need it, after asking. Needs root.")
    ] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Take back what --apply did.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    root: Annotated[Path, typer.Option(help="Stands for / where kernel files are read and written.")] = Path("/"),
    as_json: Json = False,
) -> None:
    """Say what here and in the network slows transfers, and how to mend it; exit code 9 where something is broken."""
    kept = repository or default_repository()
    places = [("cache", cache.expanduser()), ("repository", kept.expanduser())]
    options = Options(router, places, root, rate, region, ca, not no_network, metered, apply, undo, yes, as_json)
    raise typer.Exit(run(options))
