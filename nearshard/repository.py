"""The local repository: what a user has of models, shared by all of their processes.

    index.json                              what is held, for quick look-up; can be made again from the rest
    metadata/<org>/<name>/<revision>.manifest         the manifest, whose SHA-256 is the revision
    metadata/<org>/<name>/<revision>.json             hash, size, time, refs, and who signed that a ref means it
    metadata/<org>/<name>/<revision>.signed.json      the signed metadata that said so, as it came
    models/<org>/<name>/blobs/<SHA-256>               the bytes, each once: files and bodies of tasks, named by content
    models/<org>/<name>/<commit>/files/<path>         the model's files: hard links to blobs
    models/<org>/<name>/<commit>/tasks/<task>/<name>  a task's body and small files: hard links to blobs
    models/<org>/<name>/refs/<ref>                    to the revision that programs run (``nearshard.switches``)
    models/<org>/<name>/partial/                      what is being fetched (``nearshard.assembly``)
    models/<org>/<name>/lock                          held by who fetches or removes

A shard is a run of a blob, where the manifest says; a file that is one shard is that shard. So what is on disk is the
files themselves, once, and nothing beside them. What is *held* is what has its links; blobs without are removed.

``index.json`` has for each blob the size and time of change that it had when its bytes were last checked: a blob that
has them still is not read again before it is used. Small files are replaced in one step, under ``index.json.lock``.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from nearshard.assembly import MODE, Assembly, Place, damage, homes
from nearshard.placing import link, on_disk, place
from nearshard.switches import Switches
from shared import manifest as manifests
from shared.clock import Clock, SystemClock
from shared.codec import decode_json, encode_json
from shared.digest import Digest, digest_of, from_hash, hex_of
from shared.errors import DecodeError, IntegrityError, LocalError, NearshardError, NotFound
from shared.files import home, locked, replace_file
from shared.ids import parse_model
from shared.layout import Layout
from shared.manifest import Manifest

FORMAT = 1
MAX_INDEX = 64 << 20
PAUSE = 0.1
"""Seconds between two tries to have a lock that another process has."""
Stamp = tuple[int, int]
"""Size in bytes and time of the last change in nanoseconds."""


class InUse(LocalError):
    """Another process is fetching what should be removed."""

    code = "in_use"


class Active(LocalError):
    """What should be removed is what programs run."""

    code = "in_use"


@dataclass(frozen=True)
class Found:
    """How a revision was found."""

    ref: str
    """The name that meant it; empty where it was asked for by its digest."""
    private: bool
    evidence: bytes
    """The signed file that says what the ref means; may be empty."""


@dataclass(frozen=True)
class Record:
    """A revision in the repository, as ``metadata`` has it."""

    model: str
    revision: Digest
    size: int
    """Bytes of the manifest."""
    time: float
    """When it was first kept, in seconds since 1970."""
    refs: tuple[str, ...] = ()
    """Names that meant it when it was fetched by them."""
    private: bool = False
    signature: Mapping[str, Any] | None = None
    """Of the last ref: its role, version, the SHA-256 of the signed file beside, and its signatures by key id."""


@dataclass(frozen=True)
class Held:
    """What there is of a revision."""

    time: float
    refs: tuple[str, ...]
    tasks: tuple[str, ...]
    files: tuple[str, ...]
    bytes: int
    """Of the blobs that it uses, each once."""


@dataclass
class ModelIndex:
    """Of one model: revisions that are held, and blobs as they were when they were last checked."""

    revisions: dict[str, Held] = field(default_factory=dict)
    blobs: dict[str, Stamp] = field(default_factory=dict)


Index = dict[str, ModelIndex]
Links = Mapping[Path, Layout]
"""Where a file is seen in the repository, and what it is."""


def default_repository() -> Path:
    """NEARSHARD_REPOSITORY, or ``repository`` in our folder of the user's data."""
    named = os.environ.get("NEARSHARD_REPOSITORY", "")
    return Path(named).expanduser() if named else home("XDG_DATA_HOME", "~/.local/share") / "repository"


