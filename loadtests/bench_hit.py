"""``make bench-hit``: cache hits of one edge process beside one nginx worker, on the same bytes in the same run.

Both cache from the same origin and answer the same paths, on one processor core; wrk asks from another. nginx is
tried with several settings first, and measured with those that were best at each size: the fastest, and where
it is another, the one that takes the least processor time a byte. Rounds then alternate between the servers,
so that what else the machine does hits all of them, and medians are compared.

Nothing is measured before all gave the right bytes, and nothing is printed unless every request was answered and
the origin was not asked again. Everything is on 127.0.0.1, bounded in time, and gone at the end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from rich.table import Table

from loadtests.nginx import nginx
from loadtests.readers import get
from loadtests.report import console, note, processor, runtime, version
from loadtests.services import BenchmarkError, Service, publish, service, workspace
from loadtests.wrk import NOISE, Sample, Wrk
from shared import manifest
from shared.digest import hex_of
from shared.paths import blob_path, file_path, manifest_path

MODEL = "bench/files"
SIZES = {"1 KiB": 1 << 10, "64 KiB": 64 << 10, "1 MiB": 1 << 20, "64 MiB": 64 << 20}
CONNECTIONS, CONNECTIONS_LARGE = 8, 4
SEED = 20
WARM = 4
"""Times that each body is fetched first: a shard is filled, then moves up to memory."""
TRIAL = 1
"""Seconds that nginx is tried with one setting; the least that wrk can do."""
THRIFTY = 1.1
"""How much less processor time a byte makes another setting of nginx worth measuring."""


@dataclass(frozen=True)
class Cell:
    """One row of the result: what is asked for, and what must come."""

    name: str
    path: str
    size: int
    sha256: str
    connections: int
    etag: str = ""
    """Asked for with If-None-Match where set; 304 must come."""

    @property
    def fields(self) -> dict[str, str]:
        """Request header fields."""
        return {"If-None-Match": f'"{self.etag}"'} if self.etag else {}


@dataclass(frozen=True)
class Series:
    """One server's samples of one cell, a round each. ``how``: how it served, or the settings of nginx."""

    server: str
    how: str
    target: Service
    samples: list[Sample]


@dataclass(frozen=True)
class Result:
    """One cell: the edge, then nginx in one or two settings. ``trials`` of nginx: a sample each setting."""

    cell: Cell
    trials: Mapping[str, Sample]
    series: Sequence[Series]

    @property
    def rate(self) -> str:
        """The field to compare: of large bodies, a round sees only few whole ones."""
        return "bytes" if self.cell.size > 8 << 20 else "requests"

    @property
    def quiet(self) -> list[int]:
        """The rounds in which no other program was in the way of any of the servers."""
        rounds = enumerate(zip(*(series.samples for series in self.series), strict=True))
        return [number for number, samples in rounds if all(sample.others <= NOISE for sample in samples)]

    def values(self, series: Series, field: str) -> list[float]:
        """One field of the quiet rounds; of all where none was quiet."""
        return [getattr(series.samples[number], field) for number in self.quiet or range(len(series.samples))]

    def median(self, series: Series, field: str) -> float:
        """Of ``values``."""
        return float(median(self.values(series, field)))


# What is served


def make_model(directory: Path) -> Path:
    """A model directory with files of the exact sizes."""
    directory.mkdir()
    rng = random.Random(SEED)
    for name, size in SIZES.items():
        (directory / file_name(name)).write_bytes(rng.randbytes(size))
    return directory


def file_name(size: str) -> str:
    """``body-1kib.dat`` for ``1 KiB``."""
    return f"body-{size.replace(' ', '').lower()}.dat"


def cells(origin: str) -> list[Cell]:
    """What to ask for: bodies of one shard by the shard's digest, larger ones as a file of the revision."""
    published = manifest.decode(get(origin, manifest_path(MODEL, "main"))[2])
    rows = []
    for name, size in SIZES.items():
        layout = published.file(file_name(name))
        digests = [piece.digest for piece in layout.slices]
        if len(digests) == 1:
            rows.append(Cell(name, blob_path(digests[0]), size, hex_of(digests[0]), CONNECTIONS))
        else:
            path = file_path(MODEL, published.revision, file_name(name))
            rows.append(Cell(f"{name}, {len(digests)} shards", path, size, layout.sha256, CONNECTIONS_LARGE))
    first = rows[0]
    return [*rows, Cell("304", first.path, 0, hashlib.sha256().hexdigest(), CONNECTIONS, etag=first.sha256)]


# Asking


def check(target: Service, cell: Cell) -> str:
    """Fetch a cell until it is warm, and see that it is right. Gives how it was served; raises BenchmarkError."""
    for _ in range(WARM):
        status, fields, body = get(target.url, cell.path, cell.fields)
        if status != (304 if cell.etag else 200) or hashlib.sha256(body).hexdigest() != cell.sha256:
            raise BenchmarkError(f"{target.url}{cell.path} answered {status} with {len(body)} bytes, not {cell.name}")
        time.sleep(0.05)
    served = fields.get("x-cache-status") or fields.get("cache-status", "")
    if "hit" not in served.lower() and not (cell.etag and not served):  # an edge knows a shard's ETag by its name
        raise BenchmarkError(f"{target.url}{cell.path} is no hit: {served}")
    return served.partition("detail=")[2] or served or "by name"


def asked(origin: str) -> float:
    """Requests for bytes that the origin has answered."""
    lines = get(origin, "/metrics")[2].decode().splitlines()
    counted = re.compile(r'nearshard_requests_total\{kind="(?:blob|file)",.*\} (\S+)')
    return sum(float(match[1]) for line in lines if (match := counted.fullmatch(line)))


