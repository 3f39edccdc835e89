"""``nearshard publish``: publish a model directory, to a store at hand or to an origin afar."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
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
from origin.commit import Edit, LocalSink, publisher_keys, sign_role
from origin.config import OriginSettings
from origin.cutting import LIMIT, TARGET
from origin.deltas import LEAST_GAIN, Making
from origin.keyring import ROOT_FILE, Keyring, keys_beside, load_ring
from origin.model_dir import read_sources
from origin.model_signature import BUNDLE_FILE, check_signature
from origin.publish import Published, publish
from origin.remote import RemoteSink
from origin.rollout import Asked, decide, write
from origin.seen import Seen, seen_file
from origin.signing import Ref, State, key_id
from origin.storage import Storage
from origin.trust_setup import delegate_any
from origin.trust_store import TrustStore
from shared.config import HttpUrl, load, size
from shared.errors import ConfigError, UpstreamError
from shared.ids import DEFAULT_REF, parse_model, parse_ref, parse_ref_or_revision
from shared.manifest import MAX_SHARD
from shared.parcel import Effort
from shared.token_file import given_token
from shared.trust_names import org_of
from shared.web.announce import announce
from shared.web.command import run_program
from shared.web.session import make_session
from shared.web.tls import tls_by

AnySink = LocalSink | RemoteSink
Place = Callable[[], AbstractAsyncContextManager[AnySink]]
"""Opens what is published to."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

