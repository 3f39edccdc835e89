"""Bytes at paths, in a directory or in an object store: the one module that knows obstore.

Invariant: an object under its name is complete. An object store does that by its own atomic put; a directory by
temporary file, fsync, link or rename. obstore does not fsync, so a directory's writes are ours.

obstore's calls block, in threads of ours. Its asynchronous ones end in a thread of its own that takes Python's lock,
which aborts a process that ends at that moment (PyO3/pyo3-async-runtimes#40: every second short command).
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import re
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NewType, TypeVar
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import LocalStore, from_url

from shared.errors import ConfigError, DiskError, NotFound, StoreError

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

T = TypeVar("T")
Buffer = bytes | bytearray | memoryview
Version = NewType("Version", str)
"""What tells two contents of one path apart, for ``replace``; it says nothing about what the bytes are."""

READ = 1 << 20
"""Bytes given at a time, or a little more: nothing buffers a whole shard."""
THREADS = 32
"""Calls at a time. An object store answers each after a round trip, so there are to be many."""
TMP = "tmp"
LOCK = ".lock"
SCHEMES = ("s3", "s3a", "gs", "az", "azure", "adl", "abfs", "abfss", "memory")

_CONNECT = timedelta(seconds=2)
_IDLE = timedelta(seconds=10)
"""A read that brings nothing for so long has failed."""
_WRITE = timedelta(minutes=5)
"""For one put, which is at most a shard: nothing tells how far it is. 32 MiB at 1 Mbit/s."""
DELETE = timedelta(seconds=5)
"""A delete is done by then, or failed: it is not repeated (``origin.keeping`` relies on it)."""
_READ_IN_ALL = timedelta(hours=6)
"""A slow reader may take its time over a shard; obstore's own bound would be 30 s."""
_RETRY: RetryConfig = {
    "max_retries": 2,
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5), "base": 2},
    "retry_timeout": timedelta(seconds=30),
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One object of a listing; ``modified`` is the store's time."""

    path: str
    size: int
    modified: datetime


