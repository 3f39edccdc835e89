"""What a router tells a client so that it can route by itself: the nodes near it, in one snapshot. Pure.

Router, client and the client's file all speak of it in this one form. It comes over the network or from a disk, so
``parse`` lets nothing through but names in their canonical form, plain web URLs, and no more of them than a client has
use for. Nobody is believed about bytes because of it: it says whom to ask.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from shared import codec
from shared.errors import DecodeError, RequestError, UpstreamError
from shared.ids import parse_name
from shared.nearness import Nearness
from shared.node import Node, parse_node
from shared.routing import Snapshot, Verdict

EPOCH = "Nearshard-Epoch"
"""The field of an answer in which a router, or a node that heard it from one, says at which epoch the members are."""
NEAR = 256
"""Nodes that a client asks for."""
MAX_NEAR = 4096
MAX_VIEW = 4 << 20
"""Bytes of a view as JSON: what a region of over 20,000 nodes takes."""
MAX_WEIGHT = 32_768
"""Of all nodes together: each unit takes 60 microseconds and 4 KiB to place on the ring."""
MAX_ORIGINS = 16
MAX_EPOCH = 1 << 53
_ORIGIN = re.compile(r"https?://[!-;=?-~]{1,2000}")
"""No spaces, no controls, nothing that could end a field of HTTP (``<``, ``>``)."""


@dataclass(frozen=True)
class View:
    """The members as a client in ``region`` needs them."""

    epoch: int
    region: str
    """The client's, as the router found it."""
    regions: tuple[str, ...]
    """Those of the nodes, nearest first."""
    nodes: tuple[Node, ...]
    draining: frozenset[str] = frozenset()
    ejected: frozenset[str] = frozenset()
    """Nodes that the router passes over as unhealthy."""
    origins: tuple[str, ...] = ()
    """Base URLs: the last resort."""
    left_off: int = 0
    """Nodes of farther regions that are not here."""

    def __repr__(self) -> str:
        return f"<View {self.epoch} from {self.region}: {len(self.nodes)} nodes>"

    def record(self) -> dict[str, Any]:
        """As it travels and is kept."""
        nodes = [
            {**node.record(), "draining": node.id in self.draining, "ejected": node.id in self.ejected}
            for node in self.nodes
        ]
        return {
            "epoch": self.epoch,
            "region": self.region,
            "regions": list(self.regions),
            "nodes": nodes,
            "origins": list(self.origins),
            "left_off": self.left_off,
        }

    def nearness(self) -> Nearness:
        """The order of regions as the router gave it."""
        return Nearness(links={f"{self.region}>{name}": float(rank) for rank, name in enumerate(self.regions)})


def near(
    snapshot: Snapshot,
    region: str,
    order: Sequence[str],
    passed: Mapping[Verdict, Set[str]],
    origins: Sequence[str],
    count: int,
) -> View:
    """The view of a client in ``region``, of about ``count`` nodes. ``order``: the regions, nearest first; ``passed``:
    ``Routing.passed_over``.

    Regions come whole or not at all, or their rings would give shards to others than own them. The nearest one comes
    however large it is, those after it where they still fit in.
    """
    regions: list[str] = []
    nodes: list[Node] = []
    for name in order:
        members = snapshot.rings[name].names
        if not regions or len(nodes) + len(members) <= count:
            regions.append(name)
            nodes += [snapshot.nodes[node] for node in members]
    here = {node.id for node in nodes}
    return View(
        snapshot.epoch,
        region,
        tuple(regions),
        tuple(nodes),
        frozenset(passed[Verdict.DRAINING] & here),
        frozenset(passed[Verdict.EJECTED] & here),
        tuple(origins[:MAX_ORIGINS]),
        len(snapshot.nodes) - len(nodes),
    )


def parse(document: object) -> View:
    """The view in a decoded document. Raises UpstreamError: a bad one is the router's mistake, not ours."""
    try:
        return _parse(document)
    except (RequestError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UpstreamError("not a valid view of the ring") from error


def decode(data: bytes) -> View:
    """The view in a JSON body. Raises UpstreamError."""
    try:
        return parse(codec.decode_json(data, MAX_VIEW))
    except DecodeError as error:
        raise UpstreamError("not a valid view of the ring") from error


def _parse(document: Any) -> View:
    regions = tuple(parse_name(name) for name in document["regions"])
    records = document["nodes"]
    nodes = tuple(parse_node(record["id"], record) for record in records)
    ids, origins = {node.id for node in nodes}, tuple(document["origins"])
    if len(ids) != len(nodes) or len(set(regions)) != len(regions) or {node.region for node in nodes} != set(regions):
        raise ValueError("names that are there twice, or regions that are not those of the nodes")
    if sum(node.weight for node in nodes) > MAX_WEIGHT or len(origins) > MAX_ORIGINS:
        raise ValueError("too much")
    if not all(isinstance(origin, str) and _ORIGIN.fullmatch(origin) for origin in origins):
        raise ValueError("an origin that is no URL")
    return View(
        _count(document["epoch"]),
        parse_name(document["region"]),
        regions,
        nodes,
        frozenset(record["id"] for record in records if _flag(record["draining"])),
        frozenset(record["id"] for record in records if _flag(record["ejected"])),
        tuple(origin.rstrip("/") for origin in origins),
        _count(document["left_off"]),
    )


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value < MAX_EPOCH:
        raise ValueError("not a count")
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError("neither true nor false")
    return value
