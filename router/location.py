"""Where a client is. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from shared.errors import BadId, RequestError
from shared.ids import parse_name

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
