"""``nearshard trust``: keys, who may sign what, and the signed metadata that says so."""

from __future__ import annotations

import asyncio
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from origin.config import OriginSettings, default_data
from origin.keyring import keys_beside
from origin.storage import Storage
from origin.trust_setup import initialise
from origin.trust_store import TrustStore
from shared.config import load
from shared.digest import digest_of, hex_of
from shared.errors import EXIT_USAGE, NearshardError
from shared.files import replace_file
from shared.ids import parse_name

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def group() -> None:
    """Make keys, and say who may sign what."""


StoreOption = Annotated[str | None, typer.Option("--store", help="Directory or URL of the origin's store.")]
KeysOption = Annotated[
    list[Path] | None,
    typer.Option("--keys", help="Folder of private keys; again for more. By default, beside the store."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
ROOT_FILE = "root.json"


@app.command("init", epilog="Example: nearshard trust init --keys /media/usb/keys --store /srv/models --org acme")
def init_command(
    store: StoreOption = None,
    keys: Annotated[
        Path | None, typer.Option("--keys", help="New folder for the private keys; beside the store by default.")
    ] = None,
    org: Annotated[
        list[str] | None,
        typer.Option(help="An organisation to make a publisher's key for; again for more. Without, one key for any."),
    ] = None,
    root_keys: Annotated[int, typer.Option(help="Root keys to make.")] = 3,
    root_threshold: Annotated[int, typer.Option(help="Root keys that must sign a root.")] = 2,
    root_file: Annotated[
        Path | None, typer.Option(help="Where to put what clients know the network by; root.json in the keys' folder.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a network's keys and its first signed metadata. Then take root and targets keys offline."""
    where = _store(store)
    folder = (keys or keys_beside(where, default_data())).expanduser()
    orgs = [parse_name(name, "an organisation") for name in dict.fromkeys(org or [])]
    trust = TrustStore(Storage(where))
    made = asyncio.run(initialise(trust, folder, orgs, _now(), root_keys=root_keys, threshold=root_threshold))
    file = root_file or folder / ROOT_FILE
    replace_file(file, made.root)
    fingerprint = hex_of(digest_of(made.root))
    if as_json:
        sys.stdout.write(json.dumps({"root": str(file), "fingerprint": fingerprint, "keys": str(folder)}) + "\n")
        return
    sys.stdout.write(
        f"keys: {folder}\nroot: {file}\nfingerprint: {fingerprint}\n"
        "The origin needs online.pem alone. Take the root-*.pem and targets-*.pem offline, and give clients the\n"
        "root file, or its fingerprint: nearshard trust accept URL --fingerprint FINGERPRINT\n"
    )


def _store(store: str | None) -> str:
    return store or load(OriginSettings, []).store


def _now() -> datetime:
    return datetime.now(UTC)


def main() -> None:
    """Run the command; an error is one line, and its exit code."""
    try:
        app(prog_name="nearshard trust")
    except NearshardError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(error.exit_code or EXIT_USAGE) from None


if __name__ == "__main__":
    main()
