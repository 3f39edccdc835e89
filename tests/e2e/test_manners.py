"""The manners of ``nearshard get`` with real processes: proxies, caps, what fits, and what it shows on the way."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from nearshard import Client
from nearshard.manners import parse_manners
from tests.between import Between, between
from tests.certificates import Deployment
from tests.clock import HandClock
from tests.harness import Lab, Service, command, make_model, result, wait_until
from tests.proxies import http_proxy, socks5

NOWHERE = "http://edge.invalid:8720"
"""Known to nobody but to proxies that lead there."""
SHOW_CURSOR, HIDE_CURSOR = b"\x1b[?25h", b"\x1b[?25l"


Proxy = Callable[[int], AbstractAsyncContextManager[tuple[str, list[str]]]]


@dataclass
class Net:
    """An origin with a model, and an edge that sends clients to where nobody is."""

    origin: Service
    edge: Service
    body: bytes
    lab: Lab


@pytest.fixture(scope="module")
def net(shared_lab: Lab) -> Net:
    """Also trusted at the address that is nowhere."""
    model = shared_lab.folder / "model"
    make_model(model, width=1024)
    shared_lab.publish(model)
    origin = shared_lab.origin()
    shared_lab.note(NOWHERE)
    edge = shared_lab.edge(origin, advertise=NOWHERE)
    return Net(origin, edge, (model / "model.safetensors").read_bytes(), shared_lab)


@pytest.fixture(autouse=True)
def _no_proxies_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


def get(
    net: Net, target: Path, *words: str, check: bool = True, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Fetch the model to a file, from the origin unless words say otherwise."""
    where = [] if "--router" in words else ["--router", net.origin.url]
    return command("get", "acme/tiny", "-o", str(target), *where, *words, check=check, timeout=60, **(env or {}))


# Proxies


@pytest.mark.parametrize("make", [socks5, http_proxy])
async def test_everything_goes_through_the_proxy_which_resolves_names(net: Net, tmp_path: Path, make: Proxy) -> None:
    target = tmp_path / "body.safetensors"
    async with make(net.edge.port) as (proxy, asked):
        await asyncio.to_thread(get, net, target, "--router", NOWHERE, "--proxy", proxy)
    assert target.read_bytes() == net.body
    assert asked and all("edge.invalid" in host for host in asked)


async def test_tls_goes_through_an_http_proxy_by_connect(net: Net, tmp_path: Path) -> None:
    deployment, target = await asyncio.to_thread(Deployment.make, tmp_path / "ca"), tmp_path / "body.safetensors"
    words = await asyncio.to_thread(deployment.words, "origin-1")
    edge = await asyncio.to_thread(
        net.lab.edge, net.origin, node="tls", words=words, advertise="https://localhost:8710"
    )
    net.lab.note("https://localhost:8710")
    async with http_proxy(edge.port) as (proxy, asked):
        where = ["--router", "https://localhost:8710", "--ca", str(deployment.ca), "--proxy", proxy]
        await asyncio.to_thread(get, net, target, *where)
    assert target.read_bytes() == net.body
    assert set(asked) == {"CONNECT localhost:8710"}


def test_the_environments_proxy_is_used_on_request_only_and_not_for_what_it_excepts(net: Net, tmp_path: Path) -> None:
    dead = {"http_proxy": "http://user:secret@127.0.0.1:9"}
    get(net, tmp_path / "a.bin", env=dead)
    nothing_known = {**dead, "XDG_DATA_HOME": str(tmp_path / "data"), "NEARSHARD_REPOSITORY": str(tmp_path / "none")}
    failed = get(net, tmp_path / "b.bin", "--proxy", "env", check=False, env=nothing_known)
    assert failed.returncode == 6 and "the proxy" in failed.stderr and "secret" not in failed.stderr
    get(net, tmp_path / "b.bin", env={**dead, "NEARSHARD_PROXY": "env", "NO_PROXY": "127.0.0.1"})
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes() == net.body


