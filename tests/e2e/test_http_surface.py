"""The read surface over real sockets: every tier gives the same answers, good input and bad."""

from __future__ import annotations

import hashlib
import http.client
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from shared import manifest as manifests
from shared.manifest import Manifest
from tests.harness import Lab, Service, make_model, wait_until


@dataclass
class Network:
    """One of each, and what was published."""

    origin: Service
    router: Service
    edge: Service
    revision: str
    manifest: Manifest
    model: Path

    def tier(self, name: str) -> Service:
        """By name."""
        found: Service = getattr(self, name)
        return found

    def body(self, task: str) -> bytes:
        """A task's bytes, from the origin's plain file for ``all``."""
        return Answer.of(self.origin, f"/shards/acme/tiny:{task}").body


@dataclass
class Answer:
    """One response."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @classmethod
    def of(cls, service: Service, path: str, method: str = "GET", **headers: str) -> Answer:
        """Ask, exactly as told: nothing is normalised on the way."""
        connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=15)
        try:
            connection.putrequest(method, path, skip_accept_encoding=True, skip_host="Host" in headers)
            for name, value in headers.items():
                connection.putheader(name.replace("_", "-"), value)
            connection.endheaders()
            answer = connection.getresponse()
            return cls(answer.status, answer.headers, answer.read())
        finally:
            connection.close()

    @property
    def code(self) -> str:
        """The problem's code; asserts that it is a well-made problem document."""
        assert self.headers["Content-Type"] == "application/problem+json"
        assert self.headers["Cache-Control"] == "no-store"
        document = json.loads(self.body)
        assert document["status"] == self.status and document["request_id"] == self.headers["X-Request-Id"]
        return str(document["code"])


@pytest.fixture(scope="module")
def net(shared_lab: Lab, redis_url: str) -> Iterator[Network]:
    """Origin, router and one edge, with a small model."""
    model = shared_lab.folder / "model"
    make_model(model)
    revision = shared_lab.publish(model)
    origin = shared_lab.origin()
    router = shared_lab.router(origin, redis=redis_url, redis_prefix="surface:", default_region="north")
    edge = shared_lab.edge(origin, router=router, region="north")
    wait_until(lambda: router.status()["nodes"], "the edge known")
    data = Answer.of(origin, f"/models/acme/tiny/manifests/{revision}").body
    yield Network(origin, router, edge, revision, manifests.decode(data), model)


TIERS = ["origin", "router", "edge"]
BYTES = ["origin", "edge"]


@pytest.mark.parametrize("tier", BYTES)
def test_a_file_is_the_published_one_byte_for_byte(net: Network, tier: str) -> None:
    for path in ("model.safetensors", "tokenizer.json", "config.json"):
        answer = Answer.of(net.tier(tier), f"/models/acme/tiny/files/main/{path}")
        assert answer.status == 200
        assert answer.body == (net.model / path).read_bytes()
        assert answer.headers["ETag"] == f'"{hashlib.sha256(answer.body).hexdigest()}"'


@pytest.mark.parametrize("tier", BYTES)
@pytest.mark.parametrize("task", ["all", "embed", "half"])
def test_a_task_is_what_its_etag_says(net: Network, tier: str, task: str) -> None:
    answer = Answer.of(net.tier(tier), f"/shards/acme/tiny:{task}")
    assert answer.status == 200
    assert hashlib.sha256(answer.body).hexdigest() == net.manifest.tasks[task].layout.sha256
    assert answer.headers["ETag"] == f'"{net.manifest.tasks[task].layout.sha256}"'
    assert answer.headers["Nearshard-Revision"] == net.revision


@pytest.mark.parametrize("tier", BYTES)
@pytest.mark.parametrize(
    "spec", ["0-0", "-5", "100-", "0-99", "4096-1000000", "1000000-99999999", "5000-", "0-", "-99999999999"]
)
def test_every_range_is_the_slice_of_the_whole(net: Network, tier: str, spec: str) -> None:
    """R1."""
    whole = net.body("half")
    first, _, last = spec.partition("-")
    expected = whole[int(first) : int(last) + 1 if last else None] if first else whole[-int(last) :]
    answer = Answer.of(net.tier(tier), "/shards/acme/tiny:half", Range=f"bytes={spec}")
    assert answer.status == 206
    assert answer.body == expected
    start = int(first) if first else len(whole) - len(expected)
    assert answer.headers["Content-Range"] == f"bytes {start}-{start + len(expected) - 1}/{len(whole)}"


