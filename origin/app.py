"""The origin's composition root and its read API: every read path, straight from storage."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any

from aiohttp import web
from structlog.typing import FilteringBoundLogger

from origin.config import OriginSettings
from origin.storage import Storage
from shared import codec, plan, representation
from shared.clock import Clock
from shared.digest import Digest
from shared.ids import DEFAULT_REF
from shared.layout import Slice
from shared.manifest import Manifest
from shared.metrics import Metrics
from shared.paths import BlobPath, FilePath, ModelPath, ModelsPath, TaskPath
from shared.web.middleware import make_app
from shared.web.reads import Listing, Resolved, add_routes
from shared.web.send import Piece, decide, send
from shared.web.tls import Certificates

READ = 1 << 20
"""Bytes read from storage at a time: nothing buffers a whole shard."""
MANIFESTS = 64
"""Decoded manifests kept in memory."""


class OriginTier:
    """The read surface over a Storage."""

    def __init__(self, storage: Storage, url: str, metrics: Metrics) -> None:
        self._storage = storage
        self._url = url
        self._metrics = metrics
        self._manifests: OrderedDict[Digest, Manifest] = OrderedDict()

    async def resolve(self, model: str, ref: str) -> Resolved:
        """The manifest of a ref or revision. Raises NotFound."""
        revision = await self._storage.resolve(model, ref)
        manifest = self._manifests.get(revision)
        if manifest is None or manifest.model != model:
            manifest = await self._storage.manifest(model, revision)
            self._manifests[revision] = manifest
        self._manifests.move_to_end(revision)
        while len(self._manifests) > MANIFESTS:
            self._manifests.popitem(last=False)
        return Resolved(manifest)

    async def listing(self, path: ModelPath | ModelsPath) -> Listing:
        """Names, or one model's refs, revisions, tasks and files (of ``main``, or of its first ref)."""
        if isinstance(path, ModelsPath):
            return Listing(codec.encode_json({"models": await self._storage.models()}))
        refs = await self._storage.refs(path.model)
        shown = DEFAULT_REF if DEFAULT_REF in refs else next(iter(refs))
        manifest = (await self.resolve(path.model, refs[shown].revision)).manifest
        return Listing(
            codec.encode_json(
                {
                    "model": path.model,
                    "refs": {
                        name: {"revision": ref.revision, "published": ref.published} for name, ref in refs.items()
                    },
                    "revisions": await self._storage.revisions(path.model),
                    "ref": shown,
                    "tasks": {
                        task.name: {
                            "size": task.layout.size,
                            "sha256": task.layout.sha256,
                            "description": task.description,
                            "files": list(task.files),
                        }
                        for task in manifest.tasks.values()
                    },
                    "files": {
                        name: {"size": layout.size, "sha256": layout.sha256} for name, layout in manifest.files.items()
                    },
                }
            )
        )

    def sources(self, request: web.Request, path: TaskPath) -> plan.Sources:
        """This origin alone."""
        return lambda _: [self._url]

    def bases(self, request: web.Request, path: TaskPath | FilePath) -> Sequence[str]:
        """This origin alone."""
        return [self._url]

    async def bytes(self, request: web.Request, path: TaskPath | BlobPath | FilePath) -> web.StreamResponse:
        """Stream a task, a file or a shard from storage."""
        if isinstance(path, BlobPath):
            shown = representation.of_blob(path.digest, await self._storage.blob_size(path.digest))
        else:
            shown = representation.of_path(path, (await self.resolve(path.model, path.ref)).manifest)
        decision, span = decide(request, shown)
        fields = {} if isinstance(path, BlobPath) else {"Vary": "Accept"}
        return await send(request, shown, decision, span, self._pieces(shown.layout.cut(span)), fields)

    async def _pieces(self, slices: Iterable[Slice]) -> AsyncIterator[Piece]:
        for piece in slices:
            for start in range(0, piece.length, READ):
                size = min(READ, piece.length - start)
                yield await self._storage.read_blob(piece.digest, piece.offset + start, size)
                self._metrics.sent.labels("origin").inc(size)

    async def status(self) -> Mapping[str, Any]:
        """Where it is and what it has."""
        return {
            "service": "origin",
            "url": self._url,
            "store": repr(self._storage),
            "models": await self._storage.models(),
        }

    def not_ready(self) -> str:
        """Storage was opened when the process started, so it can always serve."""
        return ""


def build_app(
    settings: OriginSettings, url: str, certificates: Certificates, clock: Clock, log: FilteringBoundLogger
) -> web.Application:
    """The origin, ready to be served at ``url``. Raises ConfigError."""
    metrics = Metrics()
    storage = Storage(settings.store)
    app = make_app("nearshard-origin", clock, metrics, log)
    add_routes(app, OriginTier(storage, url, metrics), metrics)
    return app
