"""``make bench-cold``: the first download of a model at a site, over a WAN, by an edge, aria2 and curl.

The origin is in the hub's namespace of a ``loadtests.wan.Link``, everything else in the site's:

* **edge**: curl asks an edge node beside it, which has an empty cache and fills from the origin;
* **edge, weights**: the same, of a file with as many bytes that are numbers distributed as weights are, in bf16: those
  go compressed over the link, while the others' is random and cannot be. To aria2 and curl they are bytes like others;
* **aria2**: ``aria2c -x16 -s16 -k1M`` straight from the origin, 16 connections for 16 ranges;
* **curl**: curl straight from the origin, one connection.

Nothing is warm: a sample has new connections, and the edge a new process and an empty directory; the kernels' memory of
earlier connections is off. Contenders alternate, in an order that turns from round to round, and medians are
compared. The digest of every download is checked. One that takes longer than the limit is stopped there, and its
rate is that of what had reached the site by then, be it with the client already or in the edge's cache only.

Root only, for the namespaces; bounded in time, and gone at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import select
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

from rich.table import Table

from loadtests import wan
from loadtests.bodies import SHARD, Body, make_file, make_weights, sha256
from loadtests.report import console, note, processor, runtime, version
from loadtests.services import (
    BenchmarkError,
    Process,
    Service,
    bound,
    busy_seconds,
    environment,
    publish,
    running,
    service,
    workspace,
)
from loadtests.wan import Link
from shared.ids import parse_task_id
from shared.paths import file_path, task_path

RANDOM, WEIGHTS = "bench/random", "bench/weights"
FILE = "model.safetensors"
SEED = 20
PAYLOAD = (wan.MTU - 52) / wan.MTU
"""What a full packet carries: less the heads of IP and of TCP with timestamps."""
PATIENCE = 10.0
"""Seconds that a download waits for other programs' connections to give memory back."""
QUIET = 30.0
"""Seconds that the link has to become quiet after a download."""


@dataclass(frozen=True)
class Sample:
    """One download. ``got``: bytes of the body that reached the site, all of them unless it was ``stopped``."""

    seconds: float
    got: int
    stopped: bool
    down: int
    """Bytes of IP packets that reached the site."""
    up: int
    """Bytes of IP packets that reached the hub."""
    busy: float
    """Cores of the machine that were busy: where it is all of them, the link was not the limit."""
    strained: bool
    """Whether TCP had so much of the machine's memory, with other programs' connections, that windows stay small."""

    @property
    def rate(self) -> float:
        """Bits of the body a second."""
        return self.got * 8 / self.seconds


@dataclass(frozen=True)
class Series:
    """One contender's samples on one link, a round each."""

    contender: str
    samples: list[Sample] = field(default_factory=list)

    def median(self, name: str) -> float:
        """Of one field of the samples."""
        return float(median(getattr(sample, name) for sample in self.samples))


@dataclass(frozen=True)
class Result:
    """What one link gave."""

    congestion: str
    loss: float
    round_trip: float
    """Seconds to connect, measured before the rounds."""
    series: Sequence[Series]

    def of(self, contender: str) -> Series:
        """By name."""
        return next(series for series in self.series if series.contender == contender)


# The contenders: each gives the command that downloads a model to ``target``, and keeps ready what that needs


@contextmanager
def by_edge(link: Link, origin: Service, model: str, target: Path) -> Iterator[list[str]]:
    """Through an edge node that has nothing yet."""
    flags = ["--origin", origin.url, "--data", str(target.with_name("cache")), "--congestion", link.congestion]
    with service("edge_node", target.parent, *flags, inside=link.site) as edge:
        yield curl(edge.url + task_path(parse_task_id(model)), target)


@contextmanager
def by_aria2(link: Link, origin: Service, model: str, target: Path) -> Iterator[list[str]]:
    """aria2c, with as many connections as it has for one server, and its smallest pieces."""
    flags = ["--no-conf", "--quiet", "--file-allocation=none", f"--dir={target.parent}", f"--out={target.name}"]
    flags.append("--header=Accept: */*")  # the file itself, not its metalink
    yield ["aria2c", "-x16", "-s16", "-k1M", *flags, origin.url + file_path(model, "main", FILE)]


@contextmanager
def by_curl(link: Link, origin: Service, model: str, target: Path) -> Iterator[list[str]]:
    """curl."""
    yield curl(origin.url + file_path(model, "main", FILE), target)


def curl(url: str, target: Path, *flags: str) -> list[str]:
    """curl, without the user's settings."""
    return ["curl", "--disable", "--silent", "--show-error", "--fail", *flags, "--output", str(target), url]


