"""The paths of other hubs over real services: every tier says the same, to the letter of what their clients go by.

The clients themselves are in ``tests/clients``.
"""

from __future__ import annotations

import hashlib
import http.client
import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

import pytest

from tests.between import Between
from tests.e2e.test_access import Answer, ask
from tests.harness import Lab, Service, make_model, wait_nodes, wait_until

PUBLIC, SECRET = "acme/tiny", "acme/secret"
LIFETIME = "0.2"
TIERS, BYTES = ["origin", "router", "edge"], ["origin", "edge"]
ODD = "onnx/a b#c%+é.json"
OLD_HUB, NEW_HUB = {"User_Agent": "unknown/None; hf_hub/0.36.2; python/3.11"}, {"User_Agent": "hf_hub/2.4.0"}


@dataclass
class Network:
    """One of each tier; ``main`` has moved once, so there is a revision that no ref means."""

    lab: Lab
    origin: Service
    router: Service
    edge: Service
    model: Path
    earlier: str
    revision: str
    token: str

    def url(self, tier: str) -> str:
        """Of a tier, by name."""
        found: Service = getattr(self, tier)
        return found.url

    @property
    def commit(self) -> str:
        """What ``main`` means."""
        return self.revision[7:47]


@pytest.fixture(scope="module")
def net(shared_lab: Lab, redis_url: str) -> Iterator[Network]:
    lab, model = shared_lab, shared_lab.folder / "model"
    make_model(model)
    (model / "onnx").mkdir()
    (model / ODD).write_text("[1]")
    (model / "empty.txt").touch()
    earlier = lab.publish(model)
    (model / "config.json").write_text('{"layers": 3, "again": true}')
    revision = lab.publish(model)
    lab.publish(model, SECRET, "--private")
    origin = lab.origin()
    router = lab.router(origin, redis=redis_url, redis_prefix="hub:", default_region="north", ref_lifetime=LIFETIME)
    edge = lab.edge(origin, router=router, region="north", ref_lifetime=LIFETIME)
    wait_nodes(router, 1)
    yield Network(lab, origin, router, edge, model, earlier, revision, lab.token(f"{SECRET}:read"))


def resolve(path: str, ref: str = "main", model: str = PUBLIC) -> str:
    """As these clients spell it."""
    return f"/{model}/resolve/{quote(ref, safe='')}/{quote(path)}"


def follow(answer: Answer, **fields: str) -> Answer:
    """The answer of the node that a redirect leads to."""
    assert answer.status == 307
    where = urlsplit(answer.headers["location"])
    return ask(f"http://{where.netloc}", f"{where.path}?{where.query}" if where.query else where.path, **fields)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("path", ["model.safetensors", "config.json", "empty.txt", ODD])
@pytest.mark.parametrize("ref", ["main", "commit", "revision"])
def test_head_says_all_that_is_to_be_known(net: Network, tier: str, path: str, ref: str) -> None:
    named = {"main": "main", "commit": net.commit, "revision": net.revision}[ref]
    answer = ask(net.url(tier), resolve(path, named), method="HEAD")
    data = (net.model / path).read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    assert answer.status == 200 and answer.body == b""
    assert answer.headers["x-repo-commit"] == net.commit
    assert answer.headers["etag"] == answer.headers["x-linked-etag"] == f'"{sha256}"'
    assert answer.headers["content-length"] == answer.headers["x-linked-size"] == str(len(data))
    assert not [name for name in answer.headers if "xet" in name]


@pytest.mark.parametrize("tier", BYTES)
@pytest.mark.parametrize("path", ["model.safetensors", "config.json", "empty.txt", ODD])
def test_get_gives_the_bytes_whole_and_in_ranges(net: Network, tier: str, path: str) -> None:
    data = (net.model / path).read_bytes()
    for ref in ("main", net.commit):
        for _ in range(2):  # a second time by the short path, where there is one
            whole = ask(net.url(tier), resolve(path, ref))
            assert whole.status == 200 and whole.body == data
    if len(data) > 10:
        part = ask(net.url(tier), resolve(path), Range="bytes=3-7")
        assert (part.status, part.body) == (206, data[3:8])
        assert part.headers["content-range"] == f"bytes 3-7/{len(data)}"
        rest = ask(net.url(tier), resolve(path, net.commit), Range="bytes=5-")
        assert (rest.status, rest.body) == (206, data[5:])
    beyond = ask(net.url(tier), resolve(path), Range=f"bytes={len(data)}-")
    assert beyond.status == 416 and beyond.headers["content-range"] == f"bytes */{len(data)}"


