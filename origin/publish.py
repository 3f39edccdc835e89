"""Publishing: a model directory becomes shards, a manifest and a ref; to a store at hand or to an origin afar.

1. Read the directory and its tasks; refuse what is wrong before anything is stored.
2. Decide the cuts and make the tasks' headers (pure, ``origin.cutting``).
3. Read every file once; each shard is hashed, and stored where it is not there yet. The hashes of files, of tasks
   and of their pieces run along, each in a thread of its own, so nothing is read twice.
4. Make all that durable, then store the manifest, then sign what the ref means now. A publish that is killed before
   it signed shows nothing; one that is repeated finds everything there and changes nothing.

Memory: a few shards (at most 32 MiB each), whatever the size of the model.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pyfastcdc import FastCDC

from origin.cutting import LIMIT, TARGET, Cut, Members, cut_tensors, piece_length, public_names, task_tensors
from origin.hashing import BodyHash, Update
from origin.model_dir import (
    SMALL_FILE,
    TASKS_FILE,
    SourceFile,
    TaskSpec,
    match_files,
    match_tensors,
    read_model_dir,
    read_tasks,
)
from origin.signing import Ref
from origin.tensorfile import TensorHeader, make_header
from shared.digest import Digest, digest_of
from shared.errors import PublishError, TasksError, first_error
from shared.ids import DEFAULT_TASK
from shared.layout import Layout, Slice, Span, join
from shared.manifest import MAX_TENSORS, Manifest, Task, Tensor

CHUNK_MIN, CHUNK_AVERAGE, CHUNK_MAX = 1 << 20, 4 << 20, 16 << 20
"""Content-defined chunks of files that are not safetensors: the library's upper bounds; 5 MiB on average."""
IN_FLIGHT = 64 << 20
"""Bytes of shards that are being stored while the next ones are read."""


class Progress(Protocol):
    """What publishing tells whoever watches: bytes done of the total."""

    def __call__(self, done: int, total: int) -> None: ...


class Sink(Protocol):
    """Where a publish goes: a store at hand (``LocalSink``), or an origin (``origin.remote.RemoteSink``)."""

    async def begin(self, model: str, ref: str, *, private: bool) -> Ref | None:
        """Make ready; what the ref means now, None where it means nothing to whom this is for. Raises RequestError
        (``not_publisher``) or ConfigError where it could not be signed for in the end."""
        ...

    async def ensure_blob(self, digest: Digest, data: bytes) -> bool:
        """Store a shard that the caller has hashed, unless it is there. Gives whether it was stored."""
        ...

    async def put_manifest(self, manifest: Manifest) -> None:
        """Store a manifest, after all of its shards; all is durable on return."""
        ...

    async def move_ref(self, model: str, ref: str, manifest: Manifest, before: Ref | None, *, private: bool) -> bool:
        """Sign that a ref means a revision, and make that visible; durable on return. Gives whether anything changed.
        Raises Conflict (``ref_conflict``) where the ref no longer means what it did before."""
        ...


@dataclass(frozen=True)
class Published:
    """What a publish did."""

    model: str
    ref: str
    revision: Digest
    changed: bool
    """False where the ref meant this revision already."""
    shards: int
    stored: int
    """Shards that were not in the store before."""
    size: int
    """Bytes of the model's files."""
    stored_bytes: int
    tasks: tuple[str, ...]


@dataclass
class _Task:
    """A task while it is being made. ``source`` is set where its body is a file as it stands."""

    name: str
    filename: str
    files: tuple[str, ...]
    description: str
    source: str = ""
    header: bytes = b""
    head: list[Slice] = field(default_factory=list)
    parts: list[tuple[str, Span]] = field(default_factory=list)
    """(file, span) of its tensors' data, in order."""

    @property
    def size(self) -> int:
        """Bytes of a body that is made of tensors."""
        return len(self.header) + sum(span.length for _, span in self.parts)


