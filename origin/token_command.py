"""``nearshard token``: access tokens, the keys that sign them, and the list of what is good.

The list is the signed ``access`` metadata, which everything that checks tokens has; it is changed where the online key
is at hand. Making a token takes its signing key alone: no service is asked.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlencode, urlsplit

import typer

from origin.audit import Audit
from origin.config import OriginSettings
from origin.keyring import keys_beside, load_ring
from origin.signing import CUSTOM
from origin.signing import key_id as signing_key_id
from origin.storage import Storage
from origin.token_keys import TokenKeys
from origin.trust_setup import roll_forward
from origin.trust_store import TrustStore
from shared.clock import SystemClock
from shared.config import load
from shared.errors import RequestError
from shared.files import replace_file
from shared.keys import NodeKey, load_key
from shared.token_file import read_token
from shared.tokens import (
    MAX_LIFETIME,
    AccessList,
    Token,
    TokenError,
    TokenInvalid,
    issue,
    key_id,
    parse_scopes,
    read_claims,
)
from shared.trust_names import ACCESS
from shared.web.access import QUERY
from shared.web.command import run_program

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Make, show, replace and revoke access tokens.",
)

StoreOption = Annotated[str | None, typer.Option("--store", help="Directory or URL of the origin's store.")]
KeysOption = Annotated[Path | None, typer.Option("--keys", help="Folder of private keys; beside the store by default.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_TTL = re.compile(r"([0-9]{1,9})([smhd])")


@app.command("create", epilog="Example: nearshard token create --scope 'acme/*:read' --ttl 15m")
def create_command(
    scope: Annotated[list[str], typer.Option(help="<org or *>/<name or *>:<read, publish, admin or enroll>; again.")],
    ttl: Annotated[str, typer.Option(help="How long it is good: 90s, 15m, 12h, 30d.")] = "15m",
    subject: Annotated[str, typer.Option(help="For whom, in your words.")] = "",
    url: Annotated[
        list[str] | None, typer.Option(help="Print this URL with the token in it, for who can send no field; again.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the token to this file (mode 0600); print nothing.")
    ] = None,
    key: Annotated[Path | None, typer.Option(help="The key to sign with; that of --keys by default.")] = None,
    keys: KeysOption = None,
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """Make a token. Needs the signing key, and asks nobody."""
    scopes, lifetime, now = parse_scopes(scope), parse_ttl(ttl), SystemClock().time()
    token_keys = TokenKeys(_keys(keys, _store(store)))
    signing = _load(key) if key else token_keys.signing()
    text = issue(signing, scopes, token_id=secrets.token_hex(12), now=now, lifetime=lifetime, subject=subject)
    token = read_claims(text)
    if not key:
        token_keys.note_issued(token.expires, now)
    urls = [_with_token(one, text) for one in url or []]
    if output:
        replace_file(output, text.encode() + b"\n", mode=0o600)
    elif as_json:
        sys.stdout.write(json.dumps({"token": text, **_described(token), "urls": urls}) + "\n")
    else:
        sys.stdout.write("\n".join(urls or [text]) + "\n")


@app.command("rotate", epilog="Example: nearshard token rotate --store /srv/models")
def rotate_command(
    store: StoreOption = None,
    keys: KeysOption = None,
    old_ttl: Annotated[
        str | None,
        typer.Option(help="Believe the old key's tokens for so long at most; by default until the last has expired."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Sign tokens with a new key (or the first one). Tokens of the old key stay good until they expire."""
    where, now = _store(store), SystemClock().time()
    token_keys = TokenKeys(_keys(keys, where))
    until = now + parse_ttl(old_ttl) if old_ttl else token_keys.issued_until(now)
    fresh = token_keys.prepare()
    access = _change(where, keys, lambda access: access.with_key(fresh.public, now, until), "token key rotated",
                     token_key=key_id(fresh.public))  # fmt: skip
    token_keys.take_over()
    _report_keys(access, as_json=as_json)


