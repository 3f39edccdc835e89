"""``make bench-clients``: ``nearshard get`` beside aria2c, curl and ``hf download``, over a WAN and over loopback.

Over the emulated link of ``bench-cold``, the origin in the hub's namespace, everybody else in the site's:

* **get, cold edge** and **get, warm edge**: a task, from an edge at the site with an empty cache, and again;
* **get, origin** and **curl, origin**: the same task straight from the origin;
* **aria2, model**, **curl, model** and, where a venv with it is given, **hf, model**: who knows no tasks fetches the
  whole model, straight from the origin.

Then disk to disk over loopback: ``nearshard get`` and ``aria2c -x16 -s16`` (by the metalink, so that it checks pieces)
fetch the model from the same edge, which reads from its disk; a sample ends when the file is durable.

Contenders take turns, in an order that turns from round to round, medians are compared, and the digest of every
download is checked. Bytes over the link are what TCP carried to the site, with all heads of HTTP, manifests and signed
metadata in them, without the heads of IP and TCP.

Root only, for the namespaces; bounded in time, and gone at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from rich.table import Table

from loadtests import wan
from loadtests.bench_cold import curl, ended, origin_of, relax, round_trip, settled
from loadtests.bodies import SHARD, Body, make_file, sha256
from loadtests.report import console, note, processor, runtime, version
from loadtests.services import BenchmarkError, Service, publish, running, service, trust_root, workspace
from loadtests.wan import Link
from shared.ids import parse_task_id
from shared.paths import file_path, task_path

MODEL, TASK = "bench/clients", "bench/clients:part"
FILE = "model.safetensors"
SEED = 21
HEADS = 52
"""Bytes of a packet's heads of IP and TCP, with timestamps."""
MOST_BYTES, LEAST_SPEEDUP, LEAST_SPEED = 1.01, 10.0, 1.0
"""The goals: bytes over the link of the task's; a warm edge beside the origin; over loopback beside aria2."""


@dataclass(frozen=True)
class Sample:
    """One download."""

    seconds: float
    moved: int
    """Bytes that TCP carried over the link to the site; 0 over loopback."""


@dataclass(frozen=True)
class Published:
    """What there is to download."""

    model: Body
    task: Body
    store: str


Results = dict[str, list[Sample]]
Command = Callable[[Path], Sequence[str]]
"""The command that downloads to a path."""


# The contenders


def ours(url: str, what: str, directory: Path) -> Command:
    """``nearshard get``, with nothing known from before."""

    def command(target: Path) -> list[str]:
        homes = [f"XDG_{kind}_HOME={target.parent / kind.lower()}" for kind in ("CACHE", "CONFIG", "DATA")]
        words = ["get", what, "-o", str(target), "--router", url, "--trust-root", str(trust_root(directory)), "-q"]
        return ["env", *homes, sys.executable, "-m", "nearshard", *words]

    return command


def theirs(url: str, *flags: str) -> Command:
    """aria2c with all the connections that it has for one server."""

    def command(target: Path) -> list[str]:
        where = [f"--dir={target.parent}", f"--out={target.name}"]
        return ["aria2c", "--no-conf", "--quiet", "--file-allocation=none", "-x16", "-s16", "-k1M", *where, *flags, url]

    return command


def hub(program: Path, url: str) -> Command:
    """``hf download`` of the model's file, with nothing known from before."""

    def command(target: Path) -> list[str]:
        settings = [f"HF_ENDPOINT={url}", f"HF_HOME={target.parent / 'hf'}", "HF_HUB_DISABLE_TELEMETRY=1"]
        return ["env", *settings, str(program), "download", MODEL, FILE, "--local-dir", str(target.parent)]

    return command


# Over the WAN


def over_wan(published: Published, directory: Path, options: argparse.Namespace) -> tuple[Results, dict[str, str]]:
    """All contenders over one link, and where that was."""
    results: Results = defaultdict(list)
    with (
        Link(rtt_ms=options.rtt, mbit=options.mbit, congestion=options.congestion) as link,
        tempfile.TemporaryDirectory(dir=directory) as place,
        origin_of(link, Path(place), published.store) as origin,
    ):
        turns = [
            lambda: by_edge(link, origin, published, directory, options, results),
            *direct(link, origin, published, directory, options, results),
        ]
        where = surroundings(origin, link, published, options)
        for number in range(options.rounds):
            start = number % len(turns)
            for turn in [*turns[start:], *turns[:start]]:
                turn()
            note(f"over the WAN: round {number + 1} of {options.rounds} is done")
    return results, where


def by_edge(
    link: Link, origin: Service, published: Published, directory: Path, options: argparse.Namespace, results: Results
) -> None:
    """The task from an edge that has nothing yet, and from the same one again."""
    with tempfile.TemporaryDirectory(dir=directory) as place:
        flags = ["--origin", origin.url, "--data", f"{place}/cache", "--congestion", link.congestion]
        with service("edge_node", Path(place), *flags, inside=link.site) as edge:
            command = ours(edge.url, TASK, directory)
            for name in ("get, cold edge", "get, warm edge"):
                results[name].append(crossing(link, command, published.task, directory, options.limit))


