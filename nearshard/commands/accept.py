"""``nearshard trust accept``."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Annotated

import typer

from nearshard.accept import accept
from nearshard.cli import PROGRAMS
from nearshard.commands.options import Ca, Json


def add_to(app: typer.Typer) -> None:
    """Add this word of ``nearshard trust`` to the command; the others are another program's."""
    trust = typer.Typer()
    trust.callback()(_trust)
    trust.command("accept", epilog="Example: nearshard trust accept http://router:8700 --fingerprint 3f1c…")(
        accept_command
    )
    app.add_typer(trust, name="trust", help=PROGRAMS["trust"][1])


def _trust() -> None:
    """Makes ``accept`` a word of its own though it is the only one."""


def accept_command(
    url: Annotated[str, typer.Argument(metavar="URL", help="A router, an origin or an edge of the network.")],
    fingerprint: Annotated[
        str | None, typer.Option(help="SHA-256 of its root.json, from who runs it; asked for on a terminal.")
    ] = None,
    ca: Ca = None,
    as_json: Json = False,
) -> None:
    """Trust a network's signatures from now on, by the fingerprint of its root."""
    accepted = asyncio.run(accept(url, fingerprint, _confirm, ca))
    if as_json:
        sys.stdout.write(json.dumps(vars(accepted)) + "\n")
    else:
        sys.stdout.write(f"{accepted.url} is trusted by root {accepted.fingerprint}, as {accepted.noted} says\n")


def _confirm(url: str, fingerprint: str) -> bool:
    if not sys.stdin.isatty():
        return False
    sys.stderr.write(f"The root of {url} has the fingerprint\n  {fingerprint}\n")
    return typer.confirm("Does whoever runs the network say the same?", err=True)
