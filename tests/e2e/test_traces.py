"""One request through all tiers: its id in their logs, its spans at a collector."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.test_region import settle
from tests.e2e.test_routing import ask
from tests.harness import Lab, Service, command, make_model, wait_nodes
from tests.otlp import CLIENT, INTERNAL, SERVER, Collector, Seen, collector

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01"
REQUEST = "a-request-of-a-test"


@pytest.fixture
def collected() -> Iterator[Collector]:
    """A collector."""
    with collector() as made:
        yield made


def publish(lab: Lab, folder: Path) -> str:
    """A model of many shards; its revision."""
    make_model(folder / "model", width=512)
    return lab.publish(folder / "model", "acme/tiny", "--shard-target", "64KiB", "--shard-limit", "64KiB")


def fetch(url: str, **fields: str) -> None:
    """Read a body to its end, by way of redirects."""
    asked = urllib.request.Request(url, headers={name.replace("_", "-"): value for name, value in fields.items()})
    with urllib.request.urlopen(asked, timeout=30) as answer:
        answer.read()


def under(spans: list[Seen], top: str) -> set[str]:
    """Ids of the spans within one, itself included."""
    found = {top}
    while more := {span.id for span in spans if span.parent in found} - found:
        found |= more
    return found


def test_one_trace_goes_through_all_tiers(lab: Lab, collected: Collector, tmp_path: Path) -> None:
    revision = publish(lab, tmp_path)
    otlp = f"--otlp={collected.url}"
    origin = lab.origin(otlp)
    router = lab.router(origin, words=[otlp])
    edges = [lab.edge(origin, router=router, node=f"n{n}", region="default", words=[otlp]) for n in range(2)]
    wait_nodes(router, 2)
    settle(edges)
    fetch(
        f"{router.url}/shards/acme/tiny@{revision}?region=default&other=secret-in-a-query",
        traceparent=PARENT,
        X_Request_Id=REQUEST,
        User_Agent="a test",
        Authorization=f"Bearer {lab.token('*/*:read')}",
        Accept="*/*",
    )
    for service in (*edges, router, origin):
        assert service.stop() == 0

    assert {span.trace for span in collected.spans if span.attributes.get("nearshard.request_id") == REQUEST} == {TRACE}
    spans = [span for span in collected.spans if span.trace == TRACE]
    assert under(spans, SPAN) == {SPAN, *(span.id for span in spans)}, "one tree, that hangs on the caller's span"
    (sent_on,) = [span for span in spans if span.service == "nearshard-router" and span.parent == SPAN]
    assert (sent_on.kind, sent_on.name) == (SERVER, "GET /shards/{path}")
    assert sent_on.attributes["http.response.status_code"] == 307
    assert sent_on.attributes["http.route"] == "/shards/{path}"
    assert sent_on.attributes["user_agent.original"] == "a test"
    by_id = {span.id: span for span in spans}
    (served,) = [span for span in spans if span.service == "nearshard-edge" and span.parent == SPAN]
    assert served.attributes["http.response.status_code"] == 200
    assert served.attributes["http.response.header.cache-status"][0].startswith(f'"{served.instance}"')
    fills = [span for span in spans if span.name == "fill" and span.parent == served.id]
    assert {span.attributes["nearshard.outcome"] for span in fills} == {"fill-peer", "fill-origin"}
    assert all(span.kind == INTERNAL and span.attributes["nearshard.size"] > 0 for span in fills)
    peers = [span for span in spans if span.service == "nearshard-edge" and span.kind == SERVER and span != served]
    assert peers
    for span in peers:
        asking = by_id[span.parent]
        assert asking.kind == CLIENT and asking.instance == served.instance != span.instance
        assert by_id[asking.parent] in fills
    asked = {"GET /blobs/{path}", "GET /shards/{path}"}  # shard by shard, or several that follow each other
    origins = [span for span in spans if span.service == "nearshard-origin" and span.name in asked]
    assert {by_id[by_id[span.parent].parent].name for span in origins} == {"fill"}
    assert {by_id[span.parent].instance for span in origins} == {"n0", "n1"}
    assert not any(span.name.startswith(("GET /status", "PUT /nodes")) for span in collected.spans)
    assert not any(b"secret" in body or b"region=" in body or b"eyJ" in body for body in collected.raw)


def test_who_records_nothing_passes_on_what_came(lab: Lab, collected: Collector, tmp_path: Path) -> None:
    revision = publish(lab, tmp_path)
    origin = lab.origin(f"--otlp={collected.url}")
    edge = lab.edge(origin)
    path = f"/shards/acme/tiny@{revision}"
    fetch(edge.url + path, traceparent=PARENT, tracestate="rojo=00f067aa0ba902b7", X_Request_Id=REQUEST)
    fetch(f"{edge.url}/models/acme/tiny/files/{revision}/config.json", traceparent="00-not-one-01", X_Request_Id="a b")
    assert ask(edge, "GET", "/shards/acme/none", X_Request_Id=REQUEST).headers["X-Request-Id"] == REQUEST
    assert ask(edge, "GET", "/shards/acme/none", X_Request_Id="eyJ.a.b").headers["X-Request-Id"] != "eyJ.a.b"
    assert origin.stop() == edge.stop() == 0
    traced = [span for span in collected.spans if span.trace == TRACE]
    assert traced and {span.parent for span in traced} == {SPAN}
    assert {span.attributes["nearshard.request_id"] for span in traced} == {REQUEST}
    for service in (edge, origin):
        lines = [line for line in service.text().splitlines() if f"request_id={REQUEST}" in line]
        assert lines and any(f"trace_id={TRACE}" in line for line in lines)


def test_an_error_is_in_its_span(lab: Lab, collected: Collector, tmp_path: Path) -> None:
    edge = lab.edge("http://127.0.0.1:9", words=[f"--otlp={collected.url}"])
    assert ask(edge, "GET", "/blobs/sha256:" + "ab" * 32).status == 502
    assert ask(edge, "GET", "/nothing?other=secret").status == 404
    assert edge.stop() == 0
    by_name = {(span.name, span.kind): span for span in collected.spans}
    failed, fill = by_name["GET /blobs/{path}", SERVER], by_name["fill", INTERNAL]
    assert failed.failed and failed.attributes["error.type"] == "upstream_error"
    assert fill.failed and fill.attributes["error.type"] == "upstream_error"
    assert by_name["GET", CLIENT].failed
    absent = by_name["GET", SERVER]
    assert not absent.failed and absent.attributes["nearshard.code"] == "unknown_path"
    assert not any(b"secret" in body for body in collected.raw)


def test_a_command_is_part_of_its_callers_trace(lab: Lab, collected: Collector, tmp_path: Path) -> None:
    publish(lab, tmp_path)
    origin = lab.origin(f"--otlp={collected.url}")
    words = ("get", "acme/tiny", "-o", str(tmp_path / "got"), "--router", origin.url)
    command(*words, TRACEPARENT=PARENT, NEARSHARD_OTLP=collected.url)
    assert origin.stop() == 0
    (whole,) = [span for span in collected.spans if span.name == "nearshard get"]
    assert (whole.trace, whole.parent, whole.failed) == (TRACE, SPAN, False)
    origins = [span for span in collected.spans if span.service == "nearshard-origin" and span.trace == TRACE]
    assert {span.id for span in origins} <= under(collected.spans, whole.id)
    assert any(span.name == "GET /blobs/{path}" for span in origins)
    assert len({span.attributes["nearshard.request_id"] for span in origins}) == 1


def test_a_collector_that_is_away_keeps_nobody_waiting(lab: Lab, tmp_path: Path) -> None:
    revision = publish(lab, tmp_path)
    edge: Service = lab.edge(lab.origin(), words=["--otlp=http://127.0.0.1:9"])
    fetch(f"{edge.url}/shards/acme/tiny@{revision}", traceparent=PARENT)
    assert edge.stop() == 0