@pytest.mark.parametrize("scheme", ["http", "socks5", "socks5h"])
def test_a_proxy_that_is_not_there_is_an_error_that_names_it(net: Net, tmp_path: Path, scheme: str) -> None:
    failed = get(net, tmp_path / "x.bin", "--proxy", f"{scheme}://user:secret@127.0.0.1:9", check=False)
    assert (failed.returncode, failed.stderr.count("\n")) == (6, 1), failed.stderr
    assert "the proxy" in failed.stderr and "secret" not in failed.stderr


def test_a_proxy_that_refuses_is_an_error_that_says_so(net: Net, tmp_path: Path) -> None:
    words = ["--router", "https://localhost:8710", "--proxy", net.origin.url]  # which knows no CONNECT
    net.lab.note("https://localhost:8710")
    failed = get(net, tmp_path / "x.bin", *words, check=False)
    assert failed.returncode == 6 and "the proxy refused" in failed.stderr


# IPv6


def test_a_network_on_ipv6(net: Net, tmp_path: Path) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    origin = net.lab.origin("--host", "::1")
    assert origin.url.startswith("http://[::1]:")
    get(net, tmp_path / "x.bin", "--router", origin.url)
    assert (tmp_path / "x.bin").read_bytes() == net.body


# Rates


async def test_all_connections_together_keep_to_the_rate(net: Net, tmp_path: Path) -> None:
    clock = HandClock(time.time())
    async with Client(net.origin.url, manners=parse_manners(limit_rate="1M"), clock=clock) as client:
        got = await client.get("acme/tiny", tmp_path / "x.bin")
    assert (tmp_path / "x.bin").read_bytes() == net.body
    assert got.moved / 1e6 - 1 < clock.slept < got.moved / 1e6 + 1


async def test_a_metered_client_has_one_connection_for_shards(net: Net, tmp_path: Path) -> None:
    with in_front(net) as proxy:
        async with Client(proxy.url, manners=parse_manners(metered=True)) as client:
            await client.get("acme/tiny", tmp_path / "x.bin")
        assert proxy.accepted == 1
    assert (tmp_path / "x.bin").read_bytes() == net.body


@pytest.mark.parametrize(
    ("words", "env", "code"),
    [
        (["--limit-rate", "fast"], {}, 2), ([], {"NEARSHARD_LIMIT_RATE": "1k"}, 2), (["--window", "8-18=1M"], {}, 2),
        ([], {"NEARSHARD_WINDOWS": "08:00-18:00=1M 25:00-26:00=1M"}, 2), (["--proxy", "proxy:3128"], {}, 3),
    ],
)  # fmt: skip
def test_manners_that_cannot_be_kept_are_refused_before_anything_is_asked(
    net: Net, tmp_path: Path, words: list[str], env: dict[str, str], code: int
) -> None:
    done = get(net, tmp_path / "x.bin", *words, check=False, env=env)
    assert (done.returncode, done.stderr.startswith("error: "), done.stderr.count("\n")) == (code, True, 1)
    assert not list(tmp_path.iterdir())


# What is shown


def test_json_is_a_line_for_each_event_and_the_last_is_the_result(net: Net, tmp_path: Path) -> None:
    done = get(net, tmp_path / "x.bin", "--json")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["event"] for event in events][:2] == ["begin", "progress"]
    assert events[0] == {"event": "begin", "what": "acme/tiny"}
    assert events[1]["total"] == events[-1]["moved"] > 0
    assert events[-1] == result(done)
    what = {"model", "revision", "paths", "size", "moved", "saved", "refused", "seconds", "sources", "active"}
    assert events[-1].keys() == {"event", *what}
    assert done.stderr == ""


def test_json_of_what_fails_ends_with_the_error(net: Net, tmp_path: Path) -> None:
    done = command("get", "acme/tiny:none", "-o", str(tmp_path), "--router", net.origin.url, "--json", check=False)
    last = result(done)
    assert (last["event"], last["code"], last["exit_code"]) == ("error", "unknown_task", done.returncode)
    assert done.stderr.startswith("error: ")


