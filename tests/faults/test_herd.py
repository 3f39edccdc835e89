"""Many clients of one cold shard, and the one among them that goes first and leaves."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest

from tests import scripted
from tests.faults import acts, invariants
from tests.faults.client import DEADLINE, LONG, blob, connection, request, start_edge
from tests.harness import Lab
from tests.scripted import Script, source

HERD_MEMORY = 64 << 20


@pytest.mark.parametrize("memory", ["0", "512MiB"], ids=["disk", "default"])
@pytest.mark.parametrize(
    ("clients", "size"),
    [pytest.param(60, 8 << 20, id="quick"), pytest.param(500, 32 << 20, id="500", marks=pytest.mark.long)],
)
async def test_a_herd_of_clients_of_a_cold_shard_causes_one_fetch(
    lab: Lab, clients: int, size: int, memory: str, measured: Callable[[str], None]
) -> None:
    """F21: one upstream fetch, right bytes for everybody, and memory that does not grow with the herd."""
    async with source(Script()) as script:
        small = script.add(b"small")
        digest = script.add(await asyncio.to_thread(random.Random(21).randbytes, size))
        edge = await start_edge(lab, script, memory=memory)
        assert (await blob(edge, small)).gave(small)
        before, at_first = invariants.usage(edge), invariants.forget_peak(edge)
        answers = await asyncio.gather(
            *(blob(edge, digest, *([LONG] if n % 2 else []), deadline=100, keep=False) for n in range(clients))
        )
        assert all(answer.gave(digest) for answer in answers)
        assert len(script.gets()) == 2, "one for the small shard, one for the herd"
        await invariants.settled(edge)
        kept = edge.status()["memory"]["used"]
        grown = invariants.peak(edge) - at_first - kept
        measured(f"+{grown >> 20} MB for {clients} clients of {size >> 20} MiB, beside {kept >> 20} MB of cache")
        assert grown <= HERD_MEMORY
        if memory == "0":
            await invariants.all_hold(edge, lab.folder / "edge", before)
        assert await invariants.all_hold(edge, lab.folder / "edge") == 2


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(2, 42))])
async def test_followers_finish_when_the_first_client_leaves(lab: Lab, seed: int) -> None:
    """F22: whoever caused the fetch leaves, politely or not, at any byte; the others get everything from that fetch."""
    rng = random.Random(seed)
    size = 2_000_000
    held = rng.randrange(1, size)
    script = Script(acts=[scripted.held_after(held)])
    digest = script.add(rng.randbytes(size))
    async with source(script):
        edge = await start_edge(lab, script)
        async with connection(edge.port) as (reader, writer):
            writer.write(request(f"/blobs/{digest}"))
            async with asyncio.timeout(DEADLINE):
                await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(rng.randrange(min(held, 200_000)))
            followers = [asyncio.create_task(blob(edge, digest)) for _ in range(5)]
            if rng.random() < 0.5:
                writer.transport.abort()
        followers += [asyncio.create_task(blob(edge, digest, LONG)) for _ in range(5)]
        script.release.set()
        for answer in await asyncio.gather(*followers):
            assert answer.gave(digest)
        assert len(script.gets()) == 1
        assert await invariants.all_hold(edge, lab.folder / "edge") == 1


async def test_a_fetch_that_nobody_waits_for_any_more_ends_and_is_kept(lab: Lab) -> None:
    """F22: all clients leave; the shard is kept for the next one, and no client is still counted."""
    script = Script(acts=[scripted.held_after(300_000)])
    digest = script.add(random.Random(22).randbytes(2_000_000))
    async with source(script):
        edge = await start_edge(lab, script)
        for _ in range(10):
            async with connection(edge.port) as (reader, writer):
                writer.write(request(f"/blobs/{digest}"))
                await reader.readuntil(b"\r\n\r\n")
        script.release.set()
        assert await invariants.all_hold(edge, lab.folder / "edge") == 1
        assert (await blob(edge, digest)).gave(digest)
        assert len(script.gets()) == 1


async def test_followers_of_a_fetch_that_dies_get_an_error_and_the_next_is_served(lab: Lab) -> None:
    """F22: the source dies under a crowd; everybody is told, nobody gets wrong or half bytes as whole."""
    size = 1_000_000
    script = Script(acts=[scripted.broken_off(400_000), scripted.unavailable, acts.partial_unasked])
    digest = script.add(random.Random(23).randbytes(size))
    async with source(script):
        edge = await start_edge(lab, script)
        answers = await asyncio.gather(*(blob(edge, digest) for _ in range(40)))
        for answer in answers:
            assert not answer.gave(digest)
            invariants.nothing_wrong_came(answer, digest)
        script.acts[:] = [scripted.serve_whole]
        await invariants.serves(edge, digest)
        assert await invariants.all_hold(edge, lab.folder / "edge") == 1
