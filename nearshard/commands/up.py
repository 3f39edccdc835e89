"""``nearshard up``."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated

import typer

from nearshard.up import lay_out, up
from shared.errors import RequestError
from shared.ids import parse_name


def add_to(app: typer.Typer) -> None:
    """Add these words to the command."""
    app.command("up", epilog="Example: nearshard up --edges 4 --region berlin --region lagos --data /tmp/net")(
        up_command
    )


def up_command(
    edges: Annotated[int, typer.Option(min=0, max=64, help="How many edge nodes.")] = 3,
    region: Annotated[
        list[str] | None, typer.Option(help="A region; again for more. North and south by default.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Where everything is kept; ~/.local/share/nearshard by default.")
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65000, help="The router's port; origin and edges follow. 0: any.")
    ] = 8700,
    redis: Annotated[str, typer.Option(help="URL of a Redis or Valkey; one is started by default.")] = "",
    ready_file: Annotated[Path | None, typer.Option(help="Written with all URLs as JSON when all are ready.")] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Run a whole network on this machine: Valkey, origin, router and edges."""
    if log_level not in ("debug", "info", "warning", "error"):
        raise RequestError("--log-level is debug, info, warning or error")
    regions = [parse_name(name, "a region") for name in region or ["north", "south"]]
    network = lay_out(edges=edges, regions=list(dict.fromkeys(regions)), port=port, redis=redis)
    where = (data or Path("~/.local/share/nearshard")).expanduser().resolve()
    asyncio.run(
        up(
            network,
            where,
            own_redis=not redis,
            ready_file=ready_file,
            say=lambda text: print(f"nearshard: {text}", file=sys.stderr, flush=True),  # noqa: T201
            log_level=log_level,
        )
    )