@pytest.mark.parametrize("tier", BYTES)
@pytest.mark.parametrize("spec", ["9999999999-", "-0", "5-3", "abc", "", "0x0-", "1" * 30 + "-"])
def test_a_range_that_cannot_be_satisfied_is_416_with_the_size(net: Network, tier: str, spec: str) -> None:
    """R2."""
    answer = Answer.of(net.tier(tier), "/shards/acme/tiny:half", Range=f"bytes={spec}")
    assert answer.status == 416
    assert answer.code == "range_not_satisfiable"
    assert answer.headers["Content-Range"] == f"bytes */{net.manifest.tasks['half'].layout.size}"


@pytest.mark.parametrize("tier", BYTES)
def test_other_units_two_ranges_and_head_give_the_whole(net: Network, tier: str) -> None:
    """R3, R4, R7."""
    size = net.manifest.tasks["embed"].layout.size
    for value in ("items=0-5", "bytes=0-0,5-6"):
        answer = Answer.of(net.tier(tier), "/shards/acme/tiny:embed", Range=value)
        assert (answer.status, len(answer.body)) == (200, size)
    many = "bytes=" + ",".join(f"{n}-{n + 50}" for n in range(9))
    assert Answer.of(net.tier(tier), "/shards/acme/tiny:embed", Range=many).status == 416
    head = Answer.of(net.tier(tier), "/shards/acme/tiny:embed", "HEAD", Range="bytes=0-0")
    assert (head.status, head.headers["Content-Length"], head.body) == (200, str(size), b"")


@pytest.mark.parametrize("tier", BYTES)
def test_if_range_and_if_none_match(net: Network, tier: str) -> None:
    """R6, R8."""
    etag = f'"{net.manifest.tasks["embed"].layout.sha256}"'
    size = net.manifest.tasks["embed"].layout.size

    def ask(**headers: str) -> tuple[int, int]:
        answer = Answer.of(net.tier(tier), "/shards/acme/tiny:embed", **headers)
        return answer.status, len(answer.body)

    assert ask(Range="bytes=0-9", If_Range=etag) == (206, 10)
    for other in ('"x"', f"W/{etag}", "Sat, 29 Oct 1994 19:43:31 GMT"):
        assert ask(Range="bytes=0-9", If_Range=other) == (200, size)
    for match in (etag, f"W/{etag}", "*", f'"x", {etag}'):
        assert ask(Range="bytes=0-9", If_None_Match=match) == (304, 0)
    assert ask(If_None_Match='"x"') == (200, size)
    assert ask(If_Match='"x"')[0] == 412


@pytest.mark.parametrize("tier", TIERS)
def test_blobs_are_immutable_and_need_no_look_up_for_304(net: Network, tier: str) -> None:
    digest, size = next(iter(net.manifest.shards.items()))
    answer = Answer.of(net.tier(tier), f"/blobs/{digest}", If_None_Match=f'"{digest.removeprefix("sha256:")}"')
    assert answer.status == 304
    if tier != "router":
        whole = Answer.of(net.tier(tier), f"/blobs/{digest}")
        assert len(whole.body) == size and "immutable" in whole.headers["Cache-Control"]
        assert Answer.of(net.tier(tier), f"/blobs/{digest}", "HEAD").headers["Content-Length"] == str(size)


@pytest.mark.parametrize("tier", TIERS)
def test_documents_are_the_same_on_every_tier_and_revalidate(net: Network, tier: str) -> None:
    for path in ("/models", "/models/acme/tiny", "/models/acme/tiny/manifests/main"):
        expected, answer = Answer.of(net.origin, path), Answer.of(net.tier(tier), path)
        assert (answer.status, answer.body) == (200, expected.body)
        assert answer.headers["ETag"] == expected.headers["ETag"]
        again = Answer.of(net.tier(tier), path, If_None_Match=answer.headers["ETag"])
        assert (again.status, again.body) == (304, b"")
    assert set(json.loads(Answer.of(net.tier(tier), "/models/acme/tiny").body)["tasks"]) == {"all", "embed", "half"}


