"""``nearshard import``: publish a model that is somewhere else already: at a hub, in another network, in a directory.

From a hub it comes through huggingface_hub, so that endpoints, tokens, proxies and caches are those that its users have
set; from another network of ours by ``nearshard pull``, which checks it by that network's signatures. What is fetched
lies in a folder until it is published: twice the model's size for that time. A second try finds it there.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from origin.config import beside
from origin.hub_listing import EXCLUDED, HubFile, HubRevision, is_repo, is_revision_name, without
from origin.model_dir import refuse_pickle
from origin.publish_command import (
    DEFAULT_GAIN,
    DEFAULT_LIMIT,
    DEFAULT_TARGET,
    Base,
    Ca,
    Compress,
    Deltas,
    EffortName,
    Json,
    Keys,
    LeastGain,
    Origin,
    Pieces,
    Private,
    Publishing,
    Routers,
    ShardLimit,
    ShardTarget,
    Store,
    Tasks,
    Token,
    TrustRootFile,
    read_cut,
    read_making,
)
from origin.signing import Source
from shared.errors import (
    BadId,
    ConfigError,
    DiskError,
    NearshardError,
    NotFound,
    PublishError,
    RequestError,
    UpstreamError,
)
from shared.files import locked
from shared.ids import DEFAULT_REF, parse_model, parse_ref
from shared.manifest import check_paths
from shared.token_file import given_token
from shared.web.command import run_program

_HF = re.compile(r"hf://([^@]+?)(?:@(.+))?")
_PAGE = re.compile(r"([^/]+/[^/]+?)/?(?:/tree/([^/]+)/?)?")
_NETWORK = re.compile(r"(https?://[^/?#@]+)/models/([^/@?#]+/[^/@?#]+)(?:@([^/?#]+))?")
_ADVICE = (
    "an import is from hf://org/model[@revision], from a model's page at the hub, from another network of nearshard"
    " (http://host:8700/models/org/name[@ref]), or from a directory; what is anywhere else, fetch and unpack first"
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@dataclass(frozen=True)
class Fetched:
    """A model in a directory. ``expected``: what its files are by the word of where it is from."""

    directory: Path
    source: Source | None = None
    expected: Mapping[str, str] = field(default_factory=dict)


@app.command(name="import", epilog="Example: nearshard import hf://sentence-transformers/all-MiniLM-L6-v2 demo/minilm")
def command(
    what: Annotated[
        str,
        typer.Argument(
            metavar="FROM", help="hf://org/model[@revision], http://host:8700/models/org/name[@ref], or a directory."
        ),
    ],
    model: Annotated[
        str, typer.Argument(metavar="[MODEL]", help="Name to publish it under; as it is called there by default.")
    ] = "",
    ref: Annotated[
        str, typer.Option(help="Name that will mean this revision; by default the branch or tag that it is of.")
    ] = "",
    exclude: Annotated[
        list[str] | None, typer.Option(help="Files to leave out, as a glob over paths; again for more.")
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Where files are until they are published; beside the store by default.")
    ] = None,
    tasks: Tasks = None,
    store: Store = None,
    keys: Keys = None,
    origin: Origin = "",
    trust_root: TrustRootFile = None,
    token_file: Token = None,
    private: Private = False,
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
    """Fetch a model from a hub or another network, and publish it here."""
    cut = read_cut(shard_target, shard_limit, pieces=pieces)
    cut |= read_making(base, effort, least_gain, deltas=deltas, compress=compress)
    name, revision, place = parse_from(what)
    wanted_ref = ref or (revision if _is_ref(revision) else DEFAULT_REF)
    publishing = Publishing(
        model or _own_name(name, what),
        wanted_ref,
        private,
        store,
        keys,
        origin,
        trust_root,
        ca,
        given_token(token_file),
    )
    if place == "directory":
        if exclude:
            raise ConfigError("--exclude is for what is fetched; for a directory say so in its nearshard.toml")
        publishing.run(Path(what), router, as_json=as_json, tasks_file=tasks, **cut)
        return
    publishing.check()
    folder = (work or beside(publishing.where) / "import") / publishing.model.replace("/", "~")
    with _kept_until_published(folder):
        if place == "hub":
            found = _from_hub(folder, name, revision, [*EXCLUDED, *(exclude or [])])
        else:
            found = _from_network(folder, place, name, revision, exclude or [])
        publishing.run(
            found.directory,
            router,
            as_json=as_json,
            tasks_file=tasks,
            source=found.source,
            expected=found.expected,
            **cut,
        )


def parse_from(what: str) -> tuple[str, str, str]:
    """The name, the revision (may be empty) and the kind of place: ``hub``, ``directory``, or a network's URL.

    Raises RequestError for what nothing can be imported from.
    """
    if match := _HF.fullmatch(what):
        return _hub_name(match[1].strip("/"), match[2] or "")
    if match := _NETWORK.fullmatch(what):
        try:
            return parse_model(match[2]), match[3] or DEFAULT_REF, match[1]
        except BadId as error:
            raise RequestError(f"{what}: {error}") from error
    if what.startswith(("http://", "https://")):
        for hub in _hubs():
            if what.startswith(hub + "/") and (match := _PAGE.fullmatch(what.removeprefix(hub + "/"))):
                return _hub_name(match[1], match[2] or "")
    if "://" in what:
        raise RequestError(f"{what}: {_ADVICE}")
    if not Path(what).is_dir():
        raise PublishError(f"{what}: not a directory; {_ADVICE}")
    return "", "", "directory"


def _hub_name(name: str, revision: str) -> tuple[str, str, str]:
    if not is_repo(name) or (revision and not is_revision_name(revision)):
        raise RequestError(f"hf://{name}@{revision}: not a name that a hub can have; {_ADVICE}")
    return name, revision, "hub"


def _own_name(name: str, what: str) -> str:
    """What a model is to be called here where nobody says. Raises RequestError."""
    try:
        return parse_model(name.lower())
    except BadId as error:
        raise RequestError(f"{what}: say what it is to be called here: nearshard import {what} org/name") from error


def _is_ref(text: str) -> bool:
    try:
        return parse_ref(text) == text
    except BadId:
        return False


@contextmanager
def _kept_until_published(folder: Path) -> Iterator[None]:
    """A folder for one import at a time, which is dropped at its end; kept where it fails, to be continued."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            yield
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise DiskError(f"{folder}: {error.strerror or error}") from error