def test_the_router_sends_get_to_a_node_and_names_the_revision(net: Network) -> None:
    answer = ask(net.router.url, resolve(ODD))
    assert answer.headers["location"] == f"{net.edge.url}/{PUBLIC}/resolve/{net.revision}/{quote(ODD)}"
    assert follow(answer).body == (net.model / ODD).read_bytes()
    assert follow(ask(net.router.url, resolve(ODD)), Range="bytes=1-1").body == b"1"


@pytest.mark.parametrize("tier", TIERS)
def test_a_commit_that_no_ref_means_any_more_is_still_that_revision(net: Network, tier: str) -> None:
    earlier = net.earlier[7:47]
    head = ask(net.url(tier), resolve("config.json", earlier), method="HEAD")
    assert head.headers["x-repo-commit"] == earlier
    answer = ask(net.url(tier), resolve("config.json", earlier))
    assert (follow(answer) if tier == "router" else answer).body == b'{"layers": 3}'
    info = json.loads(ask(net.url(tier), f"/api/models/{PUBLIC}/revision/{earlier}").body)
    assert info["sha"] == earlier


def test_what_is_kept_of_a_ref_is_asked_for_again_and_of_a_commit_is_not(net: Network) -> None:
    """An edge answers what never changes by its short path; what a ref means is not among that."""
    assert ask(net.edge.url, resolve("config.json")).headers["cache-control"] == "public, no-cache"
    assert "immutable" in ask(net.edge.url, resolve("config.json", net.commit)).headers["cache-control"]
    before = net.lab.folder / "moved"
    make_model(before)
    net.lab.publish(before, "acme/moves")
    first = wait_until(lambda: ask(net.edge.url, resolve("config.json", model="acme/moves")).body, "there")
    (before / "config.json").write_text('{"moved": true}')
    net.lab.publish(before, "acme/moves")
    wait_until(lambda: ask(net.edge.url, resolve("config.json", model="acme/moves")).body != first, "moved")
    assert ask(net.edge.url, resolve("config.json", model="acme/moves")).body == b'{"moved": true}'


@pytest.mark.parametrize("tier", TIERS)
def test_documents_are_the_same_on_every_tier(net: Network, tier: str) -> None:
    base = f"/api/models/{PUBLIC}"
    for path in (
        base,
        f"{base}/revision/main?blobs=True",
        f"{base}/tree/main?recursive=true&expand=false",
        f"{base}/tree/{net.commit}/onnx",
        f"{base}/refs?include_prs=1",
        f"/api/v1/models/{PUBLIC}/revisions",
        f"/api/v1/models/{PUBLIC}/repo/files?Revision=master&Recursive=True&Root=onnx",
    ):
        here, there = ask(net.url(tier), path), ask(net.origin.url, path)
        assert here.status == 200, path
        shown, expected = json.loads(here.body), json.loads(there.body)
        for document in (shown, expected):
            document.pop("RequestId", None) if isinstance(document, dict) else None
        assert shown == expected
        assert b"xet" not in here.body.lower()
        again = ask(net.url(tier), path, If_None_Match=here.headers["etag"])
        assert again.status == (200 if "/v1/" in path else 304)
    assert json.loads(ask(net.url(tier), base).body)["sha"] == net.commit
    assert ask(net.url(tier), "/api/agent-harnesses").status == 200
    assert ask(net.url(tier), "/api/telemetry/hf_hub", method="HEAD").status == 204


