"""Only enrolled nodes join: whole processes, and what is sent to a router by hand."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.enrolment import HEARTBEAT, LEAVE, Enrolled, enrolment_line, sign
from shared.keys import NodeKey
from shared.node import Node
from tests.harness import Lab, Service, command, get_json, wait_nodes, wait_until

KEY, OTHER = NodeKey.generate(), NodeKey.generate()
NODE = Node("a", "http://127.0.0.1:9009", "north", 2)
L = 2**252 + 27742317777372353535851937790883648493


def ask(router: Service, method: str, node: str, body: bytes, signature: str | None) -> tuple[int, dict[str, Any]]:
    """One request; its status and JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", router.port, timeout=15)
    fields = {"Content-Type": "application/json"} | ({"Nearshard-Signature": signature} if signature else {})
    try:
        connection.request(method, f"/nodes/{node}", body, fields)
        answer = connection.getresponse()
        if answer.status == 401:
            assert answer.headers["WWW-Authenticate"] == "Nearshard"
        data = answer.read()
        return answer.status, json.loads(data) if data else {}
    finally:
        connection.close()


@pytest.fixture(scope="module")
def router(shared_lab: Lab) -> Iterator[Service]:
    """With nodes a and b enrolled."""
    file = shared_lab.folder / "nodes.toml"
    b = Enrolled(Node("b", NODE.url, "north", 1), OTHER.public)
    file.write_text(f"{enrolment_line(Enrolled(NODE, KEY.public))}\n{enrolment_line(b)}\n")
    yield shared_lab.router("http://127.0.0.1:9", enrolled=str(file))


def nonce(router: Service) -> str:
    """A fresh one, as a node gets it."""
    status, problem = ask(router, "PUT", "a", *sign(KEY, HEARTBEAT, {**NODE.record(), "boot": "0", "sequence": 1}))
    assert (status, problem["code"]) == (401, "stale_nonce")
    return str(problem["nonce"])


def said(router: Service, *, key: NodeKey = KEY, purpose: bytes = HEARTBEAT, **change: Any) -> tuple[bytes, str]:
    """A heartbeat of node a, signed."""
    order = {"boot": "b0", "sequence": 1, "nonce": nonce(router)}
    return sign(key, purpose, {**NODE.record(), **order, **change})


def test_a_node_joins_is_replayed_in_vain_and_leaves(router: Service) -> None:
    first, second = said(router, boot="1"), said(router, boot="1", sequence=2)
    status, answer = ask(router, "PUT", "a", *first)
    assert status == 200 and re.fullmatch("[0-9a-f]{32}", answer["nonce"])
    assert [node["id"] for node in router.status()["nodes"]] == ["a"]
    assert router.status()["membership"] == "enrolled"
    assert ask(router, "PUT", "a", *first)[1]["code"] == "stale_heartbeat"
    assert ask(router, "PUT", "b", *second)[0] == 401
    assert ask(router, "PUT", "a", *second)[0] == 200
    for body, signature in ((b"", None), second, said(router, sequence=3, boot="1")):
        assert ask(router, "DELETE", "a", body, signature)[1]["code"] == "bad_signature"
    bye = said(router, purpose=LEAVE, sequence=3, boot="1")
    assert ask(router, "DELETE", "a", *bye)[0] == 204
    assert router.status()["nodes"] == []
    assert ask(router, "PUT", "a", *second)[1]["code"] == "stale_heartbeat"
    assert ask(router, "DELETE", "a", *bye)[1]["code"] == "stale_heartbeat"


def refused(router: Service) -> dict[str, tuple[str, bytes, str | None, int]]:
    """Node, body, signature and status by what is wrong."""
    body, signature = said(router)
    raw = bytes.fromhex(signature)
    malleable = raw[:32] + (int.from_bytes(raw[32:], "little") + L).to_bytes(32, "little")
    return {
        "no signature": ("a", body, None, 401),
        "63 bytes": ("a", body, signature[:-2], 401),
        "65 bytes": ("a", body, signature + "00", 401),
        "all zero": ("a", body, "00" * 64, 401),
        "S + L": ("a", body, malleable.hex(), 401),
        "upper case": ("a", body, signature.upper(), 401),
        "of another body": ("a", said(router, sequence=2)[0], signature, 401),
        "for another purpose": ("a", *said(router, purpose=LEAVE), 401),
        "another node's key": ("a", *said(router, key=OTHER), 401),
        "another node's word": ("b", *said(router, key=OTHER), 422),
        "not enrolled": ("c", *said(router, key=OTHER, id="c"), 403),
        "another URL": ("a", *said(router, url="http://127.0.0.1:9010"), 403),
        "another region": ("a", *said(router, region="south"), 403),
        "more weight": ("a", *said(router, weight=3), 403),
        "metadata": ("a", *said(router, url="http://169.254.169.254/"), 422),
        "a file": ("a", *said(router, url="file:///etc/passwd"), 422),
        "an old nonce": ("a", *said(router, nonce="00" * 16), 401),
        "oversize": ("a", *said(router, pad="x" * 20_000), 413),
        "far oversize": ("a", *said(router, pad="x" * 2_000_000), 413),
        "not JSON": ("a", b"{", KEY.sign(HEARTBEAT + b"{").hex(), 400),
        "not a map": ("a", b"[]", KEY.sign(HEARTBEAT + b"[]").hex(), 422),
        "a bad name": ("%2e%2e", body, signature, 400),
    }


