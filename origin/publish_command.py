"""``nearshard publish``: publish a model directory, to a store at hand or to an origin afar."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Coroutine
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import TypeAdapter
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar

from origin.audit import Audit
from origin.commit import LocalSink, publisher_keys
from origin.config import OriginSettings
from origin.cutting import LIMIT, TARGET
from origin.keyring import ROOT_FILE, Keyring, keys_beside, load_ring
from origin.model_dir import read_sources
from origin.model_signature import BUNDLE_FILE, check_signature
from origin.publish import Published, publish
from origin.remote import RemoteSink
from origin.seen import Seen, seen_file
from origin.signing import key_id
from origin.storage import Storage
from origin.trust_setup import delegate_any
from origin.trust_store import TrustStore
from shared.config import HttpUrl, load, size
from shared.errors import ConfigError, UpstreamError
from shared.ids import parse_model, parse_ref
from shared.manifest import MAX_SHARD
from shared.token_file import given_token
from shared.trust_names import org_of
from shared.web.announce import announce
from shared.web.command import run_program
from shared.web.session import make_session
from shared.web.tls import tls_by

Place = Callable[..., Coroutine[Any, Any, Published]]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(name="publish", epilog="Example: nearshard publish ./all-MiniLM-L6-v2 demo/minilm --ref v2")
def command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Model directory, as it comes from a hub.")],
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Name to publish it under: org/name.")],
    ref: Annotated[str, typer.Option(help="Name that will mean this revision.")] = "main",
    tasks: Annotated[Path | None, typer.Option(help="Tasks file; DIR/nearshard.toml by default.")] = None,
    store: Annotated[str | None, typer.Option(help="Directory or URL of the origin's store.")] = None,
    keys: Annotated[
        list[Path] | None,
        typer.Option(help="Folder with your key, and with the online key of a store at hand; again for more."),
    ] = None,
    origin: Annotated[str, typer.Option(help="URL of an origin to upload to; a store at hand by default.")] = "",
    trust_root: Annotated[
        Path | None,
        typer.Option(envvar="NEARSHARD_TRUST_ROOT", help="The network's root file; root.json beside your key."),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            envvar="NEARSHARD_TOKEN_FILE",
            help="File (mode 0600) of a token, if the origin asks for one; NEARSHARD_TOKEN may hold the token itself.",
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Only for those with a token: nearshard token.")] = False,
    verify_signature: Annotated[
        Path | None, typer.Option(help="Check that all is signed, by OpenSSF model-signing, with this public key.")
    ] = None,
    verify_certificates: Annotated[
        Path | None, typer.Option(help="Or with a certificate of these, as PEM, or one that they vouch for.")
    ] = None,
    signature: Annotated[Path | None, typer.Option(help="Its bundle; DIR/model.sig by default.")] = None,
    shard_target: Annotated[str, typer.Option(help="Bytes that a shard should have.")] = f"{TARGET >> 20}MiB",
    pieces: Annotated[
        bool, typer.Option(help="Hash pieces too, so that other downloaders can mend a part: a third of the work.")
    ] = True,
    shard_limit: Annotated[str, typer.Option(help="Bytes that a shard may have.")] = f"{LIMIT >> 20}MiB",
    router: Annotated[
        list[str] | None,
        typer.Option(envvar="NEARSHARD_ROUTER", help="Router to tell; again for more. It tells the edges."),
    ] = None,
    ca: Annotated[
        Path | None,
        typer.Option("--ca", envvar="NEARSHARD_CA", help="CA of the deployment, as PEM, beside the system's."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Cut a model into shards, store them, and make a ref mean the result."""
    target, limit = _bytes(shard_target, "--shard-target"), _bytes(shard_limit, "--shard-limit")
    if not 4096 <= target <= limit <= MAX_SHARD:
        raise ConfigError(
            f"--shard-target is at least 4KiB and at most --shard-limit, which is at most {MAX_SHARD >> 20}MiB"
        )
    parse_model(model), parse_ref(ref)
    if origin and store:
        raise ConfigError("--origin and --store are two places; give one")
    where = store or load(OriginSettings, []).store
    folders = keys or [keys_beside(where)]
    ring = load_ring(folders)
    if verify_signature or verify_certificates:
        _, sources = read_sources(directory, tasks)
        bundle = signature or directory / BUNDLE_FILE
        check_signature(directory, sources, bundle, key=verify_signature, certificates=verify_certificates)
    elif signature:
        raise ConfigError("--signature is checked with --verify-signature or --verify-certificates; give one")
    if origin:
        root, url = _read_root(trust_root, folders), TypeAdapter(HttpUrl).validate_python(origin)
        place: Place = partial(_from_afar, url, root, ca, ring, given_token(token_file))
    else:
        place = partial(_at_hand, where, ring)
    with _bar() as bar:
        row = bar.add_task(model, total=None)
        done = asyncio.run(
            place(
                directory,
                model,
                ref,
                private=private,
                tasks_file=tasks,
                target=target,
                limit=limit,
                pieces=pieces,
                progress=lambda done, total: bar.update(row, completed=done, total=total),
            )
        )
    if done.changed:
        asyncio.run(_tell(router or [], model, ca))
    _report(done, as_json=as_json)


