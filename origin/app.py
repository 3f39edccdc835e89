"""The origin's composition root and its read API: every read path, straight from storage."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from aiohttp import web
from structlog.typing import FilteringBoundLogger

from origin.api import operations
from origin.audit import Audit
from origin.config import OriginSettings
from origin.federated.closing import Closing
from origin.federated.intake import Intake
from origin.federated.records import Records, Seal
from origin.federated.rounds import Rounds
from origin.hub_client import Hub
from origin.keyring import Keyring
from origin.mirror import Mirror
from origin.passing import PassingOn
from origin.renewal import Renewal
from origin.signing import key_id
from origin.storage import Storage
from origin.trust_store import TrustStore
from origin.upload import Uploads
from origin.visibility import StoreVisibility
from shared import codec, plan, representation
from shared.clock import Clock
from shared.digest import Digest
from shared.errors import ConfigError, NotFound
from shared.ids import DEFAULT_REF, commit_of, is_commit, is_revision
from shared.keys import NodeKey, check_private, load_key
from shared.layout import Slice
from shared.manifest import Manifest
from shared.metrics import Metrics
from shared.paths import BlobPath, FilePath, HubPath, ModelPath, ModelsPath, TaskPath, TrustPath
from shared.rollout import NOBODY, Subject, at_address
from shared.web.access import Gate, private_model
from shared.web.announce import Announcer
from shared.web.describe import add_description
from shared.web.hub import add_hub_routes
from shared.web.middleware import make_app
from shared.web.reads import Listing, Resolved, add_routes
from shared.web.send import Piece, decide, send
from shared.web.session import Sessions
from shared.web.tls import Certificates

MANIFESTS = 64
"""Decoded manifests kept in memory."""


class OriginTier:
    """The read surface over a Storage."""

    def __init__(
        self, trust: TrustStore, visibility: StoreVisibility, url: str, metrics: Metrics, mirror: Mirror | None = None
    ) -> None:
        self._mirror = mirror
        self._trust, self._storage, self._visibility = trust, trust.storage, visibility
        self._url = url
        self._metrics = metrics
        self._manifests: OrderedDict[Digest, Manifest] = OrderedDict()

    def who(self, request: web.Request) -> Subject:
        """By the client's address; of a site only where it says so."""
        said = request.query.get("region") or request.headers.get("Nearshard-Region", "")
        return at_address(request.remote, said or "")

    async def resolve(self, model: str, ref: str, who: Subject = NOBODY) -> Resolved:
        """The manifest of a ref, revision or commit. Raises NotFound."""
        revision = await (self._of_commit(model, ref) if is_commit(ref) else self._trust.resolve(model, ref, who))
        manifest = self._manifests.get(revision)
        if manifest is None or manifest.model != model:
            manifest = await self._storage.manifest(model, revision)
            self._manifests[revision] = manifest
        self._manifests.move_to_end(revision)
        while len(self._manifests) > MANIFESTS:
            self._manifests.popitem(last=False)
        return Resolved(manifest, self._fields(model, ref), known_as=await self._known_as(model, ref, revision))

    async def _known_as(self, model: str, ref: str, revision: Digest) -> str:
        """The commit of another hub that a ref was taken from."""
        if is_commit(ref) or is_revision(ref):
            return ref if is_commit(ref) else ""
        found = await self._trust.ref(model, ref)
        known = found.source and found.revision == revision and is_commit(found.source.commit)
        return found.source.commit if found.source and known else ""

    def _fields(self, model: str, ref: str) -> Mapping[str, str]:
        """What is to be said of a ref that was mirrored."""
        return self._mirror.fields(model, ref) if self._mirror else {}

    async def _of_commit(self, model: str, commit: str) -> Digest:
        """The revision that a commit of another hub was published as, or the stored one that it is the beginning of;
        those that refs mean first. Raises NotFound."""
        with suppress(NotFound):
            for ref in (await self._trust.refs(model)).values():
                if ref.source and ref.source.commit == commit:
                    return ref.revision
                if ref.rollout and commit_of(ref.rollout.revision) == commit:
                    return ref.rollout.revision
        for revisions in (list((await self.refs(model)).values()), await self._storage.revisions(model)):
            for revision in revisions:
                if commit_of(revision) == commit:
                    return revision
        raise NotFound(f"{model} has no such commit", code="unknown_revision")

    async def refs(self, model: str) -> Mapping[str, Digest]:
        """As the metadata that is in force has them."""
        with suppress(NotFound):
            return {name: ref.revision for name, ref in (await self._trust.refs(model)).items()}
        return {}

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
                        name: {
                            "revision": ref.revision,
                            "published": ref.published,
                            **({"source": asdict(ref.source)} if ref.source else {}),
                        }
                        for name, ref in refs.items()
                    },
                    "revisions": await self._storage.revisions(path.model),
                    "ref": shown,
                    **({"provenance": manifest.provenance.record()} if manifest.provenance else {}),
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
            shown = representation.of_path(path, (await self.resolve(path.model, path.ref, self.who(request))).manifest)
        decision, span = decide(request, shown)
        fields = {} if isinstance(path, BlobPath) else {"Vary": "Accept", **self._fields(path.model, path.ref)}
        pieces = self._pieces(shown.layout.cut(span), private_model(request), verified=isinstance(path, HubPath))
        return await send(request, shown, decision, span, pieces, fields)

    async def _pieces(self, slices: Iterable[Slice], private: str, *, verified: bool) -> AsyncIterator[Piece]:
        right: set[Digest] = set()
        for piece in slices:
            if verified and piece.digest not in right:
                await self._storage.verify_blob(piece.digest, private)
                right.add(piece.digest)
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
            **({"mirror": self._mirror.status()} if self._mirror else {}),
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
    upstream = settings.mirror.upstream
    proxies = {upstream: settings.mirror.proxy} if upstream and settings.mirror.proxy else {}
    sessions = Sessions(proxies.get, certificates=certificates)

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
    metrics.show_expiries(metrics.metadata_expires, lambda: renewal.expiries)
    metrics.show_expiries(metrics.certificate_expires, lambda: certificates.expiries)

    mirror = _mirror_of(settings, sessions, trust, online, audit, announcer, clock, metrics, log)

    app = make_app("nearshard-origin", clock, metrics, log, otlp=settings.otlp)
    visibility = StoreVisibility(trust)
    gate = Gate(visibility, clock)
    rounds = _add_rounds(app, settings, trust, online, gate, audit, announcer, clock, metrics, log)

    async def live(_: web.Application) -> AsyncIterator[None]:
        renewal.start()
        rounds.start()
        if mirror:
            mirror.start()
        yield
        await rounds.close()
        if mirror:
            await mirror.close()
        await renewal.close()
        await announcer.close()
        await sessions.close()

    app.cleanup_ctx.append(live)

    async def absent(request: web.Request, model: str, ref: str) -> bool:
        assert mirror is not None
        return await mirror.absent(model, ref, partial(gate.sees, request, model))

    tier = OriginTier(trust, visibility, url, metrics, mirror)
    add_routes(app, tier, gate, metrics, absent=absent if mirror else None)
    add_hub_routes(app, tier, gate, absent=PassingOn(mirror, gate).absent if mirror else None)
    Uploads(
        trust,
        online,
        audit,
        lambda model: announcer.tell(settings.router, model),
        clock,
        log,
        gate=gate if settings.publish_tokens else None,
    ).add_routes(app)
    add_description(app, "origin", operations)
    return app


