"""Edges and deltas, with real processes: a site pays for what changed, once; where that fails, shards come whole."""

from __future__ import annotations

import re
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from shared import parcel
from shared.digest import Digest, digest_of, hex_of
from shared.parcel import Run
from tests.deltas import FILE, MODEL, Encode, Signed, signed, write_model
from tests.faults import invariants
from tests.harness import Lab, Service, command, wait_nodes, wait_settled, wait_until

SHARDS = ("--deltas", "--shard-target", "64KiB", "--shard-limit", "64KiB")


@pytest.fixture
def versions(lab: Lab) -> tuple[str, Callable[..., Signed]]:
    """Version 1, published; and what publishes version 2 with deltas from it."""
    write_model(lab.folder / "v1", 1)
    old = lab.publish(lab.folder / "v1", MODEL, *SHARDS)

    def update(encode: Encode | None = None) -> Signed:
        write_model(lab.folder / "v2", 2)
        new = lab.publish(lab.folder / "v2", MODEL, *SHARDS)
        return signed(lab.store, lab.folder / "v2", old, new, encode)

    return old, update


def curl(edge: Service, path: str, *words: str) -> bytes:
    """What a client of no kind of ours gets."""
    return subprocess.run(
        ["curl", "-sS", "--fail", "--max-time", "30", *words, edge.url + path], capture_output=True, check=True
    ).stdout


def file_at(edge: Service, revision: str) -> bytes:
    """The model's file at a revision."""
    return curl(edge, f"/models/{MODEL}/files/{revision}/{FILE}")


def moved(edges: Sequence[Service]) -> int:
    """Bytes of shards that came from above, settled."""
    for edge in edges:
        wait_settled(edge)
    return sum(edge.status()["upstream_bytes"] for edge in edges)


def sent(origin: Service) -> int:
    """Bytes of shards that an origin has sent."""
    with urllib.request.urlopen(f"{origin.url}/metrics", timeout=10) as answer:
        found = re.search(r'^nearshard_sent_bytes_total{outcome="origin"} (.*)$', answer.read().decode(), re.MULTILINE)
    return int(float(found[1])) if found else 0


def test_an_edge_pays_for_the_parcels_only_and_its_readers_get_the_new_version(
    lab: Lab, versions: tuple[str, Callable[..., Signed]]
) -> None:
    old, update = versions
    origin = lab.origin()
    edge = lab.edge(origin)
    file_at(edge, old)
    before, done = (moved([edge]), sent(origin)), edge.status()["deltas"]
    new = update()
    assert file_at(edge, new.revision) == new.file
    came = moved([edge]) - before[0]
    assert came == new.bytes == sent(origin) - before[1]
    assert new.saved > new.bytes
    status = edge.status()["deltas"]
    assert {name: status[name] - done[name] for name in done} == {
        "made": len(new.ways), "failed": 0, "saved_bytes": new.saved,
    }  # fmt: skip
    other = next(iter(new.parcels))
    assert digest_of(curl(edge, f"/blobs/{other}")) == other, "others may use it too"
    assert moved([edge]) - before[0] == came
    edge.kill()
    invariants.nothing_wrong_is_kept(lab.folder / "edge")
    edge.start()
    assert file_at(edge, new.revision) == new.file and moved([edge]) == 0, "it is kept like any other"


def test_preheating_a_new_version_moves_its_parcels_and_deltas_can_be_off(
    lab: Lab, versions: tuple[str, Callable[..., Signed]]
) -> None:
    old, update = versions
    origin = lab.origin()
    edges = [lab.edge(origin, node=name, words=[word]) for name, word in (("on", "--deltas"), ("off", "--no-deltas"))]
    for edge in edges:
        file_at(edge, old)
    before = [moved([edge]) for edge in edges]
    new = update()
    for edge in edges:
        command("preheat", f"{MODEL}@{new.revision}", "--data", str(lab.folder / edge.log.stem))
    on, off = (moved([edge]) - then for edge, then in zip(edges, before, strict=True))
    assert on == new.bytes and off == new.bytes + new.saved
    assert all(file_at(edge, new.revision) == new.file for edge in edges)


