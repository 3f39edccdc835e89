"""``nearshard ls``, ``show``, ``verify``, ``repair``, ``activate``, ``rollback`` and ``rm``: the local repository, for
people and for scripts."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nearshard.activation import Activation
from nearshard.commands.options import Force
from nearshard.repository import Held, Repository, default_repository
from nearshard.switches import Switch, Switches
from nearshard.verifying import Damage, choose, verify
from shared.errors import EXIT_INTEGRITY
from shared.ids import DEFAULT_REF, is_revision, parse_model, parse_name, parse_ref, parse_ref_or_revision

if TYPE_CHECKING:
    from nearshard.client import Client, Got

Where = Annotated[
    Path | None,
    typer.Option(
        "--repository",
        envvar="NEARSHARD_REPOSITORY",
        help="Directory of the local repository; ~/.local/share/nearshard/repository by default.",
    ),
]
No = Annotated[bool, typer.Option("--no-repository", help="Keep nothing but the output.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
What = Annotated[str, typer.Argument(metavar="MODEL[@REF]", help="org/name, and a ref or revision that is held.")]
MaybeWhat = Annotated[
    str, typer.Argument(metavar="[MODEL[@REF]]", help="org/name, and a ref or revision; all by default.")
]


def directory(where: Path | None, *, none: bool = False, output: Path | None = None) -> Path | None:
    """The repository that ``get`` and ``pull`` use; None: nothing is kept but the ``output``."""
    return None if none and output else (where or default_repository()).expanduser()


def add_to(app: typer.Typer) -> None:
    """Add these words to the command."""
    app.command("ls", epilog="Example: nearshard ls --json")(ls_command)
    app.command("show", epilog="Example: nearshard show demo/minilm")(show_command)
    app.command("verify", epilog="Example: nearshard verify demo/minilm")(verify_command)
    app.command("activate", epilog="Example: nearshard activate demo/minilm@v2 --as main")(activate_command)
    app.command("rollback", epilog="Example: nearshard rollback demo/minilm")(rollback_command)
    app.command("rm", epilog="Example: nearshard rm demo/minilm:embed-3l@v1")(rm_command)


def ls_command(repository: Where = None, as_json: Json = False) -> None:
    """List what the local repository holds."""
    opened = _open(repository)
    index = opened.index()
    active = {model: Switches(opened.root, model).all() for model in index}
    rows = [
        {
            "model": model,
            "revision": revision,
            "active": [ref for ref, now in active[model].items() if now.active == revision],
            **asdict(held),
        }
        for model, mine in sorted(index.items())
        for revision, held in sorted(mine.revisions.items(), key=lambda item: -item[1].time)
    ]
    lines = (
        f"{row['model']:<32} {str(row['revision'])[7:19]}  {row['bytes'] / 1e6:10.1f} MB  {_day(row['time'])}"
        f"  {_names(row['refs'], row['active'])}  {_content(row['tasks'], row['files'])}"
        for row in rows
    )
    _say(rows, lines, as_json=as_json)


def show_command(what: What, repository: Where = None, as_json: Json = False) -> None:
    """Show what is held of a model, and where: hash, size, time and signature of each revision."""
    opened, (model, ref, _) = _open(repository), _parse(what)
    documents = [_document(opened, model, revision) for _, revision in choose(opened, model, ref)]
    _say(documents, (line for document in documents for line in _lines(document)), as_json=as_json)


def verify_command(
    what: MaybeWhat = "",
    repository: Where = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Make the index again first; read all there is.")] = False,
    as_json: Json = False,
) -> None:
    """Read every byte that is held, and name what is not right: exit code 4 then."""
    opened = _open(repository)
    if rebuild:
        opened.rebuild()
    found = verify(opened, _choose(opened, what))
    document = {"revisions": found.revisions, "bytes": found.bytes, "damages": [_damage(d) for d in found.damages]}
    lines = [f"damaged: {d.path}: {d.shard or 'the file itself'} at byte {d.offset}" for d in found.damages]
    lines.append(
        f"{found.revisions} revisions, {found.bytes / 1e6:.1f} MB: "
        + (f"{len(found.damages)} damaged; nearshard repair fetches these" if found.damages else "all right")
    )
    _say(document, lines, as_json=as_json)
    if found.damages:
        raise SystemExit(EXIT_INTEGRITY)


def repair(client: Client, what: str, *, as_json: bool) -> None:
    """Read what is held, and fetch again the shards that are not right."""
    opened = client.repository

    async def mend() -> list[Got]:
        async with client:
            return [await client.repair(model, revision) for model, revision in _choose(opened, what)]

    mended = asyncio.run(mend())
    rows = [{"model": got.model, "revision": got.revision, "moved": got.moved} for got in mended]
    _say(rows, (f"{row['model']} {str(row['revision'])[7:19]}: {row['moved']} bytes" for row in rows), as_json=as_json)


def activate_command(
    what: What,
    name: Annotated[
        str, typer.Option("--as", help="The ref whose path it is; by default the ref that is named, else main.")
    ] = "",
    stay: Annotated[
        bool, typer.Option("--stay", help="Stay there, whatever the ref comes to mean; until it is activated without.")
    ] = False,
    force: Force = False,
    repository: Where = None,
    as_json: Json = False,
) -> None:
    """Have the path that programs use lead to a revision that is held, by one rename."""
    opened, (model, ref, _) = _open(repository), _parse(what)
    path = parse_ref(name) if name else DEFAULT_REF if not ref or is_revision(ref) else ref
    revision = opened.revisions(model, ref)[0]
    switch = Activation(opened, model).activate(revision, path, stay=stay, force=force)
    _say_switch(opened, model, path, switch, as_json=as_json)


def rollback_command(
    what: Annotated[str, typer.Argument(metavar="MODEL[@REF]", help="org/name, and the ref whose path it is.")],
    repository: Where = None,
    as_json: Json = False,
) -> None:
    """Go back to the revision that was active before, at once: nobody is asked."""
    opened, (model, ref, _) = _open(repository), _parse(what)
    path = parse_ref(ref or DEFAULT_REF)
    _say_switch(opened, model, path, Activation(opened, model).roll_back(path), as_json=as_json)


def _say_switch(opened: Repository, model: str, ref: str, switch: Switch, *, as_json: bool) -> None:
    path = Switches(opened.root, model).path(ref)
    document = {"model": model, "ref": ref, "path": str(path), **asdict(switch)}
    _say(document, [str(path), f"{model}@{ref}: {_state(switch)}"], as_json=as_json)


def _state(switch: Switch) -> str:
    return (
        f"{switch.active[:19]} is active{' and stays' if switch.stays else ''}"
        f", before it {switch.previous[:19] if switch.previous else 'none'}"
    )


def rm_command(
    what: Annotated[
        str, typer.Argument(metavar="MODEL[:TASK][@REF]", help="A model, a revision of it, or one task of these.")
    ],
    force: Annotated[bool, typer.Option("--force", help="Also of what is active.")] = False,
    repository: Where = None,
    as_json: Json = False,
) -> None:
    """Remove a model, a revision or a task from the local repository, and the bytes that only it used."""
    model, ref, task = _parse(what)
    freed = _open(repository).remove(model, ref, task, force=force)
    _say({"freed": freed}, [f"{freed / 1e6:.1f} MB removed"], as_json=as_json)


def _open(where: Path | None) -> Repository:
    return Repository(directory(where))


def _parse(what: str) -> tuple[str, str, str]:
    """Model, ref or revision, task; the last two may be empty. Raises BadId."""
    head, _, ref = what.partition("@")
    model, colon, task = head.partition(":")
    return (
        parse_model(model),
        parse_ref_or_revision(ref) if ref else "",
        parse_name(task, "a task") if colon else "",
    )


def _choose(opened: Repository, what: str) -> Sequence[tuple[str, Any]]:
    model, ref, _ = _parse(what) if what else ("", "", "")
    return choose(opened, model, ref)


def _document(opened: Repository, model: str, revision: Any) -> dict[str, Any]:
    record = opened.record(model, revision)
    held: Held = opened.index()[model].revisions[revision]
    manifest, switches = opened.manifest(model, revision), Switches(opened.root, model)
    return {
        "model": model,
        "revision": revision,
        "commit": manifest.commit,
        "manifest_bytes": record.size,
        "bytes": held.bytes,
        "time": record.time,
        "refs": list(record.refs),
        "active": {ref: str(switches.path(ref)) for ref, now in switches.all().items() if now.active == revision},
        "signature": record.signature,
        **({"provenance": manifest.provenance.record()} if manifest.provenance else {}),
        "tasks": {name: [str(path) for path in opened.task(manifest, name)] for name in held.tasks},
        "files": [
            {"path": str(path), "size": layout.size, "sha256": layout.sha256}
            for path, layout in opened.files(manifest, held.files).items()
        ],
    }


def _lines(document: dict[str, Any]) -> Iterable[str]:
    yield f"{document['model']} {document['revision']}"
    refs = ", ".join(document["refs"]) or "-"
    yield f"  {document['bytes'] / 1e6:.1f} MB since {_day(document['time'])}, refs: {refs}"
    for path in document["active"].values():
        yield f"  active {path}"
    signature = document["signature"]
    if signature:
        yield f"  signed, version {signature['version']}, by {', '.join(key[:16] for key in signature['signatures'])}"
    if made := document.get("provenance"):
        yield f"  made by federated round {made['round']} of {made['sites']} sites ({made['rule']}) upon {made['base']}"
        if rejected := made["rejected"]:
            yield f"  refused: {', '.join(f'{count} {code}' for code, count in rejected.items())}"
        if "epsilon" in made:
            yield f"  differential privacy: epsilon {made['epsilon']:.3g} at delta {made['delta']:g}"
    for name, paths in document["tasks"].items():
        yield f"  task {name}: {paths[0]}"
    for file in document["files"]:
        yield f"  file {file['path']} ({file['size']} bytes)"


def _damage(found: Damage) -> dict[str, Any]:
    return {**asdict(found), "path": str(found.path)}


def _content(tasks: Sequence[str], files: Sequence[str]) -> str:
    parts = [f"tasks {', '.join(tasks)}"] if tasks else []
    return "; ".join([*parts, *([f"{len(files)} files"] if files else [])])


def _names(refs: Sequence[str], active: Sequence[str]) -> str:
    """Refs, those that are active with a star."""
    return ", ".join(f"{ref}{'*' * (ref in active)}" for ref in dict.fromkeys((*refs, *active))) or "-"


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")


def _say(document: object, lines: Iterable[str], *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(document) + "\n")
    else:
        sys.stdout.writelines(f"{line}\n" for line in lines)
