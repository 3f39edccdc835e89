"""``make bench-router``: redirects of one router process beside one nginx worker, with few nodes and with many.

A router for each number of nodes, and nginx with a server block for each, which answers 307 by a hash of the path
(``split_clients``) over the same nodes. They take turns on one core; wrk asks from another, for shards and tasks in
turn, in the regions of the nodes in turn. The nodes are made up: the benchmark sends their heartbeats, before each
round, and measures what they cost. Medians of the rounds are compared.

nginx sends a Location and a page of 160 bytes; a router also says what will come (ETag, digests) and where else to go
(three Links), counts what it sent where, and passes over who has more than its share. Nothing is measured before both
were seen to send every path to a node. Everything is on 127.0.0.1, bounded in time, and gone at the end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from http.client import HTTPConnection
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit
from urllib.request import urlopen

from rich.table import Table

from loadtests.nginx import redirecting
from loadtests.report import console, note, processor, runtime, version
from loadtests.services import POLL, READY, BenchmarkError, Service, cpu_seconds, publish, service, workspace
from loadtests.wrk import NOISE, Sample, Wrk

MODEL = "bench/tasks"
TASKS = 20
COUNTS = (3, 100, 1000)
REGION = 100
"""Nodes of a region, at most."""
PATHS = 480
CONNECTIONS = 16
LEAST = 100
"""Heartbeats from which on their cost can be told: processor time is counted in hundredths of a second."""
HEARTBEAT = 2.0
"""Seconds between two heartbeats of a real node."""


@dataclass(frozen=True)
class Node:
    """A made-up node."""

    id: str
    url: str
    region: str


@dataclass(frozen=True)
class Series:
    """One server's samples with one number of nodes, a round each."""

    server: str
    nodes: list[Node]
    target: Service
    samples: list[Sample]
    heartbeats: list[float]
    """Seconds of processor time that one took, a round each; none of nginx."""

    def median(self, field: str) -> float:
        """Of the rounds in which no other program was in the way; of all where none was quiet."""
        quiet = [sample for sample in self.samples if sample.others <= NOISE]
        return float(median(getattr(sample, field) for sample in quiet or self.samples))


# What is asked for


def make_model(directory: Path) -> Path:
    """A model directory with a tensor for each task."""
    directory.mkdir()
    header = {f"t{n}": {"dtype": "U8", "shape": [8], "data_offsets": [8 * n, 8 * n + 8]} for n in range(TASKS)}
    text = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8 * TASKS))
    (directory / "nearshard.toml").write_text(
        "".join(f'[tasks.task-{n}]\ntensors = ["t{n}"]\n' for n in range(TASKS)), encoding="utf-8"
    )
    return directory


def members(count: int) -> list[Node]:
    """So many nodes, in as few regions as hold them."""
    return [Node(f"node-{n}", f"http://127.0.0.1:{20_000 + n}", f"region-{n // REGION}") for n in range(count)]


def paths(nodes: Sequence[Node]) -> list[str]:
    """Three of four are shards, one is a task."""
    regions = sorted({node.region for node in nodes})
    what = [
        f"/shards/{MODEL}:task-{n // 4 % TASKS}"
        if n % 4 == 3
        else f"/blobs/sha256:{hashlib.sha256(b'%d' % n).hexdigest()}"
        for n in range(PATHS)
    ]
    return [f"{path}?region={regions[n % len(regions)]}" for n, path in enumerate(what)]


def check(series: Series) -> None:
    """Ask for every path, and see that a node is named. Raises BenchmarkError."""
    known = {node.url for node in series.nodes}
    connection = HTTPConnection(urlsplit(series.target.url).netloc, timeout=30)
    named = set()
    try:
        for path in paths(series.nodes):
            connection.request("GET", path)
            answer = connection.getresponse()
            answer.read()
            location = urlsplit(answer.getheader("Location", ""))
            node = f"{location.scheme}://{location.netloc}"
            if answer.status != 307 or node not in known or not location.path.startswith(path.partition("?")[0]):
                raise BenchmarkError(f"{series.server} answered {answer.status} to {path}: {location.geturl()}")
            named.add(node)
    finally:
        connection.close()
    if len(named) < min(len(known), PATHS) / 4:
        raise BenchmarkError(f"{series.server} sent all to {len(named)} of {len(known)} nodes")


