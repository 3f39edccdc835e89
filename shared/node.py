"""A node of the network, as routers, nodes and clients speak of it. Pure.

What a node is (``Node``) changes seldom and makes the ring; how it does (``State``) changes with every heartbeat.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv6Address, ip_address
from typing import Any

from shared.errors import BadId, RequestError
from shared.ids import parse_name
from shared.trials import Trial, parse_trials

MAX_URL = 256
MAX_WEIGHT = 10
_NUMBER = re.compile(r"[0-9]+|0[xX][0-9A-Fa-f]*")
_URL = re.compile(r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::([0-9]{1,5}))?/?")


@dataclass(frozen=True, slots=True)
class Node:
    """A member as it told of itself; checked."""

    id: str
    url: str
    region: str
    weight: int

    def record(self) -> dict[str, Any]:
        """For Redis and for people."""
        return {"id": self.id, "url": self.url, "region": self.region, "weight": self.weight}


def parse_node(node: str, record: object) -> Node:
    """The member that a heartbeat, or an entry of Redis, tells of. Raises RequestError (``bad_node``, ``bad_id``).

    Both come over the network: nothing but a plain web URL and names in their canonical form gets in.
    """
    if not isinstance(record, dict):
        raise RequestError("a node record is a map", code="bad_node")
    url, weight = record.get("url"), record.get("weight", 1)
    if not isinstance(url, str) or len(url) > MAX_URL or not (match := _URL.fullmatch(url)) or _unusable(match):
        raise RequestError("a node's url is http(s)://host:port", code="bad_node")
    if type(weight) is not int or not 1 <= weight <= MAX_WEIGHT:
        raise RequestError(f"a node's weight is 1 to {MAX_WEIGHT}", code="bad_node")
    if not isinstance(region := record.get("region"), str):
        raise RequestError("a node's region is a name", code="bad_node")
    try:
        return Node(parse_name(node), url.rstrip("/"), parse_name(region), weight)
    except BadId as error:
        raise RequestError(str(error), code="bad_node") from error


def _unusable(url: re.Match[str]) -> bool:
    """Whether a URL's port does not exist, or its host is an address that no node has (cloud metadata among them)."""
    if url[2] and not 0 < int(url[2]) < 1 << 16:
        return True
    try:
        address = ip_address(url[1].strip("[]"))
    except ValueError:  # a name; but resolvers take "2852039166" and "0xa9fea9fe" for addresses as well
        return url[1].startswith("[") or bool(_NUMBER.fullmatch(url[1].rpartition(".")[2]))
    if isinstance(address, IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    return address.is_link_local or address.is_multicast or address.is_unspecified


MAX_REGIONS = 256
"""Regions that a heartbeat may give round-trip times to."""
MAX_IN_FLIGHT = 1_000_000
MAX_RTT = 60_000.0


@dataclass(frozen=True, slots=True)
class State:
    """How a node does, as it told last."""

    in_flight: int = 0
    """Requests for bytes being answered."""
    draining: bool = False
    """Whether it is to get no new clients."""
    rtt: Mapping[str, float] = field(default_factory=dict)
    """Milliseconds of a round trip to other regions, as it measured them."""
    trials: tuple[Trial, ...] = ()
    """What it has seen of revisions that are in a rollout."""

    def record(self) -> dict[str, Any]:
        """For heartbeats, Redis and people."""
        trials = {"trials": [trial.record() for trial in self.trials]} if self.trials else {}
        return {"in_flight": self.in_flight, "draining": self.draining, "rtt": dict(self.rtt), **trials}


def parse_state(record: object) -> State:
    """The state in a heartbeat; what is not said is as at rest. Raises RequestError (``bad_node``)."""
    if not isinstance(record, dict):
        raise RequestError("a node record is a map", code="bad_node")
    in_flight, draining, rtt = record.get("in_flight", 0), record.get("draining", False), record.get("rtt", {})
    if type(in_flight) is not int or not 0 <= in_flight <= MAX_IN_FLIGHT:
        raise RequestError("in_flight is a count", code="bad_node")
    if not isinstance(draining, bool):
        raise RequestError("draining is true or false", code="bad_node")
    if not isinstance(rtt, dict) or len(rtt) > MAX_REGIONS:
        raise RequestError("rtt is a map of milliseconds by region", code="bad_node")
    times: dict[str, float] = {}
    for region, value in rtt.items():
        if type(value) not in (int, float) or not math.isfinite(value) or not 0 <= value <= MAX_RTT:
            raise RequestError("rtt is a map of milliseconds by region", code="bad_node")
        try:
            times[parse_name(region)] = float(value)
        except BadId as error:
            raise RequestError(str(error), code="bad_node") from error
    return State(in_flight, draining, times, parse_trials(record.get("trials", [])))
