"""What services show of themselves to Prometheus, by its own conventions."""

from __future__ import annotations

import re
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from origin.certificate_commands import cert_command
from tests.certificates import Deployment
from tests.e2e.test_routing import ask
from tests.e2e.test_traces import PARENT, REQUEST
from tests.harness import Lab, Service, make_model, wait_until

DAY = 86400.0


def metrics_of(service: Service) -> str:
    """Its page."""
    return ask(service, "GET", "/metrics").body.decode()


def values(page: str, name: str) -> dict[str, float]:
    """The values of a metric, by what is in its braces."""
    found = re.finditer(rf"^{name}(?:{{(.*)}})? (\S+)$", page, re.MULTILINE)
    return {match[1] or "": float(match[2]) for match in found}


def test_each_tier_keeps_to_the_conventions_and_says_when_its_metadata_expires(
    lab: Lab, tmp_path: Path, need: Callable[[str], str]
) -> None:
    promtool = need("promtool")
    make_model(tmp_path / "model")
    lab.publish(tmp_path / "model")
    origin = lab.origin()
    router = lab.router(origin)
    edge = lab.edge(origin)
    for service in (edge, router):
        ask(service, "GET", "/shards/acme/tiny")
    for service in (origin, router, edge):
        page = metrics_of(service)
        done = subprocess.run(
            [promtool, "check", "metrics"], input=page, capture_output=True, text=True, timeout=30, check=False
        )
        assert (done.returncode, done.stdout + done.stderr) == (0, "")
        expiries = values(page, "nearshard_metadata_expires_timestamp_seconds")
        days = {label[6:-1]: (expires - time.time()) / DAY for label, expires in expiries.items()}
        assert {"root", "timestamp", "snapshot", "targets", "acme~public"} <= days.keys()
        assert 2.9 < days["timestamp"] < 3.1 and 364 < days["root"] < 366
        assert not values(page, "nearshard_certificate_expires_timestamp_seconds")
        assert values(page, "process_open_fds")[""] > 5
        assert values(page, "process_resident_memory_bytes")[""] > 1e7
        assert values(page, "nearshard_tasks")[""] >= 1


def test_the_certificate_that_is_in_use_says_when_it_expires(lab: Lab, tmp_path: Path) -> None:
    made = Deployment.make(tmp_path / "ca")
    lab.tls = made.client()
    origin = lab.origin(*made.words("origin"))

    def expires() -> dict[str, float]:
        with urllib.request.urlopen(f"{origin.url}/metrics", timeout=10, context=lab.tls) as answer:
            return values(answer.read().decode(), "nearshard_certificate_expires_timestamp_seconds")

    before = expires()
    own, ca = before['setting="tls_cert"'], before['setting="tls_ca"']
    assert 89 * DAY < own - time.time() < 91 * DAY and 3640 * DAY < ca - time.time() < 3660 * DAY
    cert_command("origin", made.folder, [], ["127.0.0.1"], days=10, output=made.folder)
    wait_until(lambda: expires()['setting="tls_cert"'] < own - 79 * DAY, "the new one")


def test_fields_of_a_trace_make_no_difference_to_a_short_path(lab: Lab, tmp_path: Path) -> None:
    """Where nothing is recorded, aiohttp sees none of these requests, and counts none; where it is, it sees each."""
    make_model(tmp_path / "model")
    revision = lab.publish(tmp_path / "model")
    origin = lab.origin()
    path = f"/shards/acme/tiny@{revision}"
    fields = {"Accept": "*/*", "X-Request-Id": REQUEST, "traceparent": PARENT}
    for words, seen in ([], 0), (["--otlp=http://127.0.0.1:9"], 5):
        edge = lab.edge(origin, node=f"n{seen}", words=words)
        plain = ask(edge, "GET", path, Accept="*/*").body
        ask(edge, "GET", path, Accept="*/*")
        counter = 'kind="task",status="200"'
        before = values(metrics_of(edge), "nearshard_requests_total")[counter]
        for _ in range(5):
            assert ask(edge, "GET", path, **fields).body == plain
        assert values(metrics_of(edge), "nearshard_requests_total")[counter] - before == seen
