"""TLS between real processes, with certificates made by our own commands."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.client import HTTPSConnection
from pathlib import Path

import pytest

from shared.certificates import load_authority, make_certificate
from shared.errors import UpstreamError
from shared.web.session import fetch, make_session
from shared.web.tls import Files, client_context
from tests.certificates import Deployment
from tests.e2e.test_short_path import LONG, Wire, request, settled
from tests.faults import invariants
from tests.harness import Lab, Service, command, get_json, make_model, wait_nodes, wait_until

PLAN = "application/vnd.nearshard.plan+json"
MIB = 1 << 20


@dataclass
class Net:
    """A network that speaks TLS only, with everything fetched to its edge."""

    deployment: Deployment
    origin: Service
    router: Service
    edge: Service
    model: Path
    paths: dict[str, str]

    @property
    def tls(self) -> ssl.SSLContext:
        """Of a client without a certificate."""
        return self.deployment.client()


@pytest.fixture(scope="module")
def net(shared_lab: Lab) -> Net:
    """Origin, router and an edge that holds a model on disk, and small shards of it in memory."""
    folder = shared_lab.folder
    make_model(folder / "model", width=1024)
    revision = shared_lab.publish(folder / "model")
    deployment = Deployment.make(folder / "ca")
    shared_lab.tls = deployment.client()
    origin = shared_lab.origin(*deployment.words("origin-1"))
    router = shared_lab.router(origin, words=deployment.words("router-1"))
    edge = shared_lab.edge(origin, router=router, memory="20MB", words=deployment.words("edge"))
    wait_nodes(router, 1)
    plan = get_json(f"{origin.url}/shards/acme/tiny", shared_lab.tls, Accept=PLAN)
    shards = sorted(plan["shards"], key=lambda shard: shard["size"])
    paths = {
        "small shard": f"/blobs/{shards[0]['digest']}",
        "large shard": f"/blobs/{shards[-1]['digest']}",
        "task": f"/shards/acme/tiny:half@{revision}",
        "file": f"/models/acme/tiny/files/{revision}/model.safetensors",
        "small file": f"/models/acme/tiny/files/{revision}/config.json",
    }
    with wire(edge, shared_lab.tls) as asked:
        for path in [*paths.values()] * 3:
            asked.send(request(path, LONG))
            assert asked.answer()[0] == 200
    wait_until(lambda: edge.status()["fills"] == 0, "fills ended")
    return Net(deployment, origin, router, edge, folder / "model", paths)


@contextmanager
def wire(service: Service, tls: ssl.SSLContext, *, buffer: int = 0) -> Iterator[Wire]:
    """A TLS connection; ``buffer``: bytes that its socket takes in, the system's choice by default."""
    with socket.socket() as plain:
        if buffer:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        plain.settimeout(20)
        plain.connect(("127.0.0.1", service.port))
        with tls.wrap_socket(plain, server_hostname="127.0.0.1") as sock:
            yield Wire(sock)


def body_of(asked: Wire) -> str:
    """The SHA-256 of the next answer's body, which may be large."""
    while b"\r\n\r\n" not in asked.buffer:
        asked.buffer += asked.sock.recv(1 << 16)
    head, _, begun = asked.buffer.partition(b"\r\n\r\n")
    left = int(dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:])[b"Content-Length"]) - len(begun)
    digest = hashlib.sha256(begun)
    while left:
        part = asked.sock.recv(1 << 20)
        assert part, "the connection was closed"
        digest.update(part)
        left -= len(part)
    asked.buffer = b""
    return digest.hexdigest()


def serial(service: Service, tls: ssl.SSLContext) -> object:
    """Which certificate a service shows now."""
    with wire(service, tls) as asked:
        assert isinstance(asked.sock, ssl.SSLSocket)
        return (asked.sock.getpeercert() or {})["serialNumber"]


def ask(service: Service, path: str, tls: ssl.SSLContext, **fields: str) -> tuple[int, str]:
    """Status and, of an error, code of a GET."""
    with closing(HTTPSConnection("127.0.0.1", service.port, timeout=20, context=tls)) as connection:
        connection.request("GET", path, headers=fields)
        answer = connection.getresponse()
        body = answer.read()
        return answer.status, json.loads(body)["code"] if answer.status >= 400 else ""