async def publish(
    sink: Sink,
    directory: Path,
    model: str,
    ref: str,
    *,
    private: bool = False,
    tasks_file: Path | None = None,
    target: int = TARGET,
    limit: int = LIMIT,
    progress: Progress = lambda done, total: None,
) -> Published:
    """Publish ``directory`` as ``model`` and make ``ref`` mean it. ``target``, ``limit``: bytes of a shard.

    Raises PublishError, TensorFileError or TasksError for input that is refused (nothing is visible then),
    RequestError (``not_publisher``; ``ref_conflict`` where somebody else moved the ref meanwhile), ConfigError,
    DiskError where the store fails, UpstreamError where the origin does.
    """
    before = await sink.begin(model, ref, private=private)
    default_tasks = directory / TASKS_FILE
    file = tasks_file or (default_tasks if default_tasks.is_file() else None)
    specs, exclude = await asyncio.to_thread(read_tasks, file)
    sources = await asyncio.to_thread(read_model_dir, directory, exclude)
    headers = {source.path: source.tensors for source in sources if source.tensors}
    names = public_names(headers)
    members = _members(specs, {names[key]: key for key in names}, bool(headers))
    tasks = _tasks(specs, sources, names, members)

    sizes = {source.path: source.size for source in sources}
    length = piece_length([*sizes.values(), *(sizes[task.source] if task.source else task.size for task in tasks)])
    hashes = {task.name: BodyHash(task.size, length) for task in tasks if not task.source}

    writer = _Writer(sink, sum(sizes.values()), progress)
    files: dict[str, Layout] = {}
    try:
        async with asyncio.TaskGroup() as group:
            for task in tasks:
                if not task.source:
                    hashes[task.name].update(task.header)
                for start in range(0, len(task.header), limit):
                    part = task.header[start : start + limit]
                    task.head.append(Slice(await writer.store(group, part), 0, len(part)))
            for source in sources:
                cuts: AsyncIterator[tuple[bytes, Members]]
                if source.tensors:
                    own = {t.name: members.get(names[source.path, t.name], frozenset()) for t in source.tensors.tensors}
                    cuts = _read_cuts(source, list(cut_tensors(source.tensors, own, target, limit)))
                else:
                    cuts = _read_chunks(source, target)
                files[source.path] = await _store_file(group, writer, source, cuts, hashes, length)
    except BaseExceptionGroup as errors:
        raise first_error(errors) from None
    finished = {task.name: _finish(task, files, hashes) for task in tasks}
    shards = _shards(files, finished, writer.sizes)
    manifest = Manifest(model, shards, files, finished, _tensors(headers, files), length)

    revision = manifest.revision
    changed = before is None or before.revision != revision
    if changed:
        await sink.put_manifest(manifest)
        changed = await sink.move_ref(model, ref, manifest, before, private=private)
    return Published(
        model=model,
        ref=ref,
        revision=revision,
        changed=changed,
        shards=len(manifest.shards),
        stored=writer.stored,
        size=sum(sizes.values()),
        stored_bytes=writer.stored_bytes,
        tasks=tuple(manifest.tasks),
    )


def _members(specs: Sequence[TaskSpec], tensors: Mapping[str, tuple[str, str]], weights: bool) -> dict[str, Members]:
    """Which tasks use each tensor, by public name."""
    members = {name: {DEFAULT_TASK} for name in tensors}
    for spec in specs:
        if spec.tensors and not weights:
            raise TasksError(f"tasks.{spec.name}: the model has no safetensors file")
        for name in match_tensors(spec, tensors) if spec.tensors else ():
            members[name].add(spec.name)
    return {name: frozenset(tasks) for name, tasks in members.items()}


def _tasks(
    specs: Sequence[TaskSpec],
    sources: Sequence[SourceFile],
    names: Mapping[tuple[str, str], str],
    members: Mapping[str, Members],
) -> list[_Task]:
    """The tasks to make: ``all`` where the model has one, then those of the tasks file."""
    by_path = {source.path: source for source in sources}
    headers = {source.path: source.tensors for source in sources if source.tensors}
    weights = [source.path for source in sources if source.is_weight]
    small = tuple(
        source.path
        for source in sources
        if not source.is_weight
        and source.size <= SMALL_FILE
        and not source.path.endswith(".index.json")
        and not Path(source.path).name.startswith(".")
    )
    tasks: list[_Task] = []
    if len(headers) == 1 or (not headers and len(weights) == 1):
        whole = next(iter(headers), None) or weights[0]
        tasks.append(_Task(DEFAULT_TASK, Path(whole).name, small, "the whole model", source=whole))
    elif headers:
        tasks.append(_Task(DEFAULT_TASK, "model.safetensors", small, "the whole model"))
    for spec in specs:
        files = match_files(spec.files, list(by_path), spec.name)
        if spec.file and spec.file not in by_path:
            raise TasksError(f"tasks.{spec.name}: there is no file {spec.file!r}")
        filename = Path(spec.file).name if spec.file else "model.safetensors"
        tasks.append(_Task(spec.name, filename, files, spec.description, source=spec.file))
    metadata = dict(next(iter(headers.values())).metadata) if headers else {}
    for task in tasks:
        clash = [path for path in task.files if path == task.filename]
        if clash and task.source != clash[0]:
            raise TasksError(f"tasks.{task.name}: {clash[0]!r} would overwrite the task's body")
        task.files = tuple(path for path in task.files if path != task.filename)
        if task.source:
            continue
        chosen = task_tensors(task.name, headers, names, members)
        task.header = make_header([(name, tensor) for _, name, tensor in chosen], metadata)
        for path, _, tensor in chosen:
            start = headers[path].data_start
            task.parts.append((path, Span(start + tensor.begin, start + tensor.end)))
    return tasks


async def _store_file(
    group: asyncio.TaskGroup,
    writer: _Writer,
    source: SourceFile,
    cuts: AsyncIterator[tuple[bytes, Members]],
    hashes: Mapping[str, BodyHash],
    piece_length: int,
) -> Layout:
    """Store one file's shards; its bytes also go to the ``hashes`` of the tasks that use them."""
    whole = BodyHash(source.size, piece_length)
    slices: list[Slice] = []
    async for data, users in cuts:
        updates: list[Update] = [*whole.updates]
        for name in users & hashes.keys():
            updates += hashes[name].updates
        hashing = asyncio.gather(*(asyncio.to_thread(update, data) for update in updates))
        digest, _ = await asyncio.gather(writer.store(group, data), hashing)
        slices.append(Slice(digest, 0, len(data)))
    size = sum(piece.length for piece in slices)
    if size != source.size:
        raise PublishError(f"{source.path}: changed while it was read")
    return Layout(size, whole.sha256, tuple(slices), whole.pieces)


