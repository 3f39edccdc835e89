"""Updates of a large model made one, beside a numpy mean of the same arrays.

Each site's update is a real document of ``--gigabytes`` of float32 values, 10 sites by default. Ours reads the
documents, decodes, clips, aggregates and keeps statistics, in a process of its own; what is measured is its time and
the most memory that it had. numpy's ``mean(axis=0)`` of the same decoded values is timed by itself, with the arrays in
memory already: all of them at once where the machine has the memory, else a part at a time, which takes no less time.
So ours does what numpy does not, reading and decoding, and ``decode`` says how much that is: the time that one thread
takes to read and decode the documents, and to do nothing with them.

The values are normal, with a part that the sites have in common; each document repeats a few segments, which all rules
and codecs take as long for as for others.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from loadtests.report import console, note, processor
from loadtests.services import workspace
from origin.federated.aggregate import Aggregation, Contribution
from origin.federated.rules import parse_rule
from shared.updates.codecs import codec
from shared.updates.document import Update, open_update, write_update
from shared.updates.segments import MAX_ELEMENTS, Segment, segments

NAME, COLUMNS = "layers.weight", 1 << 12
DISTINCT = 4
"""Segments of each document that are not repetitions of others."""
SPARE = 2 << 30
"""Bytes of memory that are left alone."""
GOAL = 1 << 30
"""Bytes resident that ours may have."""


@dataclass(frozen=True)
class Measured:
    """What one way took."""

    way: str
    seconds: float
    peak: int
    """Bytes resident, at most."""


def shape_of(gigabytes: float) -> tuple[int, int]:
    """Of the one tensor, some GB (10^9 bytes) as float32."""
    return max(1, round(gigabytes * 1e9 / 4 / COLUMNS)), COLUMNS


def make(directory: Path, sites: int, shape: tuple[int, int], name: str) -> float:
    """The sites' documents. Returns the bytes that one has, as a share of its values'."""
    import numpy as np

    common = np.random.default_rng(0).standard_normal((DISTINCT, MAX_ELEMENTS), np.float32)
    sizes = 0
    for site in range(sites):
        own = common + np.random.default_rng(site + 1).standard_normal(common.shape, np.float32)

        def read(_: str, segment: Segment, own: Any = own) -> Any:
            return own[segment.first // MAX_ELEMENTS % DISTINCT, : segment.count]

        with (directory / f"{site}.nsu").open("wb") as file:
            sizes += write_update(file, {NAME: shape}, read, codec(name)).size
    return sizes / sites / (shape[0] * shape[1] * 4)


def opened(directory: Path, sites: int) -> list[Update]:
    """The documents, open until the process ends."""
    found = []
    for site in range(sites):
        path = directory / f"{site}.nsu"
        found.append(open_update(path.open("rb"), path.stat().st_size))
    return found


# The ways; each in a process of its own


def ours(updates: Sequence[Update], shape: tuple[int, int], rule: str) -> float:
    """Seconds of all of it. Norms are given, as the origin has them from when an update came in; half are clipped."""
    given = [Contribution(f"{site:04}", 1.0, 1.0 + site, update) for site, update in enumerate(updates)]
    begun = time.perf_counter()
    aggregation = Aggregation(given, {NAME: shape}, parse_rule(rule))
    for _ in aggregation:
        pass
    aggregation.statistics()
    return time.perf_counter() - begun


def decode(updates: Sequence[Update], shape: tuple[int, int]) -> float:
    """Seconds to read and decode all, and nothing else."""
    begun = time.perf_counter()
    for number in range(len(segments(shape))):
        for update in updates:
            update.read(NAME, number)
    return time.perf_counter() - begun


def numpy_mean(updates: Sequence[Update], shape: tuple[int, int]) -> float:
    """Seconds of ``mean`` alone, arrays in memory."""
    import numpy as np

    cuts = segments(shape)
    whole = available() - SPARE > (len(updates) + 1) * shape[0] * shape[1] * 4
    together = len(cuts) if whole else 16
    if not whole:
        note(f"numpy: no memory for all arrays at once, {together} segments at a time")
    seconds = 0.0
    for start in range(0, len(cuts), together):
        part = cuts[start : start + together]
        values = np.empty((len(updates), sum(segment.count for segment in part)), np.float32)
        for place, update in enumerate(updates):
            for number, segment in enumerate(part, start):
                at = segment.first - part[0].first
                values[place, at : at + segment.count] = update.read(NAME, number).reshape(-1)
        begun = time.perf_counter()
        values.mean(axis=0)
        seconds += time.perf_counter() - begun
    return seconds


def available() -> int:
    """Bytes of memory that can be had."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))


def measured(way: str, directory: Path, options: argparse.Namespace) -> Measured:
    """One way, in a process of its own."""
    command = [sys.executable, "-m", "loadtests.bench_aggregate", "--way", way, "--directory", str(directory)]
    command += ["--sites", str(options.sites), "--gigabytes", str(options.gigabytes)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return Measured(**json.loads(done.stdout))


def run(way: str, options: argparse.Namespace) -> Measured:
    """One way, here."""
    updates, shape = opened(options.directory, options.sites), shape_of(options.gigabytes)
    if way == "numpy":
        seconds = numpy_mean(updates, shape)
    elif way == "decode":
        seconds = decode(updates, shape)
    else:
        seconds = ours(updates, shape, way)
    return Measured(way, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)


# The table


def show(name: str, share: float, rows: Sequence[Measured], options: argparse.Namespace) -> None:
    """One codec's."""
    size = f"{options.sites} updates of {options.gigabytes:g} GB as float32"
    table = Table(title=f"{size}, sent as {name} ({share:.1%}). {processor()}")
    for column in ("way", "seconds", "GB/s of values", "most memory"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for row in rows:
        speed = options.sites * options.gigabytes / row.seconds
        over = "" if row.way == "numpy" or row.peak <= GOAL else "  over 1 GiB"
        table.add_row(row.way, f"{row.seconds:.1f}", f"{speed:.2f}", f"{row.peak / 2**20:.0f} MiB{over}")
    console().print(table)


def arguments(args: Sequence[str] | None) -> argparse.Namespace:
    """What is asked for."""
    parser = argparse.ArgumentParser(prog="bench_aggregate", description=__doc__.partition("\n")[0])
    parser.add_argument("--sites", type=int, default=10)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of each update, decoded")
    parser.add_argument("--codecs", nargs="+", default=["sign", "int4"])
    parser.add_argument("--rules", nargs="+", default=["nnm", "trimmed", "mean"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    return parser.parse_args(args)


def main(args: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    options = arguments(args)
    if options.way:
        print(json.dumps(asdict(run(options.way, options))))
        return
    figures = []
    for name in options.codecs:
        with workspace("bench-aggregate") as directory:
            note(f"{name}: writing {options.sites} updates")
            share = make(directory, options.sites, shape_of(options.gigabytes), name)
            rows = [measured(way, directory, options) for way in ("numpy", "decode", *options.rules)]
        show(name, share, rows, options)
        figures.append({"codec": name, "share": share, "rows": [asdict(row) for row in rows]})
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
