"""``nearshard report``: what the network delivered and what that spared its links, for who pays for them."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from nearshard.commands.options import ROUTERS, Ca, Json, OperatorToken, Router
from nearshard.report.asking import ask_nodes
from nearshard.report.page import page
from nearshard.report.sums import as_document, build, parse_price, parse_since, sentences, table
from shared.clock import SystemClock
from shared.errors import DiskError
from shared.files import replace_file
from shared.token_file import given_token
from shared.usage import day_of


def add_to(app: typer.Typer) -> None:
    """Add this word to the command."""
    app.command("report", epilog="Example: nearshard report --since 30d --price 0.08/GB --router https://router:8700")(
        report_command
    )


def report_command(
    since: Annotated[
        str, typer.Option(help="30d is the last 30 days, today among them; or a day, 2026-01-31.")
    ] = "30d",
    price: Annotated[str | None, typer.Option(help="What traffic costs: 0.08/GB, '$0.08/GB' or '0.08 EUR/GB'.")] = None,
    router: Router = ROUTERS,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Directory for report.html and report.csv; this one by default."),
    ] = None,
    token: OperatorToken = None,
    ca: Ca = None,
    as_json: Json = False,
) -> None:
    """Tell what sites' clients got, what crossed their links for it, and what that saved. With a token for '*/*:admin'
    private models have their names. With --json: to stdout, and to files only with -o."""
    today = day_of(SystemClock().time())
    first, cost = parse_since(since, today), parse_price(price) if price else None
    said, silent = asyncio.run(ask_nodes(router, first, given_token(token), ca))
    report = build(said, silent, first, today, cost)
    if output is not None or not as_json:
        folder = output or Path()
        _write(folder, {"report.html": page(report), "report.csv": table(report)})
    if as_json:
        sys.stdout.write(json.dumps(as_document(report)) + "\n")
    else:
        sys.stdout.write("".join(f"{text}\n" for text in sentences(report)))
        sys.stdout.write(f"{folder / 'report.html'}\n{folder / 'report.csv'}\n")


def _write(folder: Path, files: dict[str, str]) -> None:
    """Raises DiskError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            replace_file(folder / name, text.encode())
    except OSError as error:
        raise DiskError(f"{folder}: {error.strerror}") from error