# The same bytes


def test_every_client_gets_the_same_file(net: Net, need: Callable[[str], str], tmp_path: Path) -> None:
    url = f"{net.router.url}/shards/acme/tiny"
    assert url.startswith("https://")
    ca = str(net.deployment.ca)
    subprocess.run([need("curl"), "-sSfL", "--cacert", ca, "-o", tmp_path / "curl", url], check=True, timeout=60)
    aria = [need("aria2c"), "-q", f"--ca-certificate={ca}", "--header=Accept: */*", "-d", str(tmp_path), "-o", "aria"]
    subprocess.run([*aria, url], check=True, timeout=60)
    metalink = [need("aria2c"), "-q", f"--ca-certificate={ca}", "--follow-metalink=mem", "-d", str(tmp_path / "meta")]
    subprocess.run([*metalink, url], check=True, timeout=60)
    ours = ["get", "acme/tiny", "--router", net.router.url, "-o"]
    command(*ours, str(tmp_path / "ours.safetensors"), "--ca", ca)
    command(*ours, str(tmp_path / "env.safetensors"), NEARSHARD_CA=ca)
    command(*ours, str(tmp_path / "ssl.safetensors"), SSL_CERT_FILE=ca)
    wanted = hashlib.sha256((net.model / "model.safetensors").read_bytes()).hexdigest()
    got = [*(tmp_path / name for name in ("curl", "aria", "ours.safetensors", "env.safetensors", "ssl.safetensors"))]
    got += (tmp_path / "meta").iterdir()
    assert [hashlib.sha256(file.read_bytes()).hexdigest() for file in got] == [wanted] * 6


@pytest.mark.parametrize("name", ["small shard", "large shard", "task", "file", "small file"])
def test_both_paths_of_an_edge_give_the_same_answer(net: Net, name: str) -> None:
    """What the short path may not send (the kernel does not encrypt) comes by the long one, on the same connection."""
    with wire(net.edge, net.tls) as asked:
        answers = []
        for fields in ([], [LONG], [], [LONG]):
            asked.send(request(net.paths[name], *fields))
            answers.append(asked.answer())
        asked.send(request(net.paths[name], "Range: bytes=1-5"))
        part = asked.answer()
    assert len({(status, tuple(settled(fields).items()), body) for status, fields, body in answers}) == 1
    assert answers[0][0] == 200 and part[0] == 206 and part[2] == answers[0][2][1:6]
    assert hashlib.sha256(answers[0][2]).hexdigest() == answers[0][1]["ETag"].strip('"')


def test_both_paths_of_a_router_give_the_same_answer(net: Net) -> None:
    with wire(net.router, net.tls) as asked:
        for path in (net.paths["task"], net.paths["large shard"], "/shards/acme/tiny"):
            answers = []
            for fields in ([], [LONG], []):
                asked.send(request(path, *fields))
                answers.append(asked.answer())
            assert {answer[0] for answer in answers} == {307}
            assert len({answer[1]["Location"] for answer in answers}) == 1
            assert answers[0][1]["Location"].startswith(net.edge.url)


# Readers that are slow, or leave


def test_slow_readers_cost_little_memory_and_get_all(lab: Lab, tmp_path: Path) -> None:
    """64 MiB to each of eight that read nothing for a while."""
    deployment = Deployment.make(tmp_path / "ca")
    lab.tls = deployment.client()
    make_model(tmp_path / "model", width=2300)  # 3 layers of 21 MB
    revision = lab.publish(tmp_path / "model")
    edge = lab.edge(lab.origin(*deployment.words("origin-1")), memory="1MB", words=deployment.words("edge"))
    path = f"/models/acme/tiny/files/{revision}/model.safetensors"
    file = (tmp_path / "model" / "model.safetensors").read_bytes()
    wanted = hashlib.sha256(file).hexdigest()
    assert len(file) > 64 * MIB
    with wire(edge, lab.tls) as first:
        first.send(request(path))
        assert body_of(first) == wanted
    wait_until(lambda: edge.status()["fills"] == 0, "fills ended")
    at_first = invariants.forget_peak(edge)
    readers = [wire(edge, lab.tls, buffer=64 << 10) for _ in range(8)]
    asking = [reader.__enter__() for reader in readers]
    for asked in asking:
        asked.send(request(path))
    wait_until(lambda: edge.status()["in_flight"] == 8, "all are being sent to")
    for asked, reader in zip(asking, readers, strict=True):
        assert body_of(asked) == wanted
        reader.__exit__(None, None, None)
    assert invariants.peak(edge) - at_first < 16 * MIB


