"""Where the origin keeps things: one object store, a directory by default.

The tree, with every path made here::

    blobs/<2 hex>/<64 hex>                     a shard, named by its digest
    models/<org>/<name>/manifests/<64 hex>     a revision's manifest, named by its digest
    trust/<file>                               signed metadata: what refs mean (origin.trust_store)
    tmp/<random>                               a write in progress (directories only)

Invariant: an object under a final name is complete. A directory gets it as temporary file, fsync, rename;
a real object store by its own atomic put. Objects but ``trust/timestamp.json`` are never overwritten with other bytes.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError, PreconditionError
from obstore.store import LocalStore, from_url

from shared.digest import Digest, hex_of, parse_digest
from shared.errors import ConfigError, DiskError, NotFound
from shared.manifest import Manifest, decode

ABANDONED = timedelta(days=1)
"""A temporary file older than this belongs to no living publish."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A small object as it was read; ``tag`` tells it from others that were under its name."""

    data: bytes
    tag: str


class Storage:
    """Shards, manifests and refs in an object store. Safe to use from several processes."""

    def __init__(self, location: str) -> None:
        """``location``: a directory, or a URL that obstore knows. Raises ConfigError."""
        self.location = location
        self._root: Path | None = None
        self._unsynced: set[Path] = set()
        try:
            if "://" in location:
                self._store: Any = from_url(location)
            else:
                self._root = Path(location).expanduser().resolve()
                self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._store = LocalStore(self._root, mkdir=True)
        except (BaseError, OSError, ValueError) as error:
            raise ConfigError(f"store {location!r} cannot be opened: {error}") from error

    def __repr__(self) -> str:
        return f"<Storage {self.location}>"

    # Shards

    async def blob_size(self, digest: Digest) -> int:
        """Bytes of a shard. Raises NotFound."""
        with _translated("unknown_blob"):
            meta = await obstore.head_async(self._store, _blob(digest))
        return int(meta["size"])

    async def read_blob(self, digest: Digest, offset: int, length: int) -> memoryview:
        """``length`` bytes of a shard from ``offset`` on. Raises NotFound."""
        with _translated("unknown_blob"):
            data = await obstore.get_range_async(self._store, _blob(digest), start=offset, length=length)
        return memoryview(data)

    async def ensure_blob(self, digest: Digest, data: bytes) -> bool:
        """Store a shard that the caller has hashed, unless it is there. Gives whether it was stored.

        Durable after the next ``sync``, also where an earlier publish was killed before its own.
        """
        with suppress(NotFound):
            if await self.blob_size(digest) == len(data):
                self._unsynced.update(self._folders(_blob(digest)))
                return False
        await self._put(_blob(digest), data)
        return True

    # Manifests

    async def put_manifest(self, manifest: Manifest) -> None:
        """Store a manifest. Every shard that it lists must be stored and synced before."""
        await self._put(_manifest(manifest.model, manifest.revision), manifest.encoded)

    async def manifest(self, model: str, revision: Digest) -> Manifest:
        """A stored manifest. Raises NotFound; ManifestInvalid where the store is damaged."""
        return decode(await self._get(_manifest(model, revision), "unknown_revision"))

    async def has_manifest(self, model: str, revision: Digest) -> bool:
        """Whether a revision is there."""
        try:
            with _translated("unknown_revision"):
                await obstore.head_async(self._store, _manifest(model, revision))
        except NotFound:
            return False
        return True

    async def revisions(self, model: str) -> list[Digest]:
        """The stored revisions of a model, in no order that means anything."""
        paths = [path async for path in self._list(f"{_model(model)}/manifests")]
        return sorted(parse_digest("sha256:" + path.rpartition("/")[2]) for path in paths)

    # Signed metadata

    async def trust_file(self, name: str) -> Seen:
        """A file of the signed metadata. Raises NotFound."""
        with _translated("unknown_metadata"):
            result = await obstore.get_async(self._store, _trust(name))
            return Seen(bytes(await result.bytes_async()), str(result.meta["e_tag"]))

    async def trust_files(self) -> list[str]:
        """The names of all of them."""
        return [path.rpartition("/")[2] async for path in self._list("trust")]

    async def create_trust(self, name: str, data: bytes) -> bool:
        """Store a file unless there is one of that name; durable on return. Of two who try, one is told True."""
        with _translated("disk"):
            if self._root is not None:
                return await asyncio.to_thread(_link_new, self._root, _trust(name), data)
            try:
                await obstore.put_async(self._store, _trust(name), data, mode="create", use_multipart=False)
            except AlreadyExistsError:
                return False
            return True

    async def replace_trust(self, name: str, data: bytes, seen: Seen) -> bool:
        """Replace a file in one step where it is still what was ``seen``; durable on return. Else gives False."""
        with _translated("disk"):
            if self._root is not None:
                return await asyncio.to_thread(_replace_seen, self._root, _trust(name), data, seen.data)
            try:
                mode: Any = {"e_tag": seen.tag}
                await obstore.put_async(self._store, _trust(name), data, mode=mode, use_multipart=False)
            except (PreconditionError, NotFoundError, FileNotFoundError):
                return False
            return True

    # Durability

    async def sync(self) -> None:
        """Make every name that was written before durable. The bytes behind the names are already."""
        folders, self._unsynced = self._unsynced, set()
        with _translated("disk"):
            await asyncio.to_thread(_fsync_all, folders)

    async def sweep(self, now: datetime) -> int:
        """Drop temporary files that no living publish can own. Gives how many."""
        dropped = 0
        async for path in self._list("tmp", older_than=now - ABANDONED):
            with suppress(FileNotFoundError):
                await obstore.delete_async(self._store, path)
                dropped += 1
        return dropped

    async def _put(self, path: str, data: bytes | bytearray | memoryview) -> None:
        with _translated("disk"):
            if self._root is None:
                await obstore.put_async(self._store, path, data, use_multipart=False)
                return
            temporary = f"tmp/{secrets.token_hex(8)}"
            try:
                await obstore.put_async(self._store, temporary, data, use_multipart=False)
                await asyncio.to_thread(_fsync_all, [self._root / temporary])
                await obstore.rename_async(self._store, temporary, path)
            except BaseException:
                with suppress(BaseError, OSError):
                    await obstore.delete_async(self._store, temporary)
                raise
            self._unsynced.update(self._folders(path))

    def _folders(self, path: str) -> list[Path]:
        """The folders whose names lead to an object: new ones are to be made durable too."""
        root = self._root
        return [folder for folder in (root / path).parents if folder.is_relative_to(root)] if root else []

    async def _get(self, path: str, missing: str) -> bytes:
        with _translated(missing):
            result = await obstore.get_async(self._store, path)
            return bytes(await result.bytes_async())

    async def _list(self, prefix: str, older_than: datetime | None = None) -> AsyncIterator[str]:
        with _translated("disk"):
            async for batch in obstore.list(self._store, prefix):
                for meta in batch:
                    if older_than is None or meta["last_modified"] < older_than:
                        yield str(meta["path"])


