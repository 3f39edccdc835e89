"""The edge node's composition root."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import web
from structlog.typing import FilteringBoundLogger

from edge_node.account import Account
from edge_node.admin import add_admin_routes, build_admin, write_access
from edge_node.api import operations as described
from edge_node.bookkeeping import Bookkeeper, add_usage_route
from edge_node.cache import Cache
from edge_node.config import EdgeSettings
from edge_node.delivery import Delivery
from edge_node.fill import Fills
from edge_node.identity import own_key, write_identity
from edge_node.membership import Membership
from edge_node.operations import Operations
from edge_node.peers import HOP, Peers
from edge_node.rebuild import Rebuilder, reader_of
from edge_node.recipes import Recipes
from edge_node.relay import Relay
from edge_node.round_trips import RoundTrips
from edge_node.scrub import Scrubber
from edge_node.short_path import ShortConnection
from edge_node.store import DiskTier, MemoryTier
from edge_node.subscriptions import Subscriptions
from edge_node.upstream import Upstreams
from shared.acceptance import accept
from shared.catalog import Catalog
from shared.clock import Clock
from shared.errors import ConfigError
from shared.link import LinkPolicy
from shared.metrics import Metrics
from shared.node import State
from shared.pins import parse_pins
from shared.token_file import TokenFile
from shared.trust_file import TrustFile, read_root
from shared.usage import day_of
from shared.view import EPOCH
from shared.web.access import Gate
from shared.web.announce import add_announce_route
from shared.web.describe import add_description
from shared.web.hub import add_hub_routes
from shared.web.middleware import make_app
from shared.web.mirrored import Mirrored
from shared.web.reads import add_routes
from shared.web.server import CONNECTION, DRAIN, listen
from shared.web.session import Sessions
from shared.web.tls import CLAIMED, Certificates
from shared.web.trusted import ExpiredUse, Trusted
from shared.web.trusted import Upstreams as TrustUpstreams


def build_app(
    settings: EdgeSettings, url: str, certificates: Certificates, clock: Clock, log: FilteringBoundLogger
) -> web.Application:
    """An edge node, ready to be served at ``url``. Raises ConfigError."""
    metrics = Metrics()
    log = log.bind(node=settings.node)
    rng = random.Random()  # noqa: S311 - jitter, not secrets
    server = f"nearshard-edge {settings.node}"
    advertised = settings.advertise or url
    sessions = Sessions(settings.upstream_proxies.get, TokenFile(settings.token), certificates)
    memory = MemoryTier(settings.memory, metrics)
    disk = DiskTier(settings.data, settings.disk, clock, metrics, log)
    try:
        entries = disk.recover()
    except OSError as error:
        raise ConfigError(f"edge.data: {settings.data} cannot be used: {error}") from error
    key = own_key(settings.data, log)
    log.info("this node's public key; `nearshard enroll` takes it", key=key.public.hex())
    log.info("disk cache taken up", entries=entries, bytes=disk.ledger.used, directory=str(settings.data))
    peers = Peers(settings.node, settings.replicas)
    account = Account(lambda: day_of(clock.time()))
    upstreams = Upstreams(
        sessions,
        settings.origin,
        clock,
        metrics,
        parents=settings.parent,
        peers=peers,
        node=settings.node,
        account=account,
    )
    cache = Cache(memory, disk, Fills(memory, disk, upstreams, clock, rng, metrics, log))
    above = [*settings.parent, *settings.origin]
    trusted = Trusted(
        read_root(settings.trust_root, clock.time(), "edge.trust_root"),
        TrustUpstreams(sessions, above, metrics, log),
        clock,
        lifetime=settings.ref_lifetime,
        name=settings.node,
        file=TrustFile(settings.data / "trust.msgpack"),
        accepted=accept(settings.accept_expired, clock.time(), "edge.accept_expired"),
        accepting=ExpiredUse(clock, metrics, log).tell,
    )
    metrics.show_expiries(metrics.metadata_expires, trusted.expiries)
    metrics.show_expiries(metrics.certificate_expires, lambda: certificates.expiries)
    catalog = Catalog(
        sessions,
        above,
        trusted,
        clock,
        settings.node,
        lifetime=settings.ref_lifetime,
        directory=settings.data / "catalog",
        pins=parse_pins(settings.pins),
    )
    recipes = Recipes(told=account.learn)
    operations = Operations(cache, catalog, trusted, upstreams, recipes, settings.data, clock, log)
    subscriptions = Subscriptions(settings, operations, cache, catalog, trusted, clock, rng, metrics, log)
    mirrored = Mirrored(sessions, settings.origin, clock, catalog.forget)
    rebuilder = Rebuilder(cache, recipes, upstreams, reader_of(catalog, trusted, recipes), metrics, log)
    if settings.deltas:
        cache.fills.make, cache.fills.named = rebuilder.make, recipes.named
    delivery = Delivery(
        cache,
        catalog,
        trusted,
        upstreams,
        recipes,
        rebuilder.status,
        metrics,
        node=settings.node,
        region=settings.region,
        url=advertised,
        origins=settings.origin,
        server=server,
        clock=clock,
        known_public=trusted.known_public,
        small_model=settings.small_model,
        subscribed=subscriptions.status,
        traced=settings.otlp is not None,
    )
    upstreams.link.policy = LinkPolicy(
        settings.link_rate, settings.link_windows, settings.upstream_rates, metered=settings.metered
    )
    books = Bookkeeper(account, trusted, settings.data, clock, log)
    scrubber = Scrubber(disk, settings.scrub, clock, log)

    round_trips = RoundTrips(sessions.direct, settings.router, settings.region, settings.measure, clock, rng, log)

    def state() -> State:
        trials = tuple(delivery.canary.trials())
        return State(delivery.in_flight, operations.draining, round_trips.nearest(), trials)

    def record() -> dict[str, Any]:
        return {
            "url": advertised,
            "region": settings.region,
            "weight": settings.weight,
            **state().record(),
        }

    membership = Membership(
        sessions.direct,
        settings.router,
        settings.node,
        record,
        settings.heartbeat,
        clock,
        rng,
        log,
        region=settings.region,
        peers=peers,
        key=key,
    )

    def heard(model: str) -> None:
        catalog.forget(model)
        subscriptions.heard(model)

    async def tell_epoch(_: web.Request, response: web.StreamResponse) -> None:
        if peers.epoch:
            response.headers[EPOCH] = str(peers.epoch)

    async def live(_: web.Application) -> AsyncIterator[None]:
        token = secrets.token_urlsafe(32)
        admin, admin_url = await listen(
            build_admin(operations, token, clock, log), "127.0.0.1", settings.admin_port, settings.keepalive
        )
        try:
            await asyncio.to_thread(write_access, settings.data, admin_url, token)
        except OSError as error:
            log.warning("operators cannot reach this node: its directory takes no file", reason=str(error))
        else:
            await asyncio.to_thread(write_identity, settings.data, settings.node, key, record())
        operations.start()
        subscriptions.start()
        sessions.resolve_ahead([*above, *settings.router])
        trusted.start()
        membership.start()
        round_trips.start()
        scrubber.start()
        books.start()
        yield
        await membership.leave()
        await round_trips.close()
        await admin.cleanup()
        await scrubber.close()
        await subscriptions.close()
        await operations.close()
        await mirrored.close()
        await catalog.close()
        await trusted.close()
        await cache.close()
        await books.close()
        await sessions.close()

    app = make_app(server, clock, metrics, log, otlp=settings.otlp)
    app[CONNECTION] = lambda *server, **options: ShortConnection(delivery.short_path, *server, **options)
    app.cleanup_ctx.append(live)
    app.on_response_prepare.append(tell_epoch)
    app[CLAIMED] = lambda request: request.headers.get(HOP)
    app[DRAIN] = membership.leave  # before the socket closes: no new clients are sent here
    gate = Gate(trusted, clock)
    add_routes(app, delivery, gate, metrics, absent=mirrored.absent)
    add_admin_routes(app, operations, gate, log)
    add_hub_routes(app, delivery, gate, absent=mirrored.hub_absent)
    add_usage_route(app, books, gate, clock, node=settings.node, region=settings.region)
    add_announce_route(app, heard)
    Relay(sessions, settings.origin, upstreams, clock).add_routes(app)
    add_description(app, "edge", described)
    return app
