"""Publishing: a model directory becomes shards, a manifest and a ref; to a store at hand or to an origin afar.

1. Read the directory and its tasks; refuse what is wrong before anything is stored.
2. Decide the cuts and make the tasks' headers (pure, ``origin.cutting``).
3. Read every file once; each shard is hashed, and stored where it is not there yet. The hashes of files, of tasks
   and of their pieces run along, each in threads of its own, so nothing is read twice.
4. Make and store the parcels of shards that are new (``origin.deltas``); these are read a second time. Where the ref
   means the same files and tasks already, its revision stays, whatever it has deltas from.
5. Make all that durable, claim it (``origin.keeping``), then store the manifest, then sign what the ref means now. A
   publish that is killed before it signed shows nothing; one that is repeated finds everything there and changes
   nothing.

Memory: a few shards (at most 32 MiB each), whatever the size of the model.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pyfastcdc import FastCDC

from origin.cutting import LIMIT, TARGET, Cut, Members, cut_tensors, piece_length, public_names, task_tensors
from origin.deltas import DEFAULT, Made, Making, add_deltas
from origin.hashing import BodyHash, Update
from origin.model_dir import (
    SMALL_FILE,
    SourceFile,
    TaskSpec,
    match_files,
    match_tensors,
    read_sources,
)
from origin.signing import Ref, Source
from shared.deltas import bytes_moved, ways
from shared.digest import Digest, digest_of
from shared.errors import DiskError, IntegrityError, PublishError, TasksError, first_error
from shared.ids import DEFAULT_REF, DEFAULT_TASK
from shared.layout import Layout, Slice, Span, join
from shared.manifest import MAX_PIECES, MAX_TENSORS, Manifest, Task, Tensor
from shared.tensorfile import TensorHeader, make_header

CHUNK_MIN, CHUNK_AVERAGE, CHUNK_MAX = 1 << 20, 4 << 20, 16 << 20
"""Content-defined chunks of files that are not safetensors: the library's upper bounds; 5 MiB on average."""
IN_FLIGHT = 96 << 20
"""Bytes of shards that are being hashed and stored while the next ones are read."""
ATTEMPTS = 3
"""Times that shards are stored which gc takes away before they are claimed: it does so once at most."""


class Progress(Protocol):
    """What publishing tells whoever watches: bytes done of the total."""

    def __call__(self, done: int, total: int) -> None: ...