def test_clients_that_leave_in_the_middle_leave_nothing_behind(net: Net) -> None:
    for number in range(30):
        with wire(net.edge, net.tls, buffer=16 << 10) as asked:
            asked.send(request(net.paths["file"]))
            asked.sock.recv(1000)
            if number % 3 == 0:
                asked.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # RST
            elif number % 3 == 1:
                asked.sock.shutdown(socket.SHUT_WR)  # half of TCP closed, without a word of TLS
    wait_until(
        lambda: net.edge.status()["memory"]["pinned"] == 0 and net.edge.status()["disk"]["pinned"] == 0,
        "nothing pinned",
    )
    wait_until(lambda: net.edge.status()["in_flight"] == 0, "nothing under way")


def test_who_never_agrees_on_tls_is_cut_off(net: Net) -> None:
    with socket.create_connection(("127.0.0.1", net.edge.port), timeout=15) as sock:
        sock.sendall(b"\x16\x03\x01")
        assert sock.recv(100) == b""


# What does not fit


@pytest.mark.parametrize("trouble", ["wrong CA", "expired", "other name", "plain"])
def test_a_certificate_that_is_not_acceptable_is_said(
    lab: Lab, tmp_path: Path, need: Callable[[str], str], trouble: str
) -> None:
    deployment, other = Deployment.make(tmp_path / "ca"), Deployment.make(tmp_path / "other")
    words, host = deployment.words("edge"), "127.0.0.1"
    if trouble == "expired":
        made = make_certificate(
            load_authority(deployment.folder), "edge", [], [host], datetime.now(UTC) - timedelta(days=91)
        )
        (deployment.folder / "edge.pem").write_bytes(made.certificate)
        (deployment.folder / "edge.key").write_bytes(made.key)
    if trouble == "other name":
        deployment.cert("edge", dns=["models.example.org"], ip=[])
    edge = lab.edge("http://127.0.0.1:9", words=[] if trouble == "plain" else words)
    url = edge.url.replace("http:", "https:")
    ca = other.ca if trouble == "wrong CA" else deployment.ca
    done = command("get", "acme/tiny", "--router", url, "--ca", str(ca), check=False)
    advice = {
        "wrong CA": "name its CA", "expired": "has expired", "other name": "for another address",
        "plain": "does not speak TLS",
    }[trouble]  # fmt: skip
    assert done.returncode == 6 and advice in done.stderr and done.stderr.count("\n") == 1
    curl = subprocess.run([need("curl"), "-sS", "--cacert", str(ca), f"{url}/healthz"], check=False, timeout=20)
    assert curl.returncode == (35 if trouble == "plain" else 60)
    assert not [
        line for line in edge.text().splitlines() if "error" in line and "source=http://127.0.0.1:9" not in line
    ]


def test_a_source_whose_certificate_is_not_acceptable_is_passed_over(lab: Lab, tmp_path: Path) -> None:
    """The next one is asked, as after any failure."""
    deployment, other = Deployment.make(tmp_path / "ca"), Deployment.make(tmp_path / "other")
    make_model(tmp_path / "model")
    lab.publish(tmp_path / "model")
    good, bad = lab.origin(*deployment.words("origin-1")), lab.origin(*other.words("origin-2"))
    lab.tls = deployment.client()
    edge = lab.edge(bad, good, words=deployment.words("edge"))
    command("pull", "acme/tiny", "--router", edge.url, "--ca", str(deployment.ca), "-o", str(tmp_path / "got"))
    assert (tmp_path / "got" / "config.json").read_bytes() == (tmp_path / "model" / "config.json").read_bytes()
    assert "name its CA" in edge.text()