def of_another(target: bytes, base: bytes) -> bytes:
    """Signed, and makes other bytes."""
    return parcel.encode(memoryview(target[::-1]), memoryview(base), [Run(len(target), based=True)])


@pytest.mark.parametrize("encode", [of_another, None], ids=["wrong", "lost"])
def test_what_a_wrong_or_lost_parcel_is_for_comes_whole(
    lab: Lab, versions: tuple[str, Callable[..., Signed]], encode: Encode | None
) -> None:
    old, update = versions
    origin = lab.origin()
    edge = lab.edge(origin)
    file_at(edge, old)
    done = edge.status()["deltas"]
    new = update(encode)
    if encode is None:
        for lost in new.parcels:
            next(lab.store.glob(f"blobs/*/{hex_of(lost)}")).unlink()
    assert file_at(edge, new.revision) == new.file
    assert edge.status()["deltas"] == {**done, "failed": len(new.ways)}
    edge.kill()
    invariants.nothing_wrong_is_kept(lab.folder / "edge")


def test_an_edge_killed_while_it_makes_shards_has_nothing_wrong_afterwards(
    lab: Lab, versions: tuple[str, Callable[..., Signed]]
) -> None:
    """On a link that is slow enough to be met in the middle."""
    old, update = versions
    origin = lab.origin()
    edge = lab.edge(origin)
    file_at(edge, old)
    new = update()
    wait_settled(edge)
    edge.kill()
    edge.args.append("--link-rate=40")
    edge.start()
    with subprocess.Popen(
        ["curl", "-sS", f"{edge.url}/models/{MODEL}/files/{new.revision}/{FILE}", "-o", "/dev/null"],
        stderr=subprocess.DEVNULL,
    ) as reader:
        wait_until(lambda: edge.status()["deltas"]["made"] > 0 and edge.status()["fills"] > 1, "in the middle")
        edge.kill()
        reader.wait(10)
    invariants.nothing_wrong_is_kept(lab.folder / "edge")
    edge.args.remove("--link-rate=40")
    edge.start()
    assert file_at(edge, new.revision) == new.file


@pytest.mark.parametrize("client", ["curl", "get"])
def test_a_region_pays_for_each_parcel_once_wherever_its_base_is(
    lab: Lab, versions: tuple[str, Callable[..., Signed]], client: str
) -> None:
    """Shard, base and parcel are owned by different nodes; and the one that makes a shard may not have read of it:
    another node, or a client that has nothing yet, names the revision to it."""
    old, update = versions
    origin = lab.origin()
    router = lab.router(origin)
    edges = [lab.edge(origin, router=router, node=f"n{n}", region="default", memory="0") for n in range(3)]
    wait_nodes(router, 3)
    for edge in edges:
        wait_until(lambda edge=edge: edge.status()["peers"] == 3, "the ring is known")  # type: ignore[misc]
    file_at(edges[0], old)
    before, new = moved(edges), update()
    if client == "curl":
        assert file_at(edges[1], new.revision) == new.file
    else:
        command("get", f"{MODEL}@{new.revision}", "--router", router.url, "-o", str(lab.folder / "got"))
        assert (lab.folder / "got" / FILE).read_bytes() == new.file
    assert moved(edges) - before == new.bytes
    assert file_at(edges[2], new.revision) == new.file
    assert moved(edges) - before == new.bytes


def test_a_node_can_be_asked_for_what_it_holds_only(lab: Lab, versions: tuple[str, Callable[..., Signed]]) -> None:
    """RFC 9111 §5.2.1.7."""
    edge = lab.edge(lab.origin())
    held = next(iter(sorted(_blobs(lab.store))))
    asking = urllib.request.Request(f"{edge.url}/blobs/{held}", headers={"Cache-Control": "max-age=0, only-if-cached"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(asking, timeout=10)
    assert caught.value.code == 504 and b"not_cached" in caught.value.read()
    assert edge.status()["upstream_bytes"] == 0
    curl(edge, f"/blobs/{held}")
    wait_settled(edge)
    with urllib.request.urlopen(asking, timeout=10) as answer:
        assert digest_of(answer.read()) == held


def _blobs(store: Path) -> list[Digest]:
    return [Digest(f"sha256:{path.name}") for path in store.glob("blobs/*/*")]