class Objects:
    """Objects below one prefix of an object store. Paths are relative, with ``/``. Safe to use from several processes.

    All but ``entries`` raise NotFound where nothing is there (code ``unknown_path``), DiskError or StoreError.
    """

    def __init__(self, reading: Any, writing: Any, deleting: Any) -> None:
        self._reading, self._writing, self._deleting = reading, writing, deleting
        self._threads = ThreadPoolExecutor(THREADS, "store")

    async def head(self, path: str) -> Entry:
        """What is known of an object without its bytes."""
        return _entry(await self._run(lambda: obstore.head(self._reading, path)))

    async def get(self, path: str) -> tuple[bytes, Version]:
        """A small object, whole."""

        def get() -> tuple[bytes, Version]:
            result = obstore.get(self._reading, path)
            return bytes(result.bytes()), Version(result.meta["e_tag"] or "")

        return await self._run(get)

    async def read(self, path: str, offset: int, length: int) -> AsyncIterator[memoryview]:
        """``length`` bytes from ``offset`` on, about ``READ`` at a time, by one request."""
        if not length:
            return
        span = (offset, offset + length)
        result = await self._run(lambda: obstore.get(self._reading, path, options={"range": span}))
        if result.range != span:
            raise DiskError(f"{path} in the store is shorter than it should be")
        stream, left = result.stream(min_chunk_size=READ), length
        while left > 0 and (chunk := await self._run(lambda: next(stream, None))):
            left -= len(chunk)
            yield memoryview(chunk)
        if left:
            raise StoreError(f"{path}: the store gave {left} bytes fewer than it said")

    async def put(self, path: str, data: Buffer) -> None:
        """Store what only ever has these bytes (it is named by its digest). Durable after the next ``sync``."""
        await self._run(lambda: obstore.put(self._writing, path, _whole(data), use_multipart=False))

    async def put_file(self, path: str, file: Path) -> None:
        """Store what a file has, of any size, durably. The object is there whole or not at all."""
        await self._run(lambda: obstore.put(self._writing, path, file))

    @asynccontextmanager
    async def local(self, path: str, folder: Path) -> AsyncIterator[Path]:
        """A file of this machine with the bytes of an object, for as long as it is used: fetched into ``folder`` where
        the store is elsewhere. Raises NotFound."""
        size, file = (await self.head(path)).size, folder / secrets.token_hex(8)
        with file.open("xb") as opened:
            async for part in self.read(path, 0, size):
                await asyncio.to_thread(opened.write, part)
        try:
            yield file
        finally:
            file.unlink()

    async def create(self, path: str, data: Buffer) -> bool:
        """Store these bytes if nothing is there, durably. Gives whether they were stored.

        Where the answer of an object store was lost on its way, False may be for one's own write: compare.
        """

        def create() -> bool:
            try:
                obstore.put(self._writing, path, _whole(data), mode="create", use_multipart=False)
            except AlreadyExistsError:
                return False
            return True

        return await self._run(create)

    async def replace(self, path: str, data: Buffer, expected: Version | None) -> Version | None:
        """Store these bytes, durably, if what is there is ``expected``; whatever is there, or nothing, for None.

        Gives the new version; None, and changes nothing, where something else is there, or nothing. As for
        ``create``, None may be for one's own write.
        """

        def replace() -> Version | None:
            mode: Any = "overwrite" if expected is None else {"e_tag": expected}
            try:
                result = obstore.put(self._writing, path, _whole(data), mode=mode, use_multipart=False)
            except PreconditionError:
                return None
            return Version(result["e_tag"] or "")

        return await self._run(replace)

    async def delete(self, paths: Sequence[str]) -> None:
        """Remove objects, all within ``DELETE``; nothing happens where there is none. At most a thousand."""
        await self._run(lambda: obstore.delete(self._deleting, paths))

    async def entries(self, prefix: str) -> AsyncIterator[Entry]:
        """The objects below a folder, in no order that means anything. A thousand at a time are in memory."""
        batches = obstore.list(self._reading, prefix, chunk_size=1000)
        while (batch := await self._run(lambda: next(batches, None))) is not None:
            for meta in batch:
                yield _entry(meta)

    async def folders(self, prefix: str) -> list[str]:
        """The names of the folders right below a folder, sorted: all at once in memory."""
        found = await self._run(lambda: obstore.list_with_delimiter(self._reading, prefix))
        return sorted(path.rpartition("/")[2] for path in found["common_prefixes"])

    async def sync(self) -> None:
        """Make all names that ``put`` gave durable. An object store's are already."""

    def to_be_synced(self, path: str) -> None:
        """Have the next ``sync`` make this name durable, though another process gave it."""

    async def _run(self, call: Callable[[], T]) -> T:
        """A call of the store, in a thread, its errors as ours."""

        def translated() -> T:
            with self._translated():
                return call()

        return await asyncio.get_running_loop().run_in_executor(self._threads, translated)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """The store's errors as ours: no foreign exception leaves this module.

        What an object store answered is not passed on as it is: signed requests are quoted in there.
        """
        try:
            yield
        except FileNotFoundError:
            raise NotFound("not in the store", code="unknown_path") from None
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise StoreError(f"the store refuses access ({_status(error)})", code="store_denied") from None
        except BaseError as error:
            if re.search(r"kind: Timeout|timed out", str(error)):
                raise StoreError(code="store_timeout") from None
            raise StoreError(f"the store failed ({_status(error)})") from None


