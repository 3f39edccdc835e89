"""``nearshard gc``: remove from a store what no revision that is kept refers to."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Annotated

import typer

from origin.config import OriginSettings
from origin.federated.records import Records, Seal
from origin.gc import Swept, collect
from origin.objects import Entry
from origin.storage import Storage
from origin.trust_store import TrustStore
from shared.clock import SystemClock
from shared.config import load
from shared.errors import ConfigError
from shared.web.command import run_program

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(name="gc", epilog="Example: nearshard gc --dry-run --keep 3")
def command(
    store: Annotated[str | None, typer.Option(help="Directory or URL of the origin's store.")] = None,
    keep: Annotated[
        int | None, typer.Option(help="Revisions of a model to keep besides those of refs, last first; 8 by default.")
    ] = None,
    grace: Annotated[
        float | None, typer.Option(help="Seconds for which what nothing refers to yet is spared; a day by default.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go, and remove nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Remove shards, revisions and signed metadata that are no longer kept. Safe beside publishing."""
    settings = load(OriginSettings, [])
    keep, grace = settings.revisions if keep is None else keep, settings.grace if grace is None else grace
    if keep < 0 or grace < 0:
        raise ConfigError("--keep and --grace are not negative")
    paths: list[str] = []

    def show(entry: Entry) -> None:
        if dry_run and as_json:
            paths.append(entry.path)
        elif dry_run:
            sys.stdout.write(f"{entry.size:>12} {entry.modified:%Y-%m-%d %H:%M} {entry.path}\n")

    async def run() -> Swept:
        trust = TrustStore(Storage(store or settings.store))
        refs, in_force = await trust.meant(), await trust.in_force()
        for model, revisions in (await Records(trust.storage, Seal(trust, list)).in_use()).items():
            refs.setdefault(model, set()).update(revisions)
        return await collect(
            trust.storage,
            refs,
            SystemClock(),
            keep=keep,
            grace=grace,
            in_force=in_force,
            dry_run=dry_run,
            show=show,
        )

    done = asyncio.run(run())
    if as_json:
        would = {"objects": paths} if dry_run else {}
        sys.stdout.write(json.dumps(vars(done) | {"dry_run": dry_run} | would) + "\n")
    else:
        sys.stdout.write(_report(done, dry_run=dry_run))


def _report(done: Swept, *, dry_run: bool) -> str:
    left = f"; {done.left} left to the next gc, as the store failed" if done.left else ""
    return (
        f"{'would remove' if dry_run else 'removed'} {len(done.revisions)} revisions and {done.shards} shards, "
        f"{done.metadata} files of old metadata, {done.size / 1e6:.1f} MB{left}\n"
        f"kept {done.kept_revisions} revisions, {done.kept_shards} shards\n"
    )


if __name__ == "__main__":
    run_program(app, "nearshard gc")
