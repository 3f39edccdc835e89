"""The short path answers with the same bytes as the long one, and hands over what is not plain."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from shared.deltas import WANTED_FOR
from shared.web.plain import parse_fields, parse_line
from tests.harness import Lab, Service, get_json, make_model, wait_until

LONG = "X-Anything: sends a request the long way"


@dataclass
class Warm:
    """An edge that holds everything, and paths of some of it."""

    edge: Service
    origin: Service
    paths: dict[str, str]
    etags: dict[str, str]


@dataclass
class Wire:
    """A connection, byte by byte."""

    sock: socket.socket
    buffer: bytes = b""

    def send(self, *requests: str) -> None:
        """All in one write."""
        self.sock.sendall("".join(requests).encode())

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Status, fields and body of the next response."""
        while b"\r\n\r\n" not in self.buffer:
            self._more()
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        fields = dict(line.split(": ", 1) for line in lines)
        size = 0 if " 304 " in first else int(fields["Content-Length"])
        while len(self.buffer) < size:
            self._more()
        body, self.buffer = self.buffer[:size], self.buffer[size:]
        return int(first.split(" ")[1]), fields, body

    def _more(self) -> None:
        part = self.sock.recv(1 << 20)
        assert part, "the connection was closed"
        self.buffer += part


def request(path: str, *fields: str, method: str = "GET") -> str:
    """A request with these field lines."""
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: edge", *fields, "", ""])


@pytest.fixture(scope="module")
def warm(shared_lab: Lab) -> Iterator[Warm]:
    """One model, everything fetched and read often enough to be in memory where it fits."""
    make_model(shared_lab.folder / "model", width=1024)
    revision = shared_lab.publish(shared_lab.folder / "model")
    origin = shared_lab.origin()
    edge = shared_lab.edge(origin, memory="20MB")
    plan = get_json(f"{origin.url}/shards/acme/tiny", Accept="application/vnd.nearshard.plan+json")
    by_size = sorted(plan["shards"], key=lambda shard: shard["size"])
    paths = {
        "small shard": f"/blobs/{by_size[0]['digest']}",
        "large shard": f"/blobs/{by_size[-1]['digest']}",
        "task": f"/shards/acme/tiny:half@{revision}",
        "file": f"/models/acme/tiny/files/{revision}/model.safetensors",
        "small file": f"/models/acme/tiny/files/{revision}/config.json",
    }
    etags = {}
    with socket.create_connection(("127.0.0.1", edge.port), timeout=20) as sock:
        wire = Wire(sock)
        for name, path in paths.items():
            for _ in range(3):
                wire.send(request(path, LONG))
                etags[name] = wire.answer()[1]["ETag"]
    wait_until(lambda: edge.status()["fills"] == 0, "fills ended")
    yield Warm(edge, origin, paths, etags)


@pytest.fixture
def wire(warm: Warm) -> Iterator[Wire]:
    """A new connection."""
    with socket.create_connection(("127.0.0.1", warm.edge.port), timeout=20) as sock:
        yield Wire(sock)


NAMES = ["small shard", "large shard", "task", "file", "small file"]


