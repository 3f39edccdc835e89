"""The router's short path: the same bytes as the long one, the same choice, the same counts."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.e2e.test_routing import ask, member
from tests.e2e.test_short_path import LONG, Wire, request
from tests.harness import Lab, Service, make_model, wait_nodes, wait_until

DIGEST = "sha256:" + "ab" * 32
OTHER = "sha256:" + "cd" * 32


@dataclass
class Known:
    """A router with a node in each of three regions, so that none has more than its share; a model that it knows."""

    router: Service
    revision: str

    def path(self, name: str) -> str:
        """What a test asks for."""
        return {
            "shard": f"/blobs/{DIGEST}",
            "task": "/shards/acme/tiny:half",
            "default task": "/shards/acme/tiny",
            "pinned task": f"/shards/acme/tiny:half@{self.revision}",
            "file": "/models/acme/tiny/files/main/config.json",
            "pinned file": f"/models/acme/tiny/files/{self.revision}/config.json",
            "said": f"/blobs/{DIGEST}?region=south",
            "unknown region": f"/blobs/{DIGEST}?region=nowhere",
        }[name]


NAMES = ["shard", "task", "default task", "pinned task", "file", "pinned file", "said", "unknown region"]


@pytest.fixture(scope="module")
def known(shared_lab: Lab) -> Iterator[Known]:
    """Its nodes are made up; a ref is fresh for as long as the tests take."""
    make_model(shared_lab.folder / "model")
    revision = shared_lab.publish(shared_lab.folder / "model")
    flags = {"probe": "0", "ttl": "300", "ref_lifetime": "300", "default_region": "north"}
    router = shared_lab.router(shared_lab.origin(), trusted_proxies='["127.0.0.0/8"]', **flags)
    for number, region in enumerate(("north", "south", "west")):
        member(router, f"{region}-0", f"http://127.0.0.1:{number + 1}", region=region)
    made = Known(router, revision)
    for name in NAMES:
        assert ask(router, "GET", made.path(name), X_Anything="long").status == 307
    yield made


@pytest.fixture
def wire(known: Known) -> Iterator[Wire]:
    """A new connection."""
    with socket.create_connection(("127.0.0.1", known.router.port), timeout=20) as sock:
        yield Wire(sock)


def raw(wire: Wire) -> list[str]:
    """The lines of the next answer's head as they came, but for the date; a redirect has no body."""
    while b"\r\n\r\n" not in wire.buffer:
        wire._more()
    head, _, wire.buffer = wire.buffer.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert sum(line.startswith("Date: ") for line in lines) == 1
    return ["Date" if line.startswith("Date: ") else line for line in lines]


def timed(router: Service) -> float:
    """Requests for bytes that went the long way: only those are timed."""
    return total(router, "nearshard_request_seconds_count", 'kind="blob"', 'kind="task"', 'kind="file"')


