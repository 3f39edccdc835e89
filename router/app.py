"""The router's composition root and its answers.

A request for bytes is answered with 307: Location is the best node, Link names the others (RFC 6249), ETag and
Repr-Digest say what will come. The target names the revision that the ref means right now, so that all the
nodes that a client may try, now or when it resumes, give the same bytes.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import aiohttp
from aiohttp import web
from structlog.typing import FilteringBoundLogger

from router.admission import Admission
from router.config import RouterSettings
from router.enrolment_file import EnrolmentFile
from router.location import Regions
from router.registry import Registry
from router.remembered import FILE
from shared import codec, plan, representation
from shared.catalog import Catalog
from shared.clock import Clock
from shared.conditional import NotModified, evaluate
from shared.digest import hex_of, repr_digest
from shared.enrolment import SIGNATURE_FIELD
from shared.errors import BadId, ConfigError, NotFound, RequestError, UpstreamError
from shared.ids import TaskId, parse_name
from shared.metrics import Metrics
from shared.node import Node
from shared.paths import BlobPath, FilePath, ModelPath, ModelsPath, TaskPath, blob_path, file_path, task_path
from shared.representation import Representation
from shared.web.announce import add_announce_route, announce
from shared.web.middleware import KIND, make_app, read_body, refuse_expectation
from shared.web.reads import Listing, Resolved, add_routes, document, get
from shared.web.send import conditions
from shared.web.session import Sessions


class RouterTier:
    """The read surface of a router: documents itself, bytes by redirect."""

    def __init__(
        self,
        registry: Registry,
        catalog: Catalog,
        regions: Regions,
        *,
        origins: list[str],
        count: int,
        membership: Callable[[], str],
    ) -> None:
        """``membership`` says who may join, for people."""
        self._membership = membership
        self._registry, self._catalog, self._regions = registry, catalog, regions
        self._origins, self._count = origins, count

    async def bytes(self, request: web.Request, path: TaskPath | BlobPath | FilePath) -> web.StreamResponse:
        """307 to the best node. Raises NotFound for what the catalog knows is not there."""
        fields = {"Cache-Control": "private, no-cache", "Vary": "Accept, Nearshard-Region"}
        key: str
        if isinstance(path, BlobPath):
            key, target, etag = path.digest, blob_path(path.digest), hex_of(path.digest)
        else:
            shown = await self._shown(path)
            key, target = _key_and_target(path, shown)
            etag = shown.etag if shown else ""
        if etag:
            fields |= {"ETag": f'"{etag}"', "Repr-Digest": repr_digest(etag)}
            if isinstance(evaluate(conditions(request), etag, None), NotModified):
                return web.Response(status=304, headers=fields)
        urls = [base + target for base in self._bases(self._region(request), key)]
        links = [f"<{url}>; rel=duplicate; pri={number}" for number, url in enumerate(urls[1:], 2)]
        response = web.Response(status=307, headers={**fields, "Location": urls[0]})
        for link in links:
            response.headers.add("Link", link)
        return response

    async def _shown(self, path: TaskPath | FilePath) -> Representation | None:
        """What will be sent; None while no origin answers, when a node may still know."""
        model, ref = (path.model, path.ref) if isinstance(path, FilePath) else (path.task_id.model, path.task_id.ref)
        try:
            return representation.of_path(path, (await self._catalog.resolve(model, ref)).manifest)
        except UpstreamError:
            return None

    def _region(self, request: web.Request) -> str:
        said = request.query.get("region") or request.headers.get("Nearshard-Region")
        return self._regions.region_of(said, request.remote)

    def _bases(self, region: str, key: str) -> list[str]:
        """Base URLs for a key, best first, the origins last: never empty."""
        nodes = self._registry.snapshot.candidates(region, key, self._count)
        return [*(node.url for node in nodes), *self._origins]

    async def resolve(self, model: str, ref: str) -> Resolved:
        """A manifest, from the catalog."""
        return await self._catalog.resolve(model, ref)

    async def listing(self, path: ModelPath | ModelsPath) -> Listing:
        """A listing, from the catalog."""
        return await self._catalog.listing(path)

    def sources(self, request: web.Request, path: TaskPath) -> plan.Sources:
        """Each shard's owners in the client's region, then others, then the origins."""
        region = self._region(request)
        return lambda digest: self._bases(region, digest)

    async def status(self) -> Mapping[str, Any]:
        """The members, and whether Redis is there."""
        snapshot = self._registry.snapshot
        return {
            "service": "router",
            "epoch": snapshot.epoch,
            "degraded": self._registry.degraded,
            "membership": self._membership(),
            "nodes": [node.record() for node in snapshot.nodes.values()],
        }

    def not_ready(self) -> str:
        """A router can always answer: with no node left, it names the origin."""
        return ""


class Published:
    """Passes announcements on to the nodes."""

    def __init__(
        self, session: aiohttp.ClientSession, registry: Registry, catalog: Catalog, log: FilteringBoundLogger
    ) -> None:
        self._session, self._registry, self._catalog, self._log = session, registry, catalog, log
        self._tasks: set[asyncio.Task[None]] = set()

    def heard(self, model: str) -> None:
        """Something was published: ask anew, and have every node do so."""
        self._catalog.forget(model)
        for node in self._registry.snapshot.nodes.values():
            task = asyncio.create_task(self._tell(node, model))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Stop telling."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _tell(self, node: Node, model: str) -> None:
        try:
            await announce(self._session, node.url, model)
        except UpstreamError as error:
            self._log.info("a node was not told of a publish", node=node.id, reason=str(error))


def _key_and_target(path: TaskPath | FilePath, shown: Representation | None) -> tuple[str, str]:
    """The ring's key, and the path at a node: pinned to the revision where that is known."""
    revision = shown.revision if shown else None
    if isinstance(path, TaskPath):
        task = path.task_id
        return task.ring_key, task_path(TaskId(task.model, task.task, revision or task.ref))
    return f"{path.model}/{path.path}", file_path(path.model, revision or path.ref, path.path)


