"""``nearshard nodes``, ``top``, ``locate`` and ``enroll``: the network, as its routers know it."""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from nearshard.commands.options import ROUTERS, Ca, Json, OperatorToken, Region, Router, Token
from nearshard.enroll import change_afar, enrolled_of, read_identity
from nearshard.operate import from_afar
from nearshard.routes import locate, network, nodes, show_route
from shared.enrolment import enrolment_line
from shared.enrolment_file import change_file
from shared.errors import RequestError
from shared.ids import parse_name
from shared.token_file import given_token


def add_to(app: typer.Typer) -> None:
    """Add these words to the command."""
    app.command("nodes", epilog="Example: nearshard nodes --router http://router:8700")(nodes_command)
    app.command("top", epilog="Example: nearshard top --router http://router:8700")(top_command)
    app.command("locate", epilog="Example: nearshard locate demo/minilm:embed-3l --region north --explain")(
        locate_command
    )
    app.command(
        "enroll", epilog="Example: nearshard enroll --data /var/cache/nearshard --file /etc/nearshard/nodes.toml"
    )(enroll_command)


def nodes_command(router: Router = ROUTERS, ca: Ca = None, as_json: Json = False) -> None:
    """List the nodes that a router knows, how they are, and what each served today."""
    found = asyncio.run(nodes(router, ca))
    if as_json:
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        from nearshard.watch import show_nodes  # tables take a while to import, and --json needs none

        show_nodes(found)


def top_command(router: Router = ROUTERS, ca: Ca = None, as_json: Json = False) -> None:
    """Show the network as it is now, until Ctrl-C: what the router's dashboard shows, in a terminal."""
    if as_json:
        sys.stdout.write(json.dumps(asyncio.run(network(router, ca))) + "\n")
        return
    from nearshard.watch import top, wide

    with suppress(KeyboardInterrupt):  # that is how it ends
        asyncio.run(top(lambda: network(router, ca), wide()))


def locate_command(
    what: Annotated[
        str, typer.Argument(metavar="TASK", help="org/name[:task][@ref or revision], or a shard's digest.")
    ],
    router: Router = ROUTERS,
    region: Region = None,
    token: Token = None,
    ca: Ca = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say why: regions, nodes, loads, health.")] = False,
    as_json: Json = False,
) -> None:
    """Show where a client is sent for a task, best first."""
    document = asyncio.run(locate(router, what, region=region, explain=explain, token=given_token(token), ca=ca))
    if as_json:
        sys.stdout.write(json.dumps(document) + "\n")
    else:
        show_route(document)


def enroll_command(
    node: Annotated[str | None, typer.Argument(metavar="NODE", help="The node's name.")] = None,
    url: Annotated[str | None, typer.Option(help="Where clients reach it.")] = None,
    region: Annotated[str | None, typer.Option(help="The region it is in.")] = None,
    weight: Annotated[int | None, typer.Option(help="The most weight that it may take; 1 by default.")] = None,
    key: Annotated[str | None, typer.Option(help="Its public key: 64 hex digits, from its log.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="The directory of a node of this machine; it says what is not said here.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            envvar="NEARSHARD_ROUTER_ENROLLED",
            help="The routers' file, where it is here; nodes.toml by default.",
        ),
    ] = None,
    router: Annotated[
        list[str] | None,
        typer.Option(help="A router elsewhere, with a token for '*/*:enroll'; again for more, each with a file."),
    ] = None,
    token: OperatorToken = None,
    ca: Ca = None,
    remove: Annotated[bool, typer.Option("--remove", help="Throw the node out.")] = False,
) -> None:
    """Let a node join: add it to the enrolment file, which routers read again when it changes."""
    if file and router:
        raise RequestError("--file (NEARSHARD_ROUTER_ENROLLED) and --router are two places; give one")
    said: dict[str, Any] = read_identity(data.expanduser()) if data else {}
    given = {"id": node, "url": url, "region": region, "weight": weight, "key": key}
    said |= {name: value for name, value in given.items() if value is not None}
    enrolled = None if remove else enrolled_of(said)
    name = parse_name(str(said.get("id") or ""), "a node")
    if router:
        asyncio.run(change_afar(from_afar(router, "", given_token(token), ca), name, enrolled))
    else:
        change_file(file or Path("nodes.toml"), name, enrolled)
    if enrolled:
        sys.stdout.write(enrolment_line(enrolled) + "\n")
