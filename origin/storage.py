"""Where the origin keeps things: one object store, a directory by default.

The tree, with every path made here::

    blobs/<2 hex>/<64 hex>                          a public shard, named by its digest
    models/<org>/<name>/blobs/<2 hex>/<64 hex>      a shard of a private model
    models/<org>/<name>/manifests/<64 hex>          a revision's manifest, named by its digest
    models/<org>/<name>/refs/<ref>                  JSON: the revision that a ref means, and since when
    tmp/<random>                                    a write in progress (directories only)

Objects but refs are never overwritten with other bytes. What a shard is, its digest says: never the store's ETag.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from origin.objects import TMP, Buffer, Entry, Objects, Version, open_objects, shown
from shared import codec
from shared.digest import Digest, hex_of, parse_digest
from shared.errors import BadId, DecodeError, DiskError, NotFound
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
    """Shards, manifests and refs in an object store. Safe to use from several processes.

    ``model`` of a shard is the private model whose shard it is; empty for a public one. Every method raises DiskError
    or StoreError where the store fails.
    """

    def __init__(self, location: str) -> None:
        """``location``: a directory, or a URL (``origin.objects.open_objects``). Raises ConfigError."""
        self.location = location
        self.objects: Objects = open_objects(location)

    def __repr__(self) -> str:
        return f"<Storage {shown(self.location)}>"

    # Objects by path

    async def get(self, path: str) -> tuple[bytes, Version]:
        """A small object and its version. Raises NotFound."""
        return await self.objects.get(path)

    async def create(self, path: str, data: Buffer) -> bool:
        """Store an object if there is none at this path; durable on return. Gives whether it was stored."""
        return await self.objects.create(path, data)

    async def replace(self, path: str, data: Buffer, expected: Version | None) -> Version | None:
        """Put an object in the place of ``expected`` (None: of whatever is there); durable on return.

        Gives its version; None where something else, or nothing, is there.
        """
        return await self.objects.replace(path, data, expected)

    async def paths(self, prefix: str) -> AsyncIterator[str]:
        """The paths below a folder, in no order that means anything."""
        async for entry in self.objects.entries(prefix):
            yield entry.path

    # Shards

    async def blob_size(self, digest: Digest, model: str = "") -> int:
        """Bytes of a shard. Raises NotFound."""
        with _missing("unknown_blob"):
            return (await self.objects.head(_blob(digest, model))).size

    async def stream_blob(self, digest: Digest, offset: int, length: int, model: str = "") -> AsyncIterator[memoryview]:
        """``length`` bytes of a shard from ``offset`` on, about 1 MiB at a time. Raises NotFound."""
        with _missing("unknown_blob"):
            async for part in self.objects.read(_blob(digest, model), offset, length):
                yield part

    async def ensure_blob(self, digest: Digest, data: Buffer, model: str = "") -> bool:
        """Store a shard that the caller has hashed, unless it is there. Gives whether it was stored.

        Durable after the next ``sync``, also where an earlier publish was killed before its own.
        """
        path = _blob(digest, model)
        with suppress(NotFound):
            if await self.blob_size(digest, model) == len(data):
                self.objects.to_be_synced(path)
                return False
        await self.objects.put(path, data)
        return True

    # Manifests and refs

    async def put_manifest(self, manifest: Manifest) -> None:
        """Store a manifest. Every shard that it lists must be stored and synced before."""
        await self.objects.put(_manifest(manifest.model, manifest.revision), manifest.encoded)

    async def put_ref(self, model: str, ref: str, revision: Digest, now: datetime) -> None:
        """Make a ref mean a revision, whose manifest is stored and synced; durable on return."""
        record = {"revision": revision, "published": now.astimezone(UTC).isoformat(timespec="seconds")}
        await self.replace(_ref(model, ref), codec.encode_json(record), None)

    async def ref(self, model: str, ref: str) -> Ref:
        """What a ref means. Raises NotFound: ``unknown_model`` or ``unknown_revision``."""
        try:
            record = codec.decode_json((await self.get(_ref(model, ref)))[0])
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
        with _missing("unknown_revision"):
            return decode((await self.get(_manifest(model, revision)))[0])

    async def has_manifest(self, model: str, revision: Digest) -> bool:
        """Whether a revision is there."""
        try:
            await self.objects.head(_manifest(model, revision))
        except NotFound:
            return False
        return True

    async def models(self) -> list[str]:
        """The models that have a ref, sorted."""
        return [model for model in await self.names() if await self._any(f"{_model(model)}/refs")]

    async def names(self) -> list[str]:
        """The models of which there is anything, sorted: also those that no ref makes visible."""
        found = []
        for org in await self.objects.folders("models"):
            found += [f"{org}/{name}" for name in await self.objects.folders(f"models/{org}")]
        return [parse_model(model) for model in found]

    async def refs(self, model: str) -> dict[str, Ref]:
        """The refs of a model. Raises NotFound for a model that has none."""
        paths = [path async for path in self.paths(f"{_model(model)}/refs")]
        if not paths:
            raise NotFound(f"there is no model {model}", code="unknown_model")
        names = sorted(parse_ref(path.rpartition("/")[2]) for path in paths)
        return {name: await self.ref(model, name) for name in names}

    async def revisions(self, model: str) -> list[Digest]:
        """The stored revisions of a model, in no order that means anything."""
        return sorted([digest_at(entry.path) async for entry in self.manifests(model)])

    # What is stored, with its time

    async def manifests(self, model: str) -> AsyncIterator[Entry]:
        """The manifests of a model; their time is when they were first published."""
        async for entry in self._named(f"{_model(model)}/manifests"):
            yield entry

    async def blobs(self, model: str = "") -> AsyncIterator[Entry]:
        """All shards; ``model`` as everywhere."""
        async for entry in self._named(f"{_model(model)}/blobs" if model else "blobs"):
            yield entry

    async def _named(self, prefix: str) -> AsyncIterator[Entry]:
        """The objects that are named by a digest. Others are not ours."""
        async for entry in self.objects.entries(prefix):
            with suppress(BadId):
                digest_at(entry.path)
                yield entry

    # Durability

    async def sync(self) -> None:
        """Make every name that was written before durable. The bytes behind the names are already."""
        await self.objects.sync()

    async def sweep(self, now: datetime) -> int:
        """Drop temporary files that no living publish can own. Gives how many."""
        paths = [entry.path async for entry in self.objects.entries(TMP) if entry.modified < now - ABANDONED]
        await self.objects.delete(paths)
        return len(paths)

    async def _any(self, prefix: str) -> bool:
        async for _ in self.paths(prefix):
            return True
        return False


@contextmanager
def _missing(code: str) -> Iterator[None]:
    """What is not there, by its own code."""
    try:
        yield
    except NotFound as error:
        raise NotFound(str(error), code=code) from None


def digest_at(path: str) -> Digest:
    """The digest that an object is named by. Raises BadId."""
    return parse_digest("sha256:" + path.rpartition("/")[2])


def _blob(digest: Digest, model: str = "") -> str:
    name = hex_of(digest)
    return f"{_model(model)}/blobs/{name[:2]}/{name}" if model else f"blobs/{name[:2]}/{name}"


def _model(model: str) -> str:
    return f"models/{model}"


def _manifest(model: str, revision: Digest) -> str:
    return f"{_model(model)}/manifests/{hex_of(revision)}"


def _ref(model: str, ref: str) -> str:
    return f"{_model(model)}/refs/{ref}"
