"""``nearshard doctor`` beside a real network, and beside networks that are ill in one way each."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from loadtests.wan import Link, Unavailable
from nearshard.doctor.checks import CHECKS, examine
from nearshard.doctor.facts import Facts, Finding, Network, Outcome, Status
from nearshard.doctor.machine import read_machine
from nearshard.doctor.network import SAMPLE, TOTAL, Asking, look
from shared.clock import SystemClock
from shared.errors import EXIT_BROKEN, EXIT_USAGE
from shared.web.server import free_port
from tests.harness import Lab, Service, command, make_model, wait_nodes
from tests.machines import make_machine, tree
from tests.scripted import Asked, Script, source


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A machine that is not this one."""
    return make_machine(tmp_path / "machine", tmp_path)


@pytest.fixture(scope="module")
def net(shared_lab: Lab) -> tuple[Service, Service, Service]:
    """A router, an edge and an origin, with a model."""
    make_model(shared_lab.folder / "model")
    shared_lab.publish(shared_lab.folder / "model")
    origin = shared_lab.origin()
    router = shared_lab.router(origin)
    edge = shared_lab.edge(origin, router=router, node="near", region="here")
    wait_nodes(router, 1)
    return router, edge, origin


def doctor(machine: Path, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the command, on the machine that is given and directories of its own."""
    places = ["--root", str(machine), "--cache", str(machine.parent), "--repository", str(machine.parent)]
    return command("doctor", *places, *words, check=check)


def document(machine: Path, *words: str) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON."""
    done = doctor(machine, "--json", *words, check=False)
    return done.returncode, json.loads(done.stdout)


def status_of(found: dict[str, Any], check: str, subject: str = "") -> set[str]:
    """Of one check in a JSON document."""
    return {one["status"] for one in found["findings"] if one["check"] == check and subject in one["subject"]}


# A network that is well


def test_beside_a_real_network(net: tuple[Service, Service, Service], machine: Path) -> None:
    router, edge, origin = net
    code, found = document(machine, "--router", router.url)
    assert code == 0, found["findings"]
    for service in net:
        assert status_of(found, "reach", service.url) == {"ok"}
        assert status_of(found, "path-mtu", service.url) == {"ok"}
    assert status_of(found, "clock", router.url) == {"ok"} and status_of(found, "expiry", router.url) == {"ok"}
    path = found["path"]
    assert path["rate"] > 0 and 0 < path["round_trip"] < 1
    assert path["bandwidth_delay_product"] == round(path["rate"] * path["round_trip"])
    assert status_of(found, "tcp-receive-buffer") <= {"ok", "slow"}, "with a product it is judged"
    served = edge.status()
    assert 0 < served["disk"]["used"] + served["memory"]["used"] <= 4 * SAMPLE, "the sample came from the node"
    assert {one["check"] for one in found["findings"]} <= {check.id for check in CHECKS}
    assert origin.url in {one["subject"] for one in found["findings"]}


def test_the_table_says_what_to_do_and_where_that_is_from(net: tuple[Service, Service, Service], machine: Path) -> None:
    out = doctor(machine, "--router", net[0].url, "--rate", "100MB").stdout
    assert "tcp-receive-buffer" in out and "not known" in out
    assert "net.ipv4.tcp_sack = 1" in out and "RFC 2018" in out
    assert "95.4 MiB/s (as given)" in out
    assert "nearshard doctor --apply" in out
    assert not tree(machine).keys() & {"etc/sysctl.d/90-nearshard.conf"}, "nobody asked to change anything"


def test_an_edge_or_an_origin_can_be_asked_in_place_of_a_router(
    net: tuple[Service, Service, Service], machine: Path
) -> None:
    code, found = document(machine, "--router", net[2].url)
    assert code == 0
    assert found["path"]["rate"] > 0


async def test_a_metered_link_carries_small_answers_only(machine: Path) -> None:
    async with source(Script(acts=[small_answers(0.0)])) as script:
        network = await look(Asking([script.url], SystemClock(), metered=True))
    assert network.rate is None
    assert {asked.path.partition("?")[0] for asked in script.asked} == {"/healthz", "/ring", "/trust/timestamp.json"}


@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
def test_a_long_path_is_measured_and_its_settings_judged_by_it(lab: Lab, tmp_path: Path) -> None:
    """Over 20 Mbit/s and 80 ms of the benchmarks' link, in namespaces whose settings are their own."""
    make_model(tmp_path / "model", width=1024)
    lab.publish(tmp_path / "model")
    with ExitStack() as stack:
        try:
            link = stack.enter_context(Link(rtt_ms=80, mbit=20))
        except Unavailable as error:
            pytest.skip(str(error))
        words = ["--store", str(lab.store), "--host", link.hub_address, "--insecure"]
        origin = lab.service("origin", *words, within=link.hub([]))
        places = ["--cache", str(tmp_path), "--repository", str(tmp_path)]
        command = [sys.executable, "-m", "nearshard", "doctor", "--json", "--router", origin.url, *places]
        done = subprocess.run(link.site(command), capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        came = link.down().arrived
        origin.stop()
    found = json.loads(done.stdout)
    assert 0.079 < found["path"]["round_trip"] < 0.2
    assert 0.4 * 2.5e6 < found["path"]["rate"] < 1.05 * 2.5e6
    assert found["path"]["bandwidth_delay_product"] > 0.08 * 1e6
    assert status_of(found, "slow-start-after-idle") == {"slow"}, "nobody is near"
    assert status_of(found, "tcp-receive-buffer") == {"ok"}
    assert came < 1.3 * SAMPLE, "the sample is all that is downloaded"


def test_without_the_network_nobody_is_asked(machine: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        code, found = document(machine, "--no-network", "--router", f"http://127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert code == 0 and status_of(found, "reach") == {"not known"}
    assert status_of(found, "sack") == {"slow"}


# Networks that are ill


def test_no_router_at_all_is_said_clearly(machine: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    done = doctor(machine, "--router", url, check=False)
    assert done.returncode == EXIT_BROKEN
    assert "broken" in done.stdout and f"reach ({url})" in done.stdout
    assert "Connection refused" in done.stdout and "--router names another" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("ahead", "status", "code"), [(timedelta(days=2), "broken", EXIT_BROKEN), (timedelta(seconds=-60), "slow", 0)]
)
async def test_a_wrong_clock(machine: Path, ahead: timedelta, status: str, code: int) -> None:
    async with source(Script(acts=[small_answers(ahead.total_seconds())])) as script:
        ended, found = await asyncio.to_thread(document, machine, "--router", script.url, "--rate", "1MB")
    assert status_of(found, "clock") == {status} and ended == code
    (finding,) = [one for one in found["findings"] if one["check"] == "clock"]
    shift = abs(ahead.total_seconds())
    assert any(f"{shift + off:.0f} s" in finding["value"] for off in (-2, -1, 0, 1, 2)), finding
    assert ("behind" if ahead > timedelta() else "ahead of") in finding["value"]


async def test_metadata_that_has_expired(machine: Path) -> None:
    expires = (datetime.now(UTC) - timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    timestamp = json.dumps({"signed": {"expires": expires}}).encode()
    async with source(Script(acts=[small_answers(0.0, {"/trust/timestamp.json": timestamp})])) as script:
        ended, found = await asyncio.to_thread(document, machine, "--router", script.url, "--rate", "1MB")
    assert (status_of(found, "expiry"), ended) == ({"broken"}, EXIT_BROKEN)


async def test_a_large_answer_that_never_comes() -> None:
    listing = {
        "/models": b'{"models": ["acme/big"]}',
        "/models/acme/big": b'{"ref": "main", "files": {"model.bin": {"size": 9000000}}}',
    }

    async def act(script: Script, asked: Asked, writer: asyncio.StreamWriter) -> None:
        if asked.path == "/models/acme/big/files/main/model.bin":
            await script.release.wait()
        else:
            await small_answers(0.0, listing)(script, asked, writer)

    async with source(Script(acts=[act])) as script:
        network = await look(Asking([script.url], SystemClock()))
    assert network.stalled == script.url and network.rate is None
    assert Status.BROKEN in statuses(network, "path-mtu")


async def test_answers_that_are_nonsense_are_facts_and_no_errors() -> None:
    """Whoever answers at the router's port may be anything."""

    async def act(script: Script, asked: Asked, writer: asyncio.StreamWriter) -> None:
        body = {"/models": b'{"models": [{"a": 1}]}', "/healthz": b"\xff"}.get(asked.path, b"[1, 2")
        writer.write(b"HTTP/1.1 200 OK\r\nDate: yesterday\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

    async with source(Script(acts=[act])) as script:
        network = await look(Asking([script.url], SystemClock()))
    (peer,) = network.peers
    assert peer.asked and peer.skew is None and peer.expires is None and network.rate is None
    assert Status.UNKNOWN in statuses(network, "clock")


async def test_an_ipv6_address_that_hangs(tmp_path: Path) -> None:
    """A name with two addresses, of which one answers nothing: that is told, and the rest goes on by the other."""
    async with source(Script(acts=[small_answers(0.0)])) as script:
        port = int(script.url.rpartition(":")[2])
        with hanging("::1", port):
            names = {"router.test": [(4, "127.0.0.1"), (6, "::1")]}
            asking = Asking(
                [f"http://router.test:{port}"], SystemClock(), resolve=lambda host, _: names[host], rate=1e6
            )
            network = await look(asking)
    assert Status.BROKEN in statuses(network, "ipv6")
    assert {(one.family, one.outcome) for one in network.peers[0].connects} == {
        (4, Outcome.CONNECTED),
        (6, Outcome.HANGS),
    }
    assert statuses(network, "reach") == {Status.OK} and network.peers[0].skew is not None


async def test_a_resolver_that_hangs_holds_nothing_up() -> None:
    """Not even the end of the program: its thread is left behind."""
    done = threading.Event()

    def resolve(host: str, port: int) -> Sequence[tuple[int, str]]:
        done.wait(30)
        return []

    started = time.monotonic()
    network = await look(Asking(["http://router.test:8700"], SystemClock(), resolve=resolve))
    taken = time.monotonic() - started
    done.set()
    assert taken < TOTAL, "the total is a bound, however many things hang"
    assert statuses(network, "dns") == {Status.BROKEN} and statuses(network, "reach") == {Status.BROKEN}


async def test_names_that_nobody_knows_are_broken() -> None:
    def resolve(host: str, port: int) -> Sequence[tuple[int, str]]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    network = await look(Asking(["http://router.test:8700", "http://[::1:8700"], SystemClock(), resolve=resolve))
    assert statuses(network, "dns") == {Status.BROKEN}
    assert network.peers[0].lookup_error == "Name or service not known"


# Changing the machine


def test_apply_and_undo_by_the_command(machine: Path) -> None:
    before = tree(machine)
    refused = doctor(machine, "--no-network", "--apply", check=False)
    assert refused.returncode == EXIT_USAGE and "--yes" in refused.stderr
    assert "net.ipv4.tcp_sack = 1" in refused.stderr, "it shows what it would write"
    assert tree(machine) == before

    applied = doctor(machine, "--no-network", "--apply", "--yes")
    assert "now: net.ipv4.tcp_sack = 1" in applied.stdout and "udevadm control --reload" in applied.stdout
    assert (machine / "etc/sysctl.d/90-nearshard.conf").exists()
    assert (machine / "etc/udev/rules.d/90-nearshard.rules").exists()

    doctor(machine, "--undo")
    assert {path: text for path, text in tree(machine).items() if "scheduler" not in path} == {
        path: text for path, text in before.items() if "scheduler" not in path
    }, "a scheduler is shown in brackets by a kernel only"
    assert "nothing to take back" in doctor(machine, "--undo").stdout


@pytest.mark.parametrize(
    "words",
    [
        ["--apply", "--undo"],
        ["--rate", "fast"],
        ["--rate", "0"],
        ["--rate", "-5MB"],
        ["--router", "router:8700"],
    ],
)
def test_bad_words_are_refused(machine: Path, words: list[str]) -> None:
    done = doctor(machine, "--no-network", *words, check=False)
    assert done.returncode == EXIT_USAGE and done.stderr.startswith("error: ")


# What the tests above are made of


def statuses(network: Network, check: str) -> set[Status]:
    """What a check says of a network."""
    return {one.status for one in findings(network) if one.check == check}


def findings(network: Network) -> list[Finding]:
    """On a machine of which nothing is known."""
    return examine(Facts(read_machine(Path("/nonexistent"), [], SystemClock()), network, time.time()))


class small_answers:
    """A server whose clock is this far ahead, in seconds; it has ``pages``, and is otherwise no network of ours."""

    def __init__(self, ahead: float, pages: dict[str, bytes] | None = None) -> None:
        self._ahead, self._pages = timedelta(seconds=ahead), {"/healthz": b'{"status": "up"}', **(pages or {})}

    async def __call__(self, script: Script, asked: Asked, writer: asyncio.StreamWriter) -> None:
        body = self._pages.get(asked.path)
        date = format_datetime(datetime.now(UTC) + self._ahead, usegmt=True)
        status = "404 Not Found" if body is None else "200 OK"
        writer.write(
            f"HTTP/1.1 {status}\r\nDate: {date}\r\nContent-Length: {len(body or b'')}\r\n\r\n".encode() + (body or b"")
        )


@contextmanager
def hanging(address: str, port: int) -> Iterator[None]:
    """A port that answers no handshake: its backlog is full, so the kernel drops what comes."""
    with ExitStack() as stack:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
        try:
            listener.bind((address, port))
        except OSError as error:
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                pytest.skip(f"this machine has no {address}")
            raise
        listener.listen(0)
        for _ in range(4):
            client = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            client.setblocking(False)
            with suppress(BlockingIOError):
                client.connect((address, port))
        yield
