"""``nearshard federated enroll``, ``submit`` and ``rounds``: for sites. The other words are the origin's."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict
from datetime import UTC
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nearshard.cli import PROGRAMS
from nearshard.client import Client
from nearshard.commands import repository as repository_commands
from nearshard.commands.access import access, manners
from nearshard.commands.options import (
    ROUTERS,
    Ca,
    Json,
    LimitRate,
    Proxy,
    Quiet,
    Region,
    Router,
    Token,
    TrustRoot,
    Windows,
)
from nearshard.commands.repository import Where
from nearshard.federated.site import enroll
from nearshard.progress import shown

if TYPE_CHECKING:
    from nearshard.federated.submitting import Submitted
    from shared.federated import Rounds

Model = Annotated[str, typer.Argument(metavar="MODEL", help="org/name")]
Sites = Annotated[
    Path | None,
    typer.Option("--sites", envvar="NEARSHARD_SITES", help="Directory of this machine's sites, with their keys."),
]
Url = Annotated[
    str, typer.Option("--url", help="An edge or an origin to go to; by default the nodes nearby, then the origins.")
]


def add_to(app: typer.Typer) -> None:
    """Add these words of ``nearshard federated`` to the command; the others are another program's."""
    federated = typer.Typer(no_args_is_help=True)
    federated.command("enroll", epilog="Example: nearshard federated enroll berlin")(enroll_command)
    federated.command("rounds", epilog="Example: nearshard federated rounds demo/minilm")(rounds_command)
    federated.command(
        "submit",
        epilog="Example: nearshard federated submit demo/minilm --base sha256:3f1c… --update trained/ --examples 5000",
    )(submit_command)
    app.add_typer(federated, name="federated", help=PROGRAMS["federated"][1])


def enroll_command(
    site: Annotated[str, typer.Argument(metavar="SITE", help="A name for this site, lower case.")],
    sites: Sites = None,
    as_json: Json = False,
) -> None:
    """Make this site's key, and print what whoever runs the origin puts into the file of sites."""
    made = enroll(site, sites)
    if as_json:
        record = {"site": made.name, "key": made.key.public.hex(), "folder": str(made.folder)}
        sys.stdout.write(json.dumps(record) + "\n")
        return
    sys.stdout.write(made.line)
    sys.stderr.write(f"its private key is in {made.folder}; send the lines above to who runs the origin\n")


def rounds_command(
    model: Model,
    url: Url = "",
    router: Router = ROUTERS,
    region: Region = None,
    token: Token = None,
    ca: Ca = None,
    proxy: Proxy = "",
    as_json: Json = False,
) -> None:
    """Show which round of a model is open, and what became of the last ones."""
    link = manners("0", None, False, proxy)

    async def ask() -> Rounds:
        async with Client(**access(router, region, None, token, ca), manners=link) as client:
            return await client.rounds(model, url=url)

    found = asyncio.run(ask())
    if as_json:
        sys.stdout.write(json.dumps(asdict(found), default=str) + "\n")
    else:
        sys.stdout.write("".join(f"{line}\n" for line in _lines(found)))


def _lines(rounds: Rounds) -> list[str]:
    lines = []
    if rounds.open is None:
        lines.append(f"no round of {rounds.model} is open")
    else:
        now = rounds.open
        deadline = now.deadline.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
        lines.append(f"round {now.number} is {now.state}: until {deadline}, {now.counted} of {now.sites} sites")
        lines.append(f"  base    {now.base}")
        lines.append(f"  tensors {', '.join(now.tensors) or 'all floats'}")
        lines.append(f"  codecs  {', '.join(now.codecs)}; {now.max_bytes / 1e6:.0f} MB at most")
        late = f"taken, times {now.late:g} for each round" if now.late else "not taken"
        lines.append(f"  late    {late}; at least {now.min_sites} sites, rule {now.rule}")
    for past in rounds.last:
        became = f": {past.revision}" if past.revision else ""
        lines.append(f"round {past.number} {past.state}, {past.counted} sites{became}")
    return lines


def submit_command(
    model: Model,
    base: Annotated[str, typer.Option("--base", help="The revision (or a ref) that was trained on.")],
    update: Annotated[Path, typer.Option("--update", help="What was trained: a directory, or a safetensors file.")],
    examples: Annotated[int, typer.Option("--examples", min=1, help="How many examples it was trained on.")] = 1,
    codec: Annotated[
        str, typer.Option("--codec", help="How it is written, like int4, sign, step:0.5; by default what suits it.")
    ] = "",
    feedback: Annotated[
        bool,
        typer.Option("--feedback/--no-feedback", help="Keep what the codec leaves out for the next update."),
    ] = True,
    momentum: Annotated[
        float, typer.Option("--momentum", help="Of what is kept, 0 to below 1: for codecs that send few elements.")
    ] = 0.0,
    warm_up: Annotated[
        int, typer.Option("--warm-up", min=0, help="First updates in which a codec like top:0.01:sign sends more.")
    ] = 0,
    site: Annotated[str | None, typer.Option("--site", help="Which of this machine's sites, if it has more.")] = None,
    sites: Sites = None,
    url: Url = "",
    router: Router = ROUTERS,
    region: Region = None,
    token: Token = None,
    trust_root: TrustRoot = None,
    ca: Ca = None,
    repository: Where = None,
    limit_rate: LimitRate = "0",
    window: Windows = None,
    proxy: Proxy = "",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Send what was trained to the open round, as a signed and compressed difference from its base.

    Run again it goes on where it broke off: an update is counted once.
    """
    where, link = repository_commands.directory(repository), manners(limit_rate, window, False, proxy)
    opened: dict[str, Any] = access(router, region, trust_root, token, ca)

    async def send(progress: Any) -> Submitted:
        async with Client(**opened, repository=where, manners=link) as client:
            return await client.submit(
                model,
                update,
                base,
                site=site,
                sites=sites,
                examples=examples,
                codec=codec,
                feedback=feedback,
                momentum=momentum,
                warm_up=warm_up,
                url=url,
                progress=progress,
            )

    with shown(model, quiet=quiet or as_json) as progress:
        done = asyncio.run(send(progress))
    if as_json:
        sys.stdout.write(json.dumps(asdict(done)) + "\n")
    elif not quiet:
        sys.stdout.write("".join(f"{line}\n" for line in _told(done)))


def _told(done: Submitted) -> list[str]:
    lines = [f"counted in round {done.round} of {done.model}, as {done.site}: {done.size / 1e6:.2f} MB"]
    if done.full:
        lines[0] += f" of {done.full / 1e6:.2f} MB ({100 * (1 - done.size / done.full):.1f} % saved)"
    if done.clipped:
        lines.append("it is larger than most, and counts scaled down")
    if done.resumed:
        lines.append("this is the update that an earlier run had made; what was given now was not sent")
    return lines
