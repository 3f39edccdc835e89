"""What an operator does to nodes that run: preheat, pin, purge, the link; and who may not."""

from __future__ import annotations

import json
import os
import stat
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.harness import Lab, Service, command, get_json, make_model, wait_nodes, wait_until


@pytest.fixture
def net(lab: Lab) -> tuple[Path, list[Service]]:
    """Two nodes of one region under one data directory, as ``nearshard up`` lays them out."""
    make_model(lab.folder / "model")
    lab.publish(lab.folder / "model", "acme/tiny", "--shard-target", "64KiB", "--shard-limit", "64KiB")
    origin = lab.origin()
    router = lab.router(origin)
    edges = [
        lab.edge(origin, router=router, node=f"n{n}", data=lab.folder / "edges" / f"n{n}", region="default")
        for n in range(2)
    ]
    wait_nodes(router, 2)
    for edge in edges:
        wait_peers(edge, 2)
    return lab.folder, edges


def wait_peers(edge: Service, count: int) -> None:
    """Until a node has the whole ring."""
    wait_until(lambda: edge.status()["peers"] == count, f"{count} peers")


def run(data: Path, *words: str) -> dict[str, Any]:
    """A command on the nodes; its JSON."""
    document: dict[str, Any] = json.loads(command(*words, "--data", str(data), "--json").stdout)
    return document


def read(url: str) -> bytes:
    """A body."""
    with urllib.request.urlopen(url, timeout=20) as answer:
        body: bytes = answer.read()
        return body


def used(edge: Service) -> int:
    """Bytes on disk and in memory."""
    status = edge.status()
    return int(status["disk"]["used"] + status["memory"]["used"])


def test_preheat_brings_a_task_to_the_region_once(net: tuple[Path, list[Service]]) -> None:
    data, edges = net
    jobs = run(data, "preheat", "acme/tiny:half")
    plan = get_json(f"{edges[0].url}/shards/acme/tiny:half", Accept="application/vnd.nearshard.plan+json")
    size = sum(shard["size"] for shard in plan["shards"])
    assert {job["state"] for job in jobs.values()} == {"done"}
    assert sum(job["bytes_done"] for job in jobs.values()) == size
    assert sum(edge.status()["upstream_bytes"] for edge in edges) == size
    read(f"{edges[0].url}/shards/acme/tiny:half")
    assert sum(edge.status()["upstream_bytes"] for edge in edges) == size, "nothing more crossed the link"
    assert json.loads(command("preheat", "acme/tiny:half", "--data", str(data), "--json").stdout)


def test_purge_drops_a_model_and_a_later_request_fetches_it_again(net: tuple[Path, list[Service]]) -> None:
    data, edges = net
    run(data, "preheat", "acme/tiny")
    gone = run(data, "purge", "acme/tiny")
    assert sum(answer["bytes"] for answer in gone.values()) > 0
    assert [used(edge) for edge in edges] == [0, 0]
    assert read(f"{edges[0].url}/shards/acme/tiny")


def test_a_pinned_model_stays_when_room_is_needed(lab: Lab) -> None:
    for name in ("keep", "other"):
        make_model(lab.folder / name, seed=len(name))
        lab.publish(lab.folder / name, f"acme/{name}")
    size = (lab.folder / "keep/model.safetensors").stat().st_size
    origin = lab.origin()
    edge = lab.edge(origin, disk=str(int(size * 1.5)), memory="0")
    run(lab.folder / "edge", "pin", "acme/keep")
    before = edge.status()["upstream_bytes"]
    read(f"{edge.url}/shards/acme/other")
    after = edge.status()["upstream_bytes"]
    assert after > before
    read(f"{edge.url}/shards/acme/keep")
    assert edge.status()["upstream_bytes"] == after
    edge.stop()
    edge.start()
    read(f"{edge.url}/shards/acme/other")
    after = edge.status()["upstream_bytes"]
    read(f"{edge.url}/shards/acme/keep")
    assert edge.status()["upstream_bytes"] == after, "pins survive a restart"
    assert run(lab.folder / "edge", "pin", "acme/keep", "--remove")["edge"] == {"pins": []}


def test_the_links_policy_changes_while_the_node_runs(net: tuple[Path, list[Service]]) -> None:
    data, edges = net
    shown = run(data, "link", "--metered", "--rate", "50MB", "--window", "08:00-18:00=2MB", "--node", "n0")
    assert shown == {
        "n0": {"rate": 50_000_000, "windows": {"08:00-18:00": 2_000_000}, "upstreams": {}, "metered": True}
    }
    assert run(data, "link", "--node", "n1")["n1"]["metered"] is False
    access = json.loads((data / "edges/n0/admin.json").read_text())
    job = ask(access["url"], access["token"], "POST", "/preheat", {"what": "acme/tiny"})
    path = f"/jobs/{job['id']}"
    wait_until(lambda: "metered" in ask(access["url"], access["token"], "GET", path)["state"], "the preheat paused")
    assert edges[0].status()["upstream_bytes"] == 0
    read(f"{edges[0].url}/shards/acme/tiny:embed")  # clients are served
    run(data, "link", "--unmetered", "--node", "n0")
    wait_until(lambda: ask(access["url"], access["token"], "GET", path)["state"] == "done", "the preheat done")


def ask(url: str, token: str, method: str, path: str, body: object = None) -> dict[str, Any]:
    """One admin request."""
    request = urllib.request.Request(
        url + path,
        method=method,
        data=json.dumps(body).encode() if body is not None else None,
        headers={"Authorization": f"Bearer {token}"},
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        document: dict[str, Any] = json.loads(answer.read())
        return document


def test_only_who_may_read_the_nodes_files_may_operate_it(net: tuple[Path, list[Service]]) -> None:
    data, edges = net
    file = data / "edges/n0/admin.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    access = json.loads(file.read_text())
    assert access["url"].startswith("http://127.0.0.1:")
    assert access["token"] not in edges[0].text()
    for token in ("", "wrong", access["token"][:-1]):
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(access["url"], token, "POST", "/purge", {"what": "acme/tiny"})
        refused.value.close()
        assert refused.value.code == 401
    bodies: tuple[object, ...] = ({}, {"what": 5}, [], {"what": "acme/tiny", "x": 1})
    for body in bodies:
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(access["url"], access["token"], "POST", "/preheat", body)
        refused.value.close()
        assert refused.value.code == 400
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(f"{edges[0].url}/purge", method="POST"), timeout=10)
    refused.value.close()
    assert refused.value.code in (404, 405), "not on the port that clients use"


def test_operations_on_what_is_not_there_say_so(net: tuple[Path, list[Service]], tmp_path: Path) -> None:
    data, _ = net
    os.makedirs(tmp_path / "empty", exist_ok=True)
    for words, code in (
        (["preheat", "acme/none", "--data", str(data)], 8),
        (["preheat", "acme/tiny:none", "--data", str(data)], 8),
        (["preheat", "ACME", "--data", str(data)], 2),
        (["purge", "acme/tiny", "--data", str(data), "--node", "n9"], 8),
        (["purge", "acme/tiny", "--data", str(tmp_path / "empty")], 8),
        (["link", "--rate", "fast", "--data", str(data)], 2),
        (["pin", "acme/tiny", "--remove", "--data", str(data)], 8),
    ):
        done = command(*words, check=False)
        assert done.returncode == code, (words, done.stderr)
        assert done.stderr.startswith("error: ")
