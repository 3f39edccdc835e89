"""The router's composition root and its answers.

A request for bytes is answered with 307: Location is the best node, Link names the others (RFC 6249), ETag and
Repr-Digest say what will come. The target names the revision that the ref means right now, so that all the
nodes that a client may try, now or when it resumes, give the same bytes.
"""

from __future__ import annotations

import hashlib
import random
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any
from urllib.parse import urlencode

from aiohttp import web
from multidict import CIMultiDict
from structlog.typing import FilteringBoundLogger

from router.admission import Admission
from router.api import operations
from router.config import RouterSettings
from router.dashboard import add_dashboard
from router.enrolment_file import EnrolmentFile
from router.enrolments import add_enrolment_routes
from router.explain import Route, add_explain_routes
from router.federated import FederatedRounds
from router.geoip import open_geoip
from router.location import Found, Regions
from router.overview import last_errors, network
from router.probe import Prober
from router.redirect import fields_of, links_to
from router.registry import Registry
from router.remembered import FILE
from router.selection import Selection
from router.short_path import ShortConnection, ShortPath
from router.watch import MAX_NODES, Watch
from shared import codec, plan, representation
from shared import log as logs
from shared.catalog import Catalog
from shared.clock import Clock
from shared.conditional import NotModified, evaluate
from shared.digest import Digest, hex_of
from shared.enrolment import SIGNATURE_FIELD
from shared.errors import BadId, ConfigError, NotFound, RequestError, UpstreamError
from shared.ids import parse_name
from shared.metrics import Metrics
from shared.nearness import Nearness
from shared.node import Node, State
from shared.paths import BlobPath, FilePath, HubPath, ModelPath, ModelsPath, TaskPath, TrustPath, blob_path
from shared.pins import parse_pins
from shared.representation import Representation
from shared.rollout import Subject, at_address
from shared.routing import Choice
from shared.token_file import TokenFile
from shared.trials import by_site
from shared.trust_file import TrustFile, read_root
from shared.usage import day_of
from shared.view import EPOCH, MAX_NEAR, View
from shared.web.access import QUERY, Gate, private_model, require_known, token_text
from shared.web.announce import Announcer, add_announce_route
from shared.web.describe import add_description
from shared.web.hub import add_hub_routes
from shared.web.middleware import KIND, make_app, read_body, refuse_expectation
from shared.web.mirrored import Mirrored
from shared.web.reads import Listing, Resolved, add_routes, document, get
from shared.web.send import conditions
from shared.web.server import CONNECTION
from shared.web.session import Sessions
from shared.web.tls import CLAIMED, Certificates
from shared.web.trusted import Trusted, Upstreams

SERVER = "nearshard-router"