@contextmanager
def _translated(missing: str) -> Iterator[None]:
    """The store's errors as ours: no foreign exception leaves this module."""
    try:
        yield
    except FileNotFoundError as error:
        raise NotFound("not in the store", code=missing if missing != "disk" else "unknown_path") from error
    except (BaseError, OSError) as error:
        raise DiskError(f"the store failed: {error}") from error


def _link_new(root: Path, path: str, data: bytes) -> bool:
    """Give ``path`` these bytes unless it is there: temporary file, fsync, link, which one of two does first."""
    final = root / path
    final.parent.mkdir(exist_ok=True)
    with _temporary(root, data) as temporary:
        try:
            os.link(temporary, final)
        except FileExistsError:
            return False
    _fsync_all([final.parent, root])
    return True


def _replace_seen(root: Path, path: str, data: bytes, seen: bytes) -> bool:
    """Replace ``path`` where it still has the bytes ``seen``. A lock keeps others out between the look and the rename;
    the kernel takes it from whoever is killed."""
    final = root / path
    descriptor = os.open(final.with_name(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if not final.is_file() or final.read_bytes() != seen:
            return False
        with _temporary(root, data) as temporary:
            temporary.rename(final)
        _fsync_all([final.parent])
        return True
    finally:
        os.close(descriptor)


@contextmanager
def _temporary(root: Path, data: bytes) -> Iterator[Path]:
    """A synced file with these bytes, gone at the end unless it was renamed."""
    temporary = root / "tmp" / secrets.token_hex(8)
    temporary.parent.mkdir(exist_ok=True)
    try:
        with temporary.open("xb") as opened:
            opened.write(data)
            opened.flush()
            os.fsync(opened.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _fsync_all(paths: list[Path] | set[Path]) -> None:
    """fsync files or folders. A failed fsync means lost data, so it is never tried twice."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _blob(digest: Digest) -> str:
    name = hex_of(digest)
    return f"blobs/{name[:2]}/{name}"


def _model(model: str) -> str:
    return f"models/{model}"


def _manifest(model: str, revision: Digest) -> str:
    return f"{_model(model)}/manifests/{hex_of(revision)}"


def _trust(name: str) -> str:
    return f"trust/{name}"
