"""The load test as it is run: a network of its own, people by locust, a link that fails, and a report that adds up."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from loadtests.delays import DelayProxy
from loadtests.load_report import HERE
from shared.outcome import Outcome
from tests.harness import Lab, make_model

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(120)
def test_a_load_is_run_and_its_report_adds_up(tmp_path: Path) -> None:
    report, samples = tmp_path / "load.html", tmp_path / "load.jsonl"
    words = ["--region", "mobile:20:80", "--scenario", "flap", "--seconds", "6", "--concurrency", "4", "--pause", "0.2"]
    done = subprocess.run(
        [sys.executable, "-m", "loadtests.load", *words, "--report", str(report), "--json", str(samples)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=110,
        env=os.environ | {"HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    asked = [json.loads(line) for line in samples.read_text().splitlines()]
    right = [one for one in asked if not one["error"]]
    assert right
    assert all(one["outcome"] in {outcome.value for outcome in Outcome} for one in right)
    assert any(one["outcome"] in HERE for one in right)
    failed = len(asked) - len(right)
    assert f"{len(asked)} requests, {failed} failed" in done.stdout
    text = report.read_text()
    assert f"<td>{len(asked)}</td><td>{failed}</td>" in text
    served = sum(one["size"] for one in right)
    assert f"{served / 1e6:,.1f} MB were served" in text
    crossed = re.search(r"served, ([\d.,]+) MB crossed the WAN", text)
    assert crossed
    fetched = {one["path"]: one["size"] for one in right}  # each crossed once at most, compressed or not
    assert 0 < float(crossed[1].replace(",", "")) < 1.3 * sum(fetched.values()) / 1e6
    assert text.count("<li>after ") == 4
    assert "the link of mobile is cut" in text


@pytest.mark.timeout(60)
def test_a_network_that_is_there_is_loaded_by_its_url(lab: Lab, tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    lab.publish(tmp_path / "model")
    edge = lab.edge(lab.origin())
    report, samples = tmp_path / "load.html", tmp_path / "load.jsonl"
    run = partial(subprocess.run, capture_output=True, text=True, cwd=ROOT, timeout=50)
    command = [sys.executable, "-m", "loadtests.load", "--seconds", "2", "--concurrency", "2", "--pause", "0.1"]
    done = run([*command, "--url", edge.url, "--region", "far:50:80", "--report", str(report), "--json", str(samples)])
    assert done.returncode == 0, done.stderr
    asked = [json.loads(line) for line in samples.read_text().splitlines()]
    assert asked
    assert not any(one["error"] for one in asked)
    assert min(one["seconds"] for one in asked) > 0.045  # a round trip at least, whatever is held
    assert f"{edge.status()['upstream_bytes'] / 1e6:,.1f} MB crossed the WAN" in report.read_text()
    edge.kill()
    done = run([*command, "--url", edge.url])
    assert done.returncode == 2
    assert "does not answer" in done.stderr


@pytest.mark.timeout(30)
def test_a_proxy_delays_paces_and_cuts() -> None:
    body, listener = bytes(400_000), socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(1)
                connection.sendall(body)

    threading.Thread(target=serve, daemon=True).start()
    with listener, DelayProxy(rtt_ms=100, mbit=8) as proxy:
        port = proxy.forward(*listener.getsockname())
        begun = time.monotonic()
        assert len(fetch(port)) == len(body)
        seconds = time.monotonic() - begun
        assert seconds > 0.4 + 0.2 - 0.02  # what 8 Mbit/s takes; a round trip to connect and one to ask
        assert proxy.carried() == len(body)
        proxy.cut()
        assert fetch(port) == b""
        proxy.mend()
        assert len(fetch(port)) == len(body)
        listener.shutdown(socket.SHUT_RDWR)  # wakes up the thread that accepts


def fetch(port: int) -> bytes:
    """All that comes on one connection; nothing where it is broken."""
    got = b""
    try:
        with socket.create_connection(("127.0.0.1", port), 10) as connection:
            connection.sendall(b"x")
            while data := connection.recv(1 << 20):
                got += data
    except ConnectionError:
        return b""
    return got
