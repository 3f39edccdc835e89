"""Private models over real services: who may see them does, on every path and tier, and nobody else sees a byte.

FAULTS H16 and T3: no token, another's, an expired, a forged and a revoked one, before and after somebody who may see
the model has had all of it cached.
"""

from __future__ import annotations

import http.client
import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from shared import manifest as manifests
from shared.digest import Digest
from shared.keys import NodeKey
from shared.manifest import Manifest
from tests.harness import Lab, Service, command, make_model, result, wait_nodes, wait_until

SECRET, PUBLIC, MISSING = "acme/secret", "acme/public", "acme/missing"
LIFETIME = "0.2"
"""Seconds that nodes go by metadata before they ask again; in use it is some seconds, and must be under a minute."""
PLAN, METALINK = "application/vnd.nearshard.plan+json", "application/metalink4+xml"


@dataclass
class Answer:
    """One response, nothing followed."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str:
        """Of a problem document."""
        return str(json.loads(self.body)["code"])

    def told(self) -> tuple[int, dict[str, str], object]:
        """All that it tells, but for what differs between any two answers."""
        fields = {n: v for n, v in self.headers.items() if n not in ("date", "x-request-id", "nearshard-epoch", "age")}
        document = json.loads(self.body) if self.body else None
        if isinstance(document, dict):
            document.pop("request_id", None)
        return self.status, fields, document


def ask(base: str, path: str, token: str = "", method: str = "GET", **fields: str) -> Answer:
    """Ask for exactly this."""
    parts = urlsplit(base)
    connection = http.client.HTTPConnection(str(parts.hostname), int(parts.port or 80), timeout=20)
    shown = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        connection.request(method, path, headers={**shown, **{n.replace("_", "-"): v for n, v in fields.items()}})
        answer = connection.getresponse()
        return Answer(answer.status, {n.lower(): v for n, v in answer.headers.items()}, answer.read())
    finally:
        connection.close()


@dataclass
class Network:
    """Two nodes of one region behind a router, one model for all and one that is not."""

    lab: Lab
    origin: Service
    router: Service
    edges: list[Service]
    revision: str
    manifest: Manifest
    model: Path
    bad: dict[str, str]
    """Tokens that are not good, by the code that they are refused with."""

    @property
    def shard(self) -> Digest:
        """A large one."""
        return max(self.manifest.shards, key=lambda digest: self.manifest.shards[digest])

    def paths(self, model: str) -> list[tuple[str, dict[str, str]]]:
        """Every path that names a model, with fields."""
        return [
            (f"/models/{model}", {}),
            (f"/models/{model}/manifests/main", {}),
            (f"/models/{model}/manifests/{self.revision}", {}),
            (f"/models/{model}/manifests/v9", {}),
            (f"/shards/{model}", {}),
            (f"/shards/{model}:embed@{self.revision}", {}),
            (f"/shards/{model}:embed", {"Range": "bytes=0-99"}),
            (f"/shards/{model}:nope", {}),
            (f"/shards/{model}", {"Accept": PLAN}),
            (f"/shards/{model}", {"Accept": METALINK}),
            (f"/shards/{model}", {"Accept": "text/html"}),
            (f"/models/{model}/files/main/config.json", {}),
            (f"/models/{model}/files/{self.revision}/tokenizer.json", {}),
            (f"/models/{model}/blobs/{self.shard}", {}),
            (f"/models/{model}/blobs/{self.shard}", {"If-None-Match": f'"{self.shard.removeprefix("sha256:")}"'}),
            (f"/models/{model}/blobs/{self.shard}", {"Nearshard-Hop": "north-9"}),
            (f"/shards/{model}:embed@{self.revision}", {"Nearshard-Hop": "north-9"}),
        ]

    def tiers(self) -> list[Service]:
        """All services that answer the read surface."""
        return [self.origin, self.router, *self.edges]

    def read_all(self, edge: Service) -> None:
        """Have everything of the private model cached, by who may."""
        token = self.lab.token(f"{SECRET}:read")
        for path in ("all", "embed", "half"):
            assert ask(edge.url, f"/shards/{SECRET}:{path}@{self.revision}", token).status == 200
        for digest, size in self.manifest.shards.items():
            assert len(ask(edge.url, f"/models/{SECRET}/blobs/{digest}", token).body) == size


@pytest.fixture(scope="module")
def net(shared_lab: Lab, redis_url: str) -> Iterator[Network]:
    """Published with different bytes: no shard of the private model is also a public one."""
    lab = shared_lab
    make_model(lab.folder / "private", seed=1, width=384)
    (lab.folder / "private" / "config.json").write_text('{"layers": 3, "for": "us"}')
    make_model(lab.folder / "public", seed=2)
    revision = lab.publish(lab.folder / "private", SECRET, "--private")
    lab.publish(lab.folder / "public", PUBLIC)
    lab.publish(lab.folder / "public", "other/secret", "--private")
    origin = lab.origin()
    router = lab.router(origin, redis=redis_url, redis_prefix="access:", default_region="north", ref_lifetime=LIFETIME)
    edges = [lab.edge(origin, router=router, node=f"north-{n}", region="north", ref_lifetime=LIFETIME) for n in (1, 2)]
    wait_nodes(router, 2)
    body = ask(origin.url, f"/models/{SECRET}/manifests/{revision}", lab.token("acme/*:read")).body
    bad = {
        "token_expired": lab.token("*/*:read", ttl=60, ago=500),
        "token_invalid": lab.token("*/*:read", key=NodeKey.generate()),
        "token_revoked": lab.token("*/*:read", name="revoked-one"),
        "token_early": lab.token("*/*:read", ago=-3600),
    }
    command("token", "revoke", bad["token_revoked"], "--store", str(lab.store))
    made = Network(lab, origin, router, edges, revision, manifests.decode(body), lab.folder / "private", bad)
    for tier in made.tiers():
        wait_until(partial(_code, tier, bad["token_revoked"]), "revoked")
    yield made


def refused_as_missing(net: Network, tier: Service, token: str) -> None:
    """Each path of the private model is answered as that of a model that there is not."""
    for (path, fields), (other, _) in zip(net.paths(SECRET), net.paths(MISSING), strict=True):
        for method in ("GET", "HEAD"):
            hidden = ask(tier.url, path, token, method, **fields)
            assert hidden.told() == ask(tier.url, other, token, method, **fields).told(), (path, fields)
            assert hidden.status == 404 and hidden.headers["cache-control"] == "no-store"
            assert method == "HEAD" or hidden.code == "unknown_model"


def refused_by_its_code(net: Network, tier: Service, code: str) -> None:
    """Each path, of the private model, of the public one and of none, is answered with 401."""
    for model in (SECRET, PUBLIC, MISSING):
        for path, fields in net.paths(model):
            answer = ask(tier.url, path, net.bad[code], **fields)
            assert (answer.status, answer.code) == (401, code), (path, fields)
            assert answer.headers["www-authenticate"].startswith("Bearer")
    for path in ("/models", f"/blobs/{net.shard}"):
        assert ask(tier.url, path, net.bad[code]).code == code


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_nobody_else_sees_a_private_model_on_any_path_of_any_tier(net: Network, warm: bool) -> None:
    """T3, H16."""
    if warm:
        for edge in net.edges:
            net.read_all(edge)
    for tier in net.tiers():
        refused_as_missing(net, tier, "")
        refused_as_missing(net, tier, net.lab.token("other/*:read", f"{PUBLIC}:read"))
        refused_as_missing(net, tier, net.lab.token(f"{SECRET}:publish", f"{SECRET}:admin", f"{SECRET}:enroll"))
        for code in net.bad:
            refused_by_its_code(net, tier, code)


def test_who_may_sees_all_of_it_on_every_tier_and_nobody_may_keep_it(net: Network) -> None:
    token = net.lab.token(f"{SECRET}:read")
    whole = (net.model / "model.safetensors").read_bytes()
    for tier in (net.origin, *net.edges):
        answer = ask(tier.url, f"/shards/{SECRET}", token)
        assert (answer.status, answer.body) == (200, whole)
        assert ask(tier.url, f"/shards/{SECRET}?token={token}").body == whole
        assert ask(tier.url, f"/models/{SECRET}/files/main/tokenizer.json", token).status == 200
        assert len(ask(tier.url, f"/models/{SECRET}/blobs/{net.shard}", token).body) == net.manifest.shards[net.shard]
    for tier in net.tiers():
        for path, fields in net.paths(SECRET):
            answer = ask(tier.url, path, token, **fields)
            assert answer.status in (200, 206, 304, 307, 404, 406), (path, answer)
            assert answer.headers["cache-control"] == "private, no-store"
            assert answer.headers["referrer-policy"] == "no-referrer"
            assert "Authorization" in answer.headers["vary"]


def test_private_shards_are_at_no_other_path_however_warm_the_caches(net: Network) -> None:
    """Tenant A cannot read B by a digest: not as a public shard, not as a shard of its own model."""
    for edge in net.edges:
        net.read_all(edge)
    token = net.lab.token("other/*:read")
    for digest in net.manifest.shards:
        for tier in (net.origin, *net.edges):
            for path in (f"/blobs/{digest}", f"/models/other/secret/blobs/{digest}"):
                for fields in ({}, {"Nearshard-Hop": "north-9"}):
                    answer = ask(tier.url, path, token, **fields)
                    assert (answer.status, answer.code) == (404, "unknown_blob")
            assert ask(tier.url, f"/blobs/{digest}").status == 404
            assert ask(tier.url, f"/models/{PUBLIC}/blobs/{digest}").status == 404


def test_a_public_shard_of_the_same_bytes_is_had_from_public_places(net: Network) -> None:
    """And it cannot be poisoned: what is held for the private model is not what is given out."""
    edge, token = net.edges[0], net.lab.token("own/*:read")
    make_model(net.lab.folder / "own", seed=3, width=256)
    net.lab.publish(net.lab.folder / "own", "own/first", "--private")
    shards = manifests.decode(ask(edge.url, "/models/own/first/manifests/main", token).body).shards
    large = [digest for digest, size in shards.items() if size > 1000]
    for digest in large:
        assert len(ask(edge.url, f"/models/own/first/blobs/{digest}", token).body) == shards[digest]
        assert ask(edge.url, f"/blobs/{digest}").status == 404
    net.lab.publish(net.lab.folder / "own", "own/twin")
    for digest in large:
        answer = ask(edge.url, f"/blobs/{digest}")
        assert len(answer.body) == shards[digest] and "immutable" in answer.headers["cache-control"]
        assert "fill" in answer.headers["cache-status"]
        held = ask(edge.url, f"/models/own/first/blobs/{digest}", token)
        assert held.status == 200 and "hit" in held.headers["cache-status"]
    assert ask(edge.url, "/models/own/first").status == 404


def test_listings_name_what_the_asker_may_see(net: Network) -> None:
    for tier in net.tiers():

        def listed(*scopes: str, tier: Service = tier) -> set[str]:
            names = json.loads(ask(tier.url, "/models", net.lab.token(*scopes) if scopes else "").body)["models"]
            return {name for name in names if not name.startswith("own/")}

        assert listed() == listed("acme/missing:read") == {PUBLIC}
        assert listed(f"{SECRET}:read") == {PUBLIC, SECRET}
        assert listed("*/*:read") == {PUBLIC, SECRET, "other/secret"}
        for path in ("/status", "/metrics", "/readyz"):
            assert b"secret" not in ask(tier.url, path).body


def _there(tier: Service, path: str, token: str) -> bool:
    return ask(tier.url, path, token).status == 200


def test_what_is_signed_for_privately_is_told_to_who_has_a_token_for_it(net: Network) -> None:
    snapshot = json.loads(ask(net.origin.url, "/trust/timestamp.json").body)["signed"]["meta"]["snapshot.json"]
    listed = json.loads(ask(net.origin.url, f"/trust/{snapshot['version']}.snapshot.json").body)["signed"]["meta"]
    path = f"/trust/{listed['acme~private.json']['version']}.acme~private.json"
    for tier in net.tiers():
        wait_until(partial(_there, tier, path, net.lab.token("*/*:read")), "known there")
        for way in ("", net.lab.token("other/*:read")):
            answer = ask(tier.url, path, way)
            assert (answer.status, answer.code) == ((403, "forbidden") if way else (401, "token_missing"))
            assert b"secret" not in answer.body
        for code, token in net.bad.items():
            assert ask(tier.url, path, token).code == code
        assert SECRET.encode() in ask(tier.url, path, net.lab.token(f"{SECRET}:read")).body


def test_a_redirect_carries_the_token_to_one_node_and_to_nobody_else(net: Network) -> None:
    token = net.lab.token(f"{SECRET}:read")
    raw = http.client.HTTPConnection("127.0.0.1", net.router.port, timeout=10)
    for path, fields in (
        (f"/shards/{SECRET}", {"Authorization": f"Bearer {token}"}),
        (f"/shards/{SECRET}?token={token}", {}),
    ):
        raw.request("GET", path, headers=fields)
        answer = raw.getresponse()
        answer.read()
        location = urlsplit(answer.headers["Location"])
        assert answer.status == 307 and parse_qs(location.query) == {"token": [token]}
        assert location.path == f"/shards/{SECRET}:all@{net.revision}"
        links = answer.headers.get_all("Link") or []
        assert links and not any("token" in link for link in links)
    raw.close()
    for accept in (METALINK, PLAN):
        body = ask(net.router.url, f"/shards/{SECRET}", token, Accept=accept).body
        assert body and token.encode() not in body
    plan = json.loads(ask(net.router.url, f"/shards/{SECRET}", token, Accept=PLAN).body)
    for shard in plan["shards"]:
        for url in shard["urls"]:
            assert urlsplit(url).path == f"/models/{SECRET}/blobs/{shard['digest']}"
    assert (
        "location" not in ask(net.router.url, f"/shards/{PUBLIC}").headers
        or "token" not in ask(net.router.url, f"/shards/{PUBLIC}", token).headers["location"]
    ), "what is public needs none"


def test_where_a_private_model_is_is_not_told_to_others(net: Network) -> None:
    path = f"/locate/{SECRET}:all"
    assert ask(net.router.url, path).told() == ask(net.router.url, f"/locate/{MISSING}:all").told()
    assert ask(net.router.url, path + "?explain=1").status == 404
    answer = ask(net.router.url, path, net.lab.token(f"{SECRET}:read"))
    assert answer.status == 200 and b"token" not in answer.body


def test_curl_follows_to_the_bytes(net: Network, need: Callable[[str], str], tmp_path: Path) -> None:
    token = net.lab.token(f"{SECRET}:read")
    whole = (net.model / "model.safetensors").read_bytes()
    ways = [
        ["-H", f"Authorization: Bearer {token}", f"{net.router.url}/shards/{SECRET}"],
        [f"{net.router.url}/shards/{SECRET}?token={token}"],
        ["--oauth2-bearer", token, f"{net.router.url}/models/{SECRET}/files/main/model.safetensors"],
    ]
    for words in ways:
        done = subprocess.run([need("curl"), "-sSfL", "-o", str(tmp_path / "got"), *words], check=True, timeout=60)
        assert done.returncode == 0 and (tmp_path / "got").read_bytes() == whole


def test_the_short_paths_answer_nothing_private(net: Network) -> None:
    """Plain requests, as they are answered before the HTTP library sees them, after the same was asked with a token."""
    token = net.lab.token(f"{SECRET}:read")
    for tier in (*net.edges, net.router):
        for path in (
            f"/shards/{SECRET}:embed@{net.revision}",
            f"/shards/{SECRET}",
            f"/models/{SECRET}/blobs/{net.shard}",
        ):
            for _ in range(3):
                assert ask(tier.url, f"{path}?token={token}").status in (200, 307)
                assert ask(tier.url, path, token).status in (200, 307)
                assert ask(tier.url, path).status == 404
        public = f"/shards/{PUBLIC}:embed"
        for _ in range(3):
            assert ask(tier.url, public).status in (200, 307)
            for code, bad in net.bad.items():
                assert ask(tier.url, f"{public}?token={bad}").code == code


def test_a_node_that_starts_again_gives_out_no_more_than_before(net: Network, tmp_path: Path) -> None:
    data = tmp_path / "node"
    edge = net.lab.edge(net.origin, node="alone", data=data, ref_lifetime=LIFETIME)
    net.read_all(edge)
    shard = net.shard.removeprefix("sha256:")
    wait_until(lambda: (data / "models" / SECRET / "blobs" / shard[:2] / shard).exists(), "kept on disk")
    assert not list((data / "blobs").glob("*/*"))
    edge.stop()
    edge.start()
    refused_as_missing(net, edge, "")
    assert ask(edge.url, f"/blobs/{net.shard}").status == 404
    answer = ask(edge.url, f"/models/{SECRET}/blobs/{net.shard}", net.lab.token("acme/*:read"))
    assert answer.status == 200 and "hit-disk" in answer.headers["cache-status"]
    edge.stop()


def test_a_node_without_a_token_of_its_own_serves_what_is_public_and_has_nothing_private(
    net: Network, tmp_path: Path
) -> None:
    edge = net.lab.service(
        "edge_node", f"--origin={net.origin.url}", "--data", str(tmp_path / "poor"), "--node", "poor",
        "--trust-root", str(net.lab.trust_root), name="poor",
    )  # fmt: skip
    assert ask(edge.url, f"/shards/{PUBLIC}").status == 200
    assert PUBLIC in json.loads(ask(edge.url, "/models").body)["models"]
    answer = ask(edge.url, f"/shards/{SECRET}", net.lab.token("acme/*:read"))
    assert answer.status == 502
    refused_as_missing(net, edge, "")
    edge.stop()


def _code(tier: Service, token: str) -> str:
    """What a token is refused with, if it is."""
    answer = ask(tier.url, f"/models/{SECRET}", token)
    return answer.code if answer.status == 401 else ""


def test_a_revoked_token_is_refused_within_a_minute_everywhere(net: Network) -> None:
    token, kept = net.lab.token("acme/*:read"), net.lab.token("acme/*:read")
    for tier in net.tiers():
        assert ask(tier.url, f"/models/{SECRET}", token).status == 200
    command("token", "revoke", token, "--store", str(net.lab.store))
    for tier in net.tiers():
        refused = partial(_code, tier, token)
        assert wait_until(refused, "the token refused", 60) == "token_revoked"
        assert ask(tier.url, f"/models/{SECRET}", kept).status == 200


def test_tokens_are_in_no_log(net: Network) -> None:
    token = net.lab.token(f"{SECRET}:read")
    for tier in net.tiers():
        ask(tier.url, f"/shards/{SECRET}?token={token}")
        ask(tier.url, f"/shards/{SECRET}", token)
        ask(tier.url, f"/shards/{SECRET}:x?token={token}")
        text = tier.text()
        assert token not in text and token.split(".")[2] not in text
        for bad in net.bad.values():
            assert bad.split(".")[2] not in text
        assert net.lab.node_token.read_text() not in text


# Clients


def client(net: Network, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command against the router."""
    return command(*words, "--router", net.router.url, check=False, timeout=60, **env)


