"""The main job over real processes: cold, warm, restart, revalidation, and what must survive."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from nearshard import Client, NearshardError, SyncClient
from shared.errors import EXIT_INTEGRITY, EXIT_NOT_FOUND, EXIT_USAGE
from tests.harness import (
    Lab,
    Service,
    command,
    get_json,
    make_model,
    result,
    valkey,
    wait_nodes,
    wait_settled,
    wait_until,
)
from tests.scripted import Asked, Script, head, serve_whole, source


def cache_status(url: str, *extra: str) -> str:
    """The Cache-Status of a GET with curl."""
    done = subprocess.run(
        ["curl", "-sS", "-L", "-D", "-", "-o", "/dev/null", *extra, url], capture_output=True, text=True, check=True
    )
    return [line.split(": ", 1)[1] for line in done.stdout.splitlines() if line.lower().startswith("cache-status")][-1]


def test_a_task_is_fetched_cold_and_warm_and_equals_what_was_published(
    lab: Lab, redis_url: str, tmp_path: Path
) -> None:
    tensors = make_model(tmp_path / "model")
    lab.publish(tmp_path / "model")
    origin = lab.origin()
    router = lab.router(origin, redis=redis_url, redis_prefix="cold:", default_region="north")
    edges = [lab.edge(origin, router=router, node=f"n{n}", region="north") for n in range(2)]
    wait_nodes(router, 2)

    cold = SyncClient(router.url).get("acme/tiny:half", tmp_path / "cold")
    assert {how for _, how in cold.sources} == {"fill-origin"}
    assert {url for url, _ in cold.sources} <= {edge.url for edge in edges}
    for edge in edges:
        wait_settled(edge)
    warm = SyncClient(router.url).get("acme/tiny:half", tmp_path / "warm")
    assert {how for _, how in warm.sources} <= {"hit-disk", "hit-memory"}
    assert sum(edge.status()["upstream_bytes"] for edge in edges) == cold.moved

    got = load_file(tmp_path / "warm" / "model.safetensors")
    assert got.keys() == {name for name in tensors if not name.startswith("encoder.layer.2")}
    for name, tensor in got.items():
        assert np.array_equal(tensor, tensors[name]), name
    assert (tmp_path / "warm" / "config.json").read_text() == '{"layers": 3}'

    again = SyncClient(router.url).get("acme/tiny:half", tmp_path / "warm")
    assert again.moved == 0, "what is there is not fetched"


def test_pull_gives_the_directory_that_was_published(lab: Lab, tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    lab.publish(tmp_path / "model")
    origin = lab.origin()
    router = lab.router(origin)
    done = command("pull", "acme/tiny@main", "-o", str(tmp_path / "out"), "--router", router.url, "--json")
    assert result(done)["size"] > 0
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


def test_a_restarted_edge_serves_from_its_disk(lab: Lab, tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    lab.publish(tmp_path / "model")
    origin = lab.origin()
    edge = lab.edge(origin)
    url = f"{edge.url}/shards/acme/tiny"
    assert "fill-origin" in cache_status(url)
    wait_settled(edge)
    edge.kill()
    edge.start()
    assert "hit-disk" in cache_status(url)
    assert edge.status()["upstream_bytes"] == 0


def test_a_moved_ref_is_seen_after_its_lifetime_and_stale_while_the_origin_is_away(lab: Lab, tmp_path: Path) -> None:
    make_model(tmp_path / "model", seed=1)
    first = lab.publish(tmp_path / "model")
    origin = lab.origin()
    edge = lab.edge(origin, ref_lifetime="0")

    def revision() -> str:
        return str(get_json(f"{edge.url}/shards/acme/tiny", Accept="application/vnd.nearshard.plan+json")["revision"])

    assert revision() == first
    assert "hit" not in cache_status(f"{edge.url}/shards/acme/tiny")
    make_model(tmp_path / "model", seed=2)
    second = lab.publish(tmp_path / "model")
    assert second != first and revision() == second
    cache_status(f"{edge.url}/shards/acme/tiny")

    origin.kill()
    assert "stale" in cache_status(f"{edge.url}/shards/acme/tiny")
    assert revision() == second
    wait_settled(edge)
    edge.kill()
    edge.start()
    assert "stale" in cache_status(f"{edge.url}/shards/acme/tiny"), "also after a restart"


def test_a_publish_is_seen_at_once_where_the_router_is_told(lab: Lab, tmp_path: Path) -> None:
    make_model(tmp_path / "model", seed=1)
    lab.publish(tmp_path / "model")
    origin = lab.origin()
    router = lab.router(origin, ref_lifetime="3600")
    edge = lab.edge(origin, router=router, region="default", ref_lifetime="3600")
    wait_nodes(router, 1)

    def revision(service: Service) -> str:
        accept = "application/vnd.nearshard.plan+json"
        return str(get_json(f"{service.url}/shards/acme/tiny", Accept=accept)["revision"])

    before = {revision(router), revision(edge)}
    make_model(tmp_path / "model", seed=2)
    after = lab.publish(tmp_path / "model", "acme/tiny", "--router", router.url)
    assert before != {after}
    for service in (router, edge):
        wait_until(functools.partial(_is, after, revision, service), "the new revision", deadline=5)


def _is(expected: str, ask: Callable[[Service], str], service: Service) -> bool:
    return ask(service) == expected


def test_curl_follows_the_router_and_resumes(lab: Lab, tmp_path: Path, need: Callable[[str], str]) -> None:
    need("curl")
    make_model(tmp_path / "model")
    lab.publish(tmp_path / "model")
    origin = lab.origin()
    router = lab.router(origin)
    lab.edge(origin, router=router, region="default")
    wait_nodes(router, 1)
    url, whole, part = f"{router.url}/shards/acme/tiny:half", tmp_path / "whole", tmp_path / "part"
    subprocess.run(["curl", "-sSfL", url, "-o", str(whole)], check=True)
    part.write_bytes(whole.read_bytes()[:1_000_001])
    subprocess.run(["curl", "-sSfL", "-C", "-", url, "-o", str(part)], check=True)
    assert part.read_bytes() == whole.read_bytes()
    assert hashlib.sha256(whole.read_bytes()).hexdigest() == _etag(url)


def _etag(url: str) -> str:
    done = subprocess.run(["curl", "-sSI", url], capture_output=True, text=True, check=True)
    return next(line for line in done.stdout.splitlines() if line.lower().startswith("etag")).split('"')[1]


async def test_two_hundred_clients_of_one_cold_shard_cause_one_upstream_fetch(lab: Lab) -> None:
    script = Script()
    data = os.urandom(3_000_000)
    digest = script.add(data)
    async with source(script):
        edge = await asyncio.to_thread(lab.edge, script.url)

        async def read() -> bytes:
            reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
            writer.write(f"GET /blobs/{digest} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
            answer = await reader.read()
            writer.close()
            return answer.partition(b"\r\n\r\n")[2]

        assert set(await asyncio.gather(*(read() for _ in range(200)))) == {data}
        await asyncio.to_thread(edge.stop)
    assert len(script.gets()) == 1


@pytest.mark.parametrize("killed_after", [0, 1, 3])
async def test_an_edge_killed_while_it_serves_costs_the_client_nothing(
    lab: Lab, tmp_path: Path, killed_after: int
) -> None:
    make_model(tmp_path / "model", width=1024)
    lab.publish(tmp_path / "model", "acme/tiny", "--shard-target", "256KiB", "--shard-limit", "256KiB")
    origin = await asyncio.to_thread(lab.origin)
    router = await asyncio.to_thread(lab.router, origin)
    edges = [await asyncio.to_thread(lab.edge, origin, router=router, node=f"n{n}", region="default") for n in range(2)]
    await asyncio.to_thread(wait_nodes, router, 2)
    size = (tmp_path / "model" / "model.safetensors").stat().st_size

    def progress(done: int, total: int) -> None:
        if done > killed_after * total // 10:
            edges[0].kill()

    async with Client(router.url) as client:
        got = await client.get("acme/tiny", tmp_path / "out", progress=progress)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "model" / "model.safetensors"
    ).read_bytes()
    assert edges[1].url in {url for url, _ in got.sources}
    assert got.size > size


def test_a_wrong_byte_in_the_origins_store_reaches_no_disk_and_no_client(lab: Lab, tmp_path: Path) -> None:
    """F17."""
    make_model(tmp_path / "model")
    lab.publish(tmp_path / "model", "acme/tiny")
    origin = lab.origin()
    edge = lab.edge(origin)
    blob = max((lab.store / "blobs").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 4
    blob.write_bytes(data)

    for path in ("shards/acme/tiny", f"blobs/sha256:{blob.name}"):
        done = subprocess.run(["curl", "-sSf", f"{edge.url}/{path}", "-o", str(tmp_path / "x")], check=False)
        assert done.returncode in (18, 22), "a short body or an error, never a whole"
    wait_until(lambda: edge.status()["fills"] == 0, "fills ended")
    assert not list((lab.folder / "edge").rglob(blob.name))
    for service in (edge, origin):
        out = tmp_path / f"out-{service.module}"
        done_get = command("get", "acme/tiny", "-o", str(out), "--router", service.url, check=False)
        assert done_get.returncode == EXIT_INTEGRITY, done_get.stderr
        assert not list(out.rglob("*safetensors*"))


async def test_a_manifest_that_is_not_its_revision_is_refused(lab: Lab, tmp_path: Path) -> None:
    """A router that lies about a manifest, or answers for another model, gets nothing past the client."""
    make_model(tmp_path / "model")
    lab.publish(tmp_path / "model")
    origin = await asyncio.to_thread(lab.origin)

    async def lie(script: Script, asked: Asked, writer: asyncio.StreamWriter) -> None:
        accept = "*/*" if asked.path.startswith("/trust/") else asked.headers["accept"]
        body = await asyncio.to_thread(_bytes, f"{origin.url}{asked.path}", accept)
        if not body or "/ring" in asked.path:
            await serve_whole(script, asked, writer)
            return
        wrong = body.replace(b"embeddings", b"embedding$") if "/manifests/" in asked.path else body
        head(writer, wrong)
        writer.write(wrong)

    async with source(Script(acts=[lie])) as script, Client(script.url, trust_root=lab.trust_root) as client:
        with pytest.raises(NearshardError) as refused:
            await client.get("acme/tiny", tmp_path / "out")
    assert refused.value.error_code == "integrity_error"


def _bytes(url: str, accept: str = "*/*") -> bytes:
    done = subprocess.run(["curl", "-fsS", "-H", f"Accept: {accept}", url], capture_output=True, check=False)
    return done.stdout


def test_a_dead_node_is_out_of_the_answers_within_eight_seconds(lab: Lab, redis_url: str) -> None:
    """Two routers share Redis: the one that never heard the node forgets it as well."""
    make_model(lab.folder / "model")
    lab.publish(lab.folder / "model")
    origin = lab.origin()
    routers = [lab.router(origin, redis=redis_url, redis_prefix="dead:") for _ in range(2)]
    edges = [lab.edge(origin, router=routers[0], node=f"n{n}", region="default") for n in range(2)]
    for router in routers:
        wait_nodes(router, 2)
    edges[0].kill()
    for router in routers:
        wait_nodes(router, 1, deadline=8)
        document = get_json(f"{router.url}/shards/acme/tiny", Accept="application/vnd.nearshard.plan+json")
        assert not any(url.startswith(edges[0].url) for shard in document["shards"] for url in shard["urls"])
    epochs = [router.status()["epoch"] for router in routers]
    assert min(epochs) > 0


def test_a_node_that_leaves_is_out_at_once(lab: Lab) -> None:
    origin = lab.origin()
    router = lab.router(origin)
    edge = lab.edge(origin, router=router)
    wait_nodes(router, 1)
    edge.stop()
    assert router.status()["nodes"] == []


def test_routing_goes_on_without_redis_and_says_so(lab: Lab) -> None:
    make_model(lab.folder / "model")
    lab.publish(lab.folder / "model")
    with valkey() as url:
        origin = lab.origin()
        router = lab.router(origin, redis=url)
        edge = lab.edge(origin, router=router, region="default")
        wait_nodes(router, 1)
        wait_until(lambda: router.status()["degraded"] == "", "Redis in use")
    wait_until(lambda: router.status()["degraded"], "degraded")
    assert edge.url in cache_location(f"{router.url}/shards/acme/tiny")
    edge.kill()
    wait_nodes(router, 0, deadline=8)
    assert origin.url in cache_location(f"{router.url}/shards/acme/tiny"), "no node: the origin"


def cache_location(url: str) -> str:
    """The Location of a redirect."""
    done = subprocess.run(["curl", "-sSI", url], capture_output=True, text=True, check=True)
    return next(line for line in done.stdout.splitlines() if line.lower().startswith("location"))


def test_an_unknown_task_ends_with_8_and_the_names_that_exist(lab: Lab) -> None:
    make_model(lab.folder / "model")
    lab.publish(lab.folder / "model")
    router = lab.router(lab.origin())
    done = command("get", "acme/tiny:nope", "--router", router.url, check=False)
    assert done.returncode == EXIT_NOT_FOUND
    assert "all, embed, half" in done.stderr
    for words in (["get", "acme/none"], ["get", "acme/tiny@v9"], ["pull", "acme/none"]):
        assert command(*words, "--router", router.url, check=False).returncode == EXIT_NOT_FOUND
    for words in (["get", "ACME/tiny"], ["get", "../x"], ["get"], ["nonsense"]):
        assert command(*words, check=False).returncode == EXIT_USAGE


def test_what_is_there_with_other_bytes_is_not_replaced_unasked(lab: Lab, tmp_path: Path) -> None:
    make_model(lab.folder / "model")
    lab.publish(lab.folder / "model")
    router = lab.router(lab.origin())
    target = tmp_path / "mine.safetensors"
    target.write_text("mine")
    words = ["get", "acme/tiny:embed", "-o", str(target), "--router", router.url]
    assert command(*words, check=False).returncode == EXIT_USAGE
    assert target.read_text() == "mine"
    command(*words, "--force")
    assert load_file(target).keys() == {"embeddings.weight"}
    assert [path.name for path in tmp_path.glob("*.part")] == []


def test_no_router_is_a_network_error(tmp_path: Path) -> None:
    done = command("get", "acme/tiny", "-o", str(tmp_path / "x"), "--router", "http://127.0.0.1:9", check=False)
    assert done.returncode == 6
    assert done.stderr.startswith("error: ")


class TestUp:
    """``nearshard up``."""

    def start(self, folder: Path) -> tuple[subprocess.Popen[bytes], dict[str, object]]:
        """A network; its process and ready file."""
        ready = folder / "ready.json"
        words = ["up", "--port", "0", "--data", str(folder / "net"), "--ready-file", str(ready), "--edges", "3"]
        with (folder / "up.log").open("wb") as log:
            up = subprocess.Popen([sys.executable, "-m", "nearshard", *words], stderr=log)
        wait_until(lambda: ready.exists() or up.poll() is not None, "the network ready")
        assert up.poll() is None, (folder / "up.log").read_text()
        return up, json.loads(ready.read_text())

    def children(self, up: subprocess.Popen[bytes]) -> list[int]:
        """Process ids of what it started."""
        return [int(pid) for pid in Path(f"/proc/{up.pid}/task/{up.pid}/children").read_text().split()]

    def gone(self, pids: list[int]) -> bool:
        """Whether none of these runs."""
        return not any(_runs(pid) for pid in pids)

    def test_everything_is_gone_after_ctrl_c_also_when_one_was_killed(self, tmp_path: Path) -> None:
        up, ready = self.start(tmp_path)
        edges = ready["edges"]
        assert isinstance(edges, list) and [edge["region"] for edge in edges] == ["north", "south", "north"]
        assert get_json(f"{ready['router']}/status")["membership"] == "enrolled", "the everyday demo is the signed path"
        pids = self.children(up)
        assert len(pids) == 6
        os.kill(edges[0]["pid"], signal.SIGKILL)
        wait_until(lambda: self.gone([edges[0]["pid"]]), "the killed one gone")
        up.send_signal(signal.SIGINT)
        assert up.wait(20) == 0
        assert self.gone(pids)
        assert "Traceback" not in (tmp_path / "up.log").read_text()

    def test_everything_is_gone_when_it_is_killed_itself(self, tmp_path: Path) -> None:
        up, _ = self.start(tmp_path)
        pids = self.children(up)
        up.kill()
        up.wait()
        wait_until(lambda: self.gone(pids), "its children gone")

    def test_a_taken_port_is_said_and_nothing_is_left(self, lab: Lab, tmp_path: Path) -> None:
        origin = lab.origin()
        done = command("up", "--port", str(origin.port - 10), "--data", str(tmp_path / "n"), check=False)
        assert done.returncode != 0
        assert "cannot listen" in done.stderr


def _runs(pid: int) -> bool:
    """Whether a process is there and not just waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