def test_a_reader_of_events_that_leaves_ends_no_transfer(net: Net, tmp_path: Path) -> None:
    words = ["get", "acme/tiny", "-o", str(tmp_path / "x.bin"), "--router", net.origin.url, "--json"]
    run = subprocess.Popen([sys.executable, "-m", "nearshard", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert run.stdout and run.stderr
    run.stdout.close()
    said = run.stderr.read()
    run.stderr.close()
    assert (run.wait(60), said) == (0, b"")
    assert (tmp_path / "x.bin").read_bytes() == net.body


def test_quiet_is_silent_and_no_terminal_has_no_bar(net: Net, tmp_path: Path) -> None:
    quiet = get(net, tmp_path / "x.bin", "-q")
    assert (quiet.stdout, quiet.stderr) == ("", "")
    plain = get(net, tmp_path / "y.bin", env={"FORCE_COLOR": "1"})
    assert plain.stderr == "" and str(tmp_path / "y.bin") in plain.stdout


class Terminal:
    """A command with a terminal of its own."""

    def __init__(self, *words: str) -> None:
        self._file, theirs = pty.openpty()
        fcntl.fcntl(self._file, fcntl.F_SETFL, os.O_NONBLOCK)
        env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nearshard", *words],
            stdin=theirs, stdout=theirs, stderr=theirs, env=env, start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        self.said = b""

    def read(self) -> bytes:
        """What it has printed so far."""
        with suppress(OSError):  # nothing now, or nobody there any more
            while select.select([self._file], [], [], 0)[0] and (data := os.read(self._file, 65536)):
                self.said += data
        return self.said

    def close(self) -> None:
        """Stop it."""
        self.process.kill()
        self.process.wait()
        os.close(self._file)


@pytest.fixture
def held(net: Net) -> Iterator[Between]:
    """In front of an edge: holds back after two MiB."""
    with in_front(net) as proxy:
        proxy.behave(hold_after=2 << 20)
        yield proxy


@contextmanager
def in_front(net: Net) -> Iterator[Between]:
    """A proxy that an edge of its own is known by."""
    with between("127.0.0.2") as [proxy]:
        edge = net.lab.edge(net.origin, node=f"behind-{proxy.url.rpartition(':')[2]}", advertise=proxy.url)
        proxy.to = edge.port
        net.lab.note(proxy.url)
        yield proxy
        proxy.behave()  # a node that is told to end waits for answers that are under way
        edge.stop()


def test_a_terminal_has_a_bar_and_is_left_as_it_was(net: Net, held: Between, tmp_path: Path) -> None:
    terminal = Terminal("get", "acme/tiny", "-o", str(tmp_path / "x.bin"), "--router", held.url)
    try:
        assert held.holding.wait(30)
        wait_until(lambda: b"MiB" in terminal.read() and b"/s" in terminal.said, "a bar with a rate")
        held.release.set()
        assert terminal.process.wait(60) == 0
        wait_until(lambda: str(tmp_path / "x.bin").encode() in terminal.read(), "the result")
        assert terminal.said.count(HIDE_CURSOR) == terminal.said.count(SHOW_CURSOR) == 1
    finally:
        terminal.close()
    assert (tmp_path / "x.bin").read_bytes() == net.body


def test_an_interrupt_ends_at_once_and_leaves_terminal_and_disk_right(held: Between, tmp_path: Path) -> None:
    held.behave(hold_after=128 << 10)
    slow = ("--limit-rate", "128K")  # other sources end it no sooner than in half a minute
    terminal = Terminal("get", "acme/tiny", "-o", str(tmp_path / "x.bin"), "--router", held.url, *slow)
    try:
        assert held.holding.wait(30)
        wait_until(lambda: HIDE_CURSOR in terminal.read(), "a bar")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.process.wait(10) == 130
        wait_until(lambda: SHOW_CURSOR in terminal.read(), "the cursor")
        assert terminal.said.rfind(SHOW_CURSOR) > terminal.said.rfind(HIDE_CURSOR)
        assert b"Traceback" not in terminal.said and b"rror" not in terminal.said
    finally:
        terminal.close()
    assert not (tmp_path / "x.bin").exists()