def beat(series: Series) -> None:
    """A heartbeat of each node; what one cost is noted. Raises BenchmarkError."""
    connection = HTTPConnection(urlsplit(series.target.url).netloc, timeout=30)
    before = cpu_seconds(series.target.pid)
    try:
        for node in series.nodes:
            body = json.dumps({"url": node.url, "region": node.region, "weight": 1, "in_flight": 0})
            connection.request("PUT", f"/nodes/{node.id}", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.read() and answer.status != 200:
                raise BenchmarkError(f"a heartbeat was answered {answer.status}")
    finally:
        connection.close()
    series.heartbeats.append((cpu_seconds(series.target.pid) - before) / len(series.nodes))


def wait_members(series: Series) -> None:
    """Until a router has taken in all nodes that told of themselves. Raises BenchmarkError."""
    deadline = time.monotonic() + READY
    while time.monotonic() < deadline:
        with urlopen(f"{series.target.url}/status", timeout=READY) as answer:
            if len(json.load(answer)["nodes"]) == len(series.nodes):
                return
        time.sleep(POLL)
    raise BenchmarkError("a router does not know all nodes that it heard")


# The run


@contextmanager
def servers(directory: Path, cores: tuple[int, int], counts: Sequence[int]) -> Iterator[list[tuple[Series, Series]]]:
    """For each number of nodes, a router and an nginx that know them."""
    store = str(directory / "store")
    publish(make_model(directory / "model"), MODEL, store)
    nodes = [members(count) for count in counts]
    with ExitStack() as stack:
        origin = stack.enter_context(service("origin", directory, "--store", store, core=cores[1]))
        others = stack.enter_context(redirecting(directory, [[node.url for node in some] for some in nodes], cores[0]))
        pairs = []
        for some, other in zip(nodes, others, strict=True):
            own = directory / f"router-{len(some)}"
            own.mkdir()
            flags = ("--origin", origin.url, "--probe", "0", "--ttl", "300")
            router = stack.enter_context(service("router", own, *flags, core=cores[0]))
            note(f"{len(some)} nodes join")
            series = Series("router", some, router, [], [])
            beat(series)
            wait_members(series)
            series.heartbeats.clear()  # joining is dearer: each makes a ring
            pairs.append((series, Series("nginx", some, other, [], [])))
        yield pairs


def measure(
    directory: Path, cores: tuple[int, int], counts: Sequence[int], *, seconds: int, rounds: int
) -> list[tuple[Series, Series]]:
    """The whole benchmark."""
    with servers(directory, cores, counts) as pairs:
        for pair in pairs:
            for series in pair:
                check(series)
        wrk = Wrk(directory, cores[1])
        for number in range(rounds):
            note(f"round {number + 1} of {rounds}")
            for pair in pairs:
                for series in pair:
                    if series.server == "router":
                        beat(series)
                    sample = wrk.cycle(series.target, paths(series.nodes), connections=CONNECTIONS, seconds=seconds)
                    series.samples.append(sample)
        for name, value in surroundings(pairs[0][0].target, cores).items():
            note(f"{name}: {value}")
        return pairs


def surroundings(router: Service, cores: tuple[int, int]) -> dict[str, str]:
    """What the numbers depend on."""
    return {
        "processor": f"{processor()}; servers on core {cores[0]}, wrk on core {cores[1]}",
        "kernel": platform.release(),
        "router": runtime(router.pid),
        "nginx": version("nginx"),
        "wrk": version("wrk"),
    }


# The report


def show(pairs: Sequence[tuple[Series, Series]]) -> None:
    """The table."""
    table = Table(title="Redirects: medians of the rounds")
    for column in (
        "nodes",
        "server",
        "requests/s",
        "p50 ms",
        "p99 ms",
        "CPU",
        "router/nginx",
        "by CPU",
        "of the first",
        "by CPU",
        "quiet",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("heartbeats", justify="right", no_wrap=True)
    least, _ = pairs[0]
    for router, nginx in pairs:
        ratios = [
            f"{router.median(field) / other.median(field):.2f}"
            for other in (nginx, least)
            for field in ("requests", "requests_by_cpu")
        ]
        for series in (router, nginx):
            requests = [sample.requests for sample in series.samples]
            quiet = sum(sample.others <= NOISE for sample in series.samples)
            cells = [
                f"{len(series.nodes):,}" if series is router else "",
                series.server,
                f"{series.median('requests'):,.0f} ({min(requests):,.0f}-{max(requests):,.0f})",
                f"{series.median('p50'):.2f}",
                f"{series.median('p99'):.2f}",
                f"{series.median('cpu'):.0%}",
                *(ratios if series is router else [""] * len(ratios)),
                f"{quiet}/{len(series.samples)}",
            ]
            if series is router and len(series.nodes) >= LEAST:
                each = median(series.heartbeats)
                cells.append(f"{each * 1e6:.0f} µs, {each * len(series.nodes) / HEARTBEAT:.1%}")
            table.add_row(*cells)
        table.add_section()
    out = console()
    out.print(table)
    out.print(
        f"heartbeats: processor time of one, and of one of each node in {HEARTBEAT:.0f} s; they come between rounds\n"
        "by CPU: what the same processor time does. "
        f"quiet: rounds in which no other program took more than {NOISE} cores; the rest are left out."
    )


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.bench_router", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=int, default=2, choices=range(1, 61), metavar="N", help="of each run of wrk")
    parser.add_argument("--rounds", type=int, default=5, choices=range(1, 101), metavar="N", help="of each server")
    parser.add_argument(
        "--nodes", type=int, nargs="+", default=COUNTS, metavar="N", help="how many; the first is the measure"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write every sample")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark; the exit code says whether it could be run."""
    options = arguments()
    available = sorted(os.sched_getaffinity(0))
    with workspace("bench-router") as directory:
        cores = (available[0], available[-1])
        pairs = measure(directory, cores, options.nodes, seconds=options.seconds, rounds=options.rounds)
    show(pairs)
    if options.json:
        document: list[Mapping[str, object]] = [asdict(series) for pair in pairs for series in pair]
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
