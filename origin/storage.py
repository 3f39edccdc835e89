"""Where the origin keeps things: one object store, a directory by default.

The tree, with every path made here::

    blobs/<2 hex>/<64 hex>                     a shard, named by its digest
    models/<org>/<name>/manifests/<64 hex>     a revision's manifest, named by its digest
    models/<org>/<name>/refs/<ref>             JSON: the revision that a ref means, and since when
    tmp/<random>                               a write in progress (directories only)

Invariant: an object under a final name is complete. A directory gets it as temporary file, fsync, rename;
a real object store by its own atomic put. Objects but refs are never overwritten with other bytes.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, from_url

from shared import codec
from shared.digest import Digest, hex_of, parse_digest
from shared.errors import ConfigError, DecodeError, DiskError, NotFound
from shared.ids import as_revision, is_revision, parse_model, parse_ref
from shared.manifest import Manifest, decode

ABANDONED = timedelta(days=1)
"""A temporary file older than this belongs to no living publish."""


@dataclass(frozen=True, slots=True)
class Ref:
    """What a ref means, and since when (ISO 8601, UTC)."""

    revision: Digest
    published: str


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

    # Manifests and refs

    async def put_manifest(self, manifest: Manifest) -> None:
        """Store a manifest. Every shard that it lists must be stored and synced before."""
        await self._put(_manifest(manifest.model, manifest.revision), manifest.encoded)

    async def put_ref(self, model: str, ref: str, revision: Digest, now: datetime) -> None:
        """Make a ref mean a revision, whose manifest is stored and synced; durable on return."""
        record = {"revision": revision, "published": now.astimezone(UTC).isoformat(timespec="seconds")}
        await self._put(_ref(model, ref), codec.encode_json(record))
        await self.sync()

    async def ref(self, model: str, ref: str) -> Ref:
        """What a ref means. Raises NotFound: ``unknown_model`` or ``unknown_revision``."""
        try:
            record = codec.decode_json(await self._get(_ref(model, ref), "unknown_revision"))
            return Ref(parse_digest(record["revision"]), str(record["published"]))
        except NotFound:
            if not await self._any(f"{_model(model)}/refs"):
                raise NotFound(f"there is no model {model}", code="unknown_model") from None
            raise NotFound(f"{model} has no ref {ref!r}", code="unknown_revision") from None
        except (DecodeError, KeyError, TypeError) as error:
            raise DiskError(f"the ref {model}@{ref} in the store is damaged: {error}") from error

    async def resolve(self, model: str, ref: str) -> Digest:
        """The revision that a ref or revision means. Raises NotFound for a ref."""
        return as_revision(ref) if is_revision(ref) else (await self.ref(model, ref)).revision

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

    async def models(self) -> list[str]:
        """The models that have a ref, sorted."""
        names = set()
        async for path in self._list("models"):
            match path.split("/"):
                case [_, org, name, "refs", _]:
                    names.add(parse_model(f"{org}/{name}"))
                case _:
                    pass
        return sorted(names)

    async def refs(self, model: str) -> dict[str, Ref]:
        """The refs of a model. Raises NotFound for a model that has none."""
        paths = [path async for path in self._list(f"{_model(model)}/refs")]
        if not paths:
            raise NotFound(f"there is no model {model}", code="unknown_model")
        names = sorted(parse_ref(path.rpartition("/")[2]) for path in paths)
        return {name: await self.ref(model, name) for name in names}

    async def revisions(self, model: str) -> list[Digest]:
        """The stored revisions of a model, in no order that means anything."""
        paths = [path async for path in self._list(f"{_model(model)}/manifests")]
        return sorted(parse_digest("sha256:" + path.rpartition("/")[2]) for path in paths)

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

    async def _any(self, prefix: str) -> bool:
        async for _ in self._list(prefix):
            return True
        return False


@contextmanager
def _translated(missing: str) -> Iterator[None]:
    """The store's errors as ours: no foreign exception leaves this module."""
    try:
        yield
    except FileNotFoundError as error:
        raise NotFound("not in the store", code=missing if missing != "disk" else "unknown_path") from error
    except (BaseError, OSError) as error:
        raise DiskError(f"the store failed: {error}") from error


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


def _ref(model: str, ref: str) -> str:
    return f"{_model(model)}/refs/{ref}"