def test_what_is_not_signed_and_as_enrolled_is_refused(router: Service) -> None:
    """H16, S1."""
    for what, (node, body, signature, status) in refused(router).items():
        answer = ask(router, "PUT", node, body, signature)
        assert answer[0] == status, (what, answer)
        assert "evil" not in json.dumps(answer[1])
    assert router.status()["nodes"] == []
    assert ask(router, "PUT", "a", *said(router, boot="2"))[0] == 200, "and the node itself is heard"


def test_an_edge_is_enrolled_by_its_directory_and_thrown_out(lab: Lab) -> None:
    file = lab.folder / "nodes.toml"
    file.write_text("# ours\n")
    router = lab.router("http://127.0.0.1:9", enrolled=str(file))
    edge = lab.edge("http://127.0.0.1:9", router=router, node="n1", region="north", heartbeat="0.2")
    wait_until(lambda: "nearshard_refused_members" in metrics(router), "it to be refused")
    assert router.status()["nodes"] == []
    command("enroll", "--data", str(lab.folder / "n1"), "--file", str(file))
    wait_nodes(router, 1, deadline=5)
    ring = get_json(f"{router.url}/ring?region=north")
    assert [node["url"] for node in ring["nodes"]] == [edge.url]
    wait_until(lambda: edge.status()["peers"] == 1, "the edge to have its ring")
    command("enroll", "n1", "--file", str(file), "--remove")
    wait_nodes(router, 0, deadline=5)
    assert file.read_text() == "# ours\n"


def metrics(router: Service) -> str:
    """Its refusals that are not zero."""
    with urllib.request.urlopen(f"{router.url}/metrics", timeout=10) as answer:
        return "\n".join(
            line for line in answer.read().decode().splitlines() if "refused_members_total" in line and "#" not in line
        )


def test_a_node_is_enrolled_by_hand(tmp_path: Path) -> None:
    file = tmp_path / "nodes.toml"
    words = ["--url", "http://10.0.0.1:8720", "--region", "north", "--file", str(file)]
    command("enroll", "n1", *words, "--key", KEY.public.hex(), "--weight", "3")
    enrolled = Enrolled(Node("n1", "http://10.0.0.1:8720", "north", 3), KEY.public)
    assert file.read_text() == enrolment_line(enrolled) + "\n"
    for bad in ("01" + "00" * 31, "00" * 32, "xyz", KEY.public.hex().upper()):
        done = command("enroll", "n2", *words, "--key", bad, check=False)
        assert done.returncode == 2 and "public key" in done.stderr
    assert command("enroll", "n2", "--file", str(file), check=False).returncode == 2
    assert file.read_text() == enrolment_line(enrolled) + "\n"


@pytest.mark.parametrize("text", ["x", '"a" = { url = "http://h:1", region = "r", key = "00" }'])
def test_a_router_does_not_start_with_an_enrolment_that_is_wrong(lab: Lab, tmp_path: Path, text: str) -> None:
    file = tmp_path / "nodes.toml"
    file.write_text(text)
    done = start("router", "--enrolled", str(file), "--trust-root", str(lab.trust_root))
    assert done.returncode == 3 and "router.enrolled" in done.stderr


def test_an_edge_does_not_start_with_a_key_that_everybody_may_read(lab: Lab, tmp_path: Path) -> None:
    """C2."""
    (tmp_path / "node.key").write_bytes(KEY.pem())
    (tmp_path / "node.key").chmod(0o644)
    done = start("edge_node", "--data", str(tmp_path), "--trust-root", str(lab.trust_root))
    assert done.returncode == 3 and "node.key" in done.stderr


def test_without_enrolment_only_loopback_joins_and_it_is_said(lab: Lab) -> None:
    router = lab.router("http://127.0.0.1:9")
    assert router.status()["membership"] == "open on loopback"
    assert "open on loopback" in router.text()
    for url, status in (("http://10.0.0.1:1", 403), ("http://127.0.0.1:1", 200)):
        body = json.dumps({"url": url, "region": "north"}).encode()
        assert ask(router, "PUT", "x", body, None)[0] == status
    assert ask(router, "DELETE", "x", b"", None)[0] == 204


def start(module: str, *words: str) -> subprocess.CompletedProcess[str]:
    """A service that should not start."""
    words = ("-m", module, "--port", "0", *words)
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=30, check=False)