class Sink(Protocol):
    """Where a publish goes: a store at hand (``LocalSink``), or an origin (``origin.remote.RemoteSink``)."""

    async def begin(self, model: str, ref: str, *, private: bool) -> Ref | None:
        """Make ready; what the ref means now, None where it means nothing to whom this is for. Raises RequestError
        (``not_publisher``) or ConfigError where it could not be signed for in the end."""
        ...

    async def ensure_blob(self, digest: Digest, data: memoryview) -> bool:
        """Store a shard that the caller has hashed, unless it is there. Gives whether it was stored."""
        ...

    async def manifest(self, model: str, ref: str, *, private: bool) -> Manifest | None:
        """The manifest that a ref or revision means to whom this is for; None where there is none that may be read."""
        ...

    async def read_blob(self, digest: Digest) -> bytes:
        """A shard that is stored, checked. Raises NotFound, IntegrityError."""
        ...

    async def put_manifest(self, manifest: Manifest) -> bool:
        """Store a manifest, after all of its shards and parcels; all is durable on return. False, and nothing is
        stored, where some that were there are gone: gc swept them before they were claimed (``origin.keeping``)."""
        ...

    async def move_ref(
        self,
        model: str,
        ref: str,
        manifest: Manifest,
        before: Ref | None,
        source: Source | None = None,
        *,
        private: bool,
    ) -> bool:
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
    parcels: int = 0
    """Parcels that were made of new shards."""
    parcel_bytes: int = 0
    """Bytes of those that were not in the store before."""
    shard_bytes: int = 0
    """Bytes of all shards, headers of tasks among them."""
    first_bytes: int = 0
    """Bytes that who holds nothing fetches, of all shards."""
    parent: Digest | None = None
    """The revision that it was published over."""
    new_bytes: int = 0
    """Bytes of the shards that the parent does not have."""
    moved_bytes: int = 0
    """Bytes that who holds the parent fetches in their place."""
    unread: int = 0
    """Shards without a delta because the parent's could not be read."""


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
    pieces: bool = True,
    source: Source | None = None,
    expected: Mapping[str, str] | None = None,
    base: str = "",
    making: Making = DEFAULT,
    progress: Progress = lambda done, total: None,
) -> Published:
    """Publish ``directory`` as ``model`` and make ``ref`` mean it. ``target``, ``limit``: bytes of a shard; ``source``:
    where it was taken from, ``expected``: the SHA-256 (64 hex digits) that files by their paths must have, if any.

    ``base``: the ref or revision that deltas are from; what the ref means now by default, else what ``main`` means.
    ``making``: which parcels are made. ``pieces``: whether pieces are hashed for other people's downloaders; where not,
    one piece holds all of any file.

    Raises PublishError, TensorFileError or TasksError for input that is refused (nothing is visible then),
    RequestError (``not_publisher``; ``ref_conflict`` where somebody else moved the ref meanwhile), ConfigError,
    DiskError where the store fails, UpstreamError where the origin does, IntegrityError for a file that is not as
    ``expected``.
    """
    before = await sink.begin(model, ref, private=private)
    specs, sources = await asyncio.to_thread(read_sources, directory, tasks_file)
    current = await sink.manifest(model, before.revision, private=private) if before else None
    parent = current
    if base or not before:
        parent = await sink.manifest(model, base or DEFAULT_REF, private=private)
        if base and parent is None:
            raise PublishError(
                f"{model} has no ref or revision {base!r} to make deltas from, or none that you may read"
            )
    for attempt in range(ATTEMPTS):
        writer = _Writer(sink, sum(source.size for source in sources), progress)
        manifest = await _store(writer, model, specs, sources, target, limit, pieces=pieces)
        for path, digest in (expected or {}).items():
            if manifest.files[path].sha256 != digest:
                raise IntegrityError(f"{path}: not the bytes whose SHA-256 the hub named")
        same = next((known for known in (current, parent) if known and known.content == manifest), None)
        made = Made()
        if same and (same is current or not attempt):
            manifest = same
        else:
            writer.make_room()
            # what the parent's deltas need was stored by another publish: this one cannot store it again
            manifest, made = await add_deltas(
                sink, manifest, sources, writer.heads, parent, making, inherit=not attempt, progress=writer.encoded
            )
        changed = before is None or (before.revision, before.source) != (manifest.revision, source)
        here = not changed and current is not None  # not so where the store was lost, and its metadata restored
        if here or await sink.put_manifest(manifest):
            break
    else:
        raise DiskError("shards go from the store while they are published: is gc run without a grace period?")
    if changed:
        changed = await sink.move_ref(model, ref, manifest, before, source, private=private)
    return Published(
        model=model,
        ref=ref,
        revision=manifest.revision,
        changed=changed,
        shards=len(manifest.shards),
        stored=writer.stored,
        size=writer.total,
        stored_bytes=writer.stored_bytes,
        tasks=tuple(manifest.tasks),
        parcels=made.parcels,
        parcel_bytes=made.stored_bytes,
        shard_bytes=sum(manifest.shards.values()),
        first_bytes=bytes_moved(manifest, ways(manifest, manifest.shards, lambda _: False)),
        unread=made.unread,
        **(_since(manifest, parent) if parent else {}),
    )


def _since(manifest: Manifest, parent: Manifest) -> dict[str, Any]:
    """What it costs to come from the parent, for ``Published``."""
    new = {digest: size for digest, size in manifest.shards.items() if digest not in parent.shards}
    moved = bytes_moved(manifest, ways(manifest, new, parent.shards.__contains__))
    return {"parent": parent.revision, "new_bytes": sum(new.values()), "moved_bytes": moved}


