"""The router's choice with real processes: where clients are sent, why, and what takes a node out of it."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from shared.routing import Verdict
from tests.harness import Lab, Service, command, get_json, make_model, wait_nodes, wait_until

DIGEST = "sha256:" + "0" * 64


class Answer(NamedTuple):
    """An answer as it came: redirects are not followed."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def json(self) -> Any:
        """Its document."""
        return json.loads(self.body)


def ask(service: Service, method: str, path: str, body: object = None, **headers: str) -> Answer:
    """One request."""
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=10)
    try:
        fields = {"Content-Type": "application/json"} if body is not None else {}
        fields |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, json.dumps(body) if body is not None else None, fields)
        answer = connection.getresponse()
        return Answer(answer.status, answer.headers, answer.read())
    finally:
        connection.close()


def member(router: Service, node: str, url: str, **told: object) -> None:
    """A heartbeat of a node that is none of ours."""
    assert ask(router, "PUT", f"/nodes/{node}", {"url": url, "region": "north", "weight": 1, **told}).status == 200


class Net(NamedTuple):
    """A network of two regions."""

    router: Service
    edges: dict[str, Service]
    data: Path


@pytest.fixture
def net(lab: Lab) -> Net:
    """Two nodes in the north, one in the south, a published model."""
    make_model(lab.folder / "model")
    lab.publish(lab.folder / "model")
    origin = lab.origin()
    router = lab.router(
        origin, default_region="north", networks='{"192.0.2.0/24": "south"}', trusted_proxies='["127.0.0.0/8"]'
    )
    edges = {}
    for name in ("north-1", "north-2", "south-1"):
        data = lab.folder / "edges" / name
        edges[name] = lab.edge(
            origin, router=router, node=name, data=data, region=name.partition("-")[0], measure="0.2", heartbeat="0.3"
        )
    wait_nodes(router, 3)
    return Net(router, edges, lab.folder)


def explain(net: Net, what: str = DIGEST, region: str = "north") -> dict[str, Any]:
    """Why a router would send a client where it would."""
    document: dict[str, Any] = get_json(f"{net.router.url}/locate/{what}?explain=1&region={region}")
    return document


def verdicts(net: Net, region: str = "north") -> dict[str, str]:
    """By node, in the order of the choice."""
    return {node["id"]: node["verdict"] for node in explain(net, region=region)["nodes"]}


def test_locate_names_what_the_redirect_names(net: Net) -> None:
    for what in ("/shards/acme/tiny:half", f"/blobs/{DIGEST}"):
        redirect = ask(net.router, "GET", what)
        assert redirect.status == 307
        links = [field.partition(">")[0][1:] for field in redirect.headers.get_all("Link", [])]
        located = get_json(f"{net.router.url}/locate/{what.split('/', 2)[2]}")
        assert located == {"urls": [redirect.headers["Location"], *links]}
        assert len(located["urls"]) == 4
        assert ask(net.router, "HEAD", what).headers["Location"] == located["urls"][0]


def test_an_explanation_says_where_the_client_is_and_why_each_node_is_where_it_is(net: Net) -> None:
    wait_until(
        lambda: {region["how"] for region in explain(net)["regions"]} == {"here", "measured"}, "a measured round trip"
    )
    found = explain(net, "acme/tiny:half")
    assert found["key"] == "acme/tiny:half"
    assert (found["client"]["region"], found["client"]["how"]) == ("north", "said")
    assert [region["region"] for region in found["regions"]] == ["north", "south"]
    assert found["regions"][1]["ms"] < 1000
    assert [node["region"] for node in found["nodes"]] == ["north", "north", "south"]
    assert {node["verdict"] for node in found["nodes"]} == {"owner"}
    assert all(node["reason"] and not node["health"]["ejected"] for node in found["nodes"])
    assert ask(net.router, "GET", "/locate/acme/none").json()["code"] == "unknown_model"


