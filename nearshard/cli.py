"""The ``nearshard`` command.

Services, ``publish`` and ``trust`` are programs of their own packages (the parts never import each other), so those
words replace this process by ``python -m <package>``; the rest is here.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from nearshard import repository_commands
from nearshard.accept import accept
from nearshard.client import DEFAULT_ROUTER, Client, Got, SyncClient
from nearshard.doctor.command import Options as DoctorOptions
from nearshard.doctor.command import run as run_doctor
from nearshard.enroll import change_afar, enrolled_of, read_identity
from nearshard.guide import parse_routers
from nearshard.kept import Kept, cache_file
from nearshard.manners import Manners, parse_manners
from nearshard.mirrored import say_waiting
from nearshard.operate import Access, find_nodes, follow_jobs, from_afar, on_all
from nearshard.progress import OnProgress, shown, told
from nearshard.repository import default_repository
from nearshard.repository_commands import MaybeWhat, No, Where
from nearshard.routes import locate, nodes, show_nodes, show_route
from nearshard.up import lay_out, up
from shared.enrolment import enrolment_line
from shared.enrolment_file import change_file
from shared.errors import EXIT_INTERRUPTED, EXIT_USAGE, NearshardError, RequestError
from shared.ids import DEFAULT_REF, parse_name
from shared.paths import ADMIN
from shared.token_file import given_token

PROGRAMS: Mapping[str, tuple[str, str]] = {
    "token": ("origin.token_command", "Make, show, replace and revoke access tokens."),
    "import": ("origin.import_command", "Publish a model from another hub, network or directory."),
    "publish": ("origin.publish_command", "Publish a model directory."),
    "trust": ("origin.trust_command", "Make keys, and say who may sign what."),
    "gc": ("origin.gc_command", "Remove what no revision that is kept refers to."),
    "origin": ("origin", "Run an origin."),
    "router": ("router", "Run a router."),
    "edge": ("edge_node", "Run an edge node."),
}

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Deliver AI models from the nearest cache, shard by shard.",
    epilog="Example: nearshard up   (then, elsewhere)   nearshard get demo/minilm:embed-3l",
)

Router = Annotated[
    list[str],
    typer.Option("--router", envvar="NEARSHARD_ROUTER", help="Router, edge or origin to ask; again for more."),
]
ROUTERS = [DEFAULT_ROUTER]
Token = Annotated[
    Path | None,
    typer.Option(
        "--token-file",
        envvar="NEARSHARD_TOKEN_FILE",
        help="File (mode 0600) of your token, for private models; NEARSHARD_TOKEN may hold the token itself.",
    ),
]
Region = Annotated[str | None, typer.Option("--region", envvar="NEARSHARD_REGION", help="The region you are in.")]
TrustRoot = Annotated[
    Path | None,
    typer.Option("--trust-root", envvar="NEARSHARD_TRUST_ROOT", help="A root.json of the network, to check refs by."),
]
Ca = Annotated[
    Path | None,
    typer.Option("--ca", envvar="NEARSHARD_CA", help="CA of the deployment, as PEM, beside the system's."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
JsonLines = Annotated[
    bool, typer.Option("--json", help="Print one line of JSON for each event; the result is the last.")
]
LimitRate = Annotated[
    str,
    typer.Option(
        "--limit-rate", envvar="NEARSHARD_LIMIT_RATE", help="Bytes a second of all connections, like 2M; 0 is no cap."
    ),
]
Windows = Annotated[
    list[str] | None,
    typer.Option("--window", envvar="NEARSHARD_WINDOWS", help="HH:MM-HH:MM=RATE, another cap by time; again for more."),
]
Metered = Annotated[
    bool,
    typer.Option("--metered", envvar="NEARSHARD_METERED", help="The link costs by the byte: only what is asked for."),
]
Proxy = Annotated[
    str,
    typer.Option(
        "--proxy",
        envvar="NEARSHARD_PROXY",
        help="http://, socks5:// or socks5h://[user:password@]host:port; env: by HTTP_PROXY, NO_PROXY and their like.",
    ),
]


@app.command("get", epilog="Example: nearshard get demo/minilm:embed-3l@v2 -o embed-3l/")
def get_command(
    task_id: Annotated[str, typer.Argument(metavar="TASK_ID", help="org/name[:task][@ref or revision]")],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="Directory, or the body's file name; by default it is in the local repository."
        ),
    ] = None,
    router: Router = ROUTERS,
    region: Region = None,
    token: Token = None,
    trust_root: TrustRoot = None,
    ca: Ca = None,
    repository: Where = None,
    no_repository: No = False,
    limit_rate: LimitRate = "0",
    window: Windows = None,
    metered: Metered = False,
    proxy: Proxy = "",
    force: Force = False,
    quiet: Quiet = False,
    as_json: JsonLines = False,
) -> None:
    """Fetch one task, verified, from the nearest nodes."""
    where = repository_commands.directory(repository, none=no_repository, output=output)
    manners = _manners(limit_rate, window, metered, proxy)
    client = SyncClient(**_access(router, region, trust_root, token, ca), repository=where, manners=manners)
    _transfer(task_id, lambda p: client.get(task_id, output, force=force, progress=p), quiet=quiet, as_json=as_json)


@app.command("pull", epilog="Example: nearshard pull demo/minilm@v2 -o minilm/")
def pull_command(
    model: Annotated[str, typer.Argument(metavar="MODEL[@REF]", help="org/name, and a ref or revision.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Directory; by default it is in the local repository.")
    ] = None,
    router: Router = ROUTERS,
    region: Region = None,
    token: Token = None,
    trust_root: TrustRoot = None,
    ca: Ca = None,
    repository: Where = None,
    no_repository: No = False,
    limit_rate: LimitRate = "0",
    window: Windows = None,
    metered: Metered = False,
    proxy: Proxy = "",
    force: Force = False,
    quiet: Quiet = False,
    as_json: JsonLines = False,
) -> None:
    """Fetch all files of a model, verified, from the nearest nodes."""
    name, _, found = model.partition("@")
    ref = found or DEFAULT_REF
    where = repository_commands.directory(repository, none=no_repository, output=output)
    manners = _manners(limit_rate, window, metered, proxy)
    client = SyncClient(**_access(router, region, trust_root, token, ca), repository=where, manners=manners)
    _transfer(model, lambda p: client.pull(name, ref, output, force=force, progress=p), quiet=quiet, as_json=as_json)


def _manners(limit_rate: str, windows: list[str] | None, metered: bool, proxy: str) -> Manners:
    return parse_manners(limit_rate=limit_rate, windows=_by_window(windows or []), metered=metered, proxy=proxy)


def _by_window(words: list[str]) -> dict[str, str]:
    """``HH:MM-HH:MM=RATE``, each."""
    return dict(word.partition("=")[::2] for word in words)


def _transfer(what: str, fetch: Callable[[OnProgress | None], Got], *, quiet: bool, as_json: bool) -> None:
    """Fetch, and show on the way what was asked for."""
    if as_json:
        with told(what) as events:
            events.done(_document(fetch(events.progress)))
        return
    with shown(what, quiet=quiet) as progress:
        got = fetch(progress)
    if not quiet:
        _report(got)


@app.command("repair", epilog="Example: nearshard repair demo/minilm")
def repair_command(
    what: MaybeWhat = "",
    router: Router = ROUTERS,
    region: Region = None,
    token: Token = None,
    trust_root: TrustRoot = None,
    ca: Ca = None,
    repository: Where = None,
    limit_rate: LimitRate = "0",
    window: Windows = None,
    metered: Metered = False,
    proxy: Proxy = "",
    as_json: Json = False,
) -> None:
    """Read what the local repository holds, and fetch again the shards that are not right."""
    where = repository_commands.directory(repository)
    manners = _manners(limit_rate, window, metered, proxy)
    client = Client(**_access(router, region, trust_root, token, ca), repository=where, manners=manners)
    repository_commands.repair(client, what, as_json=as_json)


repository_commands.add_to(app)


def _access(
    router: list[str], region: str | None, trust_root: Path | None, token_file: Path | None, ca: Path | None
) -> dict[str, Any]:
    """What a client is made with that goes on where the last command left off, also with no router left."""
    routers = parse_routers(router)
    kept = Kept(cache_file(routers, region))
    return {
        "router": routers,
        "region": region,
        "kept": kept,
        "trust_root": trust_root,
        "token": given_token(token_file),
        "ca": ca,
        "waiting": say_waiting,
    }


@app.command("up", epilog="Example: nearshard up --edges 4 --region berlin --region lagos --data /tmp/net")
def up_command(
    edges: Annotated[int, typer.Option(min=0, max=64, help="How many edge nodes.")] = 3,
    region: Annotated[
        list[str] | None, typer.Option(help="A region; again for more. North and south by default.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Where everything is kept; ~/.local/share/nearshard by default.")
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65000, help="The router's port; origin and edges follow. 0: any.")
    ] = 8700,
    redis: Annotated[str, typer.Option(help="URL of a Redis or Valkey; one is started by default.")] = "",
    ready_file: Annotated[Path | None, typer.Option(help="Written with all URLs as JSON when all are ready.")] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Run a whole network on this machine: Valkey, origin, router and edges."""
    if log_level not in ("debug", "info", "warning", "error"):
        raise RequestError("--log-level is debug, info, warning or error")
    regions = [parse_name(name, "a region") for name in region or ["north", "south"]]
    network = lay_out(edges=edges, regions=list(dict.fromkeys(regions)), port=port, redis=redis)
    where = (data or Path("~/.local/share/nearshard")).expanduser().resolve()
    asyncio.run(
        up(
            network,
            where,
            own_redis=not redis,
            ready_file=ready_file,
            say=lambda text: print(f"nearshard: {text}", file=sys.stderr, flush=True),  # noqa: T201
            log_level=log_level,
        )
    )