def direct(
    link: Link, origin: Service, published: Published, directory: Path, options: argparse.Namespace, results: Results
) -> list[Callable[[], None]]:
    """Those that ask the origin: each a function that takes one sample."""
    task, whole = origin.url + task_path(parse_task_id(TASK)), origin.url + file_path(MODEL, "main", FILE)
    commands: dict[str, tuple[Command, Body]] = {
        "get, origin": (ours(origin.url, TASK, directory), published.task),
        "curl, origin": (lambda target: curl(task, target), published.task),
        "aria2, model": (theirs(whole, "--header=Accept: */*"), published.model),
        "curl, model": (lambda target: curl(whole, target), published.model),
    }
    if options.hf:
        commands["hf, model"] = (hub(options.hf / "bin" / "hf", origin.url), published.model)

    def turn(name: str, command: Command, body: Body) -> Callable[[], None]:
        return lambda: results[name].append(crossing(link, command, body, directory, options.limit))

    return [turn(name, command, body) for name, (command, body) in commands.items()]


def crossing(link: Link, command: Command, body: Body, directory: Path, limit: float) -> Sample:
    """One sample over the link."""
    relax()
    before = payload(link)
    seconds = download(command, body, directory, limit, inside=link.site)
    settled(link)
    return Sample(seconds, payload(link) - before)


def payload(link: Link) -> int:
    """Bytes that TCP has carried to the site so far."""
    traffic = link.down()
    return traffic.arrived - HEADS * traffic.packets_arrived


# Over loopback


def over_loopback(published: Published, directory: Path, options: argparse.Namespace) -> Results:
    """The model from an edge's disk to a file, by ours and by aria2."""
    results: Results = defaultdict(list)
    with tempfile.TemporaryDirectory(dir=directory) as place, loopback_origin(Path(place), published.store) as origin:
        flags = ["--origin", origin.url, "--data", f"{place}/cache", "--memory", "8MiB"]
        with service("edge_node", Path(place), *flags) as edge:
            url = edge.url + task_path(parse_task_id(MODEL))
            aria2 = theirs(url, "--follow-metalink=mem")
            commands = {"get": ours(edge.url, MODEL, directory), "aria2": aria2}
            download(commands["get"], published.model, directory, options.limit)  # so that it is on the edge's disk
            for number in range(options.rounds):
                for name in sorted(commands, reverse=number % 2 == 1):
                    seconds = download(commands[name], published.model, directory, options.limit)
                    results[name].append(Sample(seconds, 0))
    return results


def loopback_origin(directory: Path, store: str) -> AbstractContextManager[Service]:
    """An origin on loopback."""
    return service("origin", directory, "--store", store)


# One download


def download(
    command: Command,
    body: Body,
    directory: Path,
    limit: float,
    inside: Callable[[Sequence[str]], Sequence[str]] = list,
) -> float:
    """Seconds until the file is there and durable. Raises BenchmarkError where it fails, or the bytes are wrong."""
    with tempfile.TemporaryDirectory(dir=directory) as place:
        target, log = Path(place) / FILE, Path(place) / "log"
        words, started = command(target), time.monotonic()
        with running(inside(words), log) as process:
            if not ended(process, limit):
                raise BenchmarkError(f"{' '.join(words)} took longer than {limit:g} s")
        if process.returncode or not target.exists():
            raise BenchmarkError(f"{' '.join(words)} failed: {log.read_text(errors='replace')[-2000:]}")
        file = os.open(target, os.O_RDONLY)
        os.fsync(file)
        os.close(file)
        seconds = time.monotonic() - started
        if sha256(target) != body.sha256:
            raise BenchmarkError(f"{' '.join(words)} did not get what was published")
    return seconds


# What is downloaded


def prepare(directory: Path, options: argparse.Namespace) -> Published:
    """Publish a model with a task that is a part of it."""
    model, store = directory / "model", str(directory / "store")
    model.mkdir()
    body = make_file(model / FILE, options.size << 20, SEED)
    shards = options.part * 1024 * 1024 // SHARD
    names = json.dumps([f"{Path(FILE).stem}.{number}" for number in range(shards)])
    (model / "nearshard.toml").write_text(f"[tasks.part]\ntensors = {names}\n")
    publish(model, MODEL, store)
    with loopback_origin(directory, store) as origin:
        asked = urllib.request.Request(origin.url + task_path(parse_task_id(TASK)), method="HEAD")
        with urllib.request.urlopen(asked, timeout=10) as answer:
            task = Body(int(answer.headers["Content-Length"]), answer.headers["ETag"].strip('"'))
    return Published(body, task, store)


# The report