def test_a_client_behind_a_trusted_proxy_is_where_its_own_address_is(net: Net) -> None:
    def client(**headers: str) -> dict[str, str]:
        document: dict[str, str] = ask(net.router, "GET", f"/locate/{DIGEST}?explain=1", **headers).json()["client"]
        return document

    assert client()["how"] == "default"
    assert client(X_Forwarded_For="198.51.100.1, 192.0.2.7") == {
        "region": "south", "how": "network", "address": "192.0.2.7",
    }  # fmt: skip
    south = ask(net.router, "GET", f"/blobs/{DIGEST}", X_Forwarded_For="192.0.2.7").headers["Location"]
    assert south.startswith(net.edges["south-1"].url)


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/locate/", "unknown_path"), ("/locate/ACME/tiny", "bad_id"), ("/locate/acme%2ftiny", "bad_id"),
        ("/locate/sha256:0", "bad_id"), ("/locate/../x", "bad_id"), (f"/locate/{DIGEST}?explain=yes", "bad_request"),
        (f"/locate/{DIGEST}?region=North", "bad_region"), ("/locate/%00", "bad_id"), ("/locate/a/b/c", "bad_id"),
    ],
)  # fmt: skip
def test_what_cannot_be_located_is_said_in_our_words(router: Service, path: str, code: str) -> None:
    answer = ask(router, "GET", path)
    assert (answer.status in (400, 404), answer.json()["code"]) == (True, code)


@pytest.fixture(scope="module")
def router(shared_lab: Lab) -> Iterator[Service]:
    """A router with neither node nor origin."""
    yield shared_lab.router(origin="[]")


def test_without_nodes_and_origins_the_answer_is_no_nodes(router: Service) -> None:
    for method, path, headers in (
        ("GET", "/shards/acme/tiny", {}),
        ("HEAD", "/shards/acme/tiny", {}),
        ("GET", f"/blobs/{DIGEST}", {}),
        ("GET", "/models/acme/tiny/files/main/config.json", {}),
        ("GET", "/shards/acme/tiny", {"Accept": "application/vnd.nearshard.plan+json"}),
        ("GET", f"/locate/{DIGEST}?explain=1", {}),
        ("GET", "/locate/acme/tiny", {}),
    ):
        answer = ask(router, method, path, **headers)
        assert (answer.status, answer.headers["Retry-After"]) == (503, "1"), path
        assert method == "HEAD" or answer.json()["code"] == "no_nodes"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"node": "none", "ok": False}, 404), ({"node": "None", "ok": False}, 400), ({"node": 5, "ok": False}, 400),
        ({"node": "none"}, 400), ({"node": "none", "ok": 0}, 400), ([], 400),
        ({"node": "none", "ok": True, "x": 1}, 400),
    ],
)  # fmt: skip
def test_a_report_that_makes_no_sense_is_refused(router: Service, body: object, status: int) -> None:
    assert ask(router, "POST", "/reports", body).status == status


def test_a_report_is_a_small_json_document(router: Service) -> None:
    assert ask(router, "POST", "/reports", {"node": "a" * (2 << 20), "ok": True}).status == 413
    assert ask(router, "POST", "/reports", {"node": "a", "ok": True}, Content_Type="text/plain").status == 415
    assert ask(router, "GET", "/reports").status == 405


def test_a_node_that_drains_gets_no_new_clients_and_owns_nothing_until_it_is_back(net: Net) -> None:
    owner, other = list(verdicts(net))[:2]
    wait_until(lambda: net.edges[other].status()["peers"] == 2, "the ring of two")
    document = json.loads(command("drain", owner, "--data", str(net.data), "--json").stdout)
    assert document == {owner: {"draining": True}}
    wait_until(lambda: verdicts(net)[owner] == Verdict.DRAINING, "the router heard of it")
    assert [*verdicts(net)] == [other, "south-1", owner]
    assert ask(net.router, "GET", f"/blobs/{DIGEST}").headers["Location"].startswith(net.edges[other].url)
    wait_until(lambda: net.edges[other].status()["peers"] == 1, "its peer left it out of the ring")
    assert ask(net.edges[owner], "GET", "/shards/acme/tiny").status == 200, "it goes on answering"
    shown = {node["id"]: node for node in json.loads(command("nodes", "--router", net.router.url, "--json").stdout)}
    assert {name: node["draining"] for name, node in shown.items()} == {
        name: name == owner for name in net.edges
    }  # fmt: skip
    assert shown[owner].keys() >= {"id", "region", "url", "weight", "in_flight", "load", "health"}
    assert "draining" in command("nodes", "--router", net.router.url).stdout
    command("drain", owner, "--undo", "--data", str(net.data))
    wait_until(lambda: next(iter(verdicts(net).items())) == (owner, Verdict.OWNER), "it is back")
    wait_until(lambda: net.edges[other].status()["peers"] == 2, "its peer has it in the ring again")


