"""Which records become members, and where a client is by its network or its word."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.location import Regions
from shared.errors import RequestError
from shared.node import MAX_URL, MAX_WEIGHT, Node, parse_node
from tests.unit.strategies import quick, texts

# Records


def record(**changes: object) -> dict[str, object]:
    """What a node tells of itself, with something changed."""
    return {"url": "http://edge-1:8720", "region": "paris", "weight": 2} | changes


def refusal(node: str, told: object) -> RequestError:
    """The error that a record is answered."""
    with pytest.raises(RequestError) as caught:
        parse_node(node, told)
    return caught.value


@pytest.mark.parametrize(
    ("told", "url"),
    [
        ("http://edge-1:8720", "http://edge-1:8720"),
        ("https://edge.example.org", "https://edge.example.org"),
        ("http://10.0.0.7:1/", "http://10.0.0.7:1"),
        ("http://127.0.0.1:65535", "http://127.0.0.1:65535"),
        ("http://[2001:db8::1]:8720", "http://[2001:db8::1]:8720"),
        ("http://edge_1", "http://edge_1"),
    ],
)
def test_a_plain_web_url_makes_a_member(told: str, url: str) -> None:
    assert parse_node("edge-1", record(url=told)) == Node("edge-1", url, "paris", 2)


def test_a_member_has_weight_one_unless_it_says_more() -> None:
    assert parse_node("edge-1", {"url": "http://edge-1", "region": "paris"}).weight == 1


def test_a_member_comes_back_from_its_record() -> None:
    node = Node("edge-1", "http://edge-1:8720", "paris", 2)
    assert parse_node("edge-1", json.loads(json.dumps(node.record()))) == node


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "file:", "ftp://host", "unix:/run/x", "gopher://host", "javascript:1",  # schemes
        "169.254.169.254", "host", "host:8720", "//host", "", " ", "http", "http:", "http://", "http:///x", "http:host",
        "http://user@host", "http://user:secret@host", "http://:secret@host", "http://@host",  # users
        "http://host/path", "http://host/path/", "http://host/..", "http://host//x", "http://host;x/",  # paths
        "http://host?query", "http://host?", "http://host#fragment", "http://host#", "http://host/?", "http://host/#",
        "http://host:0", "http://host:65536", "http://host:-1", "http://host:port", "http://host:80:80", "http://:8720",
        "http://ho st", " http://host", "http://host\n", "http://host\r\nX: y", "http://host\0", "http://h\u00f4st",
        "http://host\\path", "http://good\\@evil", 'http://host"', "http://host>;rel=x", "http://<host>", "http://host%2fx",
        "http://a,http://b", "http://[::1", "http://::1", "http://[host]", "http://" + "a" * MAX_URL,
        pytest.param("http://" + "a" * 10_000_000, id="10 MB"),
        None, 5, True, ["http://host"], {"http": "host"}, b"http://host",
    ],
)  # fmt: skip
def test_anything_but_a_plain_web_url_is_refused(url: object) -> None:
    assert refusal("edge-1", record(url=url)).error_code == "bad_node"


@pytest.mark.parametrize(
    "host",
    [
        "169.254.169.254", "169.254.169.254:80", "169.254.0.1", "[fe80::1]",
        # for a resolver these are the first one:
        "[::ffff:169.254.169.254]", "[::ffff:a9fe:a9fe]", "2852039166", "0xa9fea9fe", "169.254.43518",
        "0251.0376.0251.0376",
        "0.0.0.0", "[::]", "224.0.0.1",
    ],
)  # fmt: skip
def test_no_client_is_sent_to_an_address_that_no_node_has(host: str) -> None:
    """The first one is where clouds keep their secrets."""
    url = f"http://{host}"
    assert refusal("edge-1", record(url=url)).error_code == "bad_node"


@pytest.mark.parametrize("weight", [0, -1, MAX_WEIGHT + 1, 10**12, 1.0, 1.5, "1", None, True, [1]])
def test_a_weight_that_is_no_small_whole_number_is_refused(weight: object) -> None:
    assert refusal("edge-1", record(weight=weight)).error_code == "bad_node"


@pytest.mark.parametrize(
    "name", ["", "Edge", "edge 1", "../edge", "edge/1", "edge\n", "é", "-edge", "e" * 65, "e" * 10_240]
)
def test_a_name_that_is_not_canonical_is_refused(name: str) -> None:
    assert refusal(name, record()).status in (400, 422)
    assert refusal("edge-1", record(region=name)).status in (400, 422)


@pytest.mark.parametrize(
    "told", [None, 5, "http://edge-1", [], ["url"], {}, {"url": "http://edge-1"}, {"region": "paris"}]
)
def test_a_record_that_is_incomplete_is_refused(told: object) -> None:
    assert refusal("edge-1", told).error_code == "bad_node"


values = st.none() | st.booleans() | st.integers() | st.floats() | texts
urls = st.tuples(
    st.sampled_from(["http", "HTTP", "https", "file"]),
    st.sampled_from(["://", ":", ":///"]),
    st.text("ab.:@/?#[]%\\;,<>\"' 0189", max_size=10),
).map("".join)


@quick
@given(texts, st.fixed_dictionaries({}, optional={"url": values | urls, "region": values, "weight": values}) | values)
def test_any_record_is_refused_as_a_request_or_makes_a_canonical_member(name: str, told: object) -> None:
    try:
        node = parse_node(name, told)
    except RequestError:
        return
    assert (node.id, parse_node(name, node.record())) == (name, node)


@quick
@given(urls)
def test_a_url_that_is_accepted_is_scheme_host_and_port_and_nothing_else(url: str) -> None:
    try:
        node = parse_node("edge-1", record(url=url))
    except RequestError:
        return
    assert re.fullmatch(r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?", node.url)


# Where a client is

REGIONS = Regions(
    {
        "10.0.0.0/8": "wide",
        "10.1.0.0/16": "narrow",
        "10.1.2.3/32": "one",
        "2001:db8::/32": "six",
        "2001:db8:1::/48": "six-narrow",
    },
    "elsewhere",
)


@pytest.mark.parametrize(
    ("address", "region"),
    [
        ("10.2.0.1", "wide"),
        ("10.1.0.1", "narrow"),
        ("10.1.2.3", "one"),
        ("10.1.2.4", "narrow"),
        ("192.0.2.1", "elsewhere"),
        ("2001:db8::1", "six"),
        ("2001:db8:1::1", "six-narrow"),
        ("2001:db9::1", "elsewhere"),
        ("::ffff:10.1.0.1", "narrow"),  # IPv4 on a socket of both kinds
        ("::ffff:192.0.2.1", "elsewhere"),
        ("::10.1.0.1", "elsewhere"),
        ("fe80::1%eth0", "elsewhere"),
        ("", "elsewhere"),
        (None, "elsewhere"),
        ("unix:/run/x", "elsewhere"),
        ("10.1.0.1:5000", "elsewhere"),
        ("010.1.0.1", "elsewhere"),
    ],
)
def test_a_client_is_in_the_longest_network_that_holds_its_address(address: str | None, region: str) -> None:
    assert REGIONS.find(None, address).region == region


def test_the_order_of_networks_is_no_matter() -> None:
    networks = {"10.1.0.0/16": "narrow", "10.0.0.0/8": "wide"}
    for order in (networks, dict(reversed(networks.items()))):
        assert Regions(order, "elsewhere").find(None, "10.1.0.1").region == "narrow"


def test_what_a_client_says_wins() -> None:
    assert REGIONS.find("paris", "10.1.2.3").region == "paris"
    assert REGIONS.find("", "10.1.2.3").region == "one"


@pytest.mark.parametrize("said", ["Paris", "../paris", "paris\r\n", " ", "a" * 65, "é"])
def test_a_region_that_is_not_canonical_is_a_bad_region(said: str) -> None:
    with pytest.raises(RequestError) as caught:
        REGIONS.find(said, "10.1.2.3")
    assert (caught.value.status, caught.value.error_code) == (400, "bad_region")


@quick
@given(st.none() | st.text(), st.none() | st.text() | st.ip_addresses().map(str))
def test_any_client_is_somewhere_or_says_a_bad_region(said: str | None, address: str | None) -> None:
    try:
        assert REGIONS.find(said, address).region
    except RequestError as error:
        assert error.error_code == "bad_region"
