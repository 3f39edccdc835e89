"""``nearshard trust``: keys, who may sign what, and the signed metadata that says so."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table

from origin.audit import Audit
from origin.certificate_commands import add_certificate_commands
from origin.config import OriginSettings
from origin.keyring import ROOT_FILE, Keyring, keys_beside, load_ring, named
from origin.rotation import ONLINE, Rotation, affected
from origin.signing import State, key_id, key_of
from origin.storage import Storage
from origin.trust_restore import Elsewhere, Restored, restore
from origin.trust_setup import add_publisher, initialise
from origin.trust_store import TrustStore
from shared.config import HttpUrl, load
from shared.digest import digest_of, hex_of
from shared.errors import ConfigError, RequestError
from shared.files import replace_file
from shared.ids import parse_name
from shared.keys import NodeKey, parse_public, save_key
from shared.token_file import given_token
from shared.trust_names import ROOT, SNAPSHOT, TARGETS, TIMESTAMP
from shared.web.command import run_program
from shared.web.session import make_session
from shared.web.tls import tls_by

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def group() -> None:
    """Make keys, and say who may sign what. A client begins to trust a network by `nearshard trust accept URL`."""


StoreOption = Annotated[str | None, typer.Option("--store", help="Directory or URL of the origin's store.")]
KeysOption = Annotated[
    list[Path] | None,
    typer.Option("--keys", help="Folder of private keys; again for more. By default, beside the store."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


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
    folder = (keys or keys_beside(where)).expanduser()
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


@app.command(
    "add-publisher", epilog="Example: nearshard trust add-publisher acme --public 3b6a27bc… --keys /media/usb/keys"
)
def add_publisher_command(
    org: Annotated[str, typer.Argument(metavar="ORG", help="The organisation.")],
    store: StoreOption = None,
    keys: KeysOption = None,
    public: Annotated[
        str, typer.Option(help="The publisher's public key, 64 hex digits; without it, a new key is made.")
    ] = "",
    key_file: Annotated[Path | None, typer.Option(help="Where to put a new key; in the keys' folder.")] = None,
    as_json: Json = False,
) -> None:
    """Let a key publish for an organisation. Needs the targets key and the online key."""
    parse_name(org, "an organisation")
    place = _Place.at(store, keys)
    if public:
        raw = parse_public(public)
    else:
        made = NodeKey.generate()
        file = key_file or place.folder / named(org, made)
        save_key(file, made)
        place.ring[key_id(made)] = made
        raw = made.public
        if not as_json:
            sys.stdout.write(f"key: {file}\n")
    news = asyncio.run(add_publisher(place.trust, place.ring, org, raw, _now()))
    name = str(key_of(raw).keyid)
    if news:
        place.audit("publisher added", TARGETS, org=org, key=name)
    _say({"org": org, "key": name, "added": news}, as_json=as_json)


@app.command("rotate", epilog="Example: nearshard trust rotate online --keys /media/usb/keys --keys /srv/keys")
def rotate_command(
    role: Annotated[str, typer.Argument(metavar="ROLE", help="root, targets, online, or an organisation.")],
    store: StoreOption = None,
    keys: KeysOption = None,
    as_json: Json = False,
) -> None:
    """Make new keys for a role, and have them sign in the place of the old ones."""
    parse_name(role, "a role")
    place = _Place.at(store, keys)
    done = asyncio.run(Rotation(place.trust, place.ring, place.folder, _now()).rotate(role))
    place.audit("rotated", ROOT if role in (ROOT, TARGETS, ONLINE) else TARGETS, of=role, **done)
    _say({"role": role, **done, "keys": str(place.folder)}, as_json=as_json)


@app.command("revoke", epilog="Example: nearshard trust revoke 2d711642b726b044 --replace --keys /media/usb/keys")
def revoke_command(
    key: Annotated[str, typer.Argument(metavar="KEYID", help="The key's id, or its first 8 digits or more.")],
    store: StoreOption = None,
    keys: KeysOption = None,
    replace: Annotated[bool, typer.Option("--replace", help="Make a new key in its place.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it signs.")] = False,
    as_json: Json = False,
) -> None:
    """Let a key sign nothing any more; what it had signed is signed with another key that is at hand."""
    place = _Place.at(store, keys)
    state = asyncio.run(place.trust.state())
    name = _whole_id(state, key)
    signs = affected(state, name)
    if dry_run:
        _say({"key": name, "signs": signs}, as_json=as_json)
        return
    done = asyncio.run(Rotation(place.trust, place.ring, place.folder, _now()).revoke(name, replace=replace))
    top = any(role in (ROOT, TARGETS, ONLINE) for role in signs)
    place.audit("revoked", ROOT if top else TARGETS, key=name, signs=signs, added=done["added"])
    _say({"key": name, "signs": signs, "added": done["added"], "keys": str(place.folder)}, as_json=as_json)


@app.command(
    "restore", epilog="Example: nearshard trust restore --from https://berlin-1.acme.example:8720 --store /srv/models"
)
def restore_command(
    source: Annotated[list[str], typer.Option("--from", help="A node or router of the network; again for more.")],
    store: StoreOption = None,
    trust_root: Annotated[
        Path | None,
        typer.Option(envvar="NEARSHARD_TRUST_ROOT", help="The network's root file; root.json in the keys' folder."),
    ] = None,
    keys: KeysOption = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            envvar="NEARSHARD_TOKEN_FILE",
            help="File of a token for '*/*:read': nodes tell what private refs mean to nobody else.",
        ),
    ] = None,
    ca: Annotated[
        Path | None,
        typer.Option("--ca", envvar="NEARSHARD_CA", help="CA of the deployment, as PEM, beside the system's."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Bring a store that was restored from a backup up to the signed metadata that the network knows; nobody would
    believe an older one. Says what is to be published again."""
    place = _Place.at(store, keys)
    root = (trust_root or place.folder / ROOT_FILE).expanduser()
    try:
        known = root.read_bytes()
    except OSError as error:
        raise ConfigError(f"{root}: {error.strerror}; what the network is known by is needed: --trust-root") from error
    try:
        urls = [TypeAdapter(HttpUrl).validate_python(url) for url in source]
    except ValidationError:
        raise RequestError("--from is a URL: http(s)://host:port") from None

    async def run() -> Restored:
        async with make_session(tls=tls_by(ca)) as session:
            token = given_token(token_file)
            return await restore(place.trust, [(url, Elsewhere(session, url, known, token)) for url in urls])

    done = asyncio.run(run())
    place.log.add("restored", "", source=done.source, timestamp=done.timestamp, files=done.files)
    missing = [f"{model} {revision}" for model, revision in done.missing]
    _say(
        {"from": done.source, "timestamp": done.timestamp, "files": done.files, "publish again": missing or "nothing"}
        if not as_json
        else {**vars(done), "missing": [{"model": model, "revision": revision} for model, revision in done.missing]},
        as_json=as_json,
    )


