"""``nearshard delta show``: what it would cost to move from one revision of a model to another.

It asks routers, edges or an origin as any client does, and goes by what was signed: whoever may fetch a model can see
what its next version will cost, on the machine that will pay for it.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Annotated, Any

import typer

from nearshard.client import Client
from nearshard.commands.options import ROUTERS, Ca, Json, Proxy, Region, Router, Token, TrustRoot
from nearshard.comparing import Comparison, Row, compare
from nearshard.guide import parse_routers
from nearshard.kept import Kept, cache_file
from nearshard.manners import parse_manners
from shared.ids import parse_model, parse_ref_or_revision
from shared.manifest import Manifest
from shared.token_file import given_token

Old = Annotated[str, typer.Argument(metavar="A", help="Ref or revision that is held.")]
New = Annotated[str, typer.Argument(metavar="B", help="Ref or revision to move to.")]


def add_to(app: typer.Typer) -> None:
    """Add this word to the command."""
    words = typer.Typer(
        no_args_is_help=True, rich_markup_mode=None, help="Show what the next version of a model costs."
    )
    words.callback()(lambda: None)  # so that an only word is still typed
    words.command("show", epilog="Example: nearshard delta show demo/minilm v1 main")(show_command)
    app.add_typer(words, name="delta")


def show_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="org/name")],
    old: Old,
    new: New,
    router: Router = ROUTERS,
    region: Region = None,
    token: Token = None,
    trust_root: TrustRoot = None,
    ca: Ca = None,
    proxy: Proxy = "",
    as_json: Json = False,
) -> None:
    """Show what it would cost to move from revision A of a model to B, tensor by tensor, and why."""
    name, refs = parse_model(model), (parse_ref_or_revision(old), parse_ref_or_revision(new))
    routers = parse_routers(router)
    client = Client(
        routers,
        region=region,
        kept=Kept(cache_file(routers, region)),
        trust_root=trust_root,
        token=given_token(token),
        ca=ca,
        manners=parse_manners(proxy=proxy),
    )

    async def read() -> tuple[Manifest, Manifest]:
        async with client:
            return await client.manifest(name, refs[0]), await client.manifest(name, refs[1])

    before, after = asyncio.run(read())
    found = compare(before, after)
    if as_json:
        sys.stdout.write(json.dumps(_document(before, after, found)) + "\n")
    else:
        sys.stdout.write("".join(f"{line}\n" for line in _lines(before, after, found)))


def _document(before: Manifest, after: Manifest, found: Comparison) -> Mapping[str, Any]:
    ends = {"model": after.model, "from": before.revision, "to": after.revision, "parent": after.parent}
    return {**ends, **asdict(found)}


def _lines(before: Manifest, after: Manifest, found: Comparison) -> Iterable[str]:
    width = max((len(row.name) for row in found.rows), default=0)
    for row in found.rows:
        cost = "" if row.how == "unchanged" else f"{row.moved:,} of "
        yield f"{row.name:<{width}}  {row.how:<11} {cost + format(row.size, ','):>27}{_percent(row)}  {row.why}"
    saved = f"{_saved(found.moved, found.size)} saved; {found.unchanged / 1e6:.1f} MB unchanged"
    yield (
        f"{after.model}: {before.revision[:19]} to {after.revision[:19]}: {found.moved / 1e6:.1f} MB of"
        f" {found.size / 1e6:.1f} MB ({saved})"
    )
    yield f"who holds nothing: {found.alone / 1e6:.1f} MB ({_saved(found.alone, found.size)} saved)"


def _percent(row: Row) -> str:
    return f" {100 * row.moved / row.size if row.size else 0:6.1f} %"


def _saved(moved: int, size: int) -> str:
    return f"{100 * (1 - moved / size) if size else 0:.1f} %"