async def _store(
    writer: _Writer,
    model: str,
    specs: Sequence[TaskSpec],
    sources: Sequence[SourceFile],
    target: int,
    limit: int,
    *,
    pieces: bool,
) -> Manifest:
    """Cut, hash and store all files; the manifest that describes them."""
    headers = {source.path: source.tensors for source in sources if source.tensors}
    names = public_names(headers)
    members = _members(specs, {names[key]: key for key in names}, bool(headers))
    tasks = _tasks(specs, sources, names, members)

    sizes = {source.path: source.size for source in sources}
    bodies = [*sizes.values(), *(sizes[task.source] if task.source else task.size for task in tasks)]
    length = piece_length(bodies, MAX_PIECES if pieces else 0)
    hashes = {task.name: _Lanes(BodyHash(task.size, length)) for task in tasks if not task.source}
    files: dict[str, Layout] = {}
    try:
        async with asyncio.TaskGroup() as group:
            for task in tasks:
                for start in range(0, len(task.header), limit):
                    part = task.header[start : start + limit]
                    stored = await writer.store(group, _held(part), [hashes[task.name]])
                    task.head.append(Slice(await stored, 0, len(part)))
                    writer.heads[await stored] = part
            for source in sources:
                cuts: AsyncIterator[_Shard]
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
    return Manifest(model, shards, files, finished, _tensors(headers, files), length)


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
    cuts: AsyncIterator[_Shard],
    hashes: Mapping[str, _Lanes],
    piece_length: int,
) -> Layout:
    """Store one file's shards; its bytes also go to the ``hashes`` of the tasks that use them."""
    whole = _Lanes(BodyHash(source.size, piece_length))
    stored: list[tuple[asyncio.Task[Digest], int]] = []
    async for shard in cuts:
        bodies = [whole, *(hashes[name] for name in shard.tasks & hashes.keys())]
        stored.append((await writer.store(group, shard, bodies), shard.size))
    slices = tuple([Slice(await digest, 0, size) for digest, size in stored])
    if sum(size for _, size in stored) != source.size:
        raise PublishError(f"{source.path}: changed while it was read")
    return Layout(source.size, whole.body.sha256, slices, whole.body.pieces)


@dataclass(frozen=True, slots=True)
class _Shard:
    """A shard that is to be read: its bytes, what puts them somewhere (in a thread), the tasks that use it."""

    size: int
    fill: Callable[[memoryview], None]
    tasks: Members = frozenset()


def _held(data: bytes | memoryview) -> _Shard:
    """A shard that is in memory."""

    def fill(into: memoryview) -> None:
        into[:] = data

    return _Shard(len(data), fill)


async def _read_cuts(source: SourceFile, cuts: Sequence[Cut]) -> AsyncIterator[_Shard]:
    with source.location.open("rb", buffering=0) as file:

        def fill(into: memoryview) -> None:
            while into:
                count = file.readinto(into)  # one call gives at most what it likes
                if not count:
                    raise PublishError(f"{source.path}: changed while it was read")
                into = into[count:]

        for cut in cuts:
            yield _Shard(cut.stop - cut.start, fill, cut.tasks)