class RouterTier:
    """The read surface of a router: documents itself, bytes by redirect."""

    def __init__(
        self,
        registry: Registry,
        catalog: Catalog,
        trusted: Trusted,
        regions: Regions,
        selection: Selection,
        watch: Watch,
        federated: FederatedRounds,
        clock: Clock,
        *,
        origins: list[str],
        count: int,
        membership: Callable[[], str],
        answers: Callable[[Node], Awaitable[bool]],
    ) -> None:
        """``membership`` says who may join, for people; ``answers``, whether a node does, now."""
        self._watch, self._federated, self._clock = watch, federated, clock
        self._answers = answers
        self._membership, self._trusted = membership, trusted
        self._registry, self._catalog, self._regions, self._selection = registry, catalog, regions, selection
        self._origins, self._count = origins, count

    async def bytes(self, request: web.Request, path: TaskPath | BlobPath | FilePath) -> web.StreamResponse:
        """307 to the best node. Raises NotFound for what the catalog knows is not there."""
        key, target, etag = await self._target(path, request)
        fields = fields_of(etag)
        if etag and isinstance(evaluate(conditions(request), etag, None), NotModified):
            return web.Response(status=304, headers=fields)
        choices = self._selection.choose(self.find(request).region, key, self._count)
        if isinstance(path, HubPath):
            choices = await self._answering_first(choices)
        urls = [base + target for base in self._bases(choices)]
        if private_model(request):
            # curl and others leave Authorization out where a redirect leads to another host: the URL must say it all
            urls[0] += "?" + urlencode({QUERY: token_text(request)})
        self._selection.sent(choices)
        return web.Response(status=307, headers=CIMultiDict([*fields.items(), *links_to(urls)]))

    async def _answering_first(self, choices: Sequence[Choice]) -> list[Choice]:
        """The same, without those in front that do not answer; all where none does.

        Hugging Face's clients ask here again as soon as a node is gone, but six times only, a second apart: sooner than
        its heartbeats are missed.
        """
        for index, choice in enumerate(choices):
            if await self._answers(choice.node):
                return [*choices[index:], *choices[:index]]
        return list(choices)

    async def _target(self, path: TaskPath | BlobPath | FilePath, request: web.Request) -> tuple[str, str, str]:
        """The ring's key of what is asked for, its path at a node, and its ETag (empty where that is not known)."""
        if isinstance(path, BlobPath):
            return path.digest, blob_path(path.digest, path.model), hex_of(path.digest)
        shown = await self._shown(path, request)
        target = path.at(shown.revision if shown and shown.revision else path.ref)
        return path.ring_key, target, shown.etag if shown else ""

    async def _shown(self, path: TaskPath | FilePath, request: web.Request) -> Representation | None:
        """What will be sent; None while no origin answers, when a node may still know."""
        try:
            require_known(request)
            return representation.of_path(
                path, (await self._catalog.resolve(path.model, path.ref, self.who(request))).manifest
            )
        except UpstreamError:
            return None

    def find(self, request: web.Request) -> Found:
        """Where a client is. Raises RequestError (``bad_region``)."""
        said = request.query.get("region") or request.headers.get("Nearshard-Region")
        return self._regions.find(said, request.remote, request.headers.getall("X-Forwarded-For", ()))

    def view(self, request: web.Request, count: int) -> View:
        """What a client needs to choose by itself."""
        return self._selection.view(self.find(request).region, self._origins, count)

    def _bases(self, choices: Sequence[Choice]) -> list[str]:
        """Base URLs of nodes and then of the origins. Raises UpstreamError (``no_nodes``) rather than give none."""
        bases = [*(choice.node.url for choice in choices), *self._origins]
        if not bases:
            raise UpstreamError(code="no_nodes")
        return bases

    async def locate(self, request: web.Request, path: TaskPath | BlobPath, count: int | None) -> Route:
        """Where a client would be sent. Raises NotFound, UpstreamError (``no_nodes``)."""
        key, target, _ = await self._target(path, request)
        choices = self._selection.choose(self.find(request).region, key, count or self._count)
        urls = [base + target for base in self._bases(choices[: self._count])]
        return Route(key, choices, urls)

    def who(self, request: web.Request) -> Subject:
        """By the client's region and address: the same at every router."""
        found = self.find(request)
        return at_address(found.address, found.region)

    async def resolve(self, model: str, ref: str, who: Subject) -> Resolved:
        """A manifest, from the catalog."""
        if not self._origins and not self._registry.snapshot.nodes:
            raise UpstreamError(code="no_nodes")
        return await self._catalog.resolve(model, ref, who)

    async def refs(self, model: str) -> Mapping[str, Digest]:
        """As the signed metadata has them."""
        return {name: target.revision for name, target in (await self._trusted.refs(model)).items()}

    async def listing(self, path: ModelPath | ModelsPath) -> Listing:
        """A listing, from the catalog."""
        return await self._catalog.listing(path)

    async def trust(self, path: TrustPath) -> Listing:
        """A file of the signed metadata, as it was verified here."""
        return await self._trusted.file(path)

    def sources(self, request: web.Request, path: TaskPath) -> plan.Sources:
        """Each shard's owners in the client's region, then others, then the origins. A node that is named first
        counts as sent to once, however many shards: the client fetches a few at a time."""
        region = self.find(request).region
        told: set[str] = set()

        def sources(digest: Digest) -> list[str]:
            choices = self._selection.choose(region, digest, self._count)
            if choices and choices[0].node.id not in told:
                told.add(choices[0].node.id)
                self._selection.sent(choices)
            return self._bases(choices)

        return sources

    def bases(self, request: web.Request, path: TaskPath | FilePath) -> Sequence[str]:
        """The nodes of the client's region; only where it has none, those of others; only where none is left, origins.

        aria2 takes from all that a metalink names at once, whatever the priority: what is named here as a last
        resort would be used every time, and the model would cross the site's link for each person anew.
        """
        region = self.find(request).region
        choices = self._selection.choose(region, path.ring_key, self._count)
        near = [choice for choice in choices if choice.node.region == region] or choices
        self._selection.sent(near)
        return self._bases(near) if not near else [choice.node.url for choice in near]

    async def status(self) -> Mapping[str, Any]:
        """The members, and whether Redis is there."""
        return {**await self._itself(), "nodes": self._selection.nodes()}

    async def _itself(self) -> dict[str, Any]:
        return {
            "service": "router",
            "epoch": self._registry.snapshot.epoch,
            "degraded": self._registry.degraded,
            "membership": self._membership(),
            "trust": self._trusted.status(),
            "rollouts": await self._rollouts(),
        }

    async def network(self) -> Mapping[str, Any]:
        """The whole network as it is seen from here, for the dashboard: the nodes are asked how they do."""
        seen, now = await self._watch.look(), self._clock.time()
        return {
            **await self._itself(),
            "time": round(now, 1),
            "age": round(self._watch.age, 1),
            **network(seen, day_of(now), MAX_NODES),
            "federated": self._federated.look(),
            "errors": last_errors(logs.recent(), seen),
        }

    async def _rollouts(self) -> list[dict[str, Any]]:
        """What is being rolled out of public models, and what nodes have seen of it, site by site."""
        told = [
            (node.region, trial)
            for node in self._registry.snapshot.nodes.values()
            for trial in self._registry.states.get(node.id, State()).trials
        ]
        for model in {trial.model for _, trial in told}:
            with suppress(UpstreamError):
                await self._trusted.refs(model)  # so that it is known here what is being rolled out of it
        return [
            {
                "model": model,
                "ref": ref,
                "means": target.revision,
                **(target.rollout.record() if target.rollout else {}),
                "results": by_site(
                    (site, trial)
                    for site, trial in told
                    if trial.model == model and trial.revision in self._trusted.on_trial(model)
                ),
            }
            for model, refs in sorted(self._trusted.rollouts().items())
            for ref, target in sorted(refs.items())
        ]

    def not_ready(self) -> str:
        """A router can always answer: with no node left, it names the origin."""
        return ""


