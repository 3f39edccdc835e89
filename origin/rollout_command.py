"""``nearshard rollout``: let a ref mean another revision to some, to more, to all, or to nobody again."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Annotated

import typer

from origin.publish_command import Ca, Json, Keys, Origin, Private, Publishing, Routers, Store, Token, TrustRootFile
from origin.rollout import Asked
from origin.signing import Ref
from shared.ids import DEFAULT_REF, parse_name, parse_ref_or_revision
from shared.token_file import given_token
from shared.web.command import run_program

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(name="rollout", epilog="Example: nearshard rollout demo/minilm canary --sites berlin,lima --percent 10")
def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="org/name.")],
    candidate: Annotated[
        str, typer.Argument(metavar="[REV]", help="A ref, or a revision that some ref means; the one under way.")
    ] = "",
    ref: Annotated[str, typer.Option(help="The ref that is to mean it.")] = DEFAULT_REF,
    sites: Annotated[
        str | None, typer.Option(help="Regions, between commas; '' for all. All by default, or as it was.")
    ] = None,
    percent: Annotated[
        int | None, typer.Option(help="Of the clients there, 1 to 100; of named sites all by default, or as it was.")
    ] = None,
    further: Annotated[bool, typer.Option("--continue", help="To more: 1, 5, 10, 25, 50, 100 percent.")] = False,
    finish: Annotated[bool, typer.Option("--finish", help="The ref means it, to all.")] = False,
    rollback: Annotated[bool, typer.Option("--rollback", help="The ref means to all what it meant before.")] = False,
    store: Store = None,
    keys: Keys = None,
    origin: Origin = "",
    trust_root: TrustRootFile = None,
    token_file: Token = None,
    private: Private = False,
    router: Routers = None,
    ca: Ca = None,
    as_json: Json = False,
) -> None:
    """Roll a revision out to some sites, and some of their clients; without options, show how far it is."""
    named = None if sites is None else tuple(parse_name(site.strip(), "a site") for site in sites.split(",") if site)
    asked = Asked(parse_ref_or_revision(candidate) if candidate else "", named, percent, further, finish, rollback)
    asked.check()
    publishing = Publishing(model, ref, private, store, keys, origin, trust_root, ca, given_token(token_file))
    meant, changed = asyncio.run(publishing.roll_out(asked, router or []))
    rule = meant.rollout.record() if meant.rollout else None
    document = {"model": model, "ref": ref, "revision": meant.revision, "rollout": rule, "changed": changed}
    sys.stdout.write(json.dumps(document) + "\n" if as_json else _lines(model, ref, meant))


def _lines(model: str, ref: str, meant: Ref) -> str:
    rule, means = meant.rollout, f"{model}@{ref} means {meant.revision}\n"
    if rule is None:
        return means
    where = f"of the clients in {', '.join(rule.sites)}" if rule.sites else "of all clients"
    return f"{means}and to {rule.percent} % {where}: {rule.revision}\n"


def main() -> None:
    """Run the command."""
    run_program(app, "nearshard rollout")


if __name__ == "__main__":
    main()
