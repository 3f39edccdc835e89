"""What a busy edge costs in memory: what its cache may hold, and little beside it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from tests.faults import invariants
from tests.faults.client import LONG, blob, start_edge
from tests.harness import Lab
from tests.scripted import Script, source

MIB = 1 << 20
SHARDS, SIZE = 32, 4 * MIB
BUDGET = 32 * MIB
"""Of the cache in memory; a quarter of what is read, in shards that are just small enough for it."""
BESIDE = 20 * MIB
"""Bytes beside the cache in memory: buffers of connections, and what the allocator keeps."""
READS = 3


async def test_a_busy_cache_costs_little_beside_its_budget(lab: Lab, measured: Callable[[str], None]) -> None:
    """All shards at once, cold; then again and again, so that they take turns in memory."""
    async with source(Script()) as script:
        data = await asyncio.to_thread(random.Random(31).randbytes, SHARDS * SIZE)
        digests = [script.add(data[n * SIZE : (n + 1) * SIZE]) for n in range(SHARDS)]
        edge = await start_edge(lab, script, memory=str(BUDGET))
        at_first = invariants.forget_peak(edge)

        async def read_all() -> int:
            answers = await asyncio.gather(*(blob(edge, digest, LONG, deadline=60, keep=False) for digest in digests))
            assert all(answer.gave(digest) for answer, digest in zip(answers, digests, strict=True))
            await invariants.settled(edge)
            return invariants.peak(edge) - at_first

        cold = await read_all()
        for _ in range(READS):
            warm = await read_all()
        measured(f"+{cold // MIB} MiB cold, +{warm // MIB} MiB from disk and a cache of {BUDGET // MIB} MiB")
        assert cold <= BESIDE and warm <= BUDGET + BESIDE
        await invariants.all_hold(edge, lab.folder / "edge")