def add_membership_routes(
    app: web.Application, registry: Registry, admission: Admission, metrics: Metrics, ttl: float, tier: RouterTier
) -> None:
    """``PUT /nodes/<id>``: a heartbeat. ``DELETE``: the node leaves. ``GET /ring``: the members; those of a region for
    a node of it (``?region=R``); about so many near a client, with what it needs to route by itself (``?near=N``)."""

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
        if "near" in request.query:
            return _view(request, tier)
        region = request.query.get("region")
        if region is not None:
            parse_name(region, "a region")
        snapshot = registry.snapshot
        nodes = [
            {**node.record(), "draining": registry.states.get(node.id, State()).draining}
            for node in snapshot.nodes.values()
            if region in (None, node.region)
        ]
        body = codec.encode_json({"epoch": snapshot.epoch, "region": region, "nodes": nodes})
        etag = hashlib.sha256(body).hexdigest()
        return document(request, body, "application/json", etag, "no-cache", {})

    get(app, "/ring", ring)
    app.router.add_put("/nodes/{node}", put, expect_handler=refuse_expectation)
    app.router.add_delete("/nodes/{node}", delete)


def _view(request: web.Request, tier: RouterTier) -> web.Response:
    """The ring as the client that asks needs it (``shared.view``). Raises RequestError."""
    text = request.query["near"]
    if not (text.isascii() and text.isdigit() and len(text) <= 4 and 1 <= int(text) <= MAX_NEAR):
        raise RequestError(f"near is 1 to {MAX_NEAR}")
    body = codec.encode_json(tier.view(request, int(text)).record())
    etag = hashlib.sha256(body).hexdigest()
    return document(request, body, "application/json", etag, "private, no-cache", {"Vary": "Nearshard-Region"})


def _node_id(request: web.Request) -> str:
    try:
        return parse_name(request.match_info["node"])
    except BadId:
        raise BadId("not a node's name") from None