def total(router: Service, metric: str, *labels: str) -> float:
    """The sum of a metric, of those with one of these labels."""
    return sum(
        float(line.rpartition(" ")[2])
        for line in ask(router, "GET", "/metrics").body.decode().splitlines()
        if line.startswith(metric) and any(label in line for label in labels)
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("condition", ["none", "match", "other", "weak", "star", "range"])
def test_both_paths_give_the_same_bytes(known: Known, wire: Wire, name: str, condition: str) -> None:
    path = known.path(name)
    etag = ask(known.router, "GET", path).headers["ETag"]
    lines = {
        "none": [], "match": [f"If-None-Match: {etag}"], "other": ['If-None-Match: "x"'],
        "weak": [f'If-None-Match: W/"x", W/{etag}'], "star": ["If-None-Match: *"],
        "range": ["Range: bytes=5-", f"If-Range: {etag}"],
    }[condition]  # fmt: skip
    before = timed(known.router)
    wire.send(request(path, *lines))
    short = raw(wire)
    assert timed(known.router) == before, "the short path was taken"
    wire.send(request(path, *lines, LONG))
    long = raw(wire)
    assert timed(known.router) == before + 1
    assert short == long
    assert short[0].split(" ")[1] == ("304" if condition in ("match", "weak", "star") else "307")


@pytest.mark.parametrize("region", ["north", "south", "nowhere"])
def test_the_region_of_the_field_is_used_on_both(known: Known, wire: Wire, region: str) -> None:
    field = f"Nearshard-Region: {region}"
    wire.send(request(known.path("shard"), field))
    short = raw(wire)
    wire.send(request(known.path("shard"), field, LONG))
    assert raw(wire) == short
    assert (f"Location: http://127.0.0.1:2/blobs/{DIGEST}" in short) is (region == "south")
    wire.send(request(known.path("said"), "Nearshard-Region: north"))
    assert f"Location: http://127.0.0.1:1/blobs/{DIGEST}" not in raw(wire), "what the query says comes first"


@pytest.mark.parametrize(
    ("path", "fields", "status", "code"),
    [
        (f"/blobs/{DIGEST}?region=South", [], 400, "bad_region"),
        (f"/blobs/{DIGEST}?region=-", [], 400, "bad_region"),
        (f"/blobs/{DIGEST}", ["Nearshard-Region: South"], 400, "bad_region"),
        (f"/blobs/{DIGEST.upper()}", [], 400, "bad_id"),
        (f"/blobs/{DIGEST}0", [], 400, "bad_id"),
        ("/shards/acme/../tiny", [], 400, "bad_id"),
        ("/shards/acme/tiny:none", [], 404, "unknown_task"),
        ("/shards/acme/none", [], 404, "unknown_model"),
        (f"/shards/acme/other:half@{OTHER}", [], 404, "unknown_model"),
        ("/models/acme/tiny/files/main/none", [], 404, "unknown_file"),
        ("/shards/acme/tiny", ["Accept: text/html"], 406, "not_acceptable"),
        (f"/blobs/{DIGEST}?other=1", [], 307, ""),
        (f"/blobs/{DIGEST}?region=south&region=north", [], 307, ""),
        ("/blobs/sha256%3A" + "ab" * 32, [], 307, ""),
        (f"/blobs/{DIGEST}", ["X-Forwarded-For: 192.0.2.1"], 307, ""),
        ("/shards/acme/tiny", ["Accept: application/octet-stream"], 307, ""),
        (f"/blobs/{DIGEST}", ["If-Match: *"], 307, ""),
        (f"/blobs/{DIGEST}", ['If-Match: "x"'], 412, "precondition_failed"),
    ],
)
def test_the_rest_goes_the_long_way(
    known: Known, wire: Wire, path: str, fields: list[str], status: int, code: str
) -> None:
    for _ in range(2):
        wire.send(request(path, *fields))
        answer = wire.answer()
        assert answer[0] == status
        assert not code or f'"code":"{code}"'.encode() in answer[2].replace(b" ", b"")


@pytest.mark.parametrize("path", ["/shards/acme/tiny", "/models/acme/tiny/files/main/config.json"])
def test_a_document_is_no_redirect(known: Known, path: str) -> None:
    assert ask(known.router, "GET", path, Accept="application/metalink4+xml").status == 200
    assert ask(known.router, "HEAD", path).status == 307


def test_http_1_0_and_head_are_aiohttps(known: Known) -> None:
    path = known.path("shard")
    for line, version in ((f"GET {path} HTTP/1.0\r\nHost: a", "1.0"), (f"HEAD {path} HTTP/1.1\r\nHost: a", "1.1")):
        with socket.create_connection(("127.0.0.1", known.router.port), timeout=20) as sock:
            sock.sendall(f"{line}\r\nConnection: close\r\n\r\n".encode())
            answer = b"".join(iter(lambda: sock.recv(1 << 16), b""))
            assert answer.startswith(f"HTTP/{version} 307 ".encode())
            assert answer.count(b"Link: ") == 3 and answer.endswith(b"\r\n\r\n")


def test_pipelined_requests_are_answered_in_order(known: Known, wire: Wire) -> None:
    order = ["shard", "file", "task", "shard", "said", "pinned task"]
    wire.send(*(request(known.path(name)) for name in order))
    wire.send(*(request(known.path(name)) for name in order))
    targets = [ask(known.router, "GET", known.path(name)).headers["Location"] for name in order]
    assert [wire.answer()[1]["Location"] for _ in order * 2] == targets * 2


@pytest.mark.parametrize("cut", [1, 20, -3, -1])
def test_a_request_that_arrives_in_parts_is_one_request(known: Known, wire: Wire, cut: int) -> None:
    wire.send(request(known.path("shard")))
    first = raw(wire)
    text = request(known.path("shard"))
    wire.send(text[:cut])
    wait_until(lambda: known.router.status()["service"] == "router", "the first part arrived")
    wire.send(text[cut:])
    assert raw(wire) == first
    wire.send(request(known.path("task")))
    assert raw(wire)[0].startswith("HTTP/1.1 307 ")


def test_requests_and_redirects_are_counted_as_on_the_long_path(known: Known, wire: Wire) -> None:
    def counts() -> tuple[float, float, float]:
        router = known.router
        return (
            total(router, "nearshard_requests_total", 'kind="blob",status="307"'),
            total(router, "nearshard_requests_total", 'kind="blob",status="304"'),
            total(router, "nearshard_redirects_total", 'region="north",verdict="owner"'),
        )

    for fields in ([], [LONG]):
        before = counts()
        for _ in range(5):
            wire.send(request(known.path("shard"), *fields))
            raw(wire)
        wire.send(request(known.path("shard"), "If-None-Match: *", *fields))
        raw(wire)
        assert [after - was for after, was in zip(counts(), before, strict=True)] == [5, 1, 5]


def test_what_is_sent_here_is_load(lab: Lab) -> None:
    router = lab.router("http://127.0.0.1:9", probe="0", ttl="60", default_region="north")
    for number in range(4):
        member(router, f"n{number}", f"http://127.0.0.1:{number + 1}")
    wait_nodes(router, 4)
    with socket.create_connection(("127.0.0.1", router.port), timeout=20) as sock:
        wire = Wire(sock)
        seen = set()
        for _ in range(40):
            wire.send(request(f"/blobs/{DIGEST}"))
            seen.add(wire.answer()[1]["Location"])
    assert timed(router) == 0
    assert len(seen) > 1, "one key's owner is passed over once it has its share"
    assert sum(node["load"] for node in router.status()["nodes"]) > 8


def test_members_that_change_are_seen(lab: Lab) -> None:
    router = lab.router("http://127.0.0.1:9", probe="0", ttl="60", default_region="north")
    with socket.create_connection(("127.0.0.1", router.port), timeout=20) as sock:
        wire = Wire(sock)

        def location() -> str:
            wire.send(request(f"/blobs/{DIGEST}"))
            return wire.answer()[1]["Location"].removesuffix(f"/blobs/{DIGEST}")

        assert location() == "http://127.0.0.1:9"
        member(router, "a", "http://127.0.0.1:1")
        wait_until(lambda: location() == "http://127.0.0.1:1", "the first node")
        member(router, "a", "http://127.0.0.1:2")
        wait_until(lambda: location() == "http://127.0.0.1:2", "the node where it is now")
        assert ask(router, "DELETE", "/nodes/a").status == 204
        wait_until(lambda: location() == "http://127.0.0.1:9", "no node")


def test_a_publish_is_seen(lab: Lab) -> None:
    """A router that answers from what it knows looks again in time, and at once where it is told."""
    make_model(lab.folder / "model")
    first = lab.publish(lab.folder / "model")
    router = lab.router(lab.origin(), probe="0", ttl="60", ref_lifetime="0.5")
    member(router, "a", "http://127.0.0.1:1")
    with socket.create_connection(("127.0.0.1", router.port), timeout=20) as sock:
        wire = Wire(sock)

        def location() -> str:
            wire.send(request("/shards/acme/tiny"))
            return wire.answer()[1]["Location"]

        assert all(location().endswith(f"/shards/acme/tiny:all@{first}") for _ in range(3))
        make_model(lab.folder / "model", seed=8)
        second = lab.publish(lab.folder / "model")
        wait_until(lambda: location().endswith(f"/shards/acme/tiny:all@{second}"), "the new revision")
        assert all(location().endswith(second) for _ in range(5)), "by the short path too"
        make_model(lab.folder / "model", seed=9)
        third = lab.publish(lab.folder / "model")
        assert ask(router, "POST", "/announce", {"model": "acme/tiny"}).status == 204
        wait_until(lambda: location().endswith(f"/shards/acme/tiny:all@{third}"), "the newest revision")