async def _read_chunks(source: SourceFile, target: int) -> AsyncIterator[_Shard]:
    average = min(CHUNK_AVERAGE, target)
    cutter = FastCDC(
        average,
        min_size=min(CHUNK_MIN, average // 4),
        max_size=min(CHUNK_MAX, average * 4),
        normalized_chunking=2,
    )
    with source.location.open("rb", buffering=0) as file:
        chunks: Iterator[Any] = iter(cutter.cut_stream(file))
        while chunk := await asyncio.to_thread(next, chunks, None):
            yield _held(chunk.data)


class _Room:
    """One block of memory that shards are in while they are hashed and stored, taken and given back about in order.

    Shards of all sizes, allocated one by one by several threads, leave a heap several times as large as they are.
    """

    def __init__(self, size: int) -> None:
        self._memory = memoryview(bytearray(size))
        self._taken: deque[_Taken] = deque()
        self._change = asyncio.Condition()

    async def take(self, size: int) -> _Taken:
        """So many bytes, at most all there are; waits until they are free."""
        async with self._change:
            await self._change.wait_for(lambda: self._place(size) is not None)
            start = self._place(size) or 0
            taken = _Taken(start, self._memory[start : start + size])
            self._taken.append(taken)
            return taken

    async def give_back(self, taken: _Taken) -> None:
        """Nobody looks at these bytes any more."""
        async with self._change:
            taken.free = True
            while self._taken and self._taken[0].free:
                self._taken.popleft()
            self._change.notify_all()

    def _place(self, size: int) -> int | None:
        """Where the next bytes can be: behind the last that are taken, or at the start again."""
        if not self._taken:
            return 0
        first, last = self._taken[0].start, self._taken[-1]
        end = last.start + len(last.data)
        if last.start < first:
            return end if end + size <= first else None
        if end + size <= len(self._memory):
            return end
        return 0 if size <= first else None


@dataclass
class _Taken:
    """A part of the room."""

    start: int
    data: memoryview
    free: bool = False


class _Lanes:
    """The hashes of a body, each fed in order by threads, none waiting for another."""

    def __init__(self, body: BodyHash) -> None:
        self.body = body
        self._lanes = [(update, asyncio.Lock()) for update in body.updates]

    def feed(self, data: memoryview) -> list[Coroutine[Any, Any, None]]:
        """The steps that take ``data`` in: to be started in the order of the bytes, as locks are fair."""
        return [self._feed(update, lock, data) for update, lock in self._lanes]

    async def _feed(self, update: Update, lock: asyncio.Lock, data: memoryview) -> None:
        async with lock:
            await asyncio.to_thread(update, data)


class _Writer:
    """Hashes and stores shards behind the reader's back, a bounded number of bytes at a time."""

    def __init__(self, sink: Sink, total: int, progress: Progress) -> None:
        self.sizes: dict[Digest, int] = {}
        self.heads: dict[Digest, bytes] = {}
        """Shards that are in no file: headers of tasks."""
        self.stored = 0
        self.stored_bytes = 0
        self.total = total
        self._sink = sink
        self._room = _Room(IN_FLIGHT)
        self._done, self._progress = 0, progress

    def make_room(self) -> None:
        """All is stored: leave the memory to what comes next."""
        self._room = _Room(0)

    def encoded(self, size: int, left: int) -> None:
        """Bytes of shards were encoded, and so many are left."""
        self._done += size
        self._progress(self._done, self._done + left)

    async def store(self, group: asyncio.TaskGroup, shard: _Shard, bodies: Iterable[_Lanes]) -> asyncio.Task[Digest]:
        """Have a shard taken in by ``bodies``, hashed and stored by a task of ``group``, which gives its digest.

        Waits while too much is under way.
        """
        taken = await self._room.take(shard.size)
        await asyncio.to_thread(shard.fill, taken.data)
        return group.create_task(self._take(taken, bodies))

    async def _take(self, taken: _Taken, bodies: Iterable[_Lanes]) -> Digest:
        """Tasks begin in the order in which they are made, and so do these steps.

        After an error the room is not given back: threads may still be storing what is there.
        """
        feeds = asyncio.gather(*(feed for body in bodies for feed in body.feed(taken.data)))
        digest, _ = await asyncio.gather(self._put(taken.data), feeds)
        self._done += len(taken.data)
        self._progress(min(self._done, self.total), self.total)
        await self._room.give_back(taken)
        return digest

    async def _put(self, data: memoryview) -> Digest:
        digest = await asyncio.to_thread(digest_of, data)
        if digest not in self.sizes:
            self.sizes[digest] = len(data)
            if await self._sink.ensure_blob(digest, data):
                self.stored += 1
                self.stored_bytes += len(data)
        return digest


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


def _finish(task: _Task, files: Mapping[str, Layout], hashes: Mapping[str, _Lanes]) -> Task:
    if task.source:
        layout = files[task.source]
    else:
        data = (piece for path, span in task.parts for piece in files[path].cut(span))
        slices = join([*task.head, *data])
        body = hashes[task.name].body
        layout = Layout(sum(piece.length for piece in slices), body.sha256, slices, body.pieces)
    return Task(task.name, layout, task.filename, task.files, task.description)


def _shards(files: Mapping[str, Layout], tasks: Mapping[str, Task], sizes: Mapping[Digest, int]) -> dict[Digest, int]:
    """The shard table: what files and tasks use, in that order."""
    layouts = [*files.values(), *(task.layout for task in tasks.values())]
    used = dict.fromkeys(digest for layout in layouts for digest in layout.shards())
    return {digest: sizes[digest] for digest in used}