def test_a_client_with_a_token_gets_the_model_from_the_nodes(net: Network, tmp_path: Path) -> None:
    token = net.lab.token_file(f"{SECRET}:read", name="mine")
    whole = (net.model / "model.safetensors").read_bytes()
    for number, how in enumerate(({"NEARSHARD_TOKEN_FILE": str(token)}, {"NEARSHARD_TOKEN": token.read_text()})):
        target = tmp_path / str(number)
        done = client(net, "get", SECRET, "-o", str(target), "--json", **how)
        assert done.returncode == 0, done.stderr
        assert (target / "model.safetensors").read_bytes() == whole
        edges = {edge.url for edge in net.edges}
        assert {source["url"] for source in result(done)["sources"]} <= edges
    for tier in (net.edges[0], net.origin):
        target = tmp_path / f"direct-{tier.port}"
        done = command("pull", SECRET, "-o", str(target), "--router", tier.url, "--token-file", str(token), check=False)
        assert done.returncode == 0, done.stderr
        assert (target / "model.safetensors").read_bytes() == whole


def test_a_client_without_the_right_token_is_told_so(net: Network, tmp_path: Path) -> None:
    def got(*words: str, **env: str) -> tuple[int, str]:
        done = client(net, "get", SECRET, "-o", str(tmp_path / "none"), *words, **env)
        return done.returncode, done.stderr

    code, said = got()
    assert code == 8 and "--token-file" in said
    code, said = got("--token-file", str(net.lab.token_file("other/*:read", name="theirs")))
    assert code == 5 and "other/*:read" in said
    for bad, token in net.bad.items():
        code, said = got(NEARSHARD_TOKEN=token)
        assert code == 5, (bad, said)
        assert token not in said
    file = net.lab.token_file("acme/*:read", name="open")
    file.chmod(0o644)
    assert got("--token-file", str(file))[0] == 3
    assert not (tmp_path / "none").exists()