def surroundings(origin: Service, link: Link, published: Published, options: argparse.Namespace) -> dict[str, str]:
    """What the numbers depend on."""
    where = {
        "processor": f"{processor()}, load average {os.getloadavg()[0]:.1f}",
        "kernel": platform.release(),
        "link": f"{link.rtt_ms:g} ms (connects in {round_trip(link, origin) * 1e3:.1f}), {link.mbit:g} Mbit/s each way,"
        f" {link.congestion}, MTU {wan.MTU}, queues of {wan.QUEUE:g} BDP",
        "bodies": f"model {published.model.size / 1e6:.1f} MB, task {published.task.size / 1e6:.1f} MB, shards of"
        f" {SHARD >> 20} MiB, {options.rounds} rounds",
        "ours": runtime(origin.pid),
        "aria2": version("aria2c", "--version"),
        "curl": version("curl", "--version"),
    }
    return where | ({"hf": version(str(options.hf / "bin" / "hf"), "version")} if options.hf else {})


def seconds_of(samples: Iterable[Sample]) -> float:
    """The median."""
    return median(sample.seconds for sample in samples)


def show(wide: Results, local: Results, published: Published, where: Mapping[str, str]) -> None:
    """The tables, the goals, and what it was measured on."""
    output = console()
    table = Table(title="Over the WAN: medians of the rounds (least to most)")
    table.add_column("by", no_wrap=True)
    for column in ("seconds", "MB over the link", "of the task's", "x the time of a warm edge"):
        table.add_column(column, justify="right", no_wrap=True)
    warm = seconds_of(wide["get, warm edge"])
    for name, samples in wide.items():
        moved = median(sample.moved for sample in samples)
        times = [spread(samples), f"{moved / 1e6:.2f}", f"{moved / published.task.size:.3f}"]
        table.add_row(name, *times, f"{seconds_of(samples) / warm:.1f}")
    output.print(table)
    table = Table(title="Disk to disk over loopback, the whole model, checked")
    for column in ("by", "seconds", "MB/s"):
        table.add_column(column, no_wrap=True, justify="left" if column == "by" else "right")
    for name, samples in local.items():
        table.add_row(name, spread(samples), f"{published.model.size / 1e6 / seconds_of(samples):.0f}")
    output.print(table)
    for line in goals(wide, local, published):
        output.print(line)
    for name, value in where.items():
        output.print(f"{name}: {value}")


def goals(wide: Results, local: Results, published: Published) -> Iterable[str]:
    """What was wanted, and what came."""
    cold = median(sample.moved for sample in wide["get, cold edge"]) / published.task.size
    yield verdict("bytes over the link, cold edge, of the task's", cold, MOST_BYTES, most=True)
    for name in ("get, origin", "curl, origin"):
        faster = seconds_of(wide[name]) / seconds_of(wide["get, warm edge"])
        yield verdict(f"warm edge faster than '{name}'", faster, LEAST_SPEEDUP, most=False)
    speed = seconds_of(local["aria2"]) / seconds_of(local["get"])
    yield verdict("speed over loopback, of aria2's", speed, LEAST_SPEED, most=False)


def verdict(what: str, value: float, goal: float, *, most: bool) -> str:
    """One line."""
    met = value <= goal if most else value >= goal
    return f"{what}: {value:.3f}; goal: at {'most' if most else 'least'} {goal:g}: {'met' if met else 'NOT met'}"


def spread(samples: Sequence[Sample]) -> str:
    """Seconds: the median, the least and the most."""
    times = [sample.seconds for sample in samples]
    return f"{median(times):.2f} ({min(times):.2f}-{max(times):.2f})"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.bench_clients", description=__doc__.partition("\n")[0])
    parser.add_argument("--mbit", type=float, default=200, metavar="N", help="rate of the link, each way")
    parser.add_argument("--rtt", type=float, default=100, metavar="MS", help="its round-trip time")
    parser.add_argument("--congestion", default="bbr", metavar="NAME", help="of the kernel's")
    parser.add_argument("--size", type=int, default=256, choices=range(16, 4097), metavar="MIB", help="of the model")
    parser.add_argument("--part", type=int, default=128, choices=range(8, 4097), metavar="MIB", help="of the task")
    parser.add_argument("--rounds", type=int, default=3, choices=range(1, 101), metavar="N", help="of each contender")
    parser.add_argument("--limit", type=float, default=60, metavar="S", help="seconds that a download may take")
    parser.add_argument("--hf", type=Path, metavar="VENV", help="a virtual environment with huggingface_hub's hf")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write every sample")
    options = parser.parse_args()
    if options.part > options.size:
        parser.error("the task is a part of the model")
    return options


def main() -> None:
    """Run the benchmark."""
    options = arguments()
    with workspace("bench-clients") as directory:
        published = prepare(directory, options)
        wide, where = over_wan(published, directory, options)
        local = over_loopback(published, directory, options)
    show(wide, local, published, where)
    if options.json:
        samples = {
            kind: {name: [asdict(sample) for sample in taken] for name, taken in results.items()}
            for kind, results in (("wan", wide), ("loopback", local))
        }
        options.json.write_text(json.dumps({"where": where, **samples}, indent=1) + "\n")


if __name__ == "__main__":
    main()
