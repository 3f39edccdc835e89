"""``nearshard bundle export`` and ``bundle import``."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from nearshard.bundling import Bundled, export_bundle, hand_over, import_bundle
from nearshard.client import Client
from nearshard.commands import repository as repository_commands
from nearshard.commands.access import access, manners
from nearshard.commands.options import (
    ROUTERS,
    AcceptExpired,
    Ca,
    Json,
    LimitRate,
    Metered,
    NodeUrls,
    Proxy,
    Region,
    Router,
    Token,
    TrustRoot,
    Windows,
)
from nearshard.commands.repository import Where
from nearshard.operate import find_nodes, from_afar
from nearshard.progress import shown
from shared.errors import RequestError
from shared.ids import DEFAULT_REF
from shared.paths import ADMIN
from shared.token_file import given_token

Tasks = Annotated[list[str] | None, typer.Option("--task", help="Only this task; again for more. All by default.")]
HeldTasks = Annotated[
    list[str] | None,
    typer.Option("--task", help="Hold this task of a whole model too, beside its files; again for more."),
]


def add_to(app: typer.Typer) -> None:
    """Add these words to the command."""
    bundle = typer.Typer(no_args_is_help=True)
    bundle.command("export", epilog="Example: nearshard bundle export demo/minilm@v2 --from v1 -o minilm-v2.tar")(
        export_command
    )
    bundle.command("import", epilog="Example: nearshard bundle import minilm-v2.tar --data /var/cache/nearshard")(
        import_command
    )
    app.add_typer(bundle, name="bundle", help="A model as one file, for a disk in the post.")


def export_command(
    model: Annotated[str, typer.Argument(metavar="MODEL[@REF]", help="org/name, and a ref.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The bundle's file.")],
    task: Tasks = None,
    base: Annotated[
        str, typer.Option("--from", help="A ref or revision whose shards are there already: only what is new is in it.")
    ] = "",
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
    as_json: Json = False,
) -> None:
    """Write a model, whole or as what is new since a revision, with all that it takes to verify it, to one file."""
    link = manners(limit_rate, window, metered, proxy)
    options = access(router, region, trust_root, token, ca, accept_expired)
    client = Client(**options, repository=repository_commands.directory(repository), manners=link)
    name, _, ref = model.partition("@")

    async def run() -> Bundled:
        async with client:
            with shown(model, quiet=as_json) as progress:
                return await export_bundle(
                    client, name, ref or DEFAULT_REF, output, tasks=task or (), base=base, progress=progress
                )

    _report(asyncio.run(run()), f"written to {output}", as_json=as_json)


def import_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A bundle.")],
    task: HeldTasks = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Into the running node of this data directory, or those of `nearshard up`."),
    ] = None,
    node_url: NodeUrls = None,
    router: Router = ROUTERS,
    trust_root: TrustRoot = None,
    token: Token = None,
    ca: Ca = None,
    accept_expired: AcceptExpired = None,
    repository: Where = None,
    as_json: Json = False,
) -> None:
    """Take a bundle into the local repository, or into a node's cache; all of it is verified, no network is needed."""
    if data or node_url:
        if data and node_url:
            raise RequestError("a node is of this machine, by --data, or elsewhere, by --node-url; give one")
        if accept_expired:
            raise RequestError("what a node accepts is its own setting: edge.accept_expired")
        nodes = find_nodes(data.expanduser(), []) if data else from_afar(node_url or [], ADMIN, given_token(token), ca)

        async def hand() -> dict[str, Mapping[str, object]]:
            with shown(file.name, quiet=as_json) as progress:
                return {node.name: await hand_over(node, file, progress) for node in nodes}

        answers = asyncio.run(hand())
        _print(answers, as_json=as_json)
        return
    options = access(router, None, trust_root, token, ca, accept_expired)
    client = Client(**options, repository=repository_commands.directory(repository))

    async def run() -> Bundled:
        async with client:
            with shown(file.name, quiet=as_json) as progress:
                return await import_bundle(client, file, tasks=task or (), progress=progress)

    _report(asyncio.run(run()), "taken in", as_json=as_json)


def _print(answers: Mapping[str, Mapping[str, object]], *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(answers) + "\n")
        return
    for node, told in answers.items():
        sys.stdout.write(f"{node}: {told['model']}@{told['ref']} {str(told['revision'])[:19]}, {told['bytes']} bytes\n")


def _report(done: Bundled, what: str, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(asdict(done)) + "\n")
        return
    upon = f", upon {done.base[:19]}" if done.base else ""
    sys.stdout.write(
        f"{done.model}@{done.ref} {done.revision[:19]}{upon}: {done.size / 1e6:.1f} MB {what},"
        f" {done.saved / 1e6:.1f} MB needed not be in it\n"
    )