async def _read_cuts(source: SourceFile, cuts: Sequence[Cut]) -> AsyncIterator[tuple[bytes, Members]]:
    with source.location.open("rb", buffering=0) as file:
        for cut in cuts:
            data = await asyncio.to_thread(_read_exactly, file.read, cut.stop - cut.start)
            if len(data) != cut.stop - cut.start:
                raise PublishError(f"{source.path}: changed while it was read")
            yield data, cut.tasks


async def _read_chunks(source: SourceFile, target: int) -> AsyncIterator[tuple[bytes, Members]]:
    average = min(CHUNK_AVERAGE, target)
    cutter = FastCDC(
        average,
        min_size=min(CHUNK_MIN, average // 4),
        max_size=min(CHUNK_MAX, average * 4),
        normalized_chunking=2,
    )
    with source.location.open("rb", buffering=0) as file:
        chunks: Iterator[Any] = iter(cutter.cut_stream(file))
        while chunk := await asyncio.to_thread(_next_chunk, chunks):
            yield chunk, frozenset()


def _next_chunk(chunks: Iterator[Any]) -> bytes:
    """The next chunk's bytes, copied out of the cutter's buffer; empty at the end."""
    chunk = next(chunks, None)
    return bytes(chunk.data) if chunk else b""


def _read_exactly(read: Callable[[int], bytes | None], size: int) -> bytes:
    """``size`` bytes, or fewer at the end of the file: one read call gives at most what it likes."""
    parts = []
    while size and (data := read(size)):
        parts.append(data)
        size -= len(data)
    return parts[0] if len(parts) == 1 else b"".join(parts)


class _Writer:
    """Stores shards behind the reader's back, a bounded number of bytes at a time."""

    def __init__(self, sink: Sink, total: int, progress: Progress) -> None:
        self.sizes: dict[Digest, int] = {}
        self.stored = 0
        self.stored_bytes = 0
        self._sink = sink
        self._in_flight = 0
        self._room = asyncio.Condition()
        self._done, self._total, self._progress = 0, total, progress

    async def store(self, group: asyncio.TaskGroup, data: bytes) -> Digest:
        """Hash ``data`` and have it stored by a task of ``group``; waits while too much is under way."""
        digest = await asyncio.to_thread(digest_of, data)
        if digest in self.sizes:
            self._advance(len(data))
            return digest
        self.sizes[digest] = len(data)
        async with self._room:
            await self._room.wait_for(lambda: self._in_flight + len(data) <= IN_FLIGHT or not self._in_flight)
            self._in_flight += len(data)
        group.create_task(self._put(digest, data))
        return digest

    async def _put(self, digest: Digest, data: bytes) -> None:
        try:
            if await self._sink.ensure_blob(digest, data):
                self.stored += 1
                self.stored_bytes += len(data)
            self._advance(len(data))
        finally:
            async with self._room:
                self._in_flight -= len(data)
                self._room.notify_all()

    def _advance(self, size: int) -> None:
        self._done += size
        self._progress(min(self._done, self._total), self._total)


def _tensors(headers: Mapping[str, TensorHeader], files: Mapping[str, Layout]) -> tuple[Tensor, ...]:
    """What the manifest says of tensors; nothing where there are too many."""
    if sum(len(header.tensors) for header in headers.values()) > MAX_TENSORS:
        return ()
    return tuple(
        Tensor(t.name, t.dtype, t.shape, path, _part(files[path], header.data_start, t.begin, t.end))
        for path, header in sorted(headers.items())
        for t in header.tensors
    )


def _part(layout: Layout, data_start: int, begin: int, end: int) -> tuple[Slice, ...]:
    return tuple(layout.cut(Span(data_start + begin, data_start + end)))


def _finish(task: _Task, files: Mapping[str, Layout], hashes: Mapping[str, BodyHash]) -> Task:
    if task.source:
        layout = files[task.source]
    else:
        data = (piece for path, span in task.parts for piece in files[path].cut(span))
        slices = join([*task.head, *data])
        body = hashes[task.name]
        layout = Layout(sum(piece.length for piece in slices), body.sha256, slices, body.pieces)
    return Task(task.name, layout, task.filename, task.files, task.description)


def _shards(files: Mapping[str, Layout], tasks: Mapping[str, Task], sizes: Mapping[Digest, int]) -> dict[Digest, int]:
    """The shard table: what files and tasks use, in that order."""
    layouts = [*files.values(), *(task.layout for task in tasks.values())]
    used = dict.fromkeys(digest for layout in layouts for digest in layout.shards())
    return {digest: sizes[digest] for digest in used}