def post(base: str, path: str, body: str) -> tuple[int, object]:
    """A form."""
    with closing(http.client.HTTPConnection(str(urlsplit(base).netloc), timeout=20)) as connection:
        connection.request("POST", path, body, {"Content-Type": "application/x-www-form-urlencoded"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


@pytest.mark.parametrize("tier", TIERS)
def test_paths_are_asked_for_by_a_form(net: Network, tier: str) -> None:
    path = f"/api/models/{PUBLIC}/paths-info/main"
    status, told = post(net.url(tier), path, f"paths={quote(ODD)}&paths=nope&paths=onnx&expand=false")
    assert status == 200 and isinstance(told, list)
    assert [item["path"] for item in told] == ["onnx", ODD]
    assert post(net.url(tier), path, "&".join(["paths=x"] * 20_000))[0] == 400
    assert post(net.url(tier), path, "paths=" + "x" * (2 << 20))[0] == 413


ERRORS = {
    resolve("config.json", model="acme/none"): "RepoNotFound",
    resolve("config.json", model=SECRET): "RepoNotFound",
    resolve("config.json", model="acme/UPPER"): "RepoNotFound",
    "/gpt2/resolve/main/config.json": "RepoNotFound",
    "/api/models/gpt2": "RepoNotFound",
    "/api/datasets/acme/tiny": "RepoNotFound",
    f"/api/models/{SECRET}": "RepoNotFound",
    f"/api/models/{SECRET}/tree/main": "RepoNotFound",
    f"/api/models/{SECRET}/refs": "RepoNotFound",
    "/api/models/acme/none/refs": "RepoNotFound",
    f"/api/v1/models/{SECRET}/repo?Revision=master&FilePath=config.json": "RepoNotFound",
    f"/api/v1/models/{SECRET}/revisions": "RepoNotFound",
    resolve("config.json", "v9"): "RevisionNotFound",
    resolve("config.json", "refs/pr/1"): "RevisionNotFound",
    resolve("config.json", "ab" * 20): "RevisionNotFound",
    f"/api/models/{PUBLIC}/revision/v9": "RevisionNotFound",
    f"/api/v1/models/{PUBLIC}/repo/files?Revision=v9": "RevisionNotFound",
    resolve("nope.json"): "EntryNotFound",
    resolve("onnx"): "EntryNotFound",
    f"/{PUBLIC}/resolve/main/..%2f..%2fetc/passwd": "EntryNotFound",
    f"/api/models/{PUBLIC}/tree/main/nope": "EntryNotFound",
    f"/api/models/{PUBLIC}/tree/main/onnx%2Fnope?recursive=True": "EntryNotFound",
    f"/api/v1/models/{PUBLIC}/repo?Revision=master": "EntryNotFound",
}


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("path", ERRORS)
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_errors_are_in_the_fields(net: Network, tier: str, path: str, method: str) -> None:
    answer = ask(net.url(tier), path, method=method)
    assert answer.status == 404
    assert answer.headers["x-error-code"] == ERRORS[path]
    assert answer.headers["x-error-message"]
    assert answer.headers["cache-control"] == "no-store"
    if ERRORS[path] == "EntryNotFound":
        assert answer.headers["x-repo-commit"] == net.commit


@pytest.mark.parametrize("tier", TIERS)
def test_a_private_model_is_for_who_has_a_token(net: Network, tier: str) -> None:
    path = resolve("config.json", model=SECRET)
    missing = ask(net.url(tier), resolve("config.json", model="acme/none"), net.lab.token("acme/other:read"))
    assert ask(net.url(tier), path, net.lab.token("acme/other:read")).told() == missing.told()
    head = ask(net.url(tier), path, net.token, method="HEAD")
    assert head.status == 200 and head.headers["cache-control"] == "private, no-store"
    answer = ask(net.url(tier), path, net.token)
    if tier == "router":
        assert parse_qs(urlsplit(answer.headers["location"]).query) == {"token": [net.token]}
        answer = follow(answer)
    assert answer.body == (net.model / "config.json").read_bytes()
    assert json.loads(ask(net.url(tier), f"/api/models/{SECRET}", net.token).body)["private"] is True
    bad = ask(net.url(tier), path, net.lab.token(f"{SECRET}:read", ttl=60, ago=500), method="HEAD")
    assert bad.status == 401 and "expired" in bad.headers["x-error-message"]


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("token", ["hf_abcdefgh", "ms-3d5e"])
def test_a_token_of_another_hub_means_nothing(net: Network, tier: str, token: str) -> None:
    """Their clients show the token of whoever is logged in there wherever they are led to."""
    assert ask(net.url(tier), resolve("config.json"), token, method="HEAD").status == 200
    assert ask(net.url(tier), f"/models/{PUBLIC}/files/main/config.json", token, method="HEAD").status in (200, 307)
    refused = ask(net.url(tier), resolve("config.json", model=SECRET), token, method="HEAD")
    assert refused.headers["x-error-code"] == "RepoNotFound"


def test_trouble_that_passes_is_answered_so_that_clients_try_again(lab: Lab) -> None:
    make_model(lab.folder / "model")
    lab.publish(lab.folder / "model")
    origin = lab.origin()
    edge = lab.edge(origin)
    assert ask(edge.url, resolve("config.json"), method="HEAD").status == 200
    origin.kill()
    never_seen = lab.router(origin)
    for base, path in (
        (never_seen.url, f"/api/models/{PUBLIC}"),
        (never_seen.url, resolve("config.json")),
        (edge.url, resolve("config.json", "ab" * 20)),
        (edge.url, resolve("tokenizer.json")),
    ):
        for agent, status in ((NEW_HUB, 429), (OLD_HUB, 503)):
            answer = ask(base, path, **agent)
            assert (answer.status, answer.headers["retry-after"]) == (status, "1"), path


@pytest.fixture
def between(lab: Lab) -> Iterator[Between]:
    """A proxy in front of an origin with the model: it can lie, and hold back."""
    make_model(lab.folder / "model", width=1500)
    lab.publish(lab.folder / "model")
    made = Between("127.0.0.1")
    made.to = lab.origin().port
    yield made
    made.close()


def one_bit_wrong(data: bytes) -> bytes:
    """In each large read: bodies of shards."""
    return data[:-1] + bytes([data[-1] ^ 1]) if len(data) > 20_000 else data


def test_no_byte_of_a_shard_is_sent_before_its_digest_was_right(lab: Lab, between: Between) -> None:
    """These clients go on from what they have, and look at its size alone: a wrong beginning would stay."""
    edge = lab.edge(between.url)
    path, native = resolve("model.safetensors"), f"/models/{PUBLIC}/files/main/model.safetensors"
    data = (lab.folder / "model" / "model.safetensors").read_bytes()
    assert ask(edge.url, path, method="HEAD").status == 200
    between.behave(one_bit_wrong)
    with pytest.raises(http.client.IncompleteRead) as raised:
        ask(edge.url, native)
    assert not data.startswith(raised.value.partial), "who follows a fill hears of it at the end"
    with pytest.raises(http.client.IncompleteRead) as raised:
        ask(edge.url, path)
    assert data.startswith(raised.value.partial), "the small shard with the header of the file was right"
    wrong = ask(edge.url, path, Range="bytes=1000000-1000099", **NEW_HUB)
    assert (wrong.status, wrong.code) == (429, "try_again")
    between.behave()
    assert ask(edge.url, path).body == data


def test_a_source_that_lies_is_left_for_the_next_one_and_nobody_notices(lab: Lab, between: Between) -> None:
    edge = lab.edge(f"http://127.0.0.1:{between.to}", words=["--parent", between.url])
    path = resolve("model.safetensors")
    assert ask(edge.url, path, method="HEAD").status == 200
    between.behave(one_bit_wrong)
    answer = ask(edge.url, path)
    assert answer.status == 200 and answer.body == (lab.folder / "model" / "model.safetensors").read_bytes()
    assert between.passed > 0


def test_an_origin_with_a_damaged_store_sends_nothing_of_the_shard(lab: Lab) -> None:
    make_model(lab.folder / "model", width=1500)
    lab.publish(lab.folder / "model")
    origin = lab.origin()
    blob = max((lab.store / "blobs").rglob("*"), key=lambda file: file.stat().st_size)
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    blob.chmod(0o600)
    blob.write_bytes(data)
    whole = (lab.folder / "model" / "model.safetensors").read_bytes()
    try:
        answer = ask(origin.url, resolve("model.safetensors"))
    except http.client.IncompleteRead as error:
        assert whole.startswith(error.partial)
    else:
        assert answer.status == 429


def test_the_head_goes_before_clients_give_up_and_the_body_when_it_is_right(lab: Lab, between: Between) -> None:
    edge = lab.edge(between.url)
    path = resolve("model.safetensors")
    assert ask(edge.url, path, method="HEAD").status == 200
    between.behave(hold_after=100_000)
    with closing(http.client.HTTPConnection("127.0.0.1", edge.port, timeout=9)) as connection:
        connection.request("GET", path, headers={"Range": "bytes=1000-"})  # after the header of the file
        answer = connection.getresponse()
        assert answer.status == 206 and between.holding.is_set() and not between.release.is_set()
        between.release.set()
        assert answer.read() == (lab.folder / "model" / "model.safetensors").read_bytes()[1000:]