def build_app(
    settings: RouterSettings, url: str, certificates: Certificates, clock: Clock, log: FilteringBoundLogger
) -> web.Application:
    """A router, ready to be served at ``url``. Raises ConfigError."""
    metrics = Metrics()
    rng = random.Random()  # noqa: S311 - jitter, not secrets
    sessions = Sessions(token=TokenFile(settings.token), certificates=certificates)
    enrolment = EnrolmentFile(settings.enrolled, log) if settings.enrolled else None
    admission = Admission(enrolment.nodes if enrolment else None, clock.monotonic, lambda: secrets.token_hex(16))
    try:
        registry = Registry(
            admission,
            settings.ttl,
            clock,
            rng,
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
    trusted = Trusted(
        read_root(settings.trust_root, clock.time(), "router.trust_root"),
        Upstreams(sessions, settings.origin, metrics, log),
        clock,
        lifetime=settings.ref_lifetime,
        name="router",
        file=TrustFile(settings.data / "trust.msgpack") if settings.data else None,
    )
    metrics.show_expiries(metrics.metadata_expires, trusted.expiries)
    metrics.show_expiries(metrics.certificate_expires, lambda: certificates.expiries)
    catalog = Catalog(
        sessions,
        settings.origin,
        trusted,
        clock,
        "router",
        lifetime=settings.ref_lifetime,
        pins=parse_pins(settings.pins),
    )
    mirrored = Mirrored(sessions, settings.origin, clock, catalog.forget)
    nearness = Nearness(settings.coordinates, settings.links)
    regions = Regions(
        settings.networks,
        settings.default_region,
        trusted=settings.trusted_proxies,
        geoip=open_geoip(settings.geoip) if settings.geoip else None,
        countries=settings.countries,
        nearness=nearness,
    )
    selection = Selection(registry, nearness, clock, metrics, log)
    prober = Prober(sessions.direct, registry, selection, settings.probe, clock, rng)
    announcer = Announcer(sessions, log)

    def published(model: str) -> None:
        """Ask anew, and have every node do so."""
        catalog.forget(model)
        announcer.tell([node.url for node in registry.snapshot.nodes.values()], model)

    def membership() -> str:
        trouble = enrolment.trouble if enrolment else ""
        return f"{admission.mode}; {trouble}" if trouble else admission.mode

    watch = Watch(sessions.direct, registry, selection, lambda: admission.enrolled or {}, clock)
    federated = FederatedRounds(sessions, settings.origin, trusted.models, trusted.known_public, clock)
    tier = RouterTier(
        registry,
        catalog,
        trusted,
        regions,
        selection,
        watch,
        federated,
        clock,
        origins=settings.origin,
        count=settings.candidates,
        membership=membership,
        answers=prober.answers,
    )

    short_path = ShortPath(
        catalog,
        trusted.known_public,
        regions,
        selection,
        clock,
        metrics,
        origins=settings.origin,
        count=settings.candidates,
        server=SERVER,
        epoch=lambda: registry.snapshot.epoch,
        traced=settings.otlp is not None,
    )
    gate = Gate(trusted, clock, sends_on=True)

    async def tell_epoch(_: web.Request, response: web.StreamResponse) -> None:
        if registry.snapshot.epoch:
            response.headers[EPOCH] = str(registry.snapshot.epoch)

    async def live(_: web.Application) -> AsyncIterator[None]:
        await registry.start()
        trusted.start()
        selection.start()
        prober.start()
        yield
        await federated.close()
        await watch.close()
        await prober.close()
        await selection.close()
        await announcer.close()
        await registry.close()
        await mirrored.close()
        await catalog.close()
        await trusted.close()
        await sessions.close()

    app = make_app(SERVER, clock, metrics, log, otlp=settings.otlp)
    app[CONNECTION] = lambda *server, **options: ShortConnection(short_path, *server, **options)
    app[CLAIMED] = lambda request: request.match_info.get("node")
    app.cleanup_ctx.append(live)
    app.on_response_prepare.append(tell_epoch)
    add_routes(app, tier, gate, metrics, degraded=lambda: registry.degraded, absent=mirrored.absent)
    add_hub_routes(app, tier, gate, absent=mirrored.hub_absent)
    add_membership_routes(app, registry, admission, metrics, settings.ttl, tier)
    if settings.enrolled:
        add_enrolment_routes(app, settings.enrolled, registry, gate, log)
    add_explain_routes(app, gate, tier.locate, tier.find, selection)
    add_announce_route(app, published)
    add_dashboard(app, tier.network, clock)
    add_description(app, "router", partial(operations, enrolling=settings.enrolled is not None))
    return app