def settled(fields: dict[str, str]) -> dict[str, str]:
    """Fields in their order, but for the date."""
    return {name: value for name, value in fields.items() if name != "Date"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("condition", ["none", "match", "other", "weak", "star"])
def test_both_paths_give_the_same_answer(warm: Warm, wire: Wire, name: str, condition: str) -> None:
    etag = warm.etags[name]
    value = {"none": "", "match": etag, "other": '"x"', "weak": f'W/"x", W/{etag}', "star": "*"}[condition]
    fields = [f"If-None-Match: {value}"] if value else []
    wire.send(request(warm.paths[name], *fields))
    short = wire.answer()
    wire.send(request(warm.paths[name], *fields, LONG))
    long = wire.answer()
    assert short[0] == long[0] == (200 if condition in ("none", "other") else 304)
    assert list(settled(short[1]).items()) == list(settled(long[1]).items())
    assert short[2] == long[2]
    if short[0] == 200:
        assert hashlib.sha256(short[2]).hexdigest() == etag.strip('"')


def test_the_short_path_is_taken(warm: Warm, wire: Wire) -> None:
    """Or these tests would compare the long path with itself: aiohttp counts the requests that it sees."""

    def seen() -> int:
        return sum(
            int(float(line.rsplit(" ", 1)[1]))
            for line in get_text(warm.edge).splitlines()
            if line.startswith("nearshard_requests_total") and 'kind="blob"' in line
        )

    before = seen()
    for _ in range(10):
        wire.send(request(warm.paths["small shard"]))
        wire.answer()
        wire.send(request(warm.paths["large shard"], f"{WANTED_FOR}: acme/tiny@main"))
        wire.answer()
    assert seen() == before


def get_text(service: Service) -> str:
    """Its metrics."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as sock:
        wire = Wire(sock)
        wire.send(request("/metrics"))
        return wire.answer()[2].decode()


def test_pipelined_requests_are_answered_in_order(warm: Warm, wire: Wire) -> None:
    order = ["small shard", "large shard", "file", "small file", "task", "small shard"]
    wire.send(*(request(warm.paths[name]) for name in order))
    assert [wire.answer()[1]["ETag"] for _ in order] == [warm.etags[name] for name in order]


def test_what_arrives_while_an_answer_is_sent_waits_its_turn(warm: Warm, wire: Wire) -> None:
    order = ["file", "small shard", "large shard", "small file"] * 3
    for name in order:
        wire.send(request(warm.paths[name], *([LONG] if name == "small file" else [])))
    assert [wire.answer()[1]["ETag"] for _ in order] == [warm.etags[name] for name in order]


@pytest.mark.parametrize("cut", [1, 4, 30, -3, -1])
def test_a_request_that_arrives_in_parts_is_one_request(warm: Warm, wire: Wire, cut: int) -> None:
    wire.send(request(warm.paths["small shard"]))
    assert wire.answer()[0] == 200
    text = request(warm.paths["small shard"])
    wire.send(text[:cut])
    wait_until(lambda: warm.edge.status()["service"] == "edge", "the first part arrived")
    wire.send(text[cut:])
    assert wire.answer()[1]["ETag"] == warm.etags["small shard"]
    wire.send(request(warm.paths["large shard"]))
    assert wire.answer()[1]["ETag"] == warm.etags["large shard"]


def test_paths_alternate_on_one_connection(warm: Warm, wire: Wire) -> None:
    for name in NAMES * 2:
        for fields in ([], [LONG], ["Range: bytes=0-9"]):
            wire.send(request(warm.paths[name], *fields))
            status, answered, body = wire.answer()
            assert answered["ETag"] == warm.etags[name]
            assert status == (206 if fields and fields[0].startswith("Range") else 200)
            assert len(body) == int(answered["Content-Length"])
        wire.send(request(warm.paths[name], method="HEAD"))
        wire.buffer = b""
        while b"\r\n\r\n" not in wire.buffer:
            wire._more()
        wire.buffer = b""


def test_clients_that_leave_in_the_middle_leave_nothing_behind(warm: Warm) -> None:
    for _ in range(30):
        with socket.create_connection(("127.0.0.1", warm.edge.port), timeout=10) as sock:
            sock.sendall(request(warm.paths["file"]).encode())
            sock.recv(1000)
    wait_until(
        lambda: warm.edge.status()["memory"]["pinned"] == 0 and warm.edge.status()["disk"]["pinned"] == 0,
        "nothing pinned",
    )
    fds = wait_until(lambda: open_files(warm.edge), "descriptors")
    assert fds < 40


def open_files(service: Service) -> int:
    """Open descriptors of a service."""
    import os

    return len(os.listdir(f"/proc/{service.pid}/fd"))


def test_a_client_that_closes_its_half_still_leaves_the_node_well(warm: Warm, wire: Wire) -> None:
    wire.send(request(warm.paths["small shard"]))
    wire.sock.shutdown(socket.SHUT_WR)
    assert warm.edge.status()["service"] == "edge"


@pytest.mark.parametrize(
    "raw",
    [
        "GET /x HTTP/1.0\r\nHost: a\r\n\r\n",
        "GET /x HTTP/1.1\r\n\r\n",
        "GET /x HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        "GET /x HTTP/1.1\r\nHost: a\r\nRange: bytes=0-1\r\n\r\n",
        "GET /x HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        "GET /x HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\n",
        "GET /x HTTP/1.1\r\nHost : a\r\n\r\n",
        "GET /x HTTP/1.1\r\nHost: a\r\n b\r\n\r\n",
        "GET /x HTTP/1.1\r\nHost: a\nX: b\r\n\r\n",
        "GET  /x HTTP/1.1\r\nHost: a\r\n\r\n",
        "GET /x y HTTP/1.1\r\nHost: a\r\n\r\n",
        "GET /x HTTP/1.1\r\nHost: a\r\nIf-None-Match: \x00\r\n\r\n",
        "POST /x HTTP/1.1\r\nHost: a\r\n\r\n",
        "GET /x HTTP/1.1\r\nHost: a\r\n\r\nGET /y HTTP/1.1\r\nHost: a\r\n\r\n",
        "GET /x HTTP/1.1\r\nHost: a\r\n",
        "GET http://a/x HTTP/1.1\r\nHost: a\r\n\r\n",
        "GET /" + "x" * 5000 + " HTTP/1.1\r\nHost: a\r\n\r\n",
    ],
)
def test_what_is_not_plain_is_left_to_aiohttp(raw: str) -> None:
    line = parse_line(raw.encode())
    assert line is None or parse_fields(line[1]) is None


def test_a_plain_request_is_read() -> None:
    raw = b'GET /x HTTP/1.1\r\nHost: a\r\nAccept:  */*\t\r\nIf-None-Match: "b"\r\nConnection: Keep-Alive\r\n\r\n'
    line = parse_line(raw)
    assert line is not None and line[0] == b"/x"
    fields = parse_fields(line[1])
    assert fields is not None and (fields.accept, fields.if_none_match) == (b"*/*", b'"b"')
