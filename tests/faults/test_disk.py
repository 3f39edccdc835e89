"""Disks that are full, read-only, failing or rotten: the edge serves on, and trusts nothing that it cannot check."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nearshard import Client
from shared.digest import hex_of, parse_digest
from tests.faults import invariants
from tests.faults.client import LONG, blob, start_edge, until
from tests.faults.conftest import Mount
from tests.harness import Lab, Service, get_json, make_model, wait_until
from tests.scripted import Script, source

SIZE = 700_000
REST = 30.0
"""Seconds that a disk which refused is left alone."""
MARGIN = 10.0


def shards(script: Script, count: int, size: int = SIZE) -> list[str]:
    """This many shards of a source."""
    return [str(script.add(random.Random(n).randbytes(size))) for n in range(count)]


@pytest.mark.parametrize(
    ("options", "size"),
    [("size=4m", SIZE), ("size=2500k", SIZE), ("nr_inodes=16", 20_000)],
    ids=["4m", "2.5m", "inodes"],
)
async def test_a_full_disk_costs_no_request(lab: Lab, mount: Mount, options: str, size: int) -> None:
    """F11, F12: the disk fills up in the middle of a shard, or has no inode left: everything is served, none torn."""
    data = lab.folder / "edge"
    mount(data, options)
    async with source(Script()) as script:
        digests = shards(script, 16, size)
        edge = await start_edge(lab, script, memory="4MiB")
        assert (await blob(edge, digests[0])).gave(digests[0])  # of those at once, it may be that none fits
        await invariants.settled(edge)
        before = invariants.usage(edge)
        for _ in range(2):
            answers = await asyncio.gather(*(blob(edge, digest) for digest in digests[:8]))
            answers += [await blob(edge, digest, LONG) for digest in digests[8:]]
            for answer, digest in zip(answers, digests, strict=True):
                assert answer.gave(digest), (answer.status, answer.size)
        assert await invariants.all_hold(edge, data, before) >= 1
        assert "the disk refused a write" in edge.text()


async def test_a_disk_that_becomes_read_only_is_still_served_from(lab: Lab, mount: Mount) -> None:
    """F12: what is held is served, the rest goes through memory; also after a restart on the read-only disk."""
    data = lab.folder / "edge"
    mount(data, "size=16m")
    async with source(Script()) as script:
        digests = shards(script, 8)
        edge = await start_edge(lab, script, memory="2MiB")
        for digest in digests[:4]:
            assert (await blob(edge, digest)).gave(digest)
        await invariants.settled(edge)
        mount(data, "ro")
        before = invariants.usage(edge)
        for digest in digests * 2:
            assert (await blob(edge, digest)).gave(digest)
        assert await invariants.all_hold(edge, data, before) == 4
        edge.kill()
        await asyncio.to_thread(edge.start)
        asked = len(script.gets())
        for digest in digests[:4]:
            assert (await blob(edge, digest)).gave(digest)
        assert len(script.gets()) == asked, "what is on the read-only disk is not fetched"
        await invariants.all_hold(edge, data)
        mount(data, "rw")


@pytest.mark.long
async def test_a_disk_with_room_again_is_used_again(lab: Lab, mount: Mount) -> None:
    """F11, F12: after its rest, a disk that is writable again, with more room, stores again."""
    data = lab.folder / "edge"
    mount(data, "size=2m")
    async with source(Script()) as script:
        digests = shards(script, 30)
        edge = await start_edge(lab, script, memory="1MiB")
        for digest in digests[:6]:
            assert (await blob(edge, digest)).gave(digest)
        held = await invariants.all_hold(edge, data)
        mount(data, "size=64m")
        waiting = iter(digests * 1000)

        def stored() -> bool:
            name = next(waiting)
            subprocess.run(["curl", "-sSf", "-o", "/dev/null", f"{edge.url}/blobs/{name}"], check=True)
            return invariants.nothing_wrong_is_kept(data) > held

        await until(stored, "the disk used again", REST + MARGIN)
        await invariants.all_hold(edge, data)


@contextmanager
def failing(service: Service, strace: str, call: str, folder: Path) -> Iterator[Path]:
    """Each ``call`` of a service fails with EIO. Gives the file where these are noted."""
    notes = folder / f"strace-{call}"
    words = [strace, "-f", "-p", str(service.pid), "-o", str(notes), "-e", f"inject={call}:error=EIO"]
    tracer = subprocess.Popen([*words, "-e", f"trace={call}"], stderr=subprocess.PIPE)
    try:
        threads = Path(f"/proc/{service.pid}/task")

        def traced() -> bool:
            states = [(task / "status").read_text() for task in threads.iterdir()]
            return all(f"TracerPid:\t{tracer.pid}" in state for state in states)

        wait_until(traced, "strace attached")
        yield notes
    finally:
        tracer.terminate()
        tracer.communicate(timeout=20)


def failures(notes: Path) -> int:
    """Calls that were made to fail."""
    return notes.read_text().count("EIO") if notes.exists() else 0


async def test_a_shard_that_could_not_be_made_durable_is_served_and_not_kept(
    lab: Lab, need: Callable[[str], str]
) -> None:
    """F13: fsync fails. The request is served; the shard gets no name, as nobody knows what is on the disk."""
    strace = need("strace")
    async with source(Script()) as script:
        digests = shards(script, 3)
        edge = await start_edge(lab, script)
        assert (await blob(edge, digests[0])).gave(digests[0])
        await invariants.settled(edge)
        with failing(edge, strace, "fsync", lab.folder) as notes:
            assert (await blob(edge, digests[1])).gave(digests[1])
            await invariants.settled(edge)
            assert failures(notes) == 1, "it is not tried again"
            assert invariants.nothing_wrong_is_kept(lab.folder / "edge") == 1
            for digest in digests:
                assert (await blob(edge, digest)).gave(digest)
        for digest in digests:
            await invariants.serves(edge, digest)
        assert await invariants.all_hold(edge, lab.folder / "edge") == 1


@pytest.mark.parametrize(
    ("call", "size", "fields"),
    [("sendfile", SIZE, []), ("sendfile", SIZE, [LONG]), ("pread64", 20_000, [LONG])],
    ids=["short-path", "long-path", "long-path-small"],
)
async def test_a_shard_that_cannot_be_read_is_dropped_and_fetched_again(
    lab: Lab, need: Callable[[str], str], call: str, size: int, fields: list[str]
) -> None:
    """F13: the disk fails to give a shard back: an error or a short body at first, then it is fetched anew."""
    strace = need("strace")
    async with source(Script()) as script:
        digest = shards(script, 1, size)[0]
        edge = await start_edge(lab, script, memory="0")
        assert (await blob(edge, digest)).gave(digest)
        await invariants.settled(edge)
        with failing(edge, strace, call, lab.folder) as notes:
            answer = await blob(edge, digest, *fields)
            assert not answer.gave(digest)
            invariants.nothing_wrong_came(answer, digest)
            assert failures(notes) >= 1
        await invariants.serves(edge, digest)
        assert len(script.gets()) == 2, "a shard that cannot be read is fetched again"
        assert await invariants.all_hold(edge, lab.folder / "edge") == 1


def rot(data: Path, digest: str, position: int) -> None:
    """One bit of a cached shard turns."""
    name = hex_of(parse_digest(digest))
    path = data / "blobs" / name[:2] / name
    with path.open("r+b") as file:
        was = os.pread(file.fileno(), 1, position)
        os.pwrite(file.fileno(), bytes([was[0] ^ 1]), position)


@pytest.mark.parametrize("seed", [1, *(pytest.param(n, marks=pytest.mark.long) for n in range(2, 22))])
async def test_a_rotten_shard_is_found_by_the_scrubber_and_fetched_again(lab: Lab, seed: int) -> None:
    """F14: within a cycle every shard with a turned bit is gone; the others stay; what is served then is right."""
    rng, data = random.Random(seed), lab.folder / "edge"
    async with source(Script()) as script:
        digests = shards(script, 8, 100_000)
        edge = await start_edge(lab, script, memory="0")
        for digest in digests:
            assert (await blob(edge, digest)).gave(digest)
        await invariants.settled(edge)
        await asyncio.to_thread(edge.stop)
        rotten = rng.sample(digests, 3)
        for digest in rotten:
            rot(data, digest, rng.randrange(100_000))
        edge.args.append("--scrub=1")
        await asyncio.to_thread(edge.start)
        await until(lambda: _gone(data, rotten), "rotten shards dropped", 1 + MARGIN)
        asked = len(script.gets())
        for digest in digests:
            await invariants.serves(edge, digest)
        assert len(script.gets()) == asked + len(rotten)
        assert await invariants.all_hold(edge, data) == len(digests)


def _gone(data: Path, digests: list[str]) -> bool:
    return not any(list(data.rglob(hex_of(parse_digest(digest)))) for digest in digests)


async def test_a_client_refuses_a_rotten_shard_and_takes_it_from_elsewhere(lab: Lab, tmp_path: Path) -> None:
    """F14: the node has not noticed yet; the client does, and what it ends with is what was published."""
    await asyncio.to_thread(make_model, tmp_path / "model")
    await asyncio.to_thread(lab.publish, tmp_path / "model")
    origin = await asyncio.to_thread(lab.origin)
    edge = await start_edge(lab, origin.url, memory="0", scrub="0")
    async with Client(edge.url) as client:
        await client.get("acme/tiny", tmp_path / "first")
    await invariants.settled(edge)
    plan = await asyncio.to_thread(
        lambda: get_json(f"{origin.url}/shards/acme/tiny", Accept="application/vnd.nearshard.plan+json")
    )
    worst = max(plan["shards"], key=lambda shard: shard["size"])
    rot(lab.folder / "edge", worst["digest"], worst["size"] // 2)
    async with Client(edge.url) as client:
        got = await client.get("acme/tiny", tmp_path / "second")
    assert origin.url in {url for url, _ in got.sources}
    for name in ("model.safetensors",):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    invariants.nothing_crashed(edge)