class Repository:
    """One repository. Methods block on the disk. Several processes may use it at once."""

    def __init__(self, root: Path | None = None, clock: Clock | None = None) -> None:
        """``root``: its directory; ``default_repository()`` by default."""
        self.root = (root or default_repository()).absolute()
        self._clock = clock or SystemClock()
        self._index_file = self.root / "index.json"

    def __repr__(self) -> str:
        return f"<Repository {self.root}>"

    # Where things are

    def folder(self, model: str) -> Path:
        """Of a model's bytes."""
        return self.root / "models" / model

    def blob(self, model: str, layout: Layout) -> Path:
        """Where the bytes of a layout are."""
        return self.folder(model) / "blobs" / layout.sha256

    def files(self, manifest: Manifest, paths: Iterable[str] | None = None) -> dict[Path, Layout]:
        """Where files of a revision (all by default) are seen."""
        folder = self.folder(manifest.model) / manifest.commit / "files"
        return {folder / path: manifest.file(path) for path in (manifest.files if paths is None else paths)}

    def task(self, manifest: Manifest, name: str) -> dict[Path, Layout]:
        """Where a task is seen, the body first."""
        task = manifest.task(name)
        folder = self.folder(manifest.model) / manifest.commit / "tasks" / task.name
        return {folder / task.filename: task.layout} | {folder / path: manifest.files[path] for path in task.files}

    def _metadata(self, model: str, revision: Digest, kind: str) -> Path:
        return self.root / "metadata" / model / f"{hex_of(revision)}.{kind}"

    # Metadata

    def manifest(self, model: str, revision: Digest) -> Manifest:
        """The manifest of a revision that is kept. Raises NotFound, IntegrityError where it is damaged."""
        try:
            with on_disk():
                data = self._metadata(model, revision, "manifest").read_bytes()
        except NearshardError:
            raise NotFound(f"{model} {revision} is not in {self.root}", code="unknown_revision") from None
        if digest_of(data) != revision:
            raise IntegrityError(f"the manifest of {model} {revision} in {self.root} is damaged")
        return manifests.decode(data)

    def record(self, model: str, revision: Digest) -> Record:
        """What is noted of a revision. Raises NotFound."""
        with suppress(OSError, DecodeError, KeyError, TypeError):
            data = self._metadata(model, revision, "json").read_bytes()
            kept = decode_json(data, MAX_INDEX)
            return Record(
                model,
                revision,
                int(kept["size"]),
                float(kept["time"]),
                tuple(kept["refs"]),
                kept["private"] is True,
                kept["signature"],
            )
        raise NotFound(f"{model} {revision} is not in {self.root}", code="unknown_revision")

    @on_disk()
    def note(self, manifest: Manifest, found: Found) -> None:
        """Keep a revision's metadata. Raises DiskError."""
        model, revision = manifest.model, manifest.revision
        try:
            record = self.record(model, revision)
        except NotFound:
            record = Record(model, revision, len(manifest.encoded), self._clock.time())
        refs = tuple(dict.fromkeys((*record.refs, found.ref))) if found.ref else record.refs
        signature = _signature(found.evidence) if found.evidence else record.signature
        new = replace(record, refs=refs, private=found.private, signature=signature)
        target = self._metadata(model, revision, "manifest")
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.stat().st_size != new.size or digest_of(target.read_bytes()) != revision:
            replace_file(target, manifest.encoded, sync=True)
        if found.evidence:
            replace_file(self._metadata(model, revision, "signed.json"), found.evidence, sync=True)
        if new != record or not self._metadata(model, revision, "json").exists():
            document = {"format": FORMAT, "sha256": hex_of(revision), **asdict(new)}
            replace_file(self._metadata(model, revision, "json"), encode_json(document), sync=True)

    # The index

    def index(self) -> Index:
        """What is held. Where the index is lost it is made from the rest, and no blob counts as checked."""
        with suppress(OSError, NearshardError, KeyError, TypeError, ValueError, AttributeError):
            return _decode(self._index_file.read_bytes())
        return self._rebuilt()

    def _rebuilt(self) -> Index:
        index: Index = {}
        for file in sorted((self.root / "metadata").glob("*/*/*.manifest")):
            with suppress(NearshardError, ValueError):
                model = parse_model(f"{file.parent.parent.name}/{file.parent.name}")
                revision = from_hash(bytes.fromhex(file.stem))
                held = self.held(self.manifest(model, revision))
                if held.tasks or held.files:
                    index.setdefault(model, ModelIndex()).revisions[revision] = held
        return index

    def held(self, manifest: Manifest) -> Held:
        """What has its links."""
        tasks = tuple(name for name in manifest.tasks if all(map(os.path.lexists, self.task(manifest, name))))
        files = tuple(path for link, path in zip(self.files(manifest), manifest.files, strict=True) if link.exists())
        layouts = {item.sha256: item.size for item in self.links(manifest, tasks, files).values()}
        try:
            record = self.record(manifest.model, manifest.revision)
        except NotFound:
            record = Record(manifest.model, manifest.revision, len(manifest.encoded), self._clock.time())
        return Held(record.time, record.refs, tasks, files, sum(layouts.values()))

    def links(self, manifest: Manifest, tasks: Sequence[str], files: Sequence[str]) -> dict[Path, Layout]:
        """Where these tasks and files of a revision are seen."""
        found = self.files(manifest, files)
        for name in tasks:
            found |= self.task(manifest, name)
        return found

    @contextmanager
    def _changing(self) -> Iterator[Index]:
        """The index, to be changed in the block. Raises DiskError."""
        with on_disk():
            self.root.mkdir(parents=True, exist_ok=True)
            with locked(self._index_file):
                index = self.index()
                yield index
                replace_file(self._index_file, _encode(index), sync=True)

    def rebuild(self) -> Index:
        """Make the index again from metadata and links; blobs are to be checked. Raises DiskError."""
        with self._changing() as index:
            index.clear()
            index |= self._rebuilt()
        return index

    # What a revision's bytes are

    def is_checked(self, index: Index, model: str, layout: Layout) -> bool:
        """Whether the bytes of a layout are there as they were when they were last checked."""
        known = index.get(model, ModelIndex()).blobs.get(layout.sha256)
        return known is not None and known == stamp_of(self.blob(model, layout))

    def has(self, model: str, links: Links) -> bool:
        """Whether all of this is held and as it was checked: nothing is to be done."""
        index = self.index()
        layouts = {layout.sha256: layout for layout in links.values()}
        return all(self.is_checked(index, model, layout) for layout in layouts.values()) and all(
            map(os.path.lexists, links)
        )

    def checked(self, right: Mapping[str, Mapping[str, Stamp]]) -> None:
        """These blobs, by model and name, were found right as they were then. Raises DiskError."""
        with self._changing() as index:
            for model, blobs in right.items():
                if model in index:
                    index[model].blobs |= blobs

    def hold(self, manifest: Manifest, links: Links) -> None:
        """All blobs of these links are there, and right: they are held from now on. Raises DiskError."""
        blobs = {layout.sha256: self.blob(manifest.model, layout) for layout in links.values()}
        for target, layout in links.items():
            link(blobs[layout.sha256], target)
        with self._changing() as index:
            mine = index.setdefault(manifest.model, ModelIndex())
            mine.blobs |= {name: stamp for name, blob in blobs.items() if (stamp := stamp_of(blob))}
            mine.revisions[manifest.revision] = self.held(manifest)

    def missing(self, manifest: Manifest, layouts: Sequence[Layout], *, check: bool) -> list[Layout]:
        """Those whose blobs are not there or not right; ``check``: read all, whatever is known. Raises DiskError."""
        index, model = self.index(), manifest.model
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            return [
                layout
                for layout in layouts
                if (check or not self.is_checked(index, model, layout))
                and damage(self.blob(model, layout), layout, manifest.shards, pool)
            ]

    @on_disk()
    def deliver(self, model: str, targets: Links) -> None:
        """Have files at ``targets`` outside, in place of what is there. Raises DiskError."""
        for target, layout in targets.items():
            place(self.blob(model, layout), target)

    def assembly(self, manifest: Manifest, layouts: Sequence[Layout]) -> Assembly:
        """For blobs that are missing; under the model's lock."""
        return Assembly(self.folder(manifest.model) / "partial", layouts, manifest.shards)

    def finish(self, manifest: Manifest, assembly: Assembly, layouts: Iterable[Layout]) -> None:
        """Give them their names. Raises DiskError."""
        targets = {self.blob(manifest.model, layout): layout for layout in layouts}
        assembly.finish(targets, MODE)
        partial = self.folder(manifest.model) / "partial"
        with suppress(OSError):
            partial.rmdir()

    def find(self, manifest: Manifest) -> Mapping[Digest, Sequence[Place]]:
        """Where shards may be in this model's blobs, whole; of all of its revisions that are kept."""
        found: dict[Digest, list[Place]] = {}
        for other in self._kept_manifests(manifest):
            layouts = {item.sha256: item for item in (*other.files.values(), *(t.layout for t in other.tasks.values()))}
            for layout in layouts.values():
                blob = self.blob(manifest.model, layout)
                if blob.exists():
                    for digest, position in homes(layout, other.shards).items():
                        found.setdefault(digest, []).append(Place(blob, position))
        return found

    def _kept_manifests(self, manifest: Manifest) -> Iterator[Manifest]:
        yield manifest
        for revision in self.index().get(manifest.model, ModelIndex()).revisions:
            if revision != manifest.revision:
                with suppress(NearshardError):
                    yield self.manifest(manifest.model, Digest(revision))

    # Locks

    @asynccontextmanager
    async def locked(self, model: str) -> AsyncIterator[None]:
        """While this process fetches for a model: others wait. Raises DiskError."""
        while (descriptor := self._try_lock(model)) is None:
            await self._clock.sleep(PAUSE)
        try:
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def _alone(self, model: str) -> Iterator[None]:
        """Raises InUse where another process fetches for the model."""
        descriptor = self._try_lock(model)
        if descriptor is None:
            raise InUse(f"another process is fetching {model}; try again when it is done")
        try:
            yield
        finally:
            os.close(descriptor)

    @on_disk()
    def _try_lock(self, model: str) -> int | None:
        """The descriptor that holds the lock; None where another process has it."""
        self.folder(model).mkdir(parents=True, exist_ok=True)
        file = self.folder(model) / "lock"
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_ino == file.stat().st_ino:  # else it was removed with the model meanwhile
                return descriptor
        os.close(descriptor)
        return None

    # Removing

    def remove(self, model: str, ref: str = "", task: str = "", *, force: bool = False) -> int:
        """Remove a model, a revision of it (by digest, or a ref that it was fetched by), or one task of these.

        ``force``: also of what is active. The bytes that are free now. Raises NotFound, InUse, Active, DiskError.
        """
        revisions, switches = self.revisions(model, ref), Switches(self.root, model)
        with on_disk(), self._alone(model), switches.locked():
            for name, switch in {} if force else switches.all().items():
                if switch.active in revisions:
                    raise Active(f"{switch.active[:19]} is active as {model}@{name}; --force removes it all the same")
            before = _size(self.folder(model))
            for revision in revisions:
                self._remove_links(model, revision, task)
            with self._changing() as index:
                self._forget(index, model, revisions)
                switches.forget(set(revisions) - index.get(model, ModelIndex()).revisions.keys())
            self._sweep(model)
            return before - _size(self.folder(model))

    def revisions(self, model: str, ref: str = "") -> list[Digest]:
        """The revisions of a model that are held, newest first; only what ``ref`` names. Raises NotFound."""
        held = self.index().get(model, ModelIndex()).revisions
        found = [Digest(name) for name in held if not ref or ref == name or ref in held[name].refs]
        if not found:
            raise NotFound(f"{model}{'@' if ref else ''}{ref} is not in {self.root}", code="unknown_model")
        return sorted(found, key=lambda name: -held[name].time)

    def _remove_links(self, model: str, revision: Digest, task: str) -> None:
        folder = self.folder(model) / hex_of(revision)[:40]
        if not task:
            shutil.rmtree(folder, ignore_errors=True)
            return
        if not (folder / "tasks" / task).is_dir():
            raise NotFound(f"{model}:{task} is not in {self.root}", code="unknown_task")
        shutil.rmtree(folder / "tasks" / task)

    def _forget(self, index: Index, model: str, revisions: Sequence[Digest]) -> None:
        mine = index.setdefault(model, ModelIndex())
        for revision in revisions:
            with suppress(IntegrityError):  # a damaged manifest says nothing: all of it goes
                held = self.held(self.manifest(model, revision))
                if held.tasks or held.files:
                    mine.revisions[revision] = held
                    continue
            mine.revisions.pop(revision, None)
            for kind in ("signed.json", "json", "manifest"):
                self._metadata(model, revision, kind).unlink(missing_ok=True)
        used = set(self._used(model, mine))
        mine.blobs = {name: stamp for name, stamp in mine.blobs.items() if name in used}
        if not mine.revisions:
            del index[model]

    def _used(self, model: str, mine: ModelIndex) -> Iterator[str]:
        for revision, held in mine.revisions.items():
            manifest = self.manifest(model, Digest(revision))
            for layout in self.links(manifest, held.tasks, held.files).values():
                yield layout.sha256

    def _sweep(self, model: str) -> None:
        """Remove the blobs that nothing refers to; all of a model that is gone."""
        mine = self.index().get(model)
        if mine is None:
            shutil.rmtree(self.folder(model), ignore_errors=True)
            with suppress(OSError):
                (self.root / "metadata" / model).rmdir()
            return
        used = set(self._used(model, mine))
        for blob in (self.folder(model) / "blobs").iterdir():
            if blob.name not in used:
                blob.unlink()
        shutil.rmtree(self.folder(model) / "partial", ignore_errors=True)


