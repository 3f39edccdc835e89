"""Where a client is. Pure: the GeoIP database is a function that gives an address's record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import NamedTuple

from shared.errors import BadId, RequestError
from shared.ids import parse_name
from shared.nearness import Nearness

Address = IPv4Address | IPv6Address
Lookup = Callable[[str], object]
"""The record that a GeoIP database has of an address; None where it has none."""
REMEMBERED = 16_384
"""Addresses whose region is kept: a lookup in a database costs more than all the rest of a choice."""


class Found(NamedTuple):
    """The region of a client, and how it was found."""

    region: str
    how: str
    """``said``, ``network``, ``coordinates`` or ``country`` (of GeoIP), or ``default``."""
    address: str = ""
    """The client's, as far as proxies that are trusted tell."""


class Networks:
    """A value by network; the longest one that holds an address wins. One lookup a prefix length, however many."""

    def __init__(self, networks: Mapping[str, str]) -> None:
        tables: dict[tuple[int, int], dict[int, str]] = {}
        for text, value in networks.items():
            network = ip_network(text)
            shift = network.max_prefixlen - network.prefixlen
            tables.setdefault((network.version, shift), {})[int(network.network_address) >> shift] = value
        self._tables = [(version, shift, table) for (version, shift), table in sorted(tables.items())]

    def get(self, address: Address) -> str | None:
        """The value of the longest network that holds ``address``."""
        number = int(address)
        for version, shift, table in self._tables:  # by shift: the longest prefix first
            if version == address.version and (value := table.get(number >> shift)) is not None:
                return value
        return None


class Regions:
    """Where a client is: what it says, else the longest network that holds its address, else GeoIP, else a default."""

    def __init__(
        self,
        networks: Mapping[str, str],
        default: str,
        *,
        trusted: Iterable[str] = (),
        geoip: Lookup | None = None,
        countries: Mapping[str, str] | None = None,
        nearness: Nearness | None = None,
    ) -> None:
        """``trusted``: networks of proxies whose X-Forwarded-For is believed. ``countries``: region by ISO code.
        ``nearness``: the coordinates of regions, to which a city's are compared."""
        self._networks = Networks(networks)
        self._trusted = Networks(dict.fromkeys(trusted, "proxy"))
        self._default, self._geoip = default, geoip
        self._countries, self._nearness = dict(countries or {}), nearness or Nearness()
        self._at = lru_cache(maxsize=REMEMBERED)(self._locate)

    def find(self, said: str | None, peer: str | None, forwarded: Sequence[str] = ()) -> Found:
        """The region of a client that said ``said`` (may be nothing), connected from ``peer``, with the lines of
        X-Forwarded-For in the order in which they came. Raises RequestError (``bad_region``)."""
        address = self._client(peer or "", forwarded)
        if said:
            try:
                return Found(parse_name(said), "said", address)
            except BadId as error:
                raise RequestError(str(error), code="bad_region") from error
        return self._at(address)

    def _client(self, peer: str, forwarded: Sequence[str]) -> str:
        """The right-most address that is not a proxy of ours: what is left of it, anybody may have written."""
        if not forwarded:
            return peer
        client = peer
        hops = ",".join(forwarded).split(",")
        while hops and (address := _parse(client)) is not None and self._trusted.get(address):
            before = hops.pop().strip()
            if _parse(before) is None:
                break  # a proxy that hides whom it speaks for; itself is the nearest that is known
            client = before
        return client

    def _locate(self, text: str) -> Found:
        address = _parse(text)
        if address is None:
            return Found(self._default, "default")
        if region := self._networks.get(address):
            return Found(region, "network", str(address))
        if self._geoip is not None and (found := self._geographic(self._geoip(str(address)))) is not None:
            return found._replace(address=str(address))
        return Found(self._default, "default", str(address))

    def _geographic(self, record: object) -> Found | None:
        """By a record of MaxMind's form: coordinates where there are some and regions have theirs, else the country."""
        if not isinstance(record, Mapping):
            return None
        place, country = record.get("location"), record.get("country")
        if isinstance(place, Mapping):
            latitude, longitude = place.get("latitude"), place.get("longitude")
            if isinstance(latitude, int | float) and isinstance(longitude, int | float):
                nearest = self._nearness.nearest((latitude, longitude))
                if nearest is not None:
                    return Found(nearest, "coordinates")
        if isinstance(country, Mapping) and (region := self._countries.get(str(country.get("iso_code")))):
            return Found(region, "country")
        return None


def _parse(text: str) -> Address | None:
    """An address; one of IPv4 that is written as IPv6 is IPv4."""
    try:
        address = ip_address(text)
    except ValueError:
        return None
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped:
            return address.ipv4_mapped
        if address.scope_id:
            return IPv6Address(int(address))
    return address
