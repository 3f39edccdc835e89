"""A node that is subscribed to a model: it has what the ref means before anybody asks. Real processes."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

from tests.harness import Lab, Service, make_model, wait_until

MODEL = "acme/tiny"
SHARDS = ("--shard-target", "256KiB", "--shard-limit", "256KiB")


def first(edge: Service) -> Any:
    """How its one subscription is."""
    return edge.status()["subscriptions"][0]


def test_a_subscribed_node_has_each_version_before_it_is_asked(lab: Lab) -> None:
    model = lab.folder / "model"
    make_model(model)
    lab.publish(model, MODEL, *SHARDS)
    origin = lab.origin()
    words = ["--subscriptions", json.dumps([f"{MODEL}@main"]), "--subscription-interval", "3600", "--subscription-pin"]
    edge = lab.edge(origin, words=words)
    wait_until(lambda: first(edge)["state"] == "up to date", "the first version")
    whole = first(edge)["moved"]
    assert whole > (model / "model.safetensors").stat().st_size and first(edge)["saved"] == 0

    (model / "config.json").write_text('{"layers": 5}')
    second = lab.publish(model, MODEL, *SHARDS)
    told = urllib.request.Request(
        f"{edge.url}/announce", json.dumps({"model": MODEL}).encode(), {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(told, timeout=10).close()
    wait_until(lambda: first(edge)["revision"] == second, "the second version, as soon as it was announced")
    assert 0 < first(edge)["moved"] - whole < 1000 and first(edge)["saved"] > 0.9 * whole
    assert first(edge)["next_run_in"] > 3000

    before = edge.status()["upstream_bytes"]
    with urllib.request.urlopen(f"{edge.url}/models/{MODEL}/files/main/config.json", timeout=10) as answer:
        assert json.loads(answer.read()) == {"layers": 5}
    assert edge.status()["upstream_bytes"] == before
    with urllib.request.urlopen(f"{edge.url}/metrics", timeout=10) as answer:
        metrics = answer.read().decode()
    assert 'nearshard_subscribed_bytes_total{how="saved"}' in metrics

    origin.stop()
    edge.stop()
    edge.start()
    wait_until(lambda: first(edge)["state"] == "up to date", "that it knows what it has after a restart")
    assert first(edge)["moved"] == 0 and edge.status()["trust"]["stale"]
