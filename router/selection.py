"""Which nodes serve a key for a client: pure, from one immutable snapshot of the members."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

from shared.errors import BadId, RequestError
from shared.ids import parse_name
from shared.ring import Ring

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
    try:
        return Node(parse_name(node), url.rstrip("/"), parse_name(str(record.get("region"))), weight)
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


class Snapshot:
    """The members at one epoch, with a ring for each region."""

    def __init__(self, nodes: Iterable[Node], epoch: int) -> None:
        self.epoch = epoch
        self.nodes: Mapping[str, Node] = {node.id: node for node in sorted(nodes, key=lambda n: n.id)}
        weights: dict[str, dict[str, int]] = defaultdict(dict)
        for node in self.nodes.values():
            weights[node.region][node.id] = node.weight
        self.rings: Mapping[str, Ring] = {region: Ring(members) for region, members in sorted(weights.items())}

    def __repr__(self) -> str:
        return f"<Snapshot {self.epoch}: {len(self.nodes)} nodes in {len(self.rings)} regions>"

    def candidates(self, region: str, key: str, count: int) -> list[Node]:
        """Up to ``count`` nodes for ``key``, best first, each once: the region's owners, then other regions'."""
        found: list[Node] = []
        for name in sorted(self.rings, key=lambda name: (name != region, name)):
            found += [self.nodes[node] for node in self.rings[name].owners(key, count - len(found))]
            if len(found) >= count:
                break
        return found


Network = IPv4Network | IPv6Network


class Regions:
    """Where a client is: what it says, else the longest network that holds its address, else the default."""

    def __init__(self, networks: Mapping[str, str], default: str) -> None:
        parsed: list[tuple[Network, str]] = [(ip_network(net), region) for net, region in networks.items()]
        self._networks = sorted(parsed, key=lambda item: -item[0].prefixlen)
        self._default = default

    def region_of(self, said: str | None, address: str | None) -> str:
        """The region of a client at ``address`` that said ``said``. Raises RequestError (``bad_region``)."""
        if said:
            try:
                return parse_name(said)
            except BadId as error:
                raise RequestError(str(error), code="bad_region") from error
        try:
            client: IPv4Address | IPv6Address = ip_address(address or "")
        except ValueError:
            return self._default
        if isinstance(client, IPv6Address) and client.ipv4_mapped:
            client = client.ipv4_mapped
        return next((region for network, region in self._networks if client in network), self._default)