def load(wrk: Wrk, target: Service, cell: Cell, seconds: int) -> Sample:
    """One sample of one cell."""
    return wrk.load(
        target, cell.path, size=cell.size, fields=cell.fields, connections=cell.connections, seconds=seconds
    )


# The run


def measure(
    directory: Path, cores: tuple[int, int], *, memory: str, seconds: int, rounds: int
) -> tuple[list[Result], dict[str, str]]:
    """The whole benchmark, and where it ran."""
    wrk = Wrk(directory, cores[1])
    store, data = str(directory / "store"), str(directory / "edge")
    publish(make_model(directory / "model"), MODEL, store)
    with (
        service("origin", directory, "--store", store, core=cores[1]) as origin,
        service(
            "edge_node", directory, "--origin", origin.url, "--data", data, "--memory", memory, core=cores[0]
        ) as edge,
        nginx(directory, origin.url, cores[0]) as variants,
    ):
        results = [prepare(wrk, cell, edge, variants) for cell in cells(origin.url)]
        before = asked(origin.url)
        for number in range(rounds):
            note(f"round {number + 1} of {rounds}")
            for result in results:
                for series in result.series:
                    series.samples.append(load(wrk, series.target, result.cell, seconds))
        if asked(origin.url) != before:
            raise BenchmarkError("the origin was asked while hits were measured")
        return results, surroundings(edge, cores)


def prepare(wrk: Wrk, cell: Cell, edge: Service, variants: Mapping[str, Service]) -> Result:
    """Check and warm all servers, and choose the settings of nginx."""
    series = [Series("edge", check(edge, cell), edge, [])]
    for target in variants.values():
        check(target, cell)
    trials = {name: load(wrk, target, cell, TRIAL) for name, target in variants.items()}
    fastest = max(trials, key=lambda name: trials[name].bytes)
    thriftiest = max(trials, key=lambda name: trials[name].bytes_by_cpu)
    chosen = [fastest]
    if trials[thriftiest].bytes_by_cpu > THRIFTY * trials[fastest].bytes_by_cpu:
        chosen.append(thriftiest)
    note(f"{cell.name}: nginx is best with {' and '.join(chosen)}")
    return Result(cell, trials, [*series, *(Series("nginx", name, variants[name], []) for name in chosen)])


def surroundings(edge: Service, cores: tuple[int, int]) -> dict[str, str]:
    """What the numbers depend on."""
    return {
        "processor": f"{processor()}; servers on core {cores[0]}, wrk on core {cores[1]}",
        "kernel": platform.release(),
        "congestion control": Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip(),
        "edge": runtime(edge.pid),
        "nginx": version("nginx"),
        "wrk": version("wrk"),
    }


# The report


def show(results: Iterable[Result], where: Mapping[str, str]) -> None:
    """The table, and what it was measured on."""
    table = Table(title="Cache hits: medians of the rounds (least to most)")
    for column in ("body", "server", "how"):
        table.add_column(column, no_wrap=True)
    for column in ("requests/s", "MB/s", "p50 ms", "p99 ms", "CPU", "MB/CPU s", "edge/nginx", "by CPU", "quiet"):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        edge, *others = result.series
        doubt = "" if result.quiet else "?"
        quiet = f"{len(result.quiet)}/{len(edge.samples)}"
        table.add_row(result.cell.name, *figures(result, edge), "", "", quiet)
        for series in others:
            ratios = [result.median(edge, f) / result.median(series, f) for f in (result.rate, f"{result.rate}_by_cpu")]
            table.add_row("", *figures(result, series), *(f"{ratio:.2f}{doubt}" for ratio in ratios))
        table.add_section()
    out = console()
    out.print(table)
    out.print(
        "MB: 10^6 bytes, heads included. CPU: of the server's core; where it is below 100 %, wrk was at its limit,\n"
        "and 'by CPU' (what the same processor time does) compares the servers. quiet: rounds in which no other\n"
        f"program took more than {NOISE} cores; the rest are left out. ?: none was quiet, so all were taken."
    )
    for name, value in where.items():
        out.print(f"{name}: {value}")


def figures(result: Result, series: Series) -> list[str]:
    """One server's columns."""
    rates = result.values(series, "requests")
    return [
        series.server,
        series.how,
        f"{result.median(series, 'requests'):,.0f} ({min(rates):,.0f}-{max(rates):,.0f})",
        f"{result.median(series, 'bytes') / 1e6:,.1f}",
        f"{result.median(series, 'p50'):.2f}",
        f"{result.median(series, 'p99'):.2f}",
        f"{result.median(series, 'cpu'):.0%}",
        f"{result.median(series, 'bytes_by_cpu') / 1e6:,.0f}",
    ]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.bench_hit", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=int, default=3, choices=range(1, 61), metavar="N", help="of each run of wrk")
    parser.add_argument("--rounds", type=int, default=5, choices=range(1, 101), metavar="N", help="of each server")
    parser.add_argument("--memory", default="512MiB", metavar="SIZE", help="of the edge's cache; 0: all from disk")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write every sample")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark; the exit code says whether its result means something."""
    options = arguments()
    available = sorted(os.sched_getaffinity(0))
    with workspace("bench-hit") as directory:
        results, where = measure(
            directory,
            (available[0], available[-1]),
            memory=options.memory,
            seconds=options.seconds,
            rounds=options.rounds,
        )
    show(results, where)
    if any(2 * len(result.quiet) < options.rounds for result in results):
        note("warning: other programs were in the way most of the time; run it again on a quiet machine")
    if options.json:
        document = {"where": where, "results": [asdict(result) for result in results]}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