def test_plain_http_to_a_tls_port_is_refused_and_nothing_else_happens(net: Net) -> None:
    for said in (b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n", b"\0" * 100, b"\x16\x03\x01\xff\xff" + b"\0" * 300):
        with socket.create_connection(("127.0.0.1", net.edge.port), timeout=15) as sock:
            sock.sendall(said)
            answer = sock.recv(1000)
            assert b"HTTP" not in answer and len(answer) < 50
    url = net.edge.url.replace("https:", "http:")
    assert command("get", "acme/tiny", "--router", url, check=False).returncode == 6
    assert ask(net.edge, "/healthz", net.tls)[0] == 200


def test_old_tls_is_refused(net: Net) -> None:
    old = net.deployment.client()
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning):
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError), wire(net.edge, old):
        pass
    fine = net.deployment.client()
    fine.maximum_version = ssl.TLSVersion.TLSv1_2
    fine.set_alpn_protocols(["h2", "http/1.1"])
    with wire(net.edge, fine) as asked:
        assert isinstance(asked.sock, ssl.SSLSocket)
        assert (asked.sock.version(), asked.sock.selected_alpn_protocol()) == ("TLSv1.2", "http/1.1")


# New files


def test_new_files_are_taken_and_what_is_under_way_goes_on(lab: Lab, tmp_path: Path) -> None:
    deployment = Deployment.make(tmp_path / "ca")
    lab.tls = tls = deployment.client()
    make_model(tmp_path / "model", width=1024)
    revision = lab.publish(tmp_path / "model")
    origin = lab.origin(*deployment.words("origin-1"))
    edge = lab.edge(origin, words=deployment.words("edge"))
    path = f"/models/acme/tiny/files/{revision}/model.safetensors"
    first = serial(edge, tls)
    with wire(edge, tls, buffer=64 << 10) as asked:
        asked.send(request(path))
        asked.buffer = asked.sock.recv(1000)
        cert, _ = deployment.cert("edge")
        wait_until(lambda: serial(edge, tls) != first, "the new certificate")
        second = serial(edge, tls)

        whole = cert.read_bytes()
        cert.write_bytes(whole[: len(whole) // 2])  # as a copy that broke off
        wait_until(lambda: "cannot be used" in edge.text(), "the broken file was seen")
        assert serial(edge, tls) == second
        cert.write_bytes(whole)
        wait_until(lambda: edge.text().count("certificates read again") == 2, "the whole file was read")
        assert serial(edge, tls) == second

        got = body_of(asked)
    assert got == hashlib.sha256((tmp_path / "model" / "model.safetensors").read_bytes()).hexdigest()


def test_a_ca_that_is_taken_out_is_out(lab: Lab, tmp_path: Path) -> None:
    """Of the clients, and of the sources; both were known before."""
    old, new = Deployment.make(tmp_path / "old"), Deployment.make(tmp_path / "new")
    words = new.words("edge")[:2]
    both = tmp_path / "both.pem"
    both.write_bytes(old.ca.read_bytes() + new.ca.read_bytes())
    old.cert("peer")
    lab.tls = new.client()
    known = new.client()
    known.load_cert_chain(old.folder / "peer.pem", old.folder / "peer.key")
    make_model(tmp_path / "model")
    lab.publish(tmp_path / "model")
    origin = lab.origin(*old.words("origin-1")[:2])
    edge = lab.edge(origin, words=[*words, f"--tls-ca={both}"])
    hop = {"Nearshard-Hop": "peer"}
    assert ask(edge, "/models/acme/tiny", known, **hop)[0] == 200
    both.write_bytes(new.ca.read_bytes())
    wait_until(lambda: "certificates read again" in edge.text(), "the file was read")
    with pytest.raises((ssl.SSLError, OSError)):
        ask(edge, "/models/acme/tiny", known, **hop)


# Nodes


def test_nobody_speaks_for_a_node_without_its_certificate(net: Net) -> None:
    net.deployment.cert("north-1")
    node, path = net.deployment.client("north-1"), net.paths["small file"]
    assert ask(net.edge, path, net.tls)[0] == 200
    assert ask(net.edge, path, net.tls, **{"Nearshard-Hop": "north-1", "X-A": "long"}) == (403, "certificate_needed")
    assert ask(net.edge, path, node, **{"Nearshard-Hop": "north-2", "X-A": "long"}) == (403, "certificate_needed")
    assert ask(net.edge, path, node, **{"Nearshard-Hop": "north-1", "X-A": "long"})[0] == 200


def test_a_session_that_is_resumed_is_nobodys(net: Net) -> None:
    """TLS 1.2 resumes without tickets too; certificates are looked at in whole handshakes only."""
    net.deployment.cert("north-1")
    tls = net.deployment.client("north-1")
    tls.maximum_version = ssl.TLSVersion.TLSv1_2
    session, answers = None, []
    for _ in range(2):
        plain = socket.create_connection(("127.0.0.1", net.edge.port), timeout=20)
        with tls.wrap_socket(plain, server_hostname="127.0.0.1", session=session) as sock:
            Wire(sock).send(request(net.paths["small file"], "Nearshard-Hop: north-1", LONG))
            answers.append((sock.session_reused, Wire(sock).answer()[0]))
            session = sock.session
    assert answers in ([(False, 200), (True, 403)], [(False, 200), (False, 200)])


def test_a_heartbeat_needs_the_nodes_certificate(net: Net) -> None:
    net.deployment.cert("north-1")
    body = json.dumps({"url": "https://127.0.0.1:1", "region": "north"})
    for name, tls, status in (
        ("north-1", net.tls, 403),
        ("north-2", net.deployment.client("north-1"), 403),
        ("north-1", net.deployment.client("north-1"), 200),
    ):
        with closing(HTTPSConnection("127.0.0.1", net.router.port, timeout=20, context=tls)) as connection:
            connection.request("PUT", f"/nodes/{name}", body, {"Content-Type": "application/json"})
            assert connection.getresponse().status == status
            if status == 200:
                connection.close()
                connection.request("DELETE", f"/nodes/{name}")
                assert connection.getresponse().status == 204


def test_a_certificate_of_another_ca_is_no_way_in(net: Net, tmp_path: Path) -> None:
    other = Deployment.make(tmp_path / "other")
    cert, key = other.cert("edge")
    tls = net.deployment.client()
    tls.load_cert_chain(cert, key)
    with pytest.raises(OSError):
        ask(net.origin, "/healthz", tls)


def test_reading_can_be_for_nodes_alone(lab: Lab, tmp_path: Path) -> None:
    deployment = Deployment.make(tmp_path / "ca")
    lab.tls = deployment.client("ops") if deployment.cert("ops") else None
    make_model(tmp_path / "model")
    revision = lab.publish(tmp_path / "model")
    origin = lab.origin(*deployment.words("origin-1"), "--node-certificates=required")
    inner = lab.edge(origin, words=deployment.words("edge"), node_certificates="required")
    path = f"/models/acme/tiny/files/{revision}/config.json"
    for service in (inner, origin):
        assert ask(service, path, deployment.client("ops"))[0] == 200  # through the edge's own certificate
    for service in (inner, origin):  # the short path of the edge knows it by now
        assert ask(service, path, deployment.client()) == (403, "certificate_needed")
        assert ask(service, "/healthz", deployment.client())[0] == 200
    operator = {"Authorization": f"Bearer {lab.token('*/*:admin')}"}  # shows a token, not a certificate
    assert ask(inner, "/admin/pins", deployment.client(), **operator)[0] == 200
    assert ask(inner, "/admin/pins", deployment.client()) == (401, "token_missing")
    assert ask(inner, "/admin/../status", deployment.client(), **operator)[0] in (403, 404)


# Refusing to start


def refused(module: str, *words: str) -> str:
    """What a service says that must not start."""
    words = ("-m", module, "--port", "0", *words)
    env = {**os.environ, "NEARSHARD_ROUTER_TRUST_ROOT": "root.json", "NEARSHARD_EDGE_TRUST_ROOT": "root.json"}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=30, check=False, env=env)
    assert done.returncode == 3 and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize("module", ["origin", "router", "edge_node"])
def test_a_service_that_others_could_reach_needs_tls(module: str) -> None:
    """C2."""
    said = refused(module, "--host", "0.0.0.0")
    assert "tls_cert" in said and "--insecure" in said and "0.0.0.0" in said


def test_a_router_that_others_could_reach_needs_an_enrolment(tmp_path: Path) -> None:
    said = refused("router", "--host", "0.0.0.0", *Deployment.make(tmp_path / "ca").words("router-1"))
    assert "enrolled" in said and "tls_cert" not in said


def test_a_key_that_others_may_use_is_refused(tmp_path: Path) -> None:
    """C2."""
    cert, key = Deployment.make(tmp_path / "ca").cert("edge")
    key.chmod(0o640)
    assert str(key) in refused("edge_node", "--tls-cert", str(cert), "--tls-key", str(key), "--data", str(tmp_path))


def test_the_commands_make_files_that_are_for_their_owner_and_spare_the_ca(tmp_path: Path) -> None:
    ca = str(tmp_path / "ca")
    command("trust", "ca", ca, "--name", "Acme")
    made = command("trust", "cert", "edge", "--dns", "edge.example.org", "--ca", ca, "-o", str(tmp_path / "out"))
    files = [Path(line) for line in made.stdout.splitlines()]
    assert [file.name for file in files] == ["edge.pem", "edge.key"]
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("ca/ca.key", "out/edge.key")] == [0o600, 0o600]
    key = (tmp_path / "ca" / "ca.key").read_bytes()
    assert command("trust", "ca", ca, check=False).returncode == 2
    assert command("trust", "cert", "ca", "--ca", ca, "-o", ca, check=False).returncode == 2
    assert command("trust", "cert", "edge", "--ca", str(tmp_path), check=False).returncode == 3
    assert (tmp_path / "ca" / "ca.key").read_bytes() == key