@pytest.mark.parametrize("tier", TIERS)
def test_a_plan_names_every_shard_with_urls_that_work(net: Network, tier: str) -> None:
    answer = Answer.of(
        net.tier(tier), "/shards/acme/tiny:half", Accept="application/vnd.nearshard.plan+json", Nearshard_Region="north"
    )
    document = json.loads(answer.body)
    assert document["revision"] == net.revision and answer.headers["Vary"].startswith("Accept")
    joined = b""
    for index, offset, length in document["layout"]["slices"]:
        shard = document["shards"][index]
        expected = {"origin": net.origin, "edge": net.edge, "router": net.edge}[tier]
        assert shard["urls"][0] == f"{expected.url}/blobs/{shard['digest']}"
        joined += Answer.of(expected, f"/blobs/{shard['digest']}").body[offset : offset + length]
    assert joined == net.body("half")


def test_the_router_sends_to_the_nearest_and_names_the_others(net: Network) -> None:
    answer = Answer.of(net.router, "/shards/acme/tiny:half")
    assert answer.status == 307
    assert answer.headers["Location"] == f"{net.edge.url}/shards/acme/tiny:half@{net.revision}"
    assert answer.headers["ETag"] == f'"{net.manifest.tasks["half"].layout.sha256}"'
    links = answer.headers.get_all("Link")
    assert links == [f"<{net.origin.url}/shards/acme/tiny:half@{net.revision}>; rel=duplicate; pri=2"]
    assert Answer.of(net.router, "/shards/acme/tiny", Host="evil.example").headers["Location"].startswith(net.edge.url)


HOSTILE = [
    "/shards/%2e%2e%2f%2e%2e%2fetc%2fpasswd", "/shards/%2f", "/shards/acme%2ftiny", "/shards/acme/tiny%00",
    "/shards/acme/tiny%0d%0aX:1", "/shards/acme/tiny%zz", "/shards/acme/tiny%ff", "/shards//acme/tiny",
    "/shards/../acme/tiny", "/shards/acme/..", "/shards/ACME/tiny", "/shards/acme/tiny:", "/shards/acme/tiny@",
    "/shards/acme/tiny@sha256:" + "0" * 63, "/shards/" + "a" * 10_000, "/shards/a/" + "b" * 200,
    "/blobs/sha256:" + "A" * 64, "/blobs/sha256:" + "0" * 65, "/blobs/md5:" + "0" * 32, "/blobs/" + "0" * 64,
    "/models/acme/tiny/files/main/../x", "/models/acme/tiny/files/main/a%5cb", "/models/acme",
]  # fmt: skip


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("path", HOSTILE)
def test_hostile_paths_are_refused_and_not_repeated(net: Network, tier: str, path: str) -> None:
    """T1, T2."""
    answer = Answer.of(net.tier(tier), path)
    assert answer.status == 400, path[:60]
    assert answer.code in ("bad_id", "bad_request")
    assert b"etc" not in answer.body and b"a" * 20 not in answer.body


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/", "unknown_path"),
        ("/nothing", "unknown_path"),
        ("/models/acme/none", "unknown_model"),
        ("/shards/acme/none", "unknown_model"),
        ("/shards/acme/tiny@v9", "unknown_revision"),
        ("/shards/acme/tiny@sha256:" + "0" * 64, "unknown_revision"),
        ("/shards/acme/tiny:nope", "unknown_task"),
        ("/models/acme/tiny/files/main/nope.txt", "unknown_file"),
    ],
)
def test_what_is_not_there_is_404_with_its_own_code(net: Network, tier: str, path: str, code: str) -> None:
    """T3."""
    answer = Answer.of(net.tier(tier), path)
    assert (answer.status, answer.code) == (404, code)
    if code == "unknown_task":
        assert json.loads(answer.body)["tasks"] == ["all", "embed", "half"]


@pytest.mark.parametrize("tier", BYTES)
def test_an_unknown_shard_is_404(net: Network, tier: str) -> None:
    for method in ("GET", "HEAD"):
        assert Answer.of(net.tier(tier), "/blobs/sha256:" + "0" * 64, method).status == 404