Tasks = Annotated[Path | None, typer.Option(help="Tasks file; DIR/nearshard.toml by default.")]
Store = Annotated[str | None, typer.Option(help="Directory or URL of the origin's store.")]
Keys = Annotated[
    list[Path] | None,
    typer.Option(help="Folder with your key, and with the online key of a store at hand; again for more."),
]
Origin = Annotated[str, typer.Option(help="URL of an origin to upload to; a store at hand by default.")]
TrustRootFile = Annotated[
    Path | None,
    typer.Option(envvar="NEARSHARD_TRUST_ROOT", help="The network's root file; root.json beside your key."),
]
Token = Annotated[
    Path | None,
    typer.Option(
        "--token-file",
        envvar="NEARSHARD_TOKEN_FILE",
        help="File (mode 0600) of a token, if the origin asks for one; NEARSHARD_TOKEN may hold the token itself.",
    ),
]
Private = Annotated[bool, typer.Option("--private", help="Only for those with a token: nearshard token.")]
ShardTarget = Annotated[str, typer.Option(help="Bytes that a shard should have.")]
ShardLimit = Annotated[str, typer.Option(help="Bytes that a shard may have.")]
Pieces = Annotated[
    bool, typer.Option(help="Hash pieces too, so that other downloaders can mend a part: a third of the work.")
]
Base = Annotated[
    str,
    typer.Option(metavar="REV_OR_REF", help="Make deltas from this; by default from what the ref means, else main."),
]
Deltas = Annotated[bool, typer.Option(help="Make deltas from an earlier revision.")]
Compress = Annotated[bool, typer.Option(help="Compress what is new, for who has no earlier revision.")]
EffortName = Annotated[str, typer.Option(help="How long a byte that is saved may take: fast, default or most.")]
LeastGain = Annotated[float, typer.Option(help="Keep deltas and compressed shards that save so many percent.")]
Routers = Annotated[
    list[str] | None,
    typer.Option(envvar="NEARSHARD_ROUTER", help="Router to tell; again for more. It tells the edges."),
]
Ca = Annotated[
    Path | None,
    typer.Option("--ca", envvar="NEARSHARD_CA", help="CA of the deployment, as PEM, beside the system's."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
DEFAULT_GAIN = LEAST_GAIN * 100
DEFAULT_TARGET, DEFAULT_LIMIT = f"{TARGET >> 20}MiB", f"{LIMIT >> 20}MiB"


@app.command(name="publish", epilog="Example: nearshard publish ./all-MiniLM-L6-v2 demo/minilm --ref v2")
def command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Model directory, as it comes from a hub.")],
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Name to publish it under: org/name.")],
    ref: Annotated[str, typer.Option(help="Name that will mean this revision.")] = DEFAULT_REF,
    tasks: Tasks = None,
    store: Store = None,
    keys: Keys = None,
    origin: Origin = "",
    trust_root: TrustRootFile = None,
    token_file: Token = None,
    private: Private = False,
    verify_signature: Annotated[
        Path | None, typer.Option(help="Check that all is signed, by OpenSSF model-signing, with this public key.")
    ] = None,
    verify_certificates: Annotated[
        Path | None, typer.Option(help="Or with a certificate of these, as PEM, or one that they vouch for.")
    ] = None,
    signature: Annotated[Path | None, typer.Option(help="Its bundle; DIR/model.sig by default.")] = None,
    shard_target: ShardTarget = DEFAULT_TARGET,
    pieces: Pieces = True,
    shard_limit: ShardLimit = DEFAULT_LIMIT,
    base: Base = "",
    deltas: Deltas = True,
    compress: Compress = True,
    effort: EffortName = "default",
    least_gain: LeastGain = DEFAULT_GAIN,
    router: Routers = None,
    ca: Ca = None,
    as_json: Json = False,
) -> None:
    """Cut a model into shards, store them, and make a ref mean the result."""
    cut = read_cut(shard_target, shard_limit, pieces=pieces)
    cut |= read_making(base, effort, least_gain, deltas=deltas, compress=compress)
    publishing = Publishing(model, ref, private, store, keys, origin, trust_root, ca, given_token(token_file))
    if verify_signature or verify_certificates:
        _, sources = read_sources(directory, tasks)
        bundle = signature or directory / BUNDLE_FILE
        check_signature(directory, sources, bundle, key=verify_signature, certificates=verify_certificates)
    elif signature:
        raise ConfigError("--signature is checked with --verify-signature or --verify-certificates; give one")
    publishing.run(directory, router, as_json=as_json, tasks_file=tasks, **cut)


def read_cut(shard_target: str, shard_limit: str, *, pieces: bool) -> dict[str, Any]:
    """How a model is cut, for ``publish``. Raises ConfigError."""
    target, limit = _bytes(shard_target, "--shard-target"), _bytes(shard_limit, "--shard-limit")
    if not 4096 <= target <= limit <= MAX_SHARD:
        raise ConfigError(
            f"--shard-target is at least 4KiB and at most --shard-limit, which is at most {MAX_SHARD >> 20}MiB"
        )
    return {"target": target, "limit": limit, "pieces": pieces}


def read_making(base: str, effort: str, least_gain: float, *, deltas: bool, compress: bool) -> dict[str, Any]:
    """Which parcels are made, for ``publish``. Raises ConfigError, BadId."""
    if effort.upper() not in Effort.__members__:
        raise ConfigError(f"--effort: {effort!r} is not one of {', '.join(Effort.__members__).lower()}")
    if not 0 <= least_gain < 100:
        raise ConfigError("--least-gain is a number of percent from 0 to below 100")
    if base and not deltas:
        raise ConfigError("--base names what deltas are made from, and --no-deltas makes none; give one")
    making = Making(deltas, compress, Effort[effort.upper()], least_gain / 100)
    return {"base": parse_ref_or_revision(base) if base else "", "making": making}


class Publishing:
    """What is published, where, and by whose keys: read from the options of a command, and checked."""

    def __init__(
        self,
        model: str,
        ref: str,
        private: bool,
        store: str | None,
        keys: list[Path] | None,
        origin: str,
        trust_root: Path | None,
        ca: Path | None,
        token: str = "",
    ) -> None:
        """``token``: shown to an origin that asks for one. Raises BadId, ConfigError."""
        self.model, self.ref, self._private, self._ca = parse_model(model), parse_ref(ref), private, ca
        if origin and store:
            raise ConfigError("--origin and --store are two places; give one")
        self.where = store or load(OriginSettings, []).store
        folders = keys or [keys_beside(self.where)]
        self._ring, self._afar = load_ring(folders), bool(origin)
        if origin:
            root, url = _read_root(trust_root, folders), TypeAdapter(HttpUrl).validate_python(origin)
            self._place: Place = partial(_from_afar, url, root, ca, self._ring, token)
        else:
            self._place = partial(_at_hand, self.where, self._ring, model)

    def check(self) -> None:
        """Whether it could be signed in the end: before anything is fetched for it. Raises as ``Sink.begin``."""

        async def begin() -> None:
            async with self._place() as sink:
                await sink.begin(self.model, self.ref, private=self._private)

        asyncio.run(begin())

    def run(self, directory: Path, routers: list[str] | None, *, as_json: bool, **options: Any) -> None:
        """Publish a directory, tell routers, and say what was done. ``options``: of ``publish``, whose errors it
        raises."""
        with _bar() as bar:
            row = bar.add_task(self.model, total=None)
            done = asyncio.run(
                self._publish(
                    directory,
                    progress=lambda done, total: bar.update(row, completed=done, total=total),
                    **options,
                )
            )
        if done.changed:
            asyncio.run(tell_routers(routers or [], self.model, self._ca))
        _report(done, as_json=as_json)

    async def _publish(self, directory: Path, **options: Any) -> Published:
        async with self._place() as sink:
            done = await publish(sink, directory, self.model, self.ref, private=self._private, **options)
        if done.changed and not self._afar:
            await self._audit("published", revision=done.revision)
        return done

    async def roll_out(self, asked: Asked, routers: list[str]) -> tuple[Ref, bool]:
        """Change the rollout of the ref; what the ref means then, and whether that is new.

        Raises NotFound, ConfigError, and as ``Sink.begin`` and ``sign_role``."""
        meant: list[Ref] = []

        def prepare(state: State) -> Edit | None:
            refs = state.refs(self.model)
            meant.append(decide(refs, self.model, self.ref, asked))
            if meant[-1] == refs[self.ref]:
                return None
            return lambda role, at: write(role, self.model, self.ref, meant[-1], refs[self.ref], at)

        async with self._place() as sink:
            await sink.begin(self.model, self.ref, private=self._private)
            changed = await sign_role(sink, self._ring, _now, self.model, prepare, private=self._private)
        if changed:
            await tell_routers(routers, self.model, self._ca)
        if changed and not self._afar:
            rule = meant[-1].rollout
            await self._audit("rollout", revision=meant[-1].revision, rollout=rule.record() if rule else None)
        return meant[-1], changed

    async def _audit(self, event: str, **what: object) -> None:
        """Note what was done to the store at hand."""
        state = await TrustStore(Storage(self.where)).state()
        who = publisher_keys(state, self.model, self._ring, private=self._private)[0]
        audit = Audit(load(OriginSettings, ["--store", self.where]).audit_file, _now)
        audit.add(event, key_id(who), model=self.model, ref=self.ref, **what)


def _now() -> datetime:
    return datetime.now(UTC)


@asynccontextmanager
async def _at_hand(store: str, ring: Keyring, model: str) -> AsyncIterator[AnySink]:
    trust = TrustStore(Storage(store))
    await delegate_any(trust, ring, org_of(model), _now())
    yield LocalSink(trust, ring, _now)


@asynccontextmanager
async def _from_afar(url: str, root: bytes, ca: Path | None, ring: Keyring, token: str) -> AsyncIterator[AnySink]:
    async with make_session(tls=tls_by(ca)) as session:
        yield RemoteSink(session, url, root, ring, _now, asyncio.sleep, Seen(seen_file(root)), token)


def _read_root(file: Path | None, folders: list[Path]) -> bytes:
    """The root file that is given, or the one beside the keys. Raises ConfigError."""
    for candidate in [file] if file else [folder.expanduser() / ROOT_FILE for folder in folders]:
        with suppress(FileNotFoundError):
            return candidate.read_bytes()
    raise ConfigError("what the network is known by is needed: --trust-root FILE")


async def tell_routers(routers: list[str], model: str, ca: Path | None) -> None:
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
        f"{done.stored_bytes / 1e6:.1f} MB\n{_costs(done)}tasks: {', '.join(done.tasks) or 'none'}\n"
    )
    if done.unread:
        sys.stdout.write(f"no deltas to {done.unread} shards: what they are from could not be read\n")
    if "all" not in done.tasks:
        sys.stdout.write("no task 'all': there are several weight files; name them with file = in nearshard.toml\n")


def _costs(done: Published) -> str:
    """What it costs to get it."""
    lines = f"who has nothing moves {_share(done.first_bytes, done.shard_bytes)}\n"
    if done.parent and done.parent != done.revision:
        moved = _share(done.moved_bytes, done.shard_bytes)
        lines += f"who has {done.parent[:19]} moves {moved}; {done.new_bytes / 1e6:.1f} MB are new\n"
    return lines


def _share(moved: int, whole: int) -> str:
    return f"{moved / 1e6:.1f} MB ({100 * (1 - moved / whole) if whole else 0:.1f} % saved)"


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