def test_a_node_whose_certificate_is_not_taken_is_told_why(lab: Lab, tmp_path: Path) -> None:
    """The other side's refusal comes after the handshake, as this side sees it."""
    deployment, other = Deployment.make(tmp_path / "ca"), Deployment.make(tmp_path / "other")
    make_model(tmp_path / "model")
    lab.publish(tmp_path / "model")
    origin = lab.origin(*deployment.words("origin-1"))
    lab.tls = other.client()
    words = other.words("edge")[:2]
    edge = lab.edge(origin, words=[*words, f"--tls-ca={deployment.ca}"])
    assert ask(edge, "/models/acme/tiny", lab.tls) == (502, "upstream_error")
    assert "does it take this side's certificate?" in edge.text()


async def test_a_refusal_that_is_said_is_understood(tmp_path: Path) -> None:
    """As other servers do, before TLS 1.3: by an alert, in the handshake."""
    deployment, other = Deployment.make(tmp_path / "ca"), Deployment.make(tmp_path / "other")
    cert, key = deployment.cert("origin-1")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=deployment.ca)
    context.verify_mode, context.maximum_version = ssl.CERT_REQUIRED, ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(cert, key)

    def refuse(listener: socket.socket) -> None:
        accepted, _ = listener.accept()
        with accepted, suppress(ssl.SSLError):
            context.wrap_socket(accepted, server_side=True)

    tls = client_context(Files(*other.cert("edge"), ca=deployment.ca))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        refusing = asyncio.create_task(asyncio.to_thread(refuse, listener))
        async with make_session(tls=tls) as session:
            with pytest.raises(UpstreamError, match="does not take this side") as raised:
                await fetch(session, f"https://127.0.0.1:{listener.getsockname()[1]}/", limit=1)
            assert raised.value.error_code == "bad_certificate" and raised.value.exit_code == 6
        await refusing
