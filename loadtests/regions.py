"""Regions around a hub on one machine, and our network in them: the origin and a router at the hub, an edge in each.

The WAN is one of network namespaces (``loadtests.wan``: delay, rate, loss and the kernel's own TCP) for root, else one
of proxies on loopback (``loadtests.delays``: delay and rate). Nothing listens but in the namespaces, or on loopback.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from loadtests.delays import DelayProxy
from loadtests.scenarios import Region
from loadtests.services import Service, service
from loadtests.wan import HUB_ADDRESS, MTU, Hub, Link, Unavailable
from shared.enrolment import KEY, Enrolled, enrolment_line
from shared.keys import load_or_make_key
from shared.node import Node
from shared.web.server import free_port

Inside = Callable[[Sequence[str]], Sequence[str]]


class Place(Protocol):
    """Where a region's people and services are: behind its link."""

    @property
    def region(self) -> Region:
        """Which one."""

    @property
    def address(self) -> str:
        """What its services listen on, and its people find them at."""

    @property
    def netns(self) -> str:
        """The network namespace that it is; empty where it is this one."""

    def inside(self, command: Sequence[str]) -> Sequence[str]:
        """The command, run there."""

    def upstream(self, url: str) -> str:
        """The URL by which a service at the hub is reached from there."""

    def carried(self) -> int:
        """Bytes that the link has brought there so far."""

    def cut(self) -> None:
        """Nothing passes the link until ``mend``."""

    def mend(self) -> None:
        """All passes again."""


@dataclass(frozen=True)
class Wan:
    """The hub, and the places around it."""

    places: Sequence[Place]
    hub_address: str
    inside: Inside
    """A command, run at the hub."""
    how: str
    """What the links are, for people."""


@dataclass(frozen=True)
class Behind:
    """A region in a network namespace."""

    region: Region
    link: Link

    @property
    def address(self) -> str:
        """See Place."""
        return self.link.site_address

    @property
    def netns(self) -> str:
        """See Place."""
        return self.link.netns

    def inside(self, command: Sequence[str]) -> Sequence[str]:
        """See Place."""
        return self.link.site(command)

    def upstream(self, url: str) -> str:
        """See Place."""
        return url

    def carried(self) -> int:
        """See Place: bytes of IP packets, all heads counted."""
        return self.link.down().arrived

    def cut(self) -> None:
        """See Place."""
        self.link.cut()

    def mend(self) -> None:
        """See Place."""
        self.link.mend()


@dataclass(frozen=True)
class Proxied:
    """A region on loopback, with a proxy on its way to the hub."""

    region: Region
    proxy: DelayProxy
    address: str = "127.0.0.1"
    netns: str = ""
    _ways: dict[str, str] = field(default_factory=dict)

    def inside(self, command: Sequence[str]) -> Sequence[str]:
        """See Place."""
        return command

    def upstream(self, url: str) -> str:
        """See Place."""
        if url not in self._ways:
            parts = urlsplit(url)
            assert parts.hostname and parts.port
            self._ways[url] = f"http://127.0.0.1:{self.proxy.forward(parts.hostname, parts.port)}"
        return self._ways[url]

    def carried(self) -> int:
        """See Place: bytes of TCP's payload."""
        return self.proxy.carried()

    def cut(self) -> None:
        """See Place."""
        self.proxy.cut()

    def mend(self) -> None:
        """See Place."""
        self.proxy.mend()


@contextmanager
def wan(regions: Sequence[Region], *, seed: int, congestion: str, proxies: bool = False) -> Iterator[Wan]:
    """Links to these regions. ``proxies``: by proxies even where namespaces could be had."""
    with ExitStack() as stack:
        try:
            if proxies:
                raise Unavailable("proxies were asked for")
            made = _namespaces(stack, regions, seed, congestion)
        except Unavailable as error:
            stack.close()
            made = _proxies(stack, regions, str(error))
        yield made


def _proxies(stack: ExitStack, regions: Sequence[Region], why: str) -> Wan:
    places = [
        Proxied(region, stack.enter_context(DelayProxy(rtt_ms=region.rtt_ms, mbit=region.mbit))) for region in regions
    ]
    how = f"proxies on loopback that delay and pace, without loss and without TCP of a long way ({why})"
    return Wan(places, "127.0.0.1", list, how)


def _namespaces(stack: ExitStack, regions: Sequence[Region], seed: int, congestion: str) -> Wan:
    hub = stack.enter_context(Hub())
    places = []
    for number, region in enumerate(regions):
        terms = {"rtt_ms": region.rtt_ms, "mbit": region.mbit, "loss": region.loss}
        link = stack.enter_context(Link(**terms, seed=seed + number, congestion=congestion, hub=hub))
        places.append(Behind(region, link))
    how = f"network namespaces, the kernel's own TCP ({congestion}), MTU {MTU}, delay, rate and loss by the packet"
    return Wan(places, HUB_ADDRESS, hub.inside, how)


@dataclass(frozen=True)
class Network:
    """Our services in such a WAN."""

    router: Service
    edges: Mapping[str, Service]
    """By region."""


@contextmanager
def origin(wan: Wan, directory: Path, store: str, *flags: str) -> Iterator[Service]:
    """The origin of a store, at the hub."""
    words = ["--store", store, "--host", wan.hub_address, "--insecure", *flags]
    with service("origin", directory, *words, inside=wan.inside) as started:
        yield started


@contextmanager
def network(wan: Wan, source: Service, directory: Path) -> Iterator[Network]:
    """A router at the hub and an edge with an empty cache in each region, all ready, known to each other."""
    nodes = [
        Node(f"{place.region.name}-1", f"http://{place.address}:{free_port()}", place.region.name, 1)
        for place in wan.places
    ]
    enrolled = directory / "nodes.toml"
    keys = [load_or_make_key(directory / node.id / KEY) for node in nodes]
    lines = [enrolment_line(Enrolled(node, key.public)) for node, key in zip(nodes, keys, strict=True)]
    enrolled.write_text("".join(f"{line}\n" for line in lines))
    with ExitStack() as stack:
        words = ["--host", wan.hub_address, "--insecure", "--origin", source.url, "--enrolled", str(enrolled)]
        words += ["--data", str(directory / "router"), "--default-region", wan.places[0].region.name]
        router = stack.enter_context(service("router", directory, *words, inside=wan.inside))
        edges = {}
        for place, node in zip(wan.places, nodes, strict=True):
            folder = directory / node.id
            words = ["--host", place.address, "--insecure", "--node", node.id, "--region", node.region]
            words += ["--origin", place.upstream(source.url), "--router", place.upstream(router.url)]
            words += ["--data", str(folder), "--advertise", node.url]
            port = urlsplit(node.url).port or 0
            edges[node.region] = stack.enter_context(
                service("edge_node", folder, *words, inside=place.inside, port=port)
            )
        yield Network(router, edges)
