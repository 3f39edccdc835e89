"""Bundles (``shared.bundle``) of a client: made from what the repository and the network have; taken into a repository,
or handed to a node."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from nearshard.assembly import Assembly, Place, Places, read_shard
from nearshard.client import Client
from nearshard.operate import Access, call
from nearshard.placing import on_disk
from nearshard.repository import Found, Repository
from nearshard.room import check_room
from nearshard.transfer import Progress
from shared.bundle import END, Index, entry_name, head, padding, pick, wanted
from shared.digest import Digest, digest_of, hex_of
from shared.errors import BadId, NotFound
from shared.files import replace_file, sync_folder
from shared.ids import is_revision, parse_model, parse_ref_or_revision
from shared.layout import Layout
from shared.manifest import Manifest
from shared.paths import BUNDLE
from shared.tasks import end
from shared.unbundling import Unbundling
from shared.web.trusted import Brought

AHEAD = 4
"""Shards that are had ahead of the one that is written."""
CHUNK = 4 << 20


@dataclass(frozen=True)
class Bundled:
    """A bundle that was made or taken in. Sizes in bytes."""

    model: str
    ref: str
    revision: Digest
    base: Digest | None
    size: int
    """Of the shards and parcels in it."""
    saved: int
    """Bytes of the shards that it stands for, beyond these."""


async def export_bundle(
    client: Client,
    model: str,
    ref: str,
    output: Path,
    *,
    tasks: Sequence[str] = (),
    base: str = "",
    progress: Progress | None = None,
) -> Bundled:
    """Write what ``ref`` means to a bundle. ``tasks``: only these; ``base``: a ref or revision whose shards whoever
    gets it has. Raises as ``Client.get``; BadId for a revision: what is in a bundle is signed as a ref; DiskError."""
    parse_model(model)
    if is_revision(parse_ref_or_revision(ref)):
        raise BadId("a bundle is of a ref: that is what was signed, and what can be verified")
    await client.revision(model, ref)
    target, files = await (await client.trusted()).carry(model, ref)
    manifest = await client.manifest(model, target.revision)
    before = await client.manifest(model, base) if base else None
    asked = wanted(manifest, tasks)
    blobs = pick(manifest, asked, before.shards if before else {})
    trust = {name: digest_of(data) for name, data in files.items()}
    sizes = [(entry_name("trust", digest_of(data)), len(data)) for data in dict.fromkeys(files.values())]
    sizes.append((entry_name("manifests", manifest.revision), len(manifest.encoded)))
    sizes += [(entry_name("blobs", digest), manifest.size_of(digest)) for digest in blobs]
    index = Index(model, ref, manifest.revision, trust, tuple(sizes), tuple(tasks), before.revision if before else None)
    writing = await asyncio.to_thread(_Writing, output, index)
    try:
        for data in (*dict.fromkeys(files.values()), manifest.encoded):
            await asyncio.to_thread(writing.add, data)
        async for shard in _ahead(await client.reader(manifest), blobs):
            await asyncio.to_thread(writing.add, shard)
            if progress:
                progress(writing.blobs, index.size)
        await asyncio.to_thread(writing.finish)
    finally:
        writing.close()
    whole = sum(manifest.shards[digest] for digest in asked)
    return Bundled(model, ref, manifest.revision, index.base, index.size, max(0, whole - index.size))


async def _ahead(read: Callable[[Digest], Any], blobs: Sequence[Digest]) -> AsyncIterator[memoryview]:
    """Blobs in order, the next ones under way."""
    coming: deque[asyncio.Task[memoryview]] = deque()
    left = iter(blobs)
    try:
        while True:
            while len(coming) < AHEAD and (digest := next(left, None)):
                coming.append(asyncio.create_task(read(digest)))
            if not coming:
                return
            yield await coming.popleft()
    finally:
        await end(coming)


class _Writing:
    """A bundle that is being written under another name. Blocks on the disk. Raises DiskError."""

    @on_disk()
    def __init__(self, output: Path, index: Index) -> None:
        self._output, self._index = output, index
        self._names = iter(index.entries)
        self._part = output.with_name(f".{output.name}.part")
        self.blobs = 0
        """Bytes of shards written."""
        check_room({output: sum(size for _, size in index.entries)})
        self._file: BinaryIO = self._part.open("wb")
        self._file.write(index.encode())

    def add(self, data: bytes | memoryview) -> None:
        """The next entry."""
        name, size = next(self._names)
        with on_disk():
            self._file.write(head(name, size))
            self._file.write(data)
            self._file.write(padding(size))
        self.blobs += size if name.startswith("blobs/") else 0

    def finish(self) -> None:
        """All is there: give it its name."""
        with on_disk():
            self._file.write(END)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._part.replace(self._output)
            sync_folder(self._output.absolute().parent)

    def close(self) -> None:
        """What has no name yet goes."""
        self._file.close()
        self._part.unlink(missing_ok=True)


async def import_bundle(
    client: Client, file: Path, *, tasks: Sequence[str] = (), progress: Progress | None = None
) -> Bundled:
    """Take a bundle into the client's repository: no network is needed. ``tasks``: of a whole model, those to hold
    besides its files. Raises BundleInvalid, BaseMissing, TrustError, NotFound, DiskError."""
    trusted = await client.trusted()
    holder = _RepositoryHolder(client.repository, tasks)
    taking = Unbundling(trusted, holder)
    async with holder.stack:
        manifest = await taking.take(_chunks(file, progress))
    index = taking.index
    assert index is not None
    whole = sum(manifest.shards[digest] for digest in wanted(manifest, index.tasks))
    return Bundled(index.model, index.ref, index.revision, index.base, taking.moved, max(0, whole - taking.moved))


async def hand_over(node: Access, file: Path, progress: Progress | None = None) -> Mapping[str, Any]:
    """Have a node take a bundle in. Raises what it answers, as the error it is; UpstreamError where it does not."""
    return await call(node, "POST", BUNDLE, data=_chunks(file, progress))


async def _chunks(file: Path, progress: Progress | None) -> AsyncIterator[bytes]:
    """Raises DiskError."""
    with on_disk():
        opened = await asyncio.to_thread(file.open, "rb")
    with opened:
        total, had = os.fstat(opened.fileno()).st_size, 0
        while True:
            with on_disk():
                chunk = await asyncio.to_thread(opened.read, CHUNK)
            if not chunk:
                return
            had += len(chunk)
            yield chunk
            if progress:
                progress(had, total)


class _RepositoryHolder:
    """A repository that takes a bundle in: files are put together as for a download, under the model's lock."""

    def __init__(self, repository: Repository, tasks: Sequence[str]) -> None:
        self._repository, self._tasks = repository, tasks
        self.stack = AsyncExitStack()
        """What is let go at the end."""
        self._links: Mapping[Path, Layout] = {}
        self._missing: list[Layout] = []
        self._assembly: Assembly | None = None
        self._needed: set[Digest] = set()
        self._others: set[Digest] = set()
        """Parcels, and what they are upon."""
        self._spool = Path()
        self._places: Places = {}
        self._manifest: Manifest | None = None

    async def begin(self, manifest: Manifest, brought: Brought, index: Index) -> None:
        """Under the lock from here on."""
        repository, model = self._repository, manifest.model
        self._links = self._choose(manifest, index)
        await self.stack.enter_async_context(repository.locked(model))
        self._manifest = manifest
        found = Found(index.ref, brought.target.private, brought.evidence)
        await asyncio.to_thread(repository.note, manifest, found)
        layouts = {layout.sha256: layout for layout in self._links.values()}
        self._missing = await asyncio.to_thread(repository.missing, manifest, list(layouts.values()), check=False)
        self._assembly = repository.assembly(manifest, self._missing)
        self._places = await asyncio.to_thread(repository.find, manifest)
        await asyncio.to_thread(self._assembly.prepare, self._places)
        self._needed = set(self._assembly.needed())
        self._others = {delta.parcel for delta in manifest.deltas} | manifest.others.keys()
        self._spool = repository.folder(model) / "partial" / "parcels"

    def _choose(self, manifest: Manifest, index: Index) -> Mapping[Path, Layout]:
        """What is held of it: the tasks that it is of; of a whole model its files, and the tasks that cost nothing
        beside them. Raises NotFound."""
        repository = self._repository
        if index.tasks and (absent := set(self._tasks) - set(index.tasks)):
            raise NotFound(
                f"the bundle has only {', '.join(index.tasks)}, not {', '.join(absent)}", code="unknown_task"
            )
        tasks, files = self._tasks or index.tasks, () if index.tasks else tuple(manifest.files)
        if not index.tasks:
            there = {layout.sha256 for layout in manifest.files.values()}
            free = [name for name, task in manifest.tasks.items() if task.layout.sha256 in there]
            tasks = list(dict.fromkeys((*tasks, *free)))
        return repository.links(manifest, tasks, files)

    def wanted(self) -> Sequence[Digest]:
        """Of all files that are not whole yet."""
        return list(self._needed)

    def has(self, digest: Digest) -> bool:
        """In some file, or spooled."""
        if digest in self._needed:
            return False
        return bool(self._at(digest)) or (digest in self._others and self._spooled(digest).exists())

    async def put(self, digest: Digest, data: bytes) -> None:
        """A shard at its place; a parcel, or what it is upon, beside, until the end; anything else nowhere."""
        if digest in self._needed:
            await self._land(digest, data)
        elif digest in self._others:
            await asyncio.to_thread(self._keep, digest, data)

    async def read(self, digest: Digest) -> bytes | None:
        """Checked."""
        assert self._manifest is not None
        spooled = [Place(self._spooled(digest), 0)] if digest in self._others else []
        for place in (*self._at(digest), *spooled):
            data = await asyncio.to_thread(read_shard, place, digest, self._manifest.size_of(digest))
            if data is not None:
                return data
        return None

    async def finish(self) -> None:
        """All is there: give it its names."""
        manifest = self._manifest
        assert self._assembly is not None and manifest is not None
        await asyncio.to_thread(shutil.rmtree, self._spool, ignore_errors=True)
        await asyncio.to_thread(self._repository.finish, manifest, self._assembly, self._missing)
        await asyncio.to_thread(self._repository.hold, manifest, self._links)

    def _at(self, digest: Digest) -> Sequence[Place]:
        assert self._assembly is not None
        return [*self._assembly.places(digest), *self._places.get(digest, ())]

    def _spooled(self, digest: Digest) -> Path:
        return self._spool / hex_of(digest)

    @on_disk()
    def _keep(self, digest: Digest, data: bytes) -> None:
        self._spool.mkdir(parents=True, exist_ok=True)
        replace_file(self._spooled(digest), data)

    async def _land(self, digest: Digest, data: bytes) -> None:
        assert self._assembly is not None
        landing = self._assembly.landing(digest)
        try:
            await landing.begin()
            landing.restart()
            await landing.write(data)
            await landing.settle()
        finally:
            landing.close()
        await asyncio.to_thread(self._assembly.landed, digest)
        self._needed.discard(digest)