def add_membership_routes(
    app: web.Application, registry: Registry, admission: Admission, metrics: Metrics, ttl: float
) -> None:
    """``PUT /nodes/<id>``: a heartbeat. ``DELETE``: the node leaves. ``GET /ring``: the members."""

    async def put(request: web.Request) -> web.Response:
        request[KIND] = "heartbeat"
        if request.content_type != "application/json":
            raise RequestError(code="unsupported_type")
        body, signature = await read_body(request), request.headers.get(SIGNATURE_FIELD)
        with counted():
            told = admission.heartbeat(_node_id(request), body, signature, request.remote)
        registry.heartbeat(told)
        return web.json_response({"epoch": registry.snapshot.epoch, "ttl": ttl, "nonce": admission.nonce()})

    async def delete(request: web.Request) -> web.Response:
        request[KIND] = "leave"
        body, signature = await read_body(request), request.headers.get(SIGNATURE_FIELD)
        with counted():
            leave = admission.leave(_node_id(request), body, signature, request.remote)
        if not registry.leave(leave):
            raise NotFound(code="unknown_node")
        return web.Response(status=204)

    @contextmanager
    def counted() -> Iterator[None]:
        try:
            yield
        except RequestError as error:
            if error.error_code != "stale_nonce":  # a node that starts cannot have one
                metrics.refused_members.labels("heartbeat", error.error_code).inc()
            raise

    async def ring(request: web.Request) -> web.Response:
        """The members of a region (of all without one) at one epoch: everyone who has it has the same ring."""
        request[KIND] = "ring"
        region = request.query.get("region")
        if region is not None:
            parse_name(region, "a region")
        snapshot = registry.snapshot
        nodes = [node.record() for node in snapshot.nodes.values() if region in (None, node.region)]
        body = codec.encode_json({"epoch": snapshot.epoch, "region": region, "nodes": nodes})
        etag = hashlib.sha256(body).hexdigest()
        return document(request, body, "application/json", etag, "no-cache", {})

    get(app, "/ring", ring)
    app.router.add_put("/nodes/{node}", put, expect_handler=refuse_expectation)
    app.router.add_delete("/nodes/{node}", delete)


def _node_id(request: web.Request) -> str:
    try:
        return parse_name(request.match_info["node"])
    except BadId:
        raise BadId("not a node's name") from None


def build_app(settings: RouterSettings, url: str, clock: Clock, log: FilteringBoundLogger) -> web.Application:
    """A router, ready to be served at ``url``. Raises ConfigError."""
    metrics = Metrics()
    sessions = Sessions()
    enrolment = EnrolmentFile(settings.enrolled, log) if settings.enrolled else None
    admission = Admission(enrolment.nodes if enrolment else None, clock.monotonic, lambda: secrets.token_hex(16))
    try:
        registry = Registry(
            admission,
            settings.ttl,
            clock,
            random.Random(),  # noqa: S311 - jitter, not secrets
            metrics,
            log,
            redis=settings.redis,
            prefix=settings.redis_prefix,
            file=settings.data / FILE if settings.data else None,
            enrolment=enrolment,
        )
    except ValueError as error:
        raise ConfigError(f"router.redis: {error}") from error
    if not settings.redis:
        log.info("no Redis: the membership is in this process alone")
    if enrolment is None:
        log.warning("membership: open on loopback; anything on this machine may join, as no enrolment file is set")
    catalog = Catalog(sessions, settings.origin, clock, "router", lifetime=settings.ref_lifetime)
    regions = Regions(settings.networks, settings.default_region)
    published = Published(sessions.direct, registry, catalog, log)

    def membership() -> str:
        trouble = enrolment.trouble if enrolment else ""
        return f"{admission.mode}; {trouble}" if trouble else admission.mode

    tier = RouterTier(
        registry, catalog, regions, origins=settings.origin, count=settings.candidates, membership=membership
    )

    async def live(_: web.Application) -> AsyncIterator[None]:
        await registry.start()
        yield
        await published.close()
        await registry.close()
        await catalog.close()
        await sessions.close()

    app = make_app("nearshard-router", clock, metrics, log)
    app.cleanup_ctx.append(live)
    add_routes(app, tier, metrics, degraded=lambda: registry.degraded)
    add_membership_routes(app, registry, admission, metrics, settings.ttl)
    add_announce_route(app, published.heard)
    return app
