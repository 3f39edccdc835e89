"""``nearshard preheat``, ``pin``, ``purge``, ``link`` and ``drain``: nodes, for who runs them."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from nearshard.commands.options import DEFAULT_DATA, Ca, Data, Json, Nodes, NodeUrls, OperatorToken, What, by_window
from nearshard.operate import Access, find_nodes, follow_jobs, from_afar, on_all
from nearshard.progress import shown
from shared.errors import RequestError
from shared.paths import ADMIN
from shared.token_file import given_token


def add_to(app: typer.Typer) -> None:
    """Add these words to the command."""
    app.command("preheat", epilog="Example: nearshard preheat demo/minilm:embed-3l --node north-1")(preheat_command)
    app.command("pin", epilog="Example: nearshard pin demo/minilm")(pin_command)
    app.command("purge", epilog="Example: nearshard purge demo/minilm:vocab")(purge_command)
    app.command("link", epilog="Example: nearshard link --rate 5MB --window 08:00-18:00=1MB --metered")(link_command)
    app.command("drain", epilog="Example: nearshard drain north-1   (and back: nearshard drain north-1 --undo)")(
        drain_command
    )


def preheat_command(
    what: What,
    data: Data = DEFAULT_DATA,
    node: Nodes = None,
    node_url: NodeUrls = None,
    token: OperatorToken = None,
    ca: Ca = None,
    as_json: Json = False,
) -> None:
    """Fetch a model or task to nodes before anybody asks: each takes the shards that it owns."""
    _follow("/preheat", what, _nodes(data, node, node_url, token, ca), as_json=as_json)


def pin_command(
    what: What,
    data: Data = DEFAULT_DATA,
    node: Nodes = None,
    node_url: NodeUrls = None,
    token: OperatorToken = None,
    ca: Ca = None,
    remove: Annotated[bool, typer.Option("--remove", help="No longer keep it.")] = False,
    as_json: Json = False,
) -> None:
    """Keep a model or task on the nodes' disks, whatever else they need room for."""
    nodes = _nodes(data, node, node_url, token, ca)
    if remove:
        _print(asyncio.run(on_all(nodes, "POST", "/unpin", {"what": what})), as_json=as_json)
    else:
        _follow("/pin", what, nodes, as_json=as_json)


def purge_command(
    what: What,
    data: Data = DEFAULT_DATA,
    node: Nodes = None,
    node_url: NodeUrls = None,
    token: OperatorToken = None,
    ca: Ca = None,
    as_json: Json = False,
) -> None:
    """Drop a model, a task or a shard from nodes; a later request fetches it again."""
    nodes = _nodes(data, node, node_url, token, ca)
    _print(asyncio.run(on_all(nodes, "POST", "/purge", {"what": what})), as_json=as_json)


def link_command(
    data: Data = DEFAULT_DATA,
    node: Nodes = None,
    node_url: NodeUrls = None,
    token: OperatorToken = None,
    ca: Ca = None,
    rate: Annotated[str | None, typer.Option(help="Bytes a second; 0 is no cap.")] = None,
    window: Annotated[list[str] | None, typer.Option(help="HH:MM-HH:MM=RATE; all windows are replaced.")] = None,
    metered: Annotated[
        bool | None, typer.Option("--metered/--unmetered", help="Fetch only what clients ask for.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show how nodes use the link upstream, or change it; changes take effect at once and last until restart."""
    change: dict[str, object] = {}
    if rate is not None:
        change["rate"] = rate
    if window:
        change["windows"] = by_window(window)
    if metered is not None:
        change["metered"] = metered
    nodes = _nodes(data, node, node_url, token, ca)
    answer = on_all(nodes, "PUT", "/link", change) if change else on_all(nodes, "GET", "/link")
    _print(asyncio.run(answer), as_json=as_json)


def drain_command(
    node: Annotated[str | None, typer.Argument(metavar="NODE", help="A node of this machine, or --node-url.")] = None,
    data: Data = DEFAULT_DATA,
    node_url: NodeUrls = None,
    token: OperatorToken = None,
    ca: Ca = None,
    undo: Annotated[bool, typer.Option("--undo", help="Send clients there again.")] = False,
    as_json: Json = False,
) -> None:
    """Send no new clients to a node, and let it own no shards; it goes on answering. Lasts until it restarts."""
    if not node and not node_url:
        raise RequestError("which node? Name it, or give --node-url")  # not all of them
    nodes = _nodes(data, [node] if node else [], node_url, token, ca)
    _print(asyncio.run(on_all(nodes, "PUT", "/drain", {"draining": not undo})), as_json=as_json)


def _nodes(
    data: Path, names: list[str] | None, urls: list[str] | None, token_file: Path | None, ca: Path | None
) -> list[Access]:
    """The nodes elsewhere that are named, or those of this machine."""
    if not urls:
        return find_nodes(data.expanduser(), names or [])
    if names:
        raise RequestError("a node is of this machine, by its name, or elsewhere, by --node-url; give one")
    return from_afar(urls, ADMIN, given_token(token_file), ca)


def _follow(path: str, what: str, nodes: list[Access], *, as_json: bool) -> None:
    with shown(what, quiet=as_json) as progress:

        def show(jobs: Mapping[str, Mapping[str, int]]) -> None:
            if progress:
                progress(sum(job["bytes_done"] for job in jobs.values()), sum(job["bytes"] for job in jobs.values()))

        _print(asyncio.run(follow_jobs(nodes, path, what, show)), as_json=as_json)


def _print(answers: Mapping[str, Mapping[str, object]], *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(answers) + "\n")
        return
    for name, answer in answers.items():
        shown = ", ".join(f"{key} {value}" for key, value in answer.items() if value not in ("", None))
        sys.stdout.write(f"{name}: {shown}\n")
