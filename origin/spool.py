"""The files of a revision on their way from another hub: fetched once each, to disk, and read by others meanwhile.

Publishing needs all files of a model before it can cut the first one (tasks are made of tensors of several), and
whoever asks for one meanwhile wants it from any byte on. So each lies on disk until the model is published: twice the
model's size for that time. Each file is hashed as it comes; nobody is given the last byte of what was asked for before
the hash was right. What a fetch left behind is continued where the hub names the file's SHA-256, else begun again.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from origin.hub_client import Hub
from origin.hub_listing import HubFile, HubRevision, check_bytes
from origin.model_dir import refuse_pickle
from shared.errors import (
    DiskError,
    IntegrityError,
    LocalError,
    NearshardError,
    NotFound,
    PublishError,
    UpstreamError,
    first_error,
)
from shared.layout import Span

AT_ONCE = 4
"""Files that are fetched at a time."""
TRIES = 4
"""Times that a file is asked for before its failure is the revision's; each goes on where the one before broke off."""
PAUSE = 0.5
"""Seconds before the second try; twice that before each further one."""
BATCH = 1 << 20
"""Bytes that are written, hashed or read at a time, about."""
SPARE = 64 << 20
"""Bytes of the disk that are left free."""


Held = Callable[[HubFile], AsyncIterator[memoryview] | None]
"""The bytes of a file, where they are here already; they are hashed all the same."""


class SpooledFile:
    """One file. ``sha256`` is known once it is ``done``."""

    def __init__(self, file: HubFile, location: Path) -> None:
        self.file, self.location = file, location
        self.have = 0
        """Bytes that are on disk and hashed."""
        self.done = False
        self.sha256 = ""
        self.wanted = False
        """Whether somebody waits for it."""
        self._failure: NearshardError | None = None
        self._hash = hashlib.sha256()
        self._restarts = 0
        self._news = asyncio.Event()

    async def fetch(
        self, hub: Hub, found: HubRevision, sleep: Callable[[float], Awaitable[None]], held: Held = lambda _: None
    ) -> None:
        """Have it whole and checked. Raises UpstreamError, IntegrityError, DiskError."""
        try:
            await self._take_up()
            if not self.have and (parts := held(self.file)):
                await self._copy(parts)
            for attempt in range(TRIES):
                try:
                    await self._fetch(hub, found)
                    return
                except UpstreamError as error:
                    if attempt == TRIES - 1 or isinstance(error, IntegrityError):
                        raise
                await sleep(PAUSE * 2**attempt)
        except NearshardError as error:
            self.fail(error)
            raise

    def fail(self, error: NearshardError) -> None:
        """It is not coming: whoever reads it is told."""
        if not self.done:
            self._failure = error
            self._tell()

    async def known(self) -> str:
        """Its SHA-256: the hub's word where it has one, else once it is here. Raises what the fetch failed with."""
        self.wanted = True
        while not (self.file.sha256 or self.done):
            await self._wait()
        return self.file.sha256 or self.sha256

    async def read(self, span: Span) -> AsyncIterator[memoryview]:
        """The bytes of a span as they come; the last one once all of the file is found to be right.

        Raises what the fetch failed with; IntegrityError where it had to begin again with other bytes.
        """
        self.wanted = True
        restarts, at = self._restarts, span.start
        descriptor = -1
        try:
            while at < span.stop:
                ready = span.stop if self.done else min(self.have, span.stop - 1)
                if ready <= at:
                    await self._wait()
                    if restarts != self._restarts:
                        raise IntegrityError(f"{self.file.path}: the bytes that were here before are not the hub's")
                    continue
                if descriptor < 0:
                    descriptor = os.open(self.location, os.O_RDONLY | os.O_CLOEXEC)
                part = await asyncio.to_thread(os.pread, descriptor, min(BATCH, ready - at), at)
                if not part:
                    raise DiskError(f"{self.location}: shorter than it was")
                at += len(part)
                yield memoryview(part)
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    # Fetching

    async def _take_up(self) -> None:
        """Go on with what an earlier fetch left, hashed anew: what it was is not known."""

        def take_up() -> None:
            with _disk(self.location):
                self.location.parent.mkdir(parents=True, exist_ok=True)
                with self.location.open("ab+") as opened:
                    size = opened.tell() if self.file.sha256 else 0
                    opened.truncate(size if size <= self.file.size else 0)
                    opened.seek(0)
                    while part := opened.read(BATCH):
                        self._hash.update(part)
                        self.have += len(part)

        await asyncio.to_thread(take_up)

    async def _fetch(self, hub: Hub, found: HubRevision) -> None:
        """One try."""
        old = self.have
        if self.have < self.file.size:
            await self._take(hub, found)
        try:
            check_bytes(self.file, self.have, self._hash.hexdigest())
        except IntegrityError as error:
            self._begin_again()
            if old:  # it may be what was here before that is wrong
                raise UpstreamError(str(error)) from error
            raise
        await asyncio.to_thread(_sync, self.location)
        self.sha256, self.done = self._hash.hexdigest(), True
        self._tell()

    async def _copy(self, parts: AsyncIterator[memoryview]) -> None:
        """From what is here already; what the store does not give, the hub does."""
        try:
            async for part in parts:
                await self._write(part)
        except (NotFound, LocalError):
            self._begin_again()

    async def _take(self, hub: Hub, found: HubRevision) -> None:
        batch = bytearray()
        try:
            async with hub.body(found, self.file, self.have) as body:
                if body.start < self.have:  # the hub gives no parts
                    self._begin_again()
                async for chunk in body.chunks:
                    batch += chunk
                    if len(batch) >= BATCH:
                        await self._write(batch)
                        batch = bytearray()
                await self._write(batch)
        except NotFound as error:
            raise UpstreamError(f"the hub lists {self.file.path} and has it not", code="upstream_missing") from error
        except UpstreamError:
            await self._write(batch)  # what came is not asked for again
            raise

    async def _write(self, data: bytearray | memoryview) -> None:
        at = self.have

        def write() -> None:
            with _disk(self.location), self.location.open("rb+") as opened:
                opened.seek(at)
                opened.write(data)
            self._hash.update(data)

        await asyncio.to_thread(write)
        self.have += len(data)
        self._tell()

    def _begin_again(self) -> None:
        """From the first byte; who has read what was here cannot go on."""
        self.have, self._hash = 0, hashlib.sha256()
        self._restarts += 1
        self._tell()

    # Waiting

    async def _wait(self) -> None:
        """Until something has changed. Raises what the fetch failed with."""
        if self._failure:
            raise self._failure
        await self._news.wait()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


