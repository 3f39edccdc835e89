"""What tokens let do besides reading: operating a node and enrolling nodes, from afar. (Publishing: test_publish_afar.)

Every refusal is looked at with each kind of token that is not the right one, and for what it left as it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nearshard.enroll import enrolled_of
from shared.digest import digest_of
from shared.enrolment import Enrolled, parse_enrolment
from shared.enrolment_file import change_file
from shared.errors import EXIT_AUTH, EXIT_NETWORK, EXIT_USAGE
from shared.keys import NodeKey
from shared.node import Node
from tests.e2e import test_enrolment
from tests.e2e.test_operations import used
from tests.e2e.test_publish_afar import ask
from tests.harness import Lab, Service, command, make_model, wait_settled, wait_until

ONE, SECRET = "acme/one", "acme/secret"
LIFETIME = "0.2"
RIGHTS = ("read", "publish", "admin", "enroll")
KEY = NodeKey.generate()
RECORD = {"url": "http://10.0.0.1:8720", "region": "north", "weight": 2, "key": KEY.public.hex()}


@dataclass
class Net:
    """An edge and a router with an enrolment file."""

    lab: Lab
    edge: Service
    router: Service
    file: Path
    revoked: str

    def wrong(self, right: str) -> dict[str, tuple[int, str]]:
        """Tokens that give no such right to anything, with how each is refused."""
        token = self.lab.token
        others = [f"*/*:{other}" for other in RIGHTS if other != right]
        return {
            "": (401, "token_missing"),
            **{token(other): (403, "forbidden") for other in others},
            token(f"*/*:{right}", ttl=60, ago=500): (401, "token_expired"),
            token(f"*/*:{right}", ago=-3600): (401, "token_early"),
            token(f"*/*:{right}", key=NodeKey.generate()): (401, "token_invalid"),
            self.revoked: (401, "token_revoked"),
        }


@pytest.fixture(scope="module")
def net(shared_lab: Lab) -> Net:
    lab = shared_lab
    make_model(lab.folder / "one", width=128)
    make_model(lab.folder / "secret", seed=8, width=128)
    lab.publish(lab.folder / "one", ONE)
    lab.publish(lab.folder / "secret", SECRET, "--private")
    origin, file = lab.origin(), lab.folder / "nodes.toml"
    file.write_text("# ours\n")
    router = lab.router(origin, enrolled=str(file), ref_lifetime=LIFETIME)
    edge = lab.edge(origin, ref_lifetime=LIFETIME)
    revoked = lab.token("*/*:admin", "*/*:enroll", name="revoked-one")
    command("token", "revoke", revoked, "--store", str(lab.store))
    made = Net(lab, edge, router, file, revoked)
    for service in (edge, router):
        wait_until(lambda service=service: _code(service, revoked) == "token_revoked", "revoked")  # type: ignore[misc]
    return made


def _code(service: Service, token: str) -> str:
    return asked(service, "GET", f"/models/{ONE}", token)[1]


def asked(service: Service, method: str, path: str, token: str, body: object = None) -> tuple[int, str, dict[str, Any]]:
    """Status, error code and JSON."""
    fields = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    return ask(service.url + path, method, None if body is None else json.dumps(body).encode(), **fields)


# admin

OF_ONE: list[tuple[str, str, object]] = [
    ("POST", "/admin/preheat", {"what": ONE}),
    ("POST", "/admin/pin", {"what": f"{ONE}:embed"}),
    ("POST", "/admin/unpin", {"what": f"{ONE}:embed"}),
    ("POST", "/admin/purge", {"what": f"{ONE}:half@main"}),
]
OF_ALL: list[tuple[str, str, object]] = [
    ("POST", "/admin/purge", {"what": digest_of(b"x")}),
    ("PUT", "/admin/link", {"metered": False}),
    ("GET", "/admin/link", None),
    ("PUT", "/admin/drain", {"draining": False}),
    ("GET", "/admin/pins", None),
]


def held(edge: Service) -> int:
    """Bytes that an edge holds, once all is on its disk."""
    wait_settled(edge)
    return used(edge)


def done(net: Net, token: str, what: str) -> Any:
    """A preheat, ended."""
    status, _, job = asked(net.edge, "POST", "/admin/preheat", token, {"what": what})
    assert status == 200
    path = f"/admin/jobs/{job['id']}"
    return wait_until(lambda: _ended(asked(net.edge, "GET", path, token)[2]), "the preheat done")


def _ended(job: dict[str, Any]) -> dict[str, Any] | None:
    return job if job["state"] == "done" else None


def test_a_node_is_operated_by_who_has_admin_and_nobody_else(net: Net) -> None:
    done(net, net.lab.token("*/*:admin"), ONE)
    before = held(net.edge)
    for method, path, body in OF_ONE + OF_ALL:
        for token, refusal in net.wrong("admin").items():
            assert asked(net.edge, method, path, token, body)[:2] == refusal, (path, refusal)
        for other in ("acme/other:admin", "other/*:admin", "other/one:admin"):
            assert asked(net.edge, method, path, net.lab.token(other), body)[:2] == (403, "forbidden"), path
        assert asked(net.edge, method, path[len("/admin") :], net.lab.token("*/*:admin"), body)[0] in (404, 405)
    assert held(net.edge) == before > 0
    assert asked(net.edge, "GET", "/admin/pins", net.lab.token("*/*:admin"))[2] == {"pins": []}
    for scope in (f"{ONE}:admin", "acme/*:admin", "*/one:admin", "*/*:admin"):
        for method, path, body in OF_ONE:
            assert asked(net.edge, method, path, net.lab.token(scope), body)[0] == 200, (scope, path)
    assert held(net.edge) < before


def test_what_is_of_no_one_model_is_for_who_has_all(net: Net) -> None:
    for method, path, body in OF_ALL:
        for scope in (f"{ONE}:admin", "acme/*:admin", "*/one:admin"):
            assert asked(net.edge, method, path, net.lab.token(scope), body)[:2] == (403, "forbidden"), (scope, path)
        assert asked(net.edge, method, path, net.lab.token("*/*:admin"), body)[0] == 200, path


def test_who_operates_one_model_learns_nothing_of_others(net: Net) -> None:
    every, one = net.lab.token("*/*:admin"), net.lab.token(f"{ONE}:admin")
    for what in (SECRET, "acme/missing", f"{SECRET}:nope"):
        assert asked(net.edge, "POST", "/admin/purge", one, {"what": what})[:2] == (403, "forbidden")
    job = done(net, every, SECRET)
    assert asked(net.edge, "GET", f"/admin/jobs/{job['id']}", one)[:2] == (404, "unknown_path")
    assert asked(net.edge, "GET", "/admin/jobs/99999", one)[:2] == (404, "unknown_path")
    for token, what in ((every, SECRET), (one, ONE)):
        assert asked(net.edge, "POST", "/admin/pin", token, {"what": what})[0] == 200
    assert asked(net.edge, "POST", "/admin/unpin", one, {"what": ONE})[2] == {"pins": []}
    assert asked(net.edge, "POST", "/admin/unpin", every, {"what": SECRET})[2] == {"pins": []}
    assert asked(net.edge, "GET", f"/models/{SECRET}", every)[:2] == (404, "unknown_model"), "admin is not read"


def test_what_is_no_operation_is_refused_by_its_code(net: Net) -> None:
    token = net.lab.token("*/*:admin")
    bodies: tuple[object, ...] = ({}, {"what": 5}, [], {"what": ONE, "x": 1})
    for body in bodies:
        assert asked(net.edge, "POST", "/admin/purge", token, body)[:2] == (400, "bad_json")
    for what in ("", "ACME", "acme/../one", "*/*", "sha256:x"):
        assert asked(net.edge, "POST", "/admin/purge", token, {"what": what})[:2] == (400, "bad_id"), what
    assert asked(net.edge, "POST", "/admin/purge", token, {"what": "acme/missing"})[:2] == (404, "unknown_model")


def test_who_operated_is_in_the_log_and_no_token_is(net: Net) -> None:
    good = net.lab.token("*/*:admin", name="the-operator", subject="berlin ops")
    bad = net.lab.token("other/*:admin", name="the-other")
    assert asked(net.edge, "POST", "/admin/purge", good, {"what": ONE})[0] == 200
    assert asked(net.edge, "POST", "/admin/purge", bad, {"what": ONE})[0] == 403
    lines = net.edge.text().splitlines()
    (line,) = [line for line in lines if "the-operator" in line]
    assert "purge" in line and ONE in line and "berlin ops" in line
    (line,) = [line for line in lines if "the-other" in line]
    assert "refused" in line
    for token in (good, bad):
        assert token not in net.edge.text() and token.split(".")[2] not in net.edge.text()


def test_the_commands_reach_a_node_by_its_url(net: Net) -> None:
    file = net.lab.token_file("*/*:admin", name="operator")
    there = ["--node-url", net.edge.url, "--token-file", str(file), "--json"]

    def run(*words: str) -> Any:
        return json.loads(command(*words, *there).stdout)[net.edge.url]

    assert run("preheat", ONE)["state"] == "done"
    assert run("pin", f"{ONE}:embed")["state"] == "done"
    assert run("pin", f"{ONE}:embed", "--remove") == {"pins": []}
    assert run("purge", ONE)["shards"] > 0
    assert run("drain") == {"draining": True} and run("drain", "--undo") == {"draining": False}
    assert run("link", "--rate", "5MB")["rate"] == run("link")["rate"] == 5_000_000
    for words, code in (
        (["purge", ONE, "--node-url", net.edge.url], EXIT_AUTH),
        (["purge", ONE, "--node-url", net.edge.url, "--node", "n"], EXIT_USAGE),
        (["purge", ONE, "--node-url", "edge:80"], EXIT_USAGE),
        (["purge", ONE, "--node-url", "http://127.0.0.1:9"], EXIT_NETWORK),
        (["drain"], EXIT_USAGE),
    ):
        refused = command(*words, check=False)
        assert refused.returncode == code and refused.stderr.startswith("error: "), (words, refused.stderr)


# enroll


@pytest.fixture
def enrolled(net: Net) -> Iterator[str]:
    """A token that may enrol; nobody is enrolled after the test."""
    yield net.lab.token("*/*:enroll", name="the-enroller", subject="head office")
    net.file.write_text("# ours\n")


def test_nodes_are_enrolled_by_who_may_and_nobody_else(net: Net, enrolled: str) -> None:
    path = "/enrolments/a"
    for method, body in (("PUT", RECORD), ("DELETE", None)):
        for token, refusal in net.wrong("enroll").items():
            assert asked(net.router, method, path, token, body)[:2] == refusal
        for scope in ("acme/*:enroll", f"{ONE}:enroll", "*/a:enroll"):
            assert asked(net.router, method, path, net.lab.token(scope), body)[:2] == (403, "forbidden")
    assert net.file.read_text() == "# ours\n"
    assert asked(net.router, "PUT", path, enrolled, RECORD)[0] == 204
    known = Enrolled(Node("a", str(RECORD["url"]), "north", 2), KEY.public)
    assert parse_enrolment(net.file.read_text()) == ({"a": known}, {})
    text = net.router.text()
    assert "the-enroller" in text and "head office" in text and enrolled not in text
    for token in ("", net.lab.token("*/*:read")):
        assert asked(net.router, "DELETE", path, token)[0] in (401, 403)
    assert asked(net.router, "DELETE", path, enrolled)[0] == asked(net.router, "DELETE", path, enrolled)[0] == 204
    assert net.file.read_text() == "# ours\n"


def test_it_counts_with_the_answer(net: Net, enrolled: str) -> None:
    """The router would look at its file within a second by itself; here nothing waits, again and again."""
    node, key = test_enrolment.NODE, test_enrolment.KEY
    record = {"url": node.url, "region": node.region, "weight": node.weight, "key": key.public.hex()}
    heartbeat = partial(test_enrolment.ask, net.router, "PUT", "a")
    for number in range(5):
        assert asked(net.router, "PUT", "/enrolments/a", enrolled, record)[0] == 204
        status, answer = heartbeat(*test_enrolment.said(net.router, boot=f"{number}"))
        assert status == 200, answer
        assert [known["id"] for known in net.router.status()["nodes"]] == ["a"]
        said = test_enrolment.said(net.router, boot=f"{number}", sequence=2)
        assert asked(net.router, "DELETE", "/enrolments/a", enrolled)[0] == 204
        assert net.router.status()["nodes"] == []
        assert heartbeat(*said)[1]["code"] == "not_enrolled"


def test_a_node_that_is_not_acceptable_is_refused_as_ever(net: Net, enrolled: str) -> None:
    for change, code in (
        ({"key": "01" + "00" * 31}, "bad_key"),
        ({"key": "xyz"}, "bad_key"),
        ({"key": None}, "bad_key"),
        ({"url": "http://169.254.169.254/"}, "bad_node"),
        ({"url": "file:///etc/passwd"}, "bad_node"),
        ({"region": "../x"}, "bad_node"),
        ({"weight": 11}, "bad_node"),
        ({"extra": 1}, "bad_node"),
    ):
        assert asked(net.router, "PUT", "/enrolments/a", enrolled, RECORD | change)[:2] == (422, code), change
    assert asked(net.router, "PUT", "/enrolments/a", enrolled, [])[:2] == (422, "bad_node")
    assert asked(net.router, "PUT", "/enrolments/UP", enrolled, RECORD)[:2] == (400, "bad_id")
    assert asked(net.router, "PUT", "/enrolments/a", enrolled, RECORD | {"pad": "x" * 20_000})[:2] == (413, "too_large")
    assert asked(net.router, "DELETE", "/enrolments/UP", enrolled)[:2] == (400, "bad_id")
    assert net.file.read_text() == "# ours\n"


def test_many_writers_lose_nothing(net: Net, enrolled: str) -> None:
    def enrol(number: int) -> None:
        if number % 2:
            status = asked(net.router, "PUT", f"/enrolments/n{number}", enrolled, RECORD)[0]
            assert status == 204
        else:
            change_file(net.file, f"n{number}", enrolled_of({"id": f"n{number}", **RECORD}))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(enrol, range(40)))
    nodes, wrong = parse_enrolment(net.file.read_text())
    assert set(nodes) == {f"n{number}" for number in range(40)} and not wrong


def test_routers_with_a_file_each_are_told_by_one_command(net: Net, enrolled: str, tmp_path: Path) -> None:
    other = tmp_path / "nodes.toml"
    other.write_text("")
    origin = net.edge.args[0].removeprefix("--origin=")
    second = net.lab.router(origin, enrolled=str(other), ref_lifetime=LIFETIME)
    open_to_all = net.lab.router(origin, ref_lifetime=LIFETIME)
    token = net.lab.token_file("*/*:enroll", name="enroll")
    words = ["enroll", "n1", "--url", "http://10.0.0.1:8720", "--region", "north", "--key", KEY.public.hex()]
    both = ["--router", net.router.url, "--router", second.url, "--token-file", str(token)]
    line = command(*words, *both).stdout
    assert net.file.read_text() == f"# ours\n{line}" and other.read_text() == line
    command("enroll", "n1", "--remove", *both)
    assert (net.file.read_text(), other.read_text()) == ("# ours\n", "# nobody is enrolled\n")
    for options, code in (
        (["--router", open_to_all.url, "--token-file", str(token)], 8),
        (["--router", net.router.url], EXIT_AUTH),
        ([*both, "--file", "x.toml"], EXIT_USAGE),
        (["--router", "http://127.0.0.1:9", "--router", second.url, "--token-file", str(token)], EXIT_NETWORK),
    ):
        refused = command(*words, *options, check=False)
        assert refused.returncode == code and refused.stderr.startswith("error: "), (options, refused.stderr)
    assert other.read_text() == line, "who could be reached was told"
    assert net.file.read_text() == "# ours\n"
    for service in (second, open_to_all):
        service.stop()