Data = Annotated[
    Path, typer.Option("--data", help="A node's data directory, or that of `nearshard up`.", envvar="NEARSHARD_DATA")
]
Nodes = Annotated[list[str] | None, typer.Option("--node", help="Only this node; again for more. All by default.")]
What = Annotated[str, typer.Argument(metavar="WHAT", help="org/name, org/name:task, or a shard's digest.")]
DEFAULT_DATA = Path("~/.local/share/nearshard")
NodeUrls = Annotated[
    list[str] | None,
    typer.Option("--node-url", help="A node elsewhere, by its URL, with a token for 'admin'; again for more."),
]
OperatorToken = Annotated[
    Path | None,
    typer.Option(
        "--token-file",
        envvar="NEARSHARD_TOKEN_FILE",
        help="File (mode 0600) of the token for services elsewhere; NEARSHARD_TOKEN may hold the token itself.",
    ),
]


@app.command("preheat", epilog="Example: nearshard preheat demo/minilm:embed-3l --node north-1")
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


@app.command("pin", epilog="Example: nearshard pin demo/minilm")
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


@app.command("purge", epilog="Example: nearshard purge demo/minilm:vocab")
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


@app.command("link", epilog="Example: nearshard link --rate 5MB --window 08:00-18:00=1MB --metered")
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
        change["windows"] = _by_window(window)
    if metered is not None:
        change["metered"] = metered
    nodes = _nodes(data, node, node_url, token, ca)
    answer = on_all(nodes, "PUT", "/link", change) if change else on_all(nodes, "GET", "/link")
    _print(asyncio.run(answer), as_json=as_json)