def _signature(evidence: bytes) -> dict[str, Any]:
    """Of a signed file of The Update Framework: what it is and who signed it."""
    document = json.loads(evidence)
    signed = document["signed"]
    return {
        "version": signed["version"],
        "expires": signed["expires"],
        "sha256": hex_of(digest_of(evidence)),
        "signatures": {item["keyid"]: item["sig"] for item in document["signatures"]},
    }


def stamp_of(file: Path) -> Stamp | None:
    """Of a file; None where there is none."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _size(folder: Path) -> int:
    """Bytes of the files in a folder, each once."""
    found = {}
    for file in folder.rglob("*"):
        status = file.lstat()
        found[status.st_ino] = status.st_size if file.is_file() else 0
    return sum(found.values())


def _encode(index: Index) -> bytes:
    return encode_json({"format": FORMAT, "models": {name: asdict(mine) for name, mine in sorted(index.items())}})


def _decode(data: bytes) -> Index:
    """Raises DecodeError, BadId, KeyError, TypeError, ValueError, AttributeError."""
    document = decode_json(data, MAX_INDEX)
    if document["format"] != FORMAT:
        raise ValueError("an index of another format")
    index: Index = {}
    for name, mine in document["models"].items():
        revisions = {
            revision: Held(
                float(held["time"]), tuple(held["refs"]), tuple(held["tasks"]), tuple(held["files"]), int(held["bytes"])
            )
            for revision, held in mine["revisions"].items()
        }
        blobs = {blob: (int(size), int(changed)) for blob, (size, changed) in mine["blobs"].items()}
        index[parse_model(name)] = ModelIndex(revisions, blobs)
    return index
