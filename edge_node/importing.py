"""A bundle taken into a node's cache: what was carried here is served as if it had been fetched.

All shards go to this node's disk, also those that another node of the region owns: where a bundle is needed, there may
be no other. Parcels are kept as the blobs that they are. The node verifies as it does what comes over a link.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence

from structlog.typing import FilteringBoundLogger

from edge_node.cache import Cache
from edge_node.shard_key import ShardKey, shard_key
from shared.bundle import Index, wanted
from shared.catalog import Catalog
from shared.digest import Digest
from shared.errors import DiskFull, NearshardError
from shared.manifest import Manifest
from shared.unbundling import Unbundling
from shared.web.trusted import Brought, Trusted


class CacheHolder:
    """A node's disk, for one bundle."""

    def __init__(self, cache: Cache, catalog: Catalog, allowed: Callable[[str], None]) -> None:
        self._cache, self._catalog, self._allowed = cache, catalog, allowed
        self._private = ""
        self._wanted: list[Digest] = []
        self._size = 0

    async def begin(self, manifest: Manifest, brought: Brought, index: Index) -> None:
        """Raises DiskFull where the cache is smaller than what comes; Forbidden."""
        self._allowed(manifest.model)
        self._private = manifest.model if brought.target.private else ""
        self._wanted = wanted(manifest, index.tasks)
        total = sum(manifest.shards[digest] for digest in self._wanted) + index.size
        if total > (budget := self._cache.disk.ledger.budget):
            raise DiskFull(
                f"{total} bytes are needed and the cache has {budget}: a larger edge.disk, or a bundle of fewer tasks",
                public={"needed": total, "free": budget},
            )
        await self._catalog.take_in(manifest)

    def wanted(self) -> Sequence[Digest]:
        """Of what the bundle is of."""
        return self._wanted

    def has(self, digest: Digest) -> bool:
        """On the disk."""
        return self._key(digest) in self._cache.disk.ledger

    async def put(self, digest: Digest, data: bytes) -> None:
        """To the disk. Raises DiskFull."""
        await self._cache.keep(self._key(digest), data)

    async def read(self, digest: Digest) -> bytes | None:
        """Checked when it is used: what is decoded has a digest."""
        return await self._cache.read_disk(self._key(digest))

    async def finish(self) -> None:
        """Each shard was made durable by itself."""

    def _key(self, digest: Digest) -> ShardKey:
        return shard_key(digest, self._private)


async def take_bundle(
    chunks: AsyncIterator[bytes],
    cache: Cache,
    catalog: Catalog,
    trusted: Trusted,
    log: FilteringBoundLogger,
    allowed: Callable[[str], None],
) -> dict[str, object]:
    """Take one in; what it was. ``allowed``: told the model before anything of it is kept.

    Raises BundleInvalid, BaseMissing, TrustError, NotFound, DiskError, and what ``allowed`` does.
    """
    taking = Unbundling(trusted, CacheHolder(cache, catalog, allowed))
    try:
        manifest = await taking.take(chunks)
    except NearshardError as error:
        log.warning("a bundle was not taken in", code=error.error_code, reason=str(error))
        raise
    index = taking.index
    assert index is not None
    told: dict[str, object] = {
        "model": index.model,
        "ref": index.ref,
        "revision": manifest.revision,
        "bytes": taking.moved,
        "shards": len(wanted(manifest, index.tasks)),
    }
    log.info("bundle taken in", **told)
    return told