@pytest.mark.parametrize("tier", TIERS)
def test_methods_and_expectations(net: Network, tier: str) -> None:
    """H9, H10."""
    for method in ("DELETE", "POST", "TRACE", "PATCH"):
        answer = Answer.of(net.tier(tier), "/shards/acme/tiny", method)
        assert answer.status == 405 and answer.code == "method_not_allowed"
        assert set(answer.headers["Allow"].split(",")) == {"GET", "HEAD"}
    assert Answer.of(net.tier(tier), "/shards/acme/tiny", X_HTTP_Method_Override="DELETE").status in (200, 307)
    assert Answer.of(net.tier(tier), "/shards/acme/tiny", Expect="junk").status == 417
    assert Answer.of(net.tier(tier), "/shards/acme/tiny", Accept="text/html").status == 406


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(
    "raw",
    [
        b"GET /models HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET /models HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\n",
        b"GET /models HTTP/1.1\r\nHost: a\r\nContent-Length: +4\r\n\r\n",
        b"GET /models HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"GET /models HTTP/1.1\r\n\r\n",
        b"GET /models HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /models HTTP/1.1\r\nHost: a\r\nX: b\r\n c\r\n\r\n",
        b"GET /models HTTP/1.1\r\nHost : a\r\n\r\n",
        b"GET /models HTTP/1.1\r\nHost: a\r\nX: \x00\r\n\r\n",
        b"GET /mod\xffels HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST /models HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n",
        b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /models HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 9000 + b"\r\n\r\n",
        b"GET /models HTTP/1.1\r\nHost: a\r\n" + b"".join(b"X%d: 1\r\n" % n for n in range(200)) + b"\r\n",
        b"GET /models HTTP/2.0\r\nHost: a\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    ],
)
def test_malformed_requests_are_refused_in_our_words(net: Network, tier: str, raw: bytes) -> None:
    """H1 to H5: 4xx or 505 and a problem document; nothing of the request in it."""
    with socket.create_connection(("127.0.0.1", net.tier(tier).port), timeout=10) as connection:
        connection.sendall(raw)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    status = int(answer.split(b" ", 2)[1])
    assert status in (400, 414, 431, 505), answer[:200]
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"application/problem+json" in head
    assert json.loads(body)["status"] == status and b"a" * 20 not in body


def test_two_range_fields_are_refused(net: Network) -> None:
    """R7."""
    raw = b"GET /shards/acme/tiny HTTP/1.1\r\nHost: a\r\nRange: bytes=0-1\r\nRange: bytes=2-3\r\n\r\n"
    for tier in BYTES:
        with socket.create_connection(("127.0.0.1", net.tier(tier).port), timeout=10) as connection:
            connection.sendall(raw)
            assert connection.recv(100).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b'{"a":1,"a":2}', "application/json", 400),
        (b'{"weight":NaN}', "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"1" * 5000, "application/json", 400),
        (b"{}", "text/plain", 415),
        (b"{}", "application/json", 422),
        (b'{"url":"file:///etc/passwd","region":"north"}', "application/json", 422),
        (b'{"url":"http://a@b/","region":"north"}', "application/json", 422),
        (b'{"url":"http://a:1","region":"NORTH"}', "application/json", 422),
        (b'{"url":"http://a:1","region":"north","weight":1e9}', "application/json", 422),
        (b"x" * 2_000_000, "application/json", 413),
    ],
)
def test_bad_heartbeats_are_refused(net: Network, body: bytes, kind: str, status: int) -> None:
    """H6, H10, H11."""
    connection = http.client.HTTPConnection("127.0.0.1", net.router.port, timeout=15)
    try:
        connection.request("PUT", "/nodes/evil", body, {"Content-Type": kind})
        answer = connection.getresponse()
        assert answer.status == status
        assert answer.headers["Content-Type"] == "application/problem+json"
    finally:
        connection.close()
    assert [node["id"] for node in net.router.status()["nodes"]] == ["edge"]


@pytest.mark.parametrize("tier", TIERS)
def test_health_metrics_and_status(net: Network, tier: str) -> None:
    assert json.loads(Answer.of(net.tier(tier), "/healthz").body) == {"status": "up"}
    assert json.loads(Answer.of(net.tier(tier), "/readyz").body) == {"status": "ready"}
    assert b"nearshard_requests_total" in Answer.of(net.tier(tier), "/metrics").body
    assert net.tier(tier).status()["service"] == tier


def test_random_queries_are_one_shard(net: Network) -> None:
    """H13: the query is not in the key."""
    digest = next(iter(net.manifest.tasks["all"].layout.shards()))
    before = net.edge.status()["upstream_bytes"]
    for number in range(50):
        assert Answer.of(net.edge, f"/blobs/{digest}?x={number}").status == 200
    assert net.edge.status()["upstream_bytes"] - before <= net.manifest.shards[digest]
