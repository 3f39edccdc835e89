"""What checking costs: the real client against a warm edge, by ref (signed metadata) and by revision (none), in turns.

``make bench-trust``. Each round fetches a model of ``--size`` MB both ways, in one order and then in the other, with
the metadata that the client kept from the round before. What the edge was asked for is counted.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from loadtests.readers import get
from loadtests.services import BenchmarkError, publish, service, trust_root, workspace
from nearshard.client import Client

MODEL = "bench/trust"
BOUND = 0.02
"""Of the time of a download, that checking may add."""


@dataclass
class Series:
    """One way to ask."""

    name: str
    task: str
    seconds: list[float] = field(default_factory=list)


async def fetch(url: str, root: Path, series: Series, out: Path) -> str:
    """One download by a client that has nothing of it; the revision."""
    async with Client(url, trust_root=root) as client:
        loop = asyncio.get_running_loop()
        started = loop.time()
        got = await client.get(series.task, out, force=True)
        series.seconds.append(loop.time() - started)
    await asyncio.to_thread(shutil.rmtree, out)
    return got.revision


async def check_alone(url: str, root: Path, rounds: int) -> list[float]:
    """Seconds of nothing but the check, of a client that was here before."""
    seconds = []
    for _ in range(rounds):
        async with Client(url, trust_root=root) as client:
            loop = asyncio.get_running_loop()
            started = loop.time()
            await client.revision(MODEL, "main")
            seconds.append(loop.time() - started)
    return seconds


def metadata_asked(url: str) -> float:
    """How often a service was asked for metadata so far."""
    text = get(url, "/metrics")[2].decode()
    counts = re.findall(r'^nearshard_requests_total\{kind="trust",.*\} (\S+)$', text, re.MULTILINE)
    return sum(map(float, counts))


async def measure(directory: Path, url: str, rounds: int) -> tuple[Series, Series, float]:
    """Both ways, in turns, and how often metadata was asked for."""
    root, out = trust_root(directory), directory / "out"
    by_ref = Series("by ref", MODEL)
    revision = await fetch(url, root, by_ref, out)
    by_revision = Series("by revision", f"{MODEL}@{revision}")
    await fetch(url, root, by_revision, out)
    both = [by_ref, by_revision]
    for series in both:
        series.seconds.clear()  # the edge was cold, and so was the client
    before = metadata_asked(url)
    for number in range(rounds):
        for series in both if number % 2 else reversed(both):
            await fetch(url, root, series, out)
    return by_ref, by_revision, metadata_asked(url) - before


def run(directory: Path, size: int, rounds: int) -> float:
    """What checking takes, as a part of the whole; printed with all else."""
    os.environ["XDG_DATA_HOME"] = str(directory / "data-home")  # what this client believes is the benchmark's
    model = directory / "model"
    model.mkdir()
    rng = np.random.default_rng(1)
    layers = {f"layer.{n}.weight": rng.standard_normal((2048, 1024), dtype=np.float32) for n in range(size // 8)}
    save_file(layers, model / "model.safetensors")
    store = str(directory / "store")
    publish(model, MODEL, store)
    with service("origin", directory, "--store", store) as origin:
        flags = ["--origin", origin.url, "--data", str(directory / "edge"), "--memory", f"{2 * size}MiB"]
        with service("edge_node", directory, *flags) as edge:
            by_ref, by_revision, asked = asyncio.run(measure(directory, edge.url, rounds))
            alone = statistics.median(asyncio.run(check_alone(edge.url, trust_root(directory), rounds)))
    series = (by_ref, by_revision)
    ref, revision = (statistics.median(one.seconds) for one in series)
    for one in series:
        best, most = min(one.seconds), max(one.seconds)
        print(f"{one.name:12} {statistics.median(one.seconds):.3f} s  ({best:.3f} to {most:.3f}, {rounds} rounds)")
    pairs = [one / other for one, other in zip(series[0].seconds, series[1].seconds, strict=True)]
    adds = statistics.median(pairs) - 1
    print(f"checking adds {100 * adds:+.2f} % (median of pairs), {1000 * (ref - revision):+.1f} ms between the medians")
    print(f"the check alone: {1000 * alone:.1f} ms, {100 * alone / revision:.2f} % of a download (view included)")
    print(f"requests for metadata: {asked:g} in {rounds} downloads by ref")
    if asked != rounds:
        raise BenchmarkError("a warm check is one conditional request")
    return alone / revision  # what two downloads differ by has more noise in it than that


def main(argv: Sequence[str] | None = None) -> int:
    """The benchmark; 1 where checking costs more than it may."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=256, help="MB of the model")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args(argv)
    with workspace("bench-trust") as directory:
        return int(run(directory, options.size, options.rounds) > BOUND)


if __name__ == "__main__":
    raise SystemExit(main())