Contender = Callable[[Link, Service, str, Path], AbstractContextManager[list[str]]]
CONTENDERS: Mapping[str, tuple[Contender, str]] = {
    "edge": (by_edge, RANDOM),
    "edge, weights": (by_edge, WEIGHTS),
    "aria2": (by_aria2, RANDOM),
    "curl": (by_curl, RANDOM),
}
"""And what each downloads."""


# The run


def measure(directory: Path, options: argparse.Namespace) -> tuple[list[Result], dict[str, str]]:
    """The whole benchmark, and where it ran."""
    store = str(directory / "store")
    folders = {model: directory / model for model in (RANDOM, WEIGHTS)}
    for folder in folders.values():
        folder.mkdir(parents=True)
    size = options.size << 20
    bodies = {
        RANDOM: make_file(folders[RANDOM] / FILE, size, SEED),
        WEIGHTS: make_weights(folders[WEIGHTS] / FILE, size // SHARD - 1, SEED, count=SHARD // 2),
    }
    for model, folder in folders.items():
        publish(folder, model, store)
    results: list[Result] = []
    where: dict[str, str] = {}
    for congestion in options.congestion:
        for loss in options.loss:
            with (
                Link(rtt_ms=options.rtt, mbit=options.mbit, loss=loss, congestion=congestion) as link,
                tempfile.TemporaryDirectory(dir=directory) as place,
                origin_of(link, Path(place), store) as origin,
            ):
                where = where or surroundings(origin, options, bodies[RANDOM])
                results.append(compare(link, origin, bodies, directory, options))
    return results, where


def origin_of(link: Link, directory: Path, store: str) -> AbstractContextManager[Service]:
    """The origin at the hub's end; it sends with the link's congestion control, not with its own favourite."""
    flags = ["--store", store, "--host", link.hub_address, "--insecure", "--congestion", link.congestion]
    return service("origin", directory, *flags, inside=link.hub)


def compare(
    link: Link, origin: Service, bodies: Mapping[str, Body], directory: Path, options: argparse.Namespace
) -> Result:
    """All contenders over one link."""
    result = Result(link.congestion, link.loss, round_trip(link, origin), [Series(name) for name in CONTENDERS])
    for number in range(options.rounds):
        turn = number % len(result.series)
        for series in [*result.series[turn:], *result.series[:turn]]:
            contender, model = CONTENDERS[series.contender]
            with (
                tempfile.TemporaryDirectory(dir=directory) as place,
                contender(link, origin, model, Path(place) / "body") as command,
            ):
                sample = download(link, command, bodies[model], Path(place), options.limit, whole=model == RANDOM)
            series.samples.append(sample)
            note(
                f"{link.congestion}, loss {link.loss:.1%}, round {number + 1} of {options.rounds}: {series.contender} "
                f"{sample.seconds:.1f} s, {sample.rate / 1e6:.0f} Mbit/s{', stopped' if sample.stopped else ''}"
            )
    return result


def round_trip(link: Link, origin: Service) -> float:
    """Seconds that it takes to connect, the median of some."""
    command = link.site(curl(f"{origin.url}/healthz", Path("/dev/null"), "--write-out", "%{time_connect}"))
    said = [subprocess.run(bound(command), capture_output=True, env=environment(), timeout=30) for _ in range(5)]
    return median(float(done.stdout) for done in said)


def download(link: Link, command: Sequence[str], body: Body, directory: Path, limit: float, *, whole: bool) -> Sample:
    """One sample. ``whole``: no byte of the body can be spared. Raises BenchmarkError where the download fails, is
    wrong, or was not cold."""
    target, log = directory / "body", directory / "log"
    relax()
    before = settled(link)
    busy, started = busy_seconds(), time.monotonic()
    with running(link.site(command), log) as process:
        stopped = not ended(process, limit)
        seconds, busy = time.monotonic() - started, busy_seconds() - busy
        strained = short_of_memory()
        got = min(body.size, round((crossed(link)[0] - before[0]) * PAYLOAD)) if stopped else body.size
    down, up = (now - then for now, then in zip(settled(link), before, strict=True))
    if not stopped and (process.returncode or sha256(target) != body.sha256):
        raise BenchmarkError(f"{command[0]} did not get what was published: {log.read_text(errors='replace')[-2000:]}")
    if not stopped and down < (body.size if whole else body.size // 2):
        raise BenchmarkError(f"{command[0]} got {body.size} bytes, and only {down} crossed the link")
    return Sample(seconds, got, stopped, down, up, busy / seconds, strained)


def crossed(link: Link) -> tuple[int, int]:
    """Bytes of IP packets that have arrived so far, at the site and at the hub."""
    return link.down().arrived, link.up().arrived


def settled(link: Link) -> tuple[int, int]:
    """The same, once nothing more is under way."""
    deadline = time.monotonic() + QUIET
    seen = None
    while (now := crossed(link)) != seen:
        if time.monotonic() > deadline:
            raise BenchmarkError("the link does not become quiet")
        seen = now
        time.sleep(max(0.2, 3 * link.rtt_ms / 1e3))
    return now


def short_of_memory() -> bool:
    """Whether TCP is, or may be, under memory pressure, which is the machine's and not a namespace's."""
    used = re.search(r"TCP:.* mem (\d+)", Path("/proc/net/sockstat").read_text())
    relaxed = int(Path("/proc/sys/net/ipv4/tcp_mem").read_text().split()[0])
    return used is not None and int(used[1]) > relaxed


def relax() -> None:
    """Wait until TCP has memory again, for a while."""
    deadline = time.monotonic() + PATIENCE
    while short_of_memory() and time.monotonic() < deadline:
        time.sleep(0.5)


def ended(process: Process, limit: float) -> bool:
    """Wait for the end of a process; whether it came within ``limit`` seconds. (Popen.wait looks every 50 ms.)"""
    file = os.pidfd_open(process.pid)
    try:
        return bool(select.select([file], [], [], limit)[0])
    finally:
        os.close(file)


# The report


def surroundings(origin: Service, options: argparse.Namespace, body: Body) -> dict[str, str]:
    """What the numbers depend on."""
    return {
        "processor": processor(),
        "kernel": platform.release(),
        "link": f"{options.rtt:g} ms, {options.mbit:g} Mbit/s each way, MTU {wan.MTU}, queues of {wan.QUEUE:g} BDP",
        "body": f"{body.size / 1e6:.1f} MB in shards of {SHARD >> 20} MiB",
        "edge, origin": runtime(origin.pid),
        "aria2": version("aria2c", "--version"),
        "curl": version("curl", "--version"),
    }


def show(results: Iterable[Result], options: argparse.Namespace, where: Mapping[str, str]) -> None:
    """The table, and what it was measured on."""
    table = Table(title="The first download over a WAN: medians of the rounds (least to most)")
    for column in ("link", "by"):
        table.add_column(column, no_wrap=True)
    for column in ("seconds", "Mbit/s", "of the link", "MB down", "MB up", "x aria2", "x curl", "busy cores"):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        link = [f"{result.congestion}, loss {result.loss:.1%}", f"connects in {result.round_trip * 1e3:.1f} ms", "", ""]
        for title, series in zip(link, result.series, strict=True):
            ratios = [f"{series.median('rate') / result.of(other).median('rate'):.2f}" for other in ("aria2", "curl")]
            share = f"{series.median('rate') / options.mbit / 1e6:.1%}"
            table.add_row(
                title, series.contender, *figures(series, share, ratios), end_section=series is result.series[-1]
            )
    output = console()
    output.print(table)
    output.print(
        "Mbit/s: of the body; MB: IP packets that crossed, 10^6 bytes; x: times the rate of the other.\n"
        "Stopped: the limit came first; the rate is that of what had reached the site by then."
    )
    for name, value in where.items():
        output.print(f"{name}: {value}")


def figures(series: Series, share: str, ratios: Sequence[str]) -> list[str]:
    """One contender's columns."""
    times = [sample.seconds for sample in series.samples]
    stopped = sum(sample.stopped for sample in series.samples)
    return [
        f"{median(times):.2f} ({min(times):.2f}-{max(times):.2f})" + (f", {stopped} stopped" if stopped else ""),
        f"{series.median('rate') / 1e6:.1f}",
        share,
        f"{series.median('down') / 1e6:.1f}",
        f"{series.median('up') / 1e6:.2f}",
        *ratios,
        f"{series.median('busy'):.2f}",
    ]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.bench_cold", description=__doc__.partition("\n")[0])
    parser.add_argument("--mbit", type=float, default=200, metavar="N", help="rate of the link, each way")
    parser.add_argument("--rtt", type=float, default=100, metavar="MS", help="its round-trip time")
    parser.add_argument("--loss", type=float, default=[0, 0.01], nargs="+", metavar="P", help="its loss, each way")
    parser.add_argument("--congestion", default=["bbr", "reno"], nargs="+", metavar="NAME", help="of the kernel's")
    parser.add_argument("--size", type=int, default=256, choices=range(8, 4097), metavar="MIB", help="of the model")
    parser.add_argument("--rounds", type=int, default=3, choices=range(1, 101), metavar="N", help="of each contender")
    parser.add_argument("--limit", type=float, default=30, metavar="S", help="seconds that a download may take")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write every sample")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark; the exit code says whether its result means something."""
    options = arguments()
    with workspace("bench-cold") as directory:
        results, where = measure(directory, options)
    show(results, options, where)
    if any(sample.strained for result in results for series in result.series for sample in series.samples):
        note("warning: other programs' connections took the kernel's memory for TCP; run it again on a quiet machine")
    if options.json:
        document = {"where": where, "results": [asdict(result) for result in results]}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