class Directory(Objects):
    """Objects in a directory of this machine: what obstore gives, made durable."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        store = LocalStore(root)
        super().__init__(store, store, store)
        self._root = root
        self._unsynced: set[Path] = set()

    async def get(self, path: str) -> tuple[bytes, Version]:
        """A small object, whole; its version is a digest of it."""
        data, _ = await super().get(path)
        return data, _version(data)

    async def read(self, path: str, offset: int, length: int) -> AsyncIterator[memoryview]:
        """As of any store; but each part is asked for on its own, since a file costs no round trip."""
        for start in range(offset, offset + length, READ):
            size = min(READ, offset + length - start)
            part = await self._run(lambda: obstore.get_range(self._reading, path, start=start, length=size))  # noqa: B023
            if len(part) != size:
                raise DiskError(f"{path} in the store is shorter than it should be")
            yield memoryview(part)

    async def put(self, path: str, data: Buffer) -> None:
        """As of any store."""
        await self._run(lambda: self._write(path, [data], os.replace))
        self.to_be_synced(path)

    async def put_file(self, path: str, file: Path) -> None:
        """As of any store."""

        def put() -> None:
            with file.open("rb") as opened:
                self._write(path, iter(lambda: opened.read(READ), b""), os.replace)
            _fsync_all(self._folders(path))

        await self._run(put)

    @asynccontextmanager
    async def local(self, path: str, folder: Path) -> AsyncIterator[Path]:
        """As of any store: it is a file of this machine."""
        await self.head(path)
        yield self._root / path

    async def create(self, path: str, data: Buffer) -> bool:
        """As of any store."""

        def create() -> bool:
            try:
                self._write(path, [data], os.link)
            except FileExistsError:
                return False
            _fsync_all(self._folders(path))
            return True

        return await self._run(create)

    async def replace(self, path: str, data: Buffer, expected: Version | None) -> Version | None:
        """As of any store; one at a time, by a lock on a file of the directory."""

        def replace() -> Version | None:
            with self._locked():
                if expected is not None:
                    try:
                        there = (self._root / path).read_bytes()
                    except FileNotFoundError:
                        return None
                    if _version(there) != expected:
                        return None
                self._write(path, [data], os.replace)
                _fsync_all(self._folders(path))
            return _version(data)

        return await self._run(replace)

    async def delete(self, paths: Sequence[str]) -> None:
        """As of any store. Not synced: what comes back after a power cut is garbage still."""

        def delete() -> None:
            for path in paths:
                (self._root / path).unlink(missing_ok=True)

        await self._run(delete)

    async def sync(self) -> None:
        """fsync the folders of all new names."""
        folders, self._unsynced = self._unsynced, set()
        await self._run(lambda: _fsync_all(folders))

    def to_be_synced(self, path: str) -> None:
        """As of any store."""
        self._unsynced.update(self._folders(path))

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise NotFound("not in the store", code="unknown_path") from None
        except (BaseError, OSError) as error:
            raise DiskError(f"the store failed: {str(error).partition(chr(10))[0]}") from error

    def _write(self, path: str, parts: Iterable[Buffer], give_name: Callable[[Path, Path], None]) -> None:
        """A durable temporary file, then its name. Leaves nothing where it fails."""
        final, temporary = self._root / path, self._root / TMP / secrets.token_hex(8)
        for folder in (final.parent, temporary.parent):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                for part in parts:
                    left = memoryview(part)
                    while left:
                        left = left[os.write(descriptor, left) :]
                os.fsync(descriptor)  # a failed one means lost data, so it is never tried twice
            finally:
                os.close(descriptor)
            give_name(temporary, final)
        finally:
            temporary.unlink(missing_ok=True)

    def _folders(self, path: str) -> set[Path]:
        """The folders whose names lead to an object: new ones are to be made durable too."""
        return {folder for folder in (self._root / path).parents if folder.is_relative_to(self._root)}

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self._root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def open_objects(location: str) -> Objects:
    """The objects at ``location``: a directory, or an ``s3://``, ``gs://`` or ``az://`` URL with an optional prefix.

    Endpoint, region and credentials of an object store come from its usual environment variables, as obstore reads
    them. Raises ConfigError.
    """
    scheme = urlsplit(location).scheme if "://" in location else "file"
    try:
        if scheme == "file":
            name = unquote(urlsplit(location).path) if "://" in location else location
            return Directory(Path(name).expanduser().resolve())
        if scheme not in SCHEMES:
            raise ConfigError(f"store {shown(location)!r}: not a directory, nor a URL of {', '.join(SCHEMES)}")
        if scheme == "memory":
            store = from_url(location)
            return Objects(store, store, store)
        common: ClientConfig = {"connect_timeout": _CONNECT, "allow_http": _allow_http()}
        reading: ClientConfig = {**common, "read_timeout": _IDLE, "timeout": _READ_IN_ALL}
        writing: ClientConfig = {**common, "timeout": _WRITE}
        deleting: ClientConfig = {**common, "timeout": DELETE}
        return Objects(
            from_url(location, client_options=reading, retry_config=_RETRY),
            from_url(location, client_options=writing, retry_config=_RETRY),
            from_url(location, client_options=deleting, retry_config={"max_retries": 0}),
        )
    except (BaseError, OSError, ValueError) as error:
        why = f": {error}" if scheme == "file" else f" ({type(error).__name__})"
        raise ConfigError(f"store {shown(location)!r} cannot be opened{why}") from None


def shown(location: str) -> str:
    """A location for people: what could be a secret in a URL is left out."""
    if "://" not in location:
        return location
    parts = urlsplit(location)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def _allow_http() -> bool:
    """As the environment says: client options that are given take the place of its own."""
    return any(os.environ.get(f"{name}_ALLOW_HTTP", "").lower() in ("1", "true") for name in ("AWS", "AZURE", "GOOGLE"))


def _whole(data: Buffer) -> bytes | memoryview:
    return memoryview(data) if isinstance(data, bytearray) else data


def _entry(meta: Any) -> Entry:
    return Entry(str(meta["path"]), int(meta["size"]), meta["last_modified"])


def _version(data: Buffer) -> Version:
    return Version(hashlib.sha256(data).hexdigest())


def _status(error: BaseError) -> str:
    """What may be said of an object store's error: status and code, else obstore's name for it."""
    text = str(error)
    found = [re.search(r"status code: (\d{3})", text), re.search(r"<Code>(\w{1,64})</Code>", text)]
    return ", ".join(match[1] for match in found if match) or type(error).__name__


def _fsync_all(paths: set[Path]) -> None:
    """fsync folders. A failed fsync means lost names, so it is never tried twice."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