@app.command("drain", epilog="Example: nearshard drain north-1   (and back: nearshard drain north-1 --undo)")
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


@app.command("nodes", epilog="Example: nearshard nodes --router http://router:8700")
def nodes_command(router: Router = ROUTERS, ca: Ca = None, as_json: Json = False) -> None:
    """List the nodes that a router knows, how busy they are, and what it thinks of them."""
    found = asyncio.run(nodes(router, ca))
    if as_json:
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        show_nodes(found)


@app.command("locate", epilog="Example: nearshard locate demo/minilm:embed-3l --region north --explain")
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


@app.command("enroll", epilog="Example: nearshard enroll --data /var/cache/nearshard --file /etc/nearshard/nodes.toml")
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


@app.command("doctor", epilog="Example: nearshard doctor --router http://router:8700 --rate 12MB")
def doctor_command(
    router: Router = ROUTERS,
    region: Region = None,
    ca: Ca = None,
    rate: Annotated[
        str | None, typer.Option(help="Bytes a second that the link brings, as 12MB; measured by default.")
    ] = None,
    cache: Annotated[Path, typer.Option(help="A node's data directory.", envvar="NEARSHARD_DATA")] = DEFAULT_DATA,
    repository: Annotated[
        Path | None, typer.Option(help="Where models are kept.", envvar="NEARSHARD_REPOSITORY")
    ] = None,
    metered: Annotated[bool, typer.Option("--metered", help="Download nothing to measure with.")] = False,
    no_network: Annotated[bool, typer.Option("--no-network", help="Look at this machine only.")] = False,
    apply: Annotated[
        bool, typer.Option("--apply", help="Set what was judged to need it, after asking. Needs root.")
    ] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Take back what --apply did.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    root: Annotated[Path, typer.Option(help="Stands for / where kernel files are read and written.")] = Path("/"),
    as_json: Json = False,
) -> None:
    """Say what here and in the network slows transfers, and how to mend it; exit code 9 where something is broken."""
    kept = repository or default_repository()
    places = [("cache", cache.expanduser()), ("repository", kept.expanduser())]
    options = DoctorOptions(router, places, root, rate, region, ca, not no_network, metered, apply, undo, yes, as_json)
    raise typer.Exit(run_doctor(options))


