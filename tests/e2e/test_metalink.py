"""Metalinks over real sockets: every tier describes tasks and files to those who ask for it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from shared.manifest import MIN_PIECE
from tests.e2e.test_http_surface import Answer
from tests.harness import Lab, Service, make_model, wait_nodes
from tests.unit.test_metalink import Read, read

METALINK = "application/metalink4+xml"
ARIA2 = f"*/*,{METALINK},application/metalink+xml"
TIERS = ["origin", "router", "edge"]
FILE = "weights/modèle b&c.gguf"
FILE_PATH = "/models/acme/tiny/files/{}/weights/mod%C3%A8le%20b%26c.gguf"


@dataclass
class Network:
    """One of each, and a node of another region."""

    origin: Service
    router: Service
    edge: Service
    far: Service
    revision: str
    model: Path

    def tier(self, name: str) -> Service:
        """By name."""
        found: Service = getattr(self, name)
        return found

    def near(self, tier: str) -> str:
        """Where a tier says that things can be had."""
        return self.origin.url if tier == "origin" else self.edge.url


@pytest.fixture(scope="module")
def net(shared_lab: Lab) -> Iterator[Network]:
    """A model of some pieces, with a file whose name is not easy."""
    model = shared_lab.folder / "model"
    make_model(model, width=1024)
    (model / FILE).parent.mkdir()
    (model / FILE).write_bytes(bytes(range(256)) * 10_000)
    revision = shared_lab.publish(model)
    origin = shared_lab.origin()
    router = shared_lab.router(origin, default_region="north")
    edge = shared_lab.edge(origin, router=router, region="north")
    far = shared_lab.edge(origin, router=router, node="far", region="south")
    wait_nodes(router, 2)
    yield Network(origin, router, edge, far, revision, model)


def pieces_of(data: bytes) -> tuple[str, ...]:
    """Hashes of pieces of the shortest length."""
    return tuple(
        hashlib.sha256(data[start : start + MIN_PIECE]).hexdigest() for start in range(0, len(data), MIN_PIECE)
    )


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("task", ["all", "embed", "half"])
def test_the_metalink_of_a_task_is_of_its_bytes(net: Network, tier: str, task: str) -> None:
    body = Answer.of(net.origin, f"/shards/acme/tiny:{task}").body
    answer = Answer.of(net.tier(tier), f"/shards/acme/tiny:{task}", Accept=ARIA2)
    assert (answer.status, answer.headers["Content-Type"]) == (200, METALINK)
    assert read(answer.body) == Read(
        "model.safetensors",
        len(body),
        hashlib.sha256(body).hexdigest(),
        MIN_PIECE,
        pieces_of(body),
        ((1, f"{net.near(tier)}/shards/acme/tiny:{task}@{net.revision}"),),
    )
    assert answer.headers["Content-Disposition"] == 'attachment; filename="model.safetensors.meta4"'
    assert answer.headers["Nearshard-Revision"] == net.revision


@pytest.mark.parametrize("tier", TIERS)
def test_the_metalink_of_a_file_has_its_last_name_and_urls_that_work(net: Network, tier: str) -> None:
    body = (net.model / FILE).read_bytes()
    answer = Answer.of(net.tier(tier), FILE_PATH.format("main"), Accept=METALINK)
    found = read(answer.body)
    assert (found.name, found.size, found.pieces) == ("modèle b&c.gguf", len(body), pieces_of(body))
    assert found.urls == ((1, net.near(tier) + FILE_PATH.format(net.revision)),)
    source = net.origin if tier == "origin" else net.edge
    assert Answer.of(source, found.urls[0][1].removeprefix(source.url)).body == body
    assert answer.headers["Content-Disposition"].endswith("filename*=UTF-8''mod%C3%A8le%20b%26c.gguf.meta4")


@pytest.mark.parametrize("tier", TIERS)
def test_a_file_of_one_piece_has_only_the_hash_of_the_whole(net: Network, tier: str) -> None:
    found = read(Answer.of(net.tier(tier), "/models/acme/tiny/files/main/tokenizer.json", Accept=METALINK).body)
    assert (found.pieces, found.piece_length) == ((), 0)
    assert found.sha256 == hashlib.sha256((net.model / "tokenizer.json").read_bytes()).hexdigest()


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("path", ["/shards/acme/tiny:half", "/models/acme/tiny/files/main/model.safetensors"])
def test_a_metalink_has_a_validator_of_its_own(net: Network, tier: str, path: str) -> None:
    whole = Answer.of(net.tier(tier), path, Accept=METALINK)
    etag = whole.headers["ETag"]
    assert etag == f'"{hashlib.sha256(whole.body).hexdigest()}"'
    assert whole.headers["Cache-Control"] == "private, no-cache"
    assert "Accept" in whole.headers["Vary"]
    head = Answer.of(net.tier(tier), path, "HEAD", Accept=METALINK)
    assert (head.status, head.body, head.headers["Content-Length"]) == (200, b"", str(len(whole.body)))
    again = Answer.of(net.tier(tier), path, Accept=METALINK, If_None_Match=etag)
    assert (again.status, again.body, again.headers["ETag"]) == (304, b"", etag)
    plain = Answer.of(net.tier(tier), path, "HEAD")
    assert "Accept" in plain.headers["Vary"] and plain.headers["ETag"] != etag
    other = Answer.of(net.tier(tier), path, Accept=METALINK, If_None_Match=plain.headers["ETag"])
    assert other.status == 200


@pytest.mark.parametrize("tier", TIERS)
def test_who_asks_for_a_file_gets_it_whatever_else_they_accept(net: Network, tier: str) -> None:
    status = 307 if tier == "router" else 200
    for accept in ("*/*", "application/json", "text/html", f"*/*, {METALINK};q=0.5"):
        answer = Answer.of(net.tier(tier), "/models/acme/tiny/files/main/config.json", Accept=accept)
        assert answer.status == status, accept
    assert Answer.of(net.tier(tier), "/shards/acme/tiny", Accept="text/html").code == "not_acceptable"


@pytest.mark.parametrize("tier", TIERS)
def test_what_is_not_there_has_no_metalink(net: Network, tier: str) -> None:
    for path, code in (
        ("/shards/acme/tiny:other", "unknown_task"),
        ("/models/acme/tiny/files/main/other", "unknown_file"),
        ("/shards/acme/other", "unknown_model"),
    ):
        answer = Answer.of(net.tier(tier), path, Accept=METALINK)
        assert (answer.status, answer.code) == (404, code)


def test_a_metalink_asked_for_after_the_bytes_is_a_metalink(net: Network) -> None:
    """The edge's short path knows the path by then."""
    for path in (f"/shards/acme/tiny:half@{net.revision}", FILE_PATH.format(net.revision)):
        for _ in range(3):
            assert Answer.of(net.edge, path).headers["Content-Type"] == "application/octet-stream"
        assert Answer.of(net.edge, path, Accept=METALINK).headers["Content-Type"] == METALINK


def test_a_region_without_nodes_is_sent_to_other_regions_and_then_to_the_origin(shared_lab: Lab, net: Network) -> None:
    def urls(router: Service, region: str) -> list[str]:
        answer = Answer.of(router, "/shards/acme/tiny", Accept=METALINK, Nearshard_Region=region)
        return [url.removesuffix(f"/shards/acme/tiny:all@{net.revision}") for _, url in read(answer.body).urls]

    assert urls(net.router, "south") == [net.far.url]
    assert sorted(urls(net.router, "west")) == sorted([net.edge.url, net.far.url])
    assert urls(shared_lab.router(net.origin), "west") == [net.origin.url]


def test_a_router_that_cannot_ask_sends_the_client_on(lab: Lab, net: Network) -> None:
    """It was started while no origin answers: a node may know."""
    router = lab.router("http://127.0.0.1:9")
    answer = Answer.of(router, "/shards/acme/tiny", Accept=METALINK)
    assert (answer.status, answer.headers["Location"]) == (307, "http://127.0.0.1:9/shards/acme/tiny:all@main")