def test_locate_as_a_command(net: Net) -> None:
    words = ["locate", "acme/tiny:half", "--router", net.router.url, "--region", "south"]
    urls = command(*words).stdout.split()
    assert urls == json.loads(command(*words, "--json").stdout)["urls"]
    assert urls[0].startswith(f"{net.edges['south-1'].url}/shards/acme/tiny:half@sha256:")
    explained = command(*words, "--explain").stdout
    assert "client  region south (said)" in explained
    assert "node    south-1 (south): owner: next on the ring" in explained
    for bad, code in (("ACME", 2), ("acme/none", 8), ("acme/tiny:none", 8)):
        done = command("locate", bad, "--router", net.router.url, check=False)
        assert (done.returncode, done.stderr.startswith("error: ")) == (code, True)


def test_clients_that_complain_take_a_node_out_and_one_client_does_not(lab: Lab) -> None:
    router = lab.router("http://127.0.0.1:9", probe="0", ttl="60", trusted_proxies='["127.0.0.0/8"]')
    for number in range(3):
        member(router, f"n{number}", f"http://127.0.0.1:{number + 1}")

    def state(node: str) -> dict[str, Any]:
        return next(dict(known["health"]) for known in router.status()["nodes"] if known["id"] == node)

    def complain(number: int, ok: bool = False) -> None:
        answer = ask(router, "POST", "/reports", {"node": "n0", "ok": ok}, X_Forwarded_For=f"192.0.2.{number}")
        assert (answer.status, answer.body) == (204, b"")

    for _ in range(30):
        complain(1)
    assert not state("n0")["ejected"]
    for number in range(2, 11):
        complain(number)
    assert state("n0")["ejected"]
    found = get_json(f"{router.url}/locate/{DIGEST}?explain=1&region=north")["nodes"]
    assert (found[-1]["id"], found[-1]["verdict"]) == ("n0", "ejected")
    metrics = ask(router, "GET", "/metrics").body.decode()
    assert 'nearshard_ejections_total{region="north"} 1.0' in metrics


def test_nodes_that_answer_no_probe_are_passed_over_and_all_are_used_rather_than_most_are_not(
    net: Net, lab: Lab
) -> None:
    router = lab.router("http://127.0.0.1:9", probe="0.1", ttl="60")
    member(router, "well-1", net.edges["north-1"].url)
    member(router, "well-2", net.edges["north-2"].url)
    member(router, "gone-1", "http://127.0.0.1:9")

    def by_verdict() -> dict[str, str]:
        nodes = get_json(f"{router.url}/locate/{DIGEST}?explain=1&region=north")["nodes"]
        return {node["id"]: node["verdict"] for node in nodes}

    wait_until(lambda: by_verdict().get("gone-1") == "ejected", "the dead node ejected")
    assert [*by_verdict()][-1] == "gone-1"
    member(router, "gone-2", "http://127.0.0.1:10")
    member(router, "gone-3", "http://127.0.0.1:11")
    wait_until(lambda: [*by_verdict().values()].count("panic") == 3, "panic")
    assert len(by_verdict()) == 5
    ask(router, "GET", f"/blobs/{DIGEST}?region=north")
    metrics = ask(router, "GET", "/metrics").body.decode()
    assert 'nearshard_panics_total{region="north"} 1.0' in metrics
    assert 'nearshard_redirects_total{region="north",verdict=' in metrics