def _add_rounds(
    app: web.Application,
    settings: OriginSettings,
    trust: TrustStore,
    online: Callable[[], list[NodeKey]],
    gate: Gate,
    audit: Audit,
    announcer: Announcer,
    clock: Clock,
    metrics: Metrics,
    log: FilteringBoundLogger,
) -> Rounds:
    """Federated rounds, answered by ``app``. Raises ConfigError for a key that cannot be used."""
    wanted, folder = settings.federated, settings.federated_folder
    own = [_key(wanted.key, "origin.federated.key")] if wanted.key else []
    records = Records(trust.storage, Seal(trust, online))
    closing = Closing(
        records,
        trust,
        lambda: Keyring({key_id(key): key for key in (*own, *online())}),
        wanted,
        folder / "work",
        audit,
        lambda model: announcer.tell(settings.router, model),
        clock,
        log,
        metrics,
    )
    intake = Intake(records, wanted, folder / "spool", gate, audit, lambda _: rounds.look_now(), clock, metrics, log)
    rounds = Rounds(records, closing, intake, clock, log, look=wanted.look, publishes=bool(own))
    intake.add_routes(app)
    return rounds


def _key(file: Path, setting: str) -> NodeKey:
    """A key that a setting names. Raises ConfigError."""
    try:
        return load_key(file)
    except FileNotFoundError:
        raise ConfigError(f"{setting}: {file}: there is no such file") from None


def _mirror_of(
    settings: OriginSettings,
    sessions: Sessions,
    trust: TrustStore,
    online: Callable[[], list[NodeKey]],
    audit: Audit,
    announcer: Announcer,
    clock: Clock,
    metrics: Metrics,
    log: FilteringBoundLogger,
) -> Mirror | None:
    """The mirror of another hub, where one is set. Raises ConfigError for a key that cannot be used."""
    wanted = settings.mirror
    if wanted.upstream is None:
        return None
    assert wanted.key is not None
    key = _key(wanted.key, "origin.mirror.key")
    if wanted.token_file:
        check_private(wanted.token_file)
    hub = Hub(sessions.of(wanted.upstream), wanted.upstream, wanted.token_file)
    return Mirror(
        wanted,
        settings.mirror_folder,
        hub,
        trust,
        lambda: [key, *online()],
        audit,
        lambda model: announcer.tell(settings.router, model),
        clock,
        metrics,
        log,
    )
