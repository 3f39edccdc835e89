"""Where a client is: behind proxies, and by a GeoIP database."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mmdb_writer import MMDBWriter
from netaddr import IPSet

from router.config import RouterSettings
from router.geoip import open_geoip
from router.location import Networks, Regions
from shared.config import load
from shared.errors import ConfigError
from shared.nearness import Nearness
from tests.unit.strategies import quick

BEHIND = Regions({"10.0.0.0/8": "office", "192.0.2.0/24": "proxy"}, "elsewhere", trusted=["192.0.2.0/24", "::1/128"])


@pytest.mark.parametrize(
    ("peer", "forwarded", "address"),
    [
        ("198.51.100.1", ["10.0.0.1"], "198.51.100.1"),  # not a proxy of ours: it may say what it likes
        ("192.0.2.1", ["10.0.0.1"], "10.0.0.1"),
        ("192.0.2.1", ["6.6.6.6, 10.0.0.1"], "10.0.0.1"),  # what is left of a stranger is the stranger's word
        ("192.0.2.1", ["6.6.6.6", "10.0.0.1, 192.0.2.9"], "10.0.0.1"),
        ("192.0.2.1", ["192.0.2.2,192.0.2.3"], "192.0.2.2"),
        ("192.0.2.1", [], "192.0.2.1"),
        ("192.0.2.1", [""], "192.0.2.1"),
        ("192.0.2.1", ["10.0.0.1, unknown"], "192.0.2.1"),
        ("192.0.2.1", ["10.0.0.1, , 192.0.2.2"], "192.0.2.2"),
        ("::ffff:192.0.2.1", ["10.0.0.1"], "10.0.0.1"),
        ("::1", ["2001:db8::5"], "2001:db8::5"),
        ("", ["10.0.0.1"], ""),
        (None, ["10.0.0.1"], ""),
    ],
)
def test_the_client_is_the_right_most_address_that_is_no_proxy_of_ours(
    peer: str | None, forwarded: list[str], address: str
) -> None:
    assert BEHIND.find(None, peer, forwarded).address == address


@quick
@given(st.lists(st.text() | st.ip_addresses().map(str)), st.sampled_from(["192.0.2.1", "198.51.100.1"]))
def test_whatever_is_forwarded_the_client_is_somewhere(forwarded: list[str], peer: str) -> None:
    assert BEHIND.find(None, peer, forwarded).region in ("office", "proxy", "elsewhere")


@quick
@given(st.lists(st.ip_addresses(v=4).flatmap(lambda a: st.integers(0, 32).map(lambda n: (a, n))), max_size=20),
       st.ip_addresses())  # fmt: skip
def test_networks_find_what_a_look_at_each_would(pairs: list[tuple[object, int]], address: object) -> None:
    from ipaddress import IPv4Address, IPv6Address, ip_network

    assert isinstance(address, IPv4Address | IPv6Address)
    networks = {str(ip_network(f"{base}/{bits}", strict=False)): f"{base}/{bits}" for base, bits in pairs}
    holding = [net for net in networks if address in ip_network(net)]
    longest = max(holding, key=lambda net: ip_network(net).prefixlen, default=None)
    assert Networks(networks).get(address) == (networks[longest] if longest else None)


# GeoIP


def database(path: Path, kind: str, records: dict[str, dict[str, object]]) -> Path:
    """A file of MaxMind's form."""
    writer = MMDBWriter(ip_version=6, ipv4_compatible=True, database_type=kind)
    for network, record in records.items():
        writer.insert_network(IPSet([network]), record)
    writer.to_db_file(str(path))
    return path


NEARNESS = Nearness({"north": (59.3, 18.1), "south": (-33.9, 18.4)})


@pytest.fixture
def by_city(tmp_path: Path) -> Regions:
    """Regions by a database of cities and one of whose cities has no place."""
    file = database(
        tmp_path / "city.mmdb",
        "GeoLite2-City",
        {
            "203.0.113.0/26": {"location": {"latitude": 60.2, "longitude": 24.9}, "country": {"iso_code": "FI"}},
            "203.0.113.64/26": {"location": {"latitude": -29.9, "longitude": 31.0}, "country": {"iso_code": "FI"}},
            "203.0.113.128/26": {"country": {"iso_code": "DE"}},
            "203.0.113.192/26": {"country": {"iso_code": "XX"}, "location": {"latitude": "x"}},
            "2001:db8::/32": {"location": {"latitude": 55.0, "longitude": 12.0}},
        },
    )
    return Regions(
        {"203.0.113.1/32": "office"}, "elsewhere", geoip=open_geoip(file), countries={"DE": "europe"}, nearness=NEARNESS
    )


@pytest.mark.parametrize(
    ("address", "region", "how"),
    [
        ("203.0.113.1", "office", "network"),
        ("203.0.113.2", "north", "coordinates"),
        ("203.0.113.70", "south", "coordinates"),
        ("203.0.113.130", "europe", "country"),
        ("203.0.113.200", "elsewhere", "default"),
        ("198.51.100.1", "elsewhere", "default"),
        ("2001:db8::7", "north", "coordinates"),
        ("::ffff:203.0.113.2", "north", "coordinates"),
    ],
)
def test_geoip_is_asked_after_networks(by_city: Regions, address: str, region: str, how: str) -> None:
    found = by_city.find(None, address)
    assert (found.region, found.how) == (region, how)


def test_without_coordinates_of_regions_the_country_counts(tmp_path: Path) -> None:
    file = database(
        tmp_path / "country.mmdb",
        "GeoLite2-Country",
        {"203.0.113.0/24": {"country": {"iso_code": "DE"}, "location": {"latitude": 60.2, "longitude": 24.9}}},
    )
    regions = Regions({}, "elsewhere", geoip=open_geoip(file), countries={"DE": "europe"})
    assert regions.find(None, "203.0.113.9").region == "europe"


@pytest.mark.parametrize("content", [b"", b"no database", b"\xab\xcd\xefMaxMind.com" * 3, None])
def test_a_broken_database_is_an_error_at_start(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "broken.mmdb"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"router\.geoip"):
        open_geoip(file)


def test_a_database_cut_short_is_an_error_at_start_or_has_no_records(tmp_path: Path) -> None:
    whole = database(tmp_path / "whole.mmdb", "GeoLite2-City", {"203.0.113.0/24": {"country": {"iso_code": "DE"}}})
    data = whole.read_bytes()
    for length in range(0, len(data), 97):
        (tmp_path / "cut.mmdb").write_bytes(data[length:])
        try:
            lookup = open_geoip(tmp_path / "cut.mmdb")
        except ConfigError:
            continue
        assert Regions({}, "elsewhere", geoip=lookup, countries={}).find(None, "203.0.113.9").region == "elsewhere"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("links", '{"north": 5}'), ("links", '{"north>north": 5}'), ("links", '{"north>South": 5}'),
        ("links", '{"north>south": -1}'), ("coordinates", '{"north": [91, 0]}'), ("coordinates", '{"north": [1]}'),
        ("countries", '{"de": "europe"}'), ("countries", '{"DE": "Europe"}'), ("trusted-proxies", '["10.0.0.1/8"]'),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_meant_are_refused(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"router\.{name.replace('-', '_')}"):
        load(RouterSettings, ["--trust-root", "root.json", f"--{name}", value])


def test_a_router_without_a_root_of_trust_is_refused() -> None:
    """There is no switch that turns the check off; the error says where to get one."""
    with pytest.raises(ConfigError, match=r"router\.trust_root.*nearshard trust accept"):
        load(RouterSettings, [])