# A hub


def _library() -> Any:
    """huggingface_hub, which not everybody needs. Raises ConfigError."""
    try:
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError:
        raise ConfigError("hf:// needs huggingface_hub: pip install 'nearshard[hub]'") from None
    return huggingface_hub


def _hubs() -> list[str]:
    """Whose pages are a hub's: where the library would ask, and what people copy from a browser."""
    known = ["https://huggingface.co", "https://hf.co"]
    try:
        return [str(_library().constants.ENDPOINT), *known]
    except ConfigError:
        return known


def _from_hub(folder: Path, name: str, revision: str, exclude: list[str]) -> Fetched:
    """A revision's files by huggingface_hub. Raises NotFound, RequestError, UpstreamError, ConfigError."""
    library = _library()
    if not sys.stderr.isatty():
        library.utils.disable_progress_bars()
    with _translated(library, name):
        info = library.HfApi().model_info(name, revision=revision or None, files_metadata=True)
        files = tuple(
            HubFile(entry.rfilename, entry.size or 0, entry.lfs.sha256 if entry.lfs else "") for entry in info.siblings
        )
        check_paths([file.path for file in files])
        found = without(HubRevision(info.id, info.sha, files), exclude)
        directory = folder / info.sha
        library.snapshot_download(
            info.id, revision=info.sha, local_dir=directory, ignore_patterns=[*exclude] or None, max_workers=4
        )
    expected = {}
    for file in found.files:
        location = directory / file.path
        if location.stat().st_size != file.size:
            raise UpstreamError(f"{file.path} has {location.stat().st_size} bytes, and not the {file.size} of the hub")
        try:
            refuse_pickle(file.path, location)
        except PublishError:
            location.unlink()
            sys.stderr.write(f"warning: {file.path} is left out: it is a pickle, which runs code when it is loaded\n")
            continue
        if file.sha256:
            expected[file.path] = file.sha256
    return Fetched(directory, Source(str(library.constants.ENDPOINT), info.id, info.sha), expected)


@contextmanager
def _translated(library: Any, name: str) -> Iterator[None]:
    """The library's errors as ours."""
    errors = library.errors
    try:
        yield
    except NearshardError:
        raise
    except errors.GatedRepoError as error:
        raise RequestError(
            f"{name} is not for everybody at the hub: ask for access there, then `hf auth login` or set HF_TOKEN",
            code="unauthorized",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise NotFound(
            f"the hub has no {name}, or shows it to others only: `hf auth login` or set HF_TOKEN", code="unknown_model"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise NotFound(f"{name} has no such revision at the hub", code="unknown_revision") from error
    except OSError as error:
        if error.errno:
            raise
        raise UpstreamError(f"{name} could not be fetched from {library.constants.ENDPOINT}: {error}") from error
    except Exception as error:  # of requests, httpx or httpx2, by version: they have no base in common
        raise UpstreamError(f"{name} could not be fetched from {library.constants.ENDPOINT}: {error}") from error


# Another network


def _from_network(folder: Path, url: str, model: str, ref: str, exclude: list[str]) -> Fetched:
    """A revision of another network, checked by its signatures. Raises what ``nearshard pull`` ends with."""
    if exclude:
        raise ConfigError("--exclude is for a hub: a network's revision is taken as it was signed")
    directory = folder / "files"
    words = ["pull", f"{model}@{ref}", "--router", url, "-o", str(directory), "--force", "--json"]
    done = subprocess.run([sys.executable, "-m", "nearshard", *words], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)  # it has said why
    last = json.loads(done.stdout.splitlines()[-1])  # of its events: what it did
    return Fetched(directory, Source(url, model, str(last["revision"])))


def main() -> None:
    """Run the command."""
    run_program(app, "nearshard import")


if __name__ == "__main__":
    main()