def _now() -> datetime:
    return datetime.now(UTC)


async def _at_hand(
    store: str, ring: Keyring, directory: Path, model: str, ref: str, *, private: bool, **options: Any
) -> Published:
    trust = TrustStore(Storage(store))
    await delegate_any(trust, ring, org_of(model), _now())
    done = await publish(LocalSink(trust, ring, _now), directory, model, ref, private=private, **options)
    if done.changed:
        who = publisher_keys(await trust.state(), model, ring, private=private)[0]
        audit = Audit(load(OriginSettings, ["--store", store]).audit_file, _now)
        audit.add("published", key_id(who), model=model, ref=ref, revision=done.revision)
    return done


async def _from_afar(
    url: str,
    root: bytes,
    ca: Path | None,
    ring: Keyring,
    token: str,
    directory: Path,
    model: str,
    ref: str,
    **options: Any,
) -> Published:
    async with make_session(tls=tls_by(ca)) as session:
        sink = RemoteSink(session, url, root, ring, _now, asyncio.sleep, Seen(seen_file(root)), token)
        return await publish(sink, directory, model, ref, **options)


def _read_root(file: Path | None, folders: list[Path]) -> bytes:
    """The root file that is given, or the one beside the keys. Raises ConfigError."""
    for candidate in [file] if file else [folder.expanduser() / ROOT_FILE for folder in folders]:
        with suppress(FileNotFoundError):
            return candidate.read_bytes()
    raise ConfigError("what the network is known by is needed: --trust-root FILE")


async def _tell(routers: list[str], model: str, ca: Path | None) -> None:
    """Have refs looked up at once. What cannot be told sees it when its refs' lifetime ends, a few seconds on."""
    async with make_session(tls=tls_by(ca)) as session:
        for url in routers:
            try:
                await announce(session, url.rstrip("/"), model)
            except UpstreamError as error:
                sys.stderr.write(f"warning: {error}; it sees the new revision when its refs' lifetime ends\n")


def _bar() -> Bar:
    console = Console(stderr=True)
    return Bar(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(),
        TimeRemainingColumn(), console=console, disable=not console.is_terminal, transient=True,
    )  # fmt: skip


def _report(done: Published, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(vars(done) | {"tasks": list(done.tasks)}) + "\n")
        return
    what = "now means" if done.changed else "means already"
    sys.stdout.write(
        f"{done.model}@{done.ref} {what} {done.revision}\n"
        f"{done.shards} shards, {done.size / 1e6:.1f} MB of files; stored {done.stored} shards, "
        f"{done.stored_bytes / 1e6:.1f} MB\ntasks: {', '.join(done.tasks) or 'none'}\n"
    )
    if "all" not in done.tasks:
        sys.stdout.write("no task 'all': there are several weight files; name them with file = in nearshard.toml\n")


def _bytes(text: str, flag: str) -> int:
    try:
        return int(size(text))
    except ValueError:
        raise ConfigError(f"{flag}: {text!r} is not a number of bytes, like 8MiB") from None


def main() -> None:
    """Run the command."""
    run_program(app, "nearshard publish")


if __name__ == "__main__":
    main()