class Spool:
    """The files of one revision, in a folder of its own."""

    def __init__(self, found: HubRevision, folder: Path) -> None:
        self.found, self.folder = found, folder
        self.files = {file.path: SpooledFile(file, folder / file.path) for file in found.files}
        self.lock = asyncio.Lock()
        """Held by who fetches or publishes it."""
        self.left_out: list[str] = []
        """Files that were fetched and are not published: pickles under a name that does not say so."""

    @property
    def done(self) -> int:
        """Bytes that are here."""
        return sum(file.have for file in self.files.values())

    def file(self, path: str) -> SpooledFile:
        """A file, which is fetched next. Raises NotFound (``unknown_file``)."""
        try:
            return self.files[path]
        except KeyError:
            raise NotFound(f"no file {path!r}", code="unknown_file") from None

    async def fetch(self, hub: Hub, sleep: Callable[[float], Awaitable[None]], held: Held = lambda _: None) -> None:
        """Have all files whole and checked; what somebody waits for first, then small ones. Raises as a file does."""
        await asyncio.to_thread(self._check_room)
        left = sorted(self.files.values(), key=lambda file: file.file.size)

        async def work() -> None:
            while left:
                next_one = next((file for file in left if file.wanted), left[0])
                left.remove(next_one)
                await next_one.fetch(hub, self.found, sleep, held)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(AT_ONCE):
                    group.create_task(work())
        except BaseExceptionGroup as errors:
            error = first_error(errors)
            self.fail(error if isinstance(error, NearshardError) else UpstreamError("the fetch was given up"))
            raise error from None
        await asyncio.to_thread(self._leave_out_pickles)

    def hashes(self) -> dict[str, str]:
        """The SHA-256 of all files that are to be published, by path; once they are here."""
        return {path: file.sha256 for path, file in self.files.items() if path not in self.left_out}

    def fail(self, error: NearshardError) -> None:
        """Tell whoever reads a file that is not coming."""
        for file in self.files.values():
            file.fail(error)

    def remove(self) -> None:
        """Drop the folder. Who reads a file that is open goes on."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _check_room(self) -> None:
        """Before the first byte: whether they fit. Raises DiskError."""
        with _disk(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            here = sum(entry.stat().st_size for entry in self.folder.rglob("*") if entry.is_file())
            free = shutil.disk_usage(self.folder).free
        if free - SPARE < self.found.size - here:
            raise DiskError(f"{self.folder}: {self.found.size - here} bytes are to be fetched, and {free} are free")

    def _leave_out_pickles(self) -> None:
        for path, file in self.files.items():
            try:
                refuse_pickle(path, file.location)
            except PublishError:
                file.location.unlink()
                self.left_out.append(path)


def _sync(location: Path) -> None:
    with _disk(location):
        descriptor = os.open(location, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _disk(location: Path) -> Iterator[None]:
    """The disk's errors as ours."""
    try:
        yield
    except OSError as error:
        raise DiskError(f"{location}: {error.strerror}") from error