@app.command("revoke", epilog="Example: nearshard token revoke - < leaked.txt   (or its id, from nearshard token show)")
def revoke_command(
    what: Annotated[str, typer.Argument(metavar="TOKEN|ID", help="The token, its id, or - to read it from stdin.")],
    store: StoreOption = None,
    keys: KeysOption = None,
) -> None:
    """Call a token back: refused within a minute, wherever it is shown."""
    now = SystemClock().time()
    text = sys.stdin.readline().strip() if what == "-" else what
    try:
        token = read_claims(text)
        name, expires = token.id, token.expires
    except TokenInvalid:
        name, expires = text, now + MAX_LIFETIME
    _change(_store(store), keys, lambda access: access.with_revoked(name, now, expires), "token revoked", token=name)
    sys.stdout.write(f"revoked: {name}\n")


@app.command("show", epilog="Example: nearshard token show   (or: nearshard token show --token-file FILE)")
def show_command(
    token_file: Annotated[
        Path | None, typer.Option(envvar="NEARSHARD_TOKEN_FILE", help="Say what the token in this file is good for.")
    ] = None,
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """Show the keys that are believed and the tokens that are revoked; or one token."""
    access = asyncio.run(_access(TrustStore(Storage(_store(store)))))
    if token_file is None:
        _report_keys(access, as_json=as_json)
        return
    text = read_token(token_file)
    document = _described(read_claims(text))
    try:
        access.verify(text, SystemClock().time())
        document["state"] = "good"
    except TokenError as error:
        document["state"] = error.error_code
    if as_json:
        sys.stdout.write(json.dumps(document) + "\n")
    else:
        sys.stdout.writelines(f"{name}: {_shown(value)}\n" for name, value in document.items())


def parse_ttl(text: str) -> float:
    """Seconds that ``15m`` or the like says. Raises RequestError."""
    match = _TTL.fullmatch(text)
    if match is None:
        raise RequestError(f"{text!r} is no length of time, like 90s, 15m, 12h or 30d")
    return float(int(match[1]) * _UNITS[match[2]])


def _load(file: Path) -> NodeKey:
    try:
        return load_key(file)
    except FileNotFoundError:
        raise RequestError(f"{file}: there is no such file") from None


def _change(
    store: str, keys: Path | None, change: Callable[[AccessList], AccessList], event: str, **what: object
) -> AccessList:
    """Put a changed list in force, whoever else changes it at the same time, and say so in the audit log. Gives it."""
    trust, ring = TrustStore(Storage(store)), load_ring([_keys(keys, store)])

    def changed(fields: Any) -> dict[str, Any]:
        return change(AccessList.parse(fields)).document()

    async def put() -> AccessList:
        online = await roll_forward(trust, ring, _now())
        await trust.change_access(changed, online, _now())
        audit = Audit(load(OriginSettings, ["--store", store]).audit_file, _now)
        audit.add(event, signing_key_id(online[0]), **what)
        return await _access(trust)

    return asyncio.run(put())


async def _access(trust: TrustStore) -> AccessList:
    state = await trust.state()
    return AccessList.parse(state.roles[ACCESS].unrecognized_fields[CUSTOM])


def _report_keys(access: AccessList, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(access.document()) + "\n")
        return
    for key in access.keys.values():
        state = "signs" if key.until is None else f"believed until {_iso(key.until)}"
        sys.stdout.write(f"key {key.id}: {state}\n")
    for name, expires in access.revoked.items():
        sys.stdout.write(f"revoked {name}: forgotten after {_iso(expires)}\n")


def _described(token: Token) -> dict[str, Any]:
    return {
        "id": token.id,
        "scopes": [str(scope) for scope in token.scopes],
        "subject": token.subject,
        "issued": _iso(token.issued),
        "expires": _iso(token.expires),
        "key": token.key,
    }


def _shown(value: object) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _with_token(url: str, text: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.fragment:
        raise RequestError(f"{url!r} is not an http:// or https:// URL")
    return f"{url}{'&' if parts.query else '?'}{urlencode({QUERY: text})}"


def _store(store: str | None) -> str:
    return store or load(OriginSettings, []).store


def _keys(keys: Path | None, store: str) -> Path:
    return keys or keys_beside(store)


def _now() -> datetime:
    return datetime.now(UTC)


if __name__ == "__main__":
    run_program(app, "nearshard token")