trust_app = typer.Typer()


@trust_app.callback()
def trust_group() -> None:
    """Has one word here; ``main`` hands the others over before typer sees them."""


@trust_app.command("accept", epilog="Example: nearshard trust accept http://router:8700 --fingerprint 3f1c…")
def accept_command(
    url: Annotated[str, typer.Argument(metavar="URL", help="A router, an origin or an edge of the network.")],
    fingerprint: Annotated[
        str | None, typer.Option(help="SHA-256 of its root.json, from who runs it; asked for on a terminal.")
    ] = None,
    ca: Ca = None,
    as_json: Json = False,
) -> None:
    """Trust a network's signatures from now on, by the fingerprint of its root."""
    accepted = asyncio.run(accept(url, fingerprint, _confirm, ca))
    if as_json:
        sys.stdout.write(json.dumps(vars(accepted)) + "\n")
    else:
        sys.stdout.write(f"{accepted.url} is trusted by root {accepted.fingerprint}, as {accepted.noted} says\n")


def _confirm(url: str, fingerprint: str) -> bool:
    if not sys.stdin.isatty():
        return False
    sys.stderr.write(f"The root of {url} has the fingerprint\n  {fingerprint}\n")
    return typer.confirm("Does whoever runs the network say the same?", err=True)


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


def _add_programs() -> None:
    """The words that other packages answer, so that ``--help`` lists them."""
    for name, (_, about) in PROGRAMS.items():
        if name == "trust":
            app.add_typer(trust_app, name=name, help=about)
            continue

        def command() -> None:
            """Never run: ``main`` hands these words over before typer sees them."""

        app.command(name, help=about, add_help_option=False)(command)


_add_programs()


def _document(got: Got) -> dict[str, object]:
    """For programs."""
    return {
        "model": got.model,
        "revision": got.revision,
        "paths": [str(path) for path in got.paths],
        "size": got.size,
        "moved": got.moved,
        "seconds": round(got.seconds, 3),
        "sources": [{"url": url, "outcome": how, "bytes": n} for (url, how), n in got.sources.items()],
    }


def _report(got: Got) -> None:
    """For people."""
    for path in got.paths:
        sys.stdout.write(f"{path}\n")
    served = ", ".join(f"{n / 1e6:.1f} MB {how} from {url}" for (url, how), n in sorted(got.sources.items()))
    sys.stdout.write(
        f"{got.model} {got.revision[:19]}: {got.size / 1e6:.1f} MB in {got.seconds:.2f} s"
        f" ({served or 'all of it was there'})\n"
    )


def main() -> None:
    """Run the command; an error is one line on stderr, and its exit code."""
    if len(sys.argv) > 1 and sys.argv[1] in PROGRAMS and sys.argv[1:3] != ["trust", "accept"]:
        module, _ = PROGRAMS[sys.argv[1]]
        os.execv(sys.executable, [sys.executable, "-m", module, *sys.argv[2:]])  # noqa: S606
    try:
        app(prog_name="nearshard", standalone_mode=True)
    except NearshardError as error:
        sys.stderr.write(f"error: {error}\n")
        if names := error.public.get("tasks"):
            sys.stderr.write(f"tasks: {', '.join(str(name) for name in names)}\n")  # type: ignore[attr-defined]
        raise SystemExit(error.exit_code or EXIT_USAGE) from None
    except KeyboardInterrupt:
        raise SystemExit(EXIT_INTERRUPTED) from None
