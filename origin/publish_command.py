"""``nearshard publish``: publish a model directory to a local store."""

from __future__ import annotations

import asyncio
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar

from origin.config import OriginSettings
from origin.cutting import LIMIT, TARGET
from origin.publish import Published, publish
from origin.storage import Storage
from shared.config import load, size
from shared.errors import EXIT_CONFIG, EXIT_USAGE, ConfigError, NearshardError, UpstreamError
from shared.ids import parse_model, parse_ref
from shared.manifest import MAX_SHARD
from shared.web.announce import announce
from shared.web.session import make_session
from shared.web.tls import tls_by

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(name="publish", epilog="Example: nearshard publish ./all-MiniLM-L6-v2 demo/minilm --ref v2")
def command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Model directory, as it comes from a hub.")],
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Name to publish it under: org/name.")],
    ref: Annotated[str, typer.Option(help="Name that will mean this revision.")] = "main",
    tasks: Annotated[Path | None, typer.Option(help="Tasks file; DIR/nearshard.toml by default.")] = None,
    store: Annotated[str | None, typer.Option(help="Directory or URL of the origin's store.")] = None,
    shard_target: Annotated[str, typer.Option(help="Bytes that a shard should have.")] = f"{TARGET >> 20}MiB",
    shard_limit: Annotated[str, typer.Option(help="Bytes that a shard may have.")] = f"{LIMIT >> 20}MiB",
    router: Annotated[
        list[str] | None,
        typer.Option(envvar="NEARSHARD_ROUTER", help="Router to tell; again for more. It tells the edges."),
    ] = None,
    ca: Annotated[
        Path | None,
        typer.Option("--ca", envvar="NEARSHARD_CA", help="CA of the deployment, as PEM, beside the system's."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Cut a model into shards, store them, and make a ref mean the result."""
    target, limit = _bytes(shard_target, "--shard-target"), _bytes(shard_limit, "--shard-limit")
    if not 4096 <= target <= limit <= MAX_SHARD:
        raise ConfigError(
            f"--shard-target is at least 4KiB and at most --shard-limit, which is at most {MAX_SHARD >> 20}MiB"
        )
    storage = Storage(store or load(OriginSettings, []).store)
    parse_model(model), parse_ref(ref)
    with _bar() as bar:
        row = bar.add_task(model, total=None)
        done = asyncio.run(
            publish(
                storage,
                directory,
                model,
                ref,
                datetime.now(UTC),
                tasks_file=tasks,
                target=target,
                limit=limit,
                progress=lambda done, total: bar.update(row, completed=done, total=total),
            )
        )
    if done.changed:
        asyncio.run(_tell(router or [], model, ca))
    _report(done, as_json=as_json)


async def _tell(routers: list[str], model: str, ca: Path | None) -> None:
    """Have refs looked up at once. What cannot be told sees it when its refs' lifetime ends, a few seconds on."""
    async with make_session(tls=tls_by(ca)) as session:
        for url in routers:
            try:
                await announce(session, url.rstrip("/"), model)
            except UpstreamError as error:
                sys.stderr.write(f"warning: {error}; it sees the new revision when its refs' lifetime ends\n")


def _bar() -> Bar:
    console = Console(stderr=True)
    return Bar(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(),
        TimeRemainingColumn(), console=console, disable=not console.is_terminal, transient=True,
    )  # fmt: skip


def _report(done: Published, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(vars(done) | {"tasks": list(done.tasks)}) + "\n")
        return
    what = "now means" if done.changed else "means already"
    sys.stdout.write(
        f"{done.model}@{done.ref} {what} {done.revision}\n"
        f"{done.shards} shards, {done.size / 1e6:.1f} MB of files; stored {done.stored} shards, "
        f"{done.stored_bytes / 1e6:.1f} MB\ntasks: {', '.join(done.tasks) or 'none'}\n"
    )
    if "all" not in done.tasks:
        sys.stdout.write("no task 'all': there are several weight files; name them with file = in nearshard.toml\n")


def _bytes(text: str, flag: str) -> int:
    try:
        return int(size(text))
    except ValueError:
        raise ConfigError(f"{flag}: {text!r} is not a number of bytes, like 8MiB") from None


def main() -> None:
    """Run the command; an error is one line, and its exit code."""
    try:
        app(prog_name="nearshard publish")
    except NearshardError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(EXIT_CONFIG if isinstance(error, ConfigError) else error.exit_code or EXIT_USAGE) from None


if __name__ == "__main__":
    main()
