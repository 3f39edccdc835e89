"""The origin's composition root and its read API: every read path, straight from storage."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from aiohttp import web
from structlog.typing import FilteringBoundLogger

from origin.audit import Audit
from origin.config import OriginSettings
from origin.renewal import Renewal
from origin.storage import Storage
from origin.trust_store import TrustStore
from origin.upload import Uploads
from origin.visibility import StoreVisibility
from shared import codec, plan, representation
from shared.clock import Clock
from shared.digest import Digest
from shared.errors import ConfigError
from shared.ids import DEFAULT_REF
from shared.keys import NodeKey, load_key
from shared.layout import Slice
from shared.manifest import Manifest
from shared.metrics import Metrics
from shared.paths import BlobPath, FilePath, ModelPath, ModelsPath, TaskPath, TrustPath
from shared.web.access import Gate, private_model
from shared.web.announce import Announcer
from shared.web.middleware import make_app
from shared.web.reads import Listing, Resolved, add_routes
from shared.web.send import Piece, decide, send
from shared.web.session import Sessions
from shared.web.tls import Certificates

MANIFESTS = 64
"""Decoded manifests kept in memory."""


class OriginTier:
    """The read surface over a Storage."""

    def __init__(self, trust: TrustStore, visibility: StoreVisibility, url: str, metrics: Metrics) -> None:
        self._trust, self._storage, self._visibility = trust, trust.storage, visibility
        self._url = url
        self._metrics = metrics
        self._manifests: OrderedDict[Digest, Manifest] = OrderedDict()

    async def resolve(self, model: str, ref: str) -> Resolved:
        """The manifest of a ref or revision. Raises NotFound."""
        revision = await self._trust.resolve(model, ref)
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
            return Listing(codec.encode_json({"models": await self._trust.models()}))
        refs = await self._trust.refs(path.model)
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

    async def trust(self, path: TrustPath) -> Listing:
        """A file of the signed metadata, from storage. Raises NotFound."""
        return Listing(await self._trust.file(path.role, path.version))

    def sources(self, request: web.Request, path: TaskPath) -> plan.Sources:
        """This origin alone."""
        return lambda _: [self._url]

    def bases(self, request: web.Request, path: TaskPath | FilePath) -> Sequence[str]:
        """This origin alone."""
        return [self._url]

    async def bytes(self, request: web.Request, path: TaskPath | BlobPath | FilePath) -> web.StreamResponse:
        """Stream a task, a file or a shard from storage."""
        if isinstance(path, BlobPath):
            shown = representation.of_blob(path.digest, await self._storage.blob_size(path.digest, path.model))
        else:
            shown = representation.of_path(path, (await self.resolve(path.model, path.ref)).manifest)
        decision, span = decide(request, shown)
        fields = {} if isinstance(path, BlobPath) else {"Vary": "Accept"}
        return await send(
            request, shown, decision, span, self._pieces(shown.layout.cut(span), private_model(request)), fields
        )

    async def _pieces(self, slices: Iterable[Slice], private: str) -> AsyncIterator[Piece]:
        for piece in slices:
            async for part in self._storage.stream_blob(piece.digest, piece.offset, piece.length, private):
                yield part
                self._metrics.sent.labels("origin").inc(len(part))

    async def status(self) -> Mapping[str, Any]:
        """Where it is and what it has."""
        return {
            "service": "origin",
            "url": self._url,
            "store": repr(self._storage),
            "models": await self._public_models(),
        }

    async def _public_models(self) -> list[str]:
        """Anybody may ask for the status."""
        if not await self._trust.exists():
            return []
        return [model for model in await self._trust.models() if await self._visibility.is_public(model)]

    def not_ready(self) -> str:
        """Storage was opened when the process started, so it can always serve."""
        return ""


def build_app(
    settings: OriginSettings, url: str, certificates: Certificates, clock: Clock, log: FilteringBoundLogger
) -> web.Application:
    """The origin, ready to be served at ``url``. Raises ConfigError: also for an online key that others may read."""
    metrics = Metrics()
    trust = TrustStore(Storage(settings.store))
    sessions = Sessions(certificates=certificates)

    def online() -> list[NodeKey]:
        try:
            return [load_key(settings.online_file)]
        except FileNotFoundError:
            raise ConfigError(f"{settings.online_file}: there is no online key", code="no_online_key") from None

    try:
        online()
    except ConfigError as error:
        if error.error_code != "no_online_key":
            raise
        log.warning("nothing can be published here, and the signed metadata will expire", reason=str(error))
    audit = Audit(settings.audit_file, lambda: datetime.fromtimestamp(clock.time(), UTC))
    announcer = Announcer(sessions, log)
    renewal = Renewal(trust, online, clock, log)

    async def live(_: web.Application) -> AsyncIterator[None]:
        renewal.start()
        yield
        await renewal.close()
        await announcer.close()
        await sessions.close()

    app = make_app("nearshard-origin", clock, metrics, log)
    app.cleanup_ctx.append(live)
    visibility = StoreVisibility(trust)
    gate = Gate(visibility, clock)
    add_routes(app, OriginTier(trust, visibility, url, metrics), gate, metrics)
    Uploads(
        trust,
        online,
        audit,
        lambda model: announcer.tell(settings.router, model),
        clock,
        log,
        gate=gate if settings.publish_tokens else None,
    ).add_routes(app)
    return app
