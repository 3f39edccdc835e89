"""The WAN of the benchmarks is the one that was asked for, and nothing of it is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from loadtests.services import BenchmarkError
from loadtests.wan import Hub, Link, Unavailable

HERE = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(60)
root = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")

SERVE = """
import socket, sys
listener = socket.create_server((sys.argv[1], 9000))
print("ready", flush=True)
connection, _ = listener.accept()
connection.sendall(bytes(int(sys.argv[2])))
connection.close()
"""
FETCH = """
import json, socket, sys, time
begun = time.monotonic()
connection = socket.create_connection((sys.argv[1], 9000))
connected = time.monotonic() - begun
got = 0
while data := connection.recv(1 << 20):
    got += len(data)
print(json.dumps({"got": got, "connected": connected, "rate": got * 8 / (time.monotonic() - begun)}))
"""
COLLECT = """
import json, socket, sys
SO_RCVBUFFORCE = 33
listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
listener.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)
listener.bind((sys.argv[1], 9000))
print("ready", flush=True)
got = []
while (data := listener.recv(100)) != b"end":
    got.append(int(data))
print(json.dumps(got), flush=True)
"""
SCATTER = """
import socket, sys
sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for word in [*range(int(sys.argv[2])), *["end"] * 20]:
    sender.sendto(str(word).encode(), (sys.argv[1], 9000))
"""
WAIT = """
from loadtests.wan import Link
with Link(rtt_ms=10, mbit=10) as link:
    print(link.site([])[-1], flush=True)
    input()
"""


def python(script: str, *words: object) -> list[str]:
    """A command that runs ``script``."""
    return [sys.executable, "-c", script, *map(str, words)]


def meet(serve: Sequence[str], ask: Sequence[str]) -> tuple[str, str]:
    """What two programs say, the second one started when the first is ready."""
    with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout and server.stdout.readline() == "ready\n"
            asked = subprocess.run(ask, stdout=subprocess.PIPE, text=True, check=True, timeout=8)
            return server.stdout.read(), asked.stdout
        finally:
            server.kill()


def namespaces() -> str:
    """What there is of them."""
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout


@contextmanager
def linked(**terms: Any) -> Iterator[Link]:
    """A link; the test is skipped where this machine cannot have one."""
    with ExitStack() as stack:
        try:
            link = stack.enter_context(Link(**terms))
        except Unavailable as error:
            pytest.skip(str(error))
        yield link


def scattered(seed: int, count: int) -> list[int]:
    """Which of numbered packets arrive at the hub, over a link that loses one in five."""
    with linked(rtt_ms=20, mbit=100, loss=0.2, seed=seed) as link:
        arrived, _ = meet(
            link.hub(python(COLLECT, link.hub_address)), link.site(python(SCATTER, link.hub_address, count))
        )
        assert link.up().packets_sent >= count
    return list(json.loads(arrived))


@root
@pytest.mark.parametrize("congestion", ["bbr", "reno"])
def test_delay_and_rate_are_as_asked(congestion: str) -> None:
    size = 6_000_000
    with linked(rtt_ms=60, mbit=50, congestion=congestion) as link:
        _, said = meet(
            link.hub(python(SERVE, link.hub_address, size)), link.site(python(FETCH, link.hub_address, size))
        )
        measured = json.loads(said)
        assert measured["got"] == size
        assert measured["connected"] > 0.058
        assert measured["rate"] < 50e6  # how near it comes to the link's 50 depends on who else uses the machine
        assert size < link.down().arrived < 1.2 * size
        assert 0 < link.up().arrived < 0.1 * size


@root
def test_loss_is_as_asked_and_comes_from_the_seed() -> None:
    count = 600
    first, again, other = scattered(1, count), scattered(1, count), scattered(2, count)
    assert first == again != other
    assert 0.7 * count < len(first) < 0.9 * count


@root
def test_two_links_do_not_meet_and_nothing_is_left() -> None:
    before = namespaces()
    with pytest.raises(ZeroDivisionError), linked(rtt_ms=10, mbit=10) as one, linked(rtt_ms=10, mbit=10) as two:
        assert one.site([])[-1] != two.site([])[-1]
        left_running = subprocess.Popen(one.hub(["sleep", "60"]))
        raise ZeroDivisionError
    assert left_running.wait(5) == -signal.SIGKILL
    assert namespaces() == before


@root
def test_sites_of_a_hub_reach_each_other_over_both_links_and_one_can_be_cut() -> None:
    with Hub() as hub, linked(rtt_ms=30, mbit=50, hub=hub) as one, linked(rtt_ms=50, mbit=50, hub=hub) as two:
        size = 100_000
        serve = two.site(python(SERVE, two.site_address, size))
        measured = json.loads(meet(serve, one.site(python(FETCH, two.site_address, size)))[1])
        assert measured["got"] == size
        assert measured["connected"] > 0.078
        assert min(one.down().arrived, two.up().arrived) > size
        two.cut()
        asked = python(FETCH, two.hub_address, size)
        with pytest.raises(subprocess.CalledProcessError):
            subprocess.run(two.site(["timeout", "0.3", *asked]), stderr=subprocess.DEVNULL, check=True, timeout=8)
        two.mend()
        _, said = meet(hub.inside(python(SERVE, two.hub_address, size)), two.site(asked))
        assert json.loads(said)["got"] == size


@root
def test_an_interrupted_run_leaves_nothing() -> None:
    with linked(rtt_ms=10, mbit=10):
        pass
    with subprocess.Popen(
        python(WAIT), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=HERE
    ) as run:
        assert run.stdout
        name = run.stdout.readline().strip()
        assert name in namespaces()
        run.send_signal(signal.SIGINT)
        assert run.wait(60) != 0
    assert name not in namespaces()


def test_without_root_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(BenchmarkError, match="root"), Link(rtt_ms=10, mbit=10):
        pass


@root
def test_what_the_kernel_refuses_is_said_and_leaves_nothing() -> None:
    before = namespaces()
    with pytest.raises(Unavailable, match="congestion"), Link(rtt_ms=10, mbit=10, congestion="no-such-thing"):
        pass
    assert namespaces() == before