@app.command("show", epilog="Example: nearshard trust show --store /srv/models")
def show_command(store: StoreOption = None, as_json: Json = False) -> None:
    """Show who signs what, and until when it is good."""
    trust = TrustStore(Storage(_store(store)))
    state, root = asyncio.run(_state_and_root(trust))
    signed = {ROOT: state.root, TIMESTAMP: state.timestamp, SNAPSHOT: state.snapshot, **state.roles}
    roles = {
        name: {
            "version": metadata.version,
            "expires": metadata.expires.isoformat(),
            "threshold": state.role(name).threshold,
            "keys": list(state.role(name).keyids),
        }
        for name, metadata in signed.items()
    }
    if as_json:
        sys.stdout.write(json.dumps({"fingerprint": hex_of(digest_of(root)), "roles": roles}) + "\n")
        return
    table = Table("role", "version", "good until", "signed by", box=None)
    for name, shown in roles.items():
        keys = " ".join(key[:16] for key in shown["keys"])  # type: ignore[attr-defined]
        table.add_row(name, str(shown["version"]), str(shown["expires"])[:16], f"{shown['threshold']} of {keys}")
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"fingerprint of root {state.root.version}: {hex_of(digest_of(root))}")
    console.print(table)


async def _state_and_root(trust: TrustStore) -> tuple[State, bytes]:
    state = await trust.state()
    return state, await trust.file(ROOT, state.root.version)


def _whole_id(state: State, beginning: str) -> str:
    """The one key id that begins so. Raises RequestError."""
    every = {*state.root.keys, *(state.targets.delegations.keys if state.targets.delegations else ())}
    found = [key for key in every if key.startswith(beginning)]
    if len(beginning) < 8 or len(found) != 1:
        raise RequestError(
            "a key's id is 64 hex digits, of which the first 8 or more can be given", code="unknown_role"
        )
    return str(found[0])


@dataclass(frozen=True)
class _Place:
    """A store, and the keys at hand."""

    trust: TrustStore
    ring: Keyring
    folder: Path
    """Where new keys are put."""
    log: Audit

    @classmethod
    def at(cls, store: str | None, keys: list[Path] | None) -> _Place:
        where = _store(store)
        folders = [folder.expanduser() for folder in keys or [keys_beside(where)]]
        audit = Audit(load(OriginSettings, ["--store", where]).audit_file, _now)
        return cls(TrustStore(Storage(where)), load_ring(folders), folders[0], audit)

    def audit(self, event: str, role: str, **what: object) -> None:
        """Who: the keys at hand that sign for a role."""
        state = asyncio.run(self.trust.state())
        who = ",".join(key for key in state.role(role).keyids if key in self.ring)
        self.log.add(event, who, **what)


def _say(document: Mapping[str, object], *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(document) + "\n")
        return
    for name, value in document.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        sys.stdout.write(f"{name}: {shown}\n")


def _store(store: str | None) -> str:
    return store or load(OriginSettings, []).store


def _now() -> datetime:
    return datetime.now(UTC)


add_certificate_commands(app)

if __name__ == "__main__":
    run_program(app, "nearshard trust")
