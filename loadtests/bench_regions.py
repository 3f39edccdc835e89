"""``make bench-regions``: people of several offices, straight to the origin, by nginx in each office, and by our edges.

All in one run over the same emulated links (``loadtests.regions``), with the same plain HTTP clients, the same requests
from one seed, and the same files, in revisions that never change:

* **direct**: everybody asks the origin;
* **nginx, whole** and **nginx, slices**: everybody asks the ``proxy_cache`` of the office, which keeps bodies whole, or
  in slices; either fetches each thing once at a time (``proxy_cache_lock``), and may keep all that it has for ever;
* **edges**: everybody asks the edge node of the office; a router at the hub holds the edges together.

Each has four phases, and begins with empty caches. A **cold start**: all people of all offices fetch the same model's
file at the same moment. **Partial tasks**: each fetches some tasks of a second model, by the origin's path of a task,
so that direct and nginx too move no more than the task; tasks overlap. A **release**: all fetch the file of the first
model's next version, in which a few tensors were tuned. **Warm hits**: what was fetched in the office before, by Zipf's
law, with pauses; nginx and the edges are asked for more of these, and judged by all of them.

Response times are until the last byte; bodies are compared with what was published. Bytes over the WAN are those that
the links have brought to the offices, all heads counted. Direct runs once, the others in turn, in an order that turns
from round to round; all their samples count.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any

from rich.table import Table

from loadtests import nginx, regions
from loadtests.bodies import FILE, make_model
from loadtests.percentiles import percentile
from loadtests.region_clients import Asked
from loadtests.regions import Place, Wan
from loadtests.report import console, note, processor, runtime, version
from loadtests.scenarios import REGIONS, Popularity
from loadtests.services import (
    BenchmarkError,
    Service,
    bound,
    busy_seconds,
    environment,
    publish,
    service,
    stolen_seconds,
    workspace,
)
from shared.ids import parse_task_id
from shared.paths import file_path, task_path

MODEL, OTHER = "bench/regions", "bench/tasks"
SEED = 30
TASKS = {"quarter": 0.25, "half": 0.5, "most": 0.75, "embedding": 0.0}
"""Tasks of a model, most popular first: the embedding, and that part of its layers."""
PHASES = ("cold start", "partial tasks", "release", "warm hits")
MORE = "more warm hits"
"""A phase that direct is spared, so no part of the mix: the percentiles of hits are of a few, without it."""
MORE_HITS = 4
"""Times as many requests as the warm hits have."""
HITS = "all warm hits"
"""Both together, by which hits are judged: the first ones find less in memory, and count as the others do."""
TOGETHER: Mapping[str, Sequence[str]] = {HITS: ("warm hits", MORE), "all": PHASES}
"""Rows of several phases."""
PAUSE = 1.5
"""Mean of the seconds between two warm hits of a person."""
PHASE_LIMIT = 240.0
"""Seconds that a phase may take."""
LAST_START = 600.0
"""Seconds after which nobody begins another round, so that the whole is over in twelve minutes."""
QUIET, STILL = 20.0, 20_000
"""Seconds that the links have to become quiet after a phase; bytes in half a second that count as quiet."""
MOST_STOLEN = 0.1
"""Cores that the machine's host may take for others before the figures are said to be in doubt."""
LEAST_SPEEDUP, MOST_BEHIND = 10.0, 1.05
"""The goals: the mean beside direct's, and warm hits beside nginx's."""
COLUMNS = ("mean", "p50", "p95", "p99", "bytes")

Request = tuple[float, str, str]
"""Seconds to wait before it, its path, and the name of the body that has to come."""


@dataclass(frozen=True)
class Published:
    """What there is to fetch."""

    store: str
    bodies: Path
    """A folder with every body, under its name."""
    requests: Mapping[str, Sequence[Sequence[Sequence[Request]]]]
    """By phase: for each region, for each of its people, the requests in turn."""
    note: str


@dataclass(frozen=True)
class Phase:
    """What one phase of one contender gave."""

    contender: str
    phase: str
    samples: Sequence[Asked]
    carried: int
    """Bytes that the links brought to the offices."""
    busy: float
    """Cores of the machine that were busy: where it is all of them, the links were not the limit."""
    stolen: float
    """Of those, cores that the machine's host gave to others."""


# The contenders: each gives the URL of whom a region's people ask, in the order of the regions


@contextmanager
def straight(wan: Wan, origin: Service, _directory: Path) -> Iterator[list[str]]:
    """To the origin."""
    yield [place.upstream(origin.url) for place in wan.places]


def proxies(slices: str) -> Callable[[Wan, Service, Path], AbstractContextManager[list[str]]]:
    """By an nginx in each region."""

    @contextmanager
    def by_nginx(wan: Wan, origin: Service, directory: Path) -> Iterator[list[str]]:
        with ExitStack() as stack:
            urls = []
            for place in wan.places:
                folder = directory / place.region.name
                folder.mkdir()
                settings = {"slices": slices, "send": "read 1x128k"}
                started = nginx.caching(folder, place.upstream(origin.url), place.address, place.inside, **settings)
                urls.append(stack.enter_context(started).url)
            yield urls

    return by_nginx


@contextmanager
def by_edges(wan: Wan, origin: Service, directory: Path) -> Iterator[list[str]]:
    """By an edge in each region."""
    with regions.network(wan, origin, directory) as network:
        yield [network.edges[place.region.name].url for place in wan.places]


Contender = Callable[[Wan, Service, Path], AbstractContextManager[list[str]]]
CONTENDERS: Mapping[str, Contender] = {
    "direct": straight,
    "nginx, whole": proxies(""),
    "nginx, slices": proxies("1m"),
    "edges": by_edges,
}
RIVALS = ("nginx, whole", "nginx, slices")


# What is fetched


def prepare(directory: Path, options: argparse.Namespace) -> Published:
    """Publish two models, one of them in two versions; draw the requests; note every body that has to come."""
    store, bodies = str(directory / "store"), directory / "bodies"
    bodies.mkdir()
    first = _publish(directory / "v1", MODEL, store, options.layers, SEED)
    second = _publish(directory / "v2", MODEL, store, options.layers, SEED, tuned=(2, options.layers - 1))
    other = _publish(directory / "other", OTHER, store, options.layers, SEED + 7)
    (directory / "v1" / FILE).rename(bodies / "v1")
    (directory / "v2" / FILE).rename(bodies / "v2")
    tasks = [task_path(parse_task_id(f"{OTHER}:{task}@{other}")) for task in TASKS]
    with service("origin", directory, "--store", store) as origin:
        for task, path in zip(TASKS, tasks, strict=True):
            with urllib.request.urlopen(origin.url + path, timeout=30) as answer:
                (bodies / task).write_bytes(answer.read())
    files = {"v1": file_path(MODEL, first, FILE), "v2": file_path(MODEL, second, FILE)}
    paths = dict(zip(TASKS, tasks, strict=True)) | files
    sizes = {name: (bodies / name).stat().st_size / 1e6 for name in paths}
    said = ", ".join(f"{name} {size:.1f} MB" for name, size in sizes.items())
    return Published(store, bodies, draw(paths, options), said)


def _publish(folder: Path, model: str, store: str, layers: int, seed: int, *, tuned: Sequence[int] = ()) -> str:
    tasks = {task: round(part * layers) for task, part in TASKS.items()}
    make_model(folder, tasks, layers=layers, seed=seed, tuned=tuned)
    return publish(folder, model, store)


def draw(paths: Mapping[str, str], options: argparse.Namespace) -> dict[str, list[list[list[Request]]]]:
    """The requests of every phase, region and person, from the seed."""
    rng = Random(options.seed)
    popular = Popularity(list(TASKS), rng)
    requests: dict[str, list[list[list[Request]]]] = {phase: [] for phase in (*PHASES, MORE)}
    everybody = range(options.people)

    def request(name: str, wait: float = 0.0) -> Request:
        return wait, paths[name], name

    for _ in REGIONS:
        partial = [[popular.choose() for _ in range(options.tasks)] for _ in everybody]
        had = {name for names in partial for name in names}
        warm = Popularity([*(task for task in TASKS if task in had), "v2", "v1"], rng)
        requests["cold start"].append([[request("v1")] for _ in everybody])
        requests["partial tasks"].append([[request(name) for name in names] for names in partial])
        requests["release"].append([[request("v2")] for _ in everybody])
        for phase, times in (("warm hits", 1), (MORE, MORE_HITS)):
            each = range(options.warm * times)
            requests[phase].append(
                [[request(warm.choose(), rng.expovariate(1 / PAUSE)) for _ in each] for _ in everybody]
            )
    return requests


# The run


def measure(directory: Path, options: argparse.Namespace) -> tuple[list[Phase], dict[str, str]]:
    """The whole benchmark, and where it ran."""
    begun = time.monotonic()
    note("publishing")
    published = prepare(directory, options)
    phases: list[Phase] = []
    with (
        regions.wan(REGIONS, seed=options.seed, congestion=options.congestion, proxies=options.proxies) as wan,
        regions.origin(wan, directory, published.store, "--congestion", options.congestion) as origin,
    ):
        where = surroundings(wan, origin, published, options)
        for number in range(options.rounds):
            names = [name for name in CONTENDERS if name != "direct" or number == 0]
            turn = number % len(names)
            for name in [*names[turn:], *names[:turn]]:
                if time.monotonic() - begun > LAST_START:
                    note(f"left out for want of time: {name} in round {number + 1}")
                    continue
                with tempfile.TemporaryDirectory(dir=directory) as place:
                    phases += run(name, wan, origin, published, Path(place))
    return phases, where


def run(contender: str, wan: Wan, origin: Service, published: Published, directory: Path) -> Iterator[Phase]:
    """All phases of one contender, its caches empty at first."""
    with CONTENDERS[contender](wan, origin, directory) as urls:
        for phase in PHASES if contender == "direct" else (*PHASES, MORE):
            settled(wan)
            before, busy, stolen, begun = carried(wan), busy_seconds(), stolen_seconds(), time.monotonic()
            samples = ask(wan, urls, published, phase, directory)
            seconds, busy, stolen = time.monotonic() - begun, busy_seconds() - busy, stolen_seconds() - stolen
            settled(wan)
            done = Phase(contender, phase, samples, carried(wan) - before, busy / seconds, stolen / seconds)
            wrong = sum(bool(sample.error) for sample in samples)
            note(
                f"{contender}, {phase}: {seconds:.1f} s, mean {mean(s.seconds for s in samples):.3f} s, "
                f"{done.carried / 1e6:.1f} MB, {done.busy:.2f} cores" + (f", {wrong} WRONG" if wrong else "")
            )
            yield done


def ask(wan: Wan, urls: Sequence[str], published: Published, phase: str, directory: Path) -> list[Asked]:
    """One phase: the people of all regions, begun at once. Raises BenchmarkError."""
    with ExitStack() as stack:
        offices = []
        for place, url, people in zip(wan.places, urls, published.requests[phase], strict=True):
            work, result = (directory / f"{place.region.name}.{kind}" for kind in ("work", "result"))
            work.write_text(json.dumps({"url": url, "bodies": str(published.bodies), "people": people}))
            offices.append((stack.enter_context(office(place, work, result)), result))
        for process, _ in offices:
            process.stdout.readline()  # they are ready
        for process, _ in offices:
            process.stdin.write(b"go\n")
            process.stdin.flush()
        for process, _ in offices:
            try:
                code = process.wait(PHASE_LIMIT)
            except subprocess.TimeoutExpired:
                raise BenchmarkError(f"{phase} took longer than {PHASE_LIMIT:.0f} s") from None
            if code:
                raise BenchmarkError("the people of an office ended by themselves; see above")
        return [Asked(**sample) for _, result in offices for sample in json.loads(result.read_bytes())]


@contextmanager
def office(place: Place, work: Path, result: Path) -> Iterator[Any]:
    """The process of a region's people."""
    with subprocess.Popen(
        bound(place.inside([sys.executable, "-m", "loadtests.region_clients", str(work), str(result)])),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
        cwd=Path(__file__).parents[1],
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def carried(wan: Wan) -> int:
    """Bytes that all links have brought so far."""
    return sum(place.carried() for place in wan.places)


def settled(wan: Wan) -> None:
    """Wait until next to nothing is under way: edges say now and then that they are there."""
    deadline, before = time.monotonic() + QUIET, carried(wan)
    while time.monotonic() < deadline:
        time.sleep(0.5)
        now = carried(wan)
        if now - before < STILL:
            return
        before = now
    raise BenchmarkError("the links do not become quiet")


# The report


Figures = Mapping[str, float]
"""Seconds, and bytes over the WAN in a round, by ``COLUMNS``."""


def figures(phases: Sequence[Phase]) -> Figures:
    """Of the samples of all of them; bytes in the mean of the rounds."""
    times = [sample.seconds for phase in phases for sample in phase.samples]
    rounds = len(phases) / len({phase.phase for phase in phases})
    return {
        "mean": mean(times),
        "p50": percentile(times, 0.50),
        "p95": percentile(times, 0.95),
        "p99": percentile(times, 0.99),
        "bytes": sum(phase.carried for phase in phases) / rounds,
    }


def tables(phases: Sequence[Phase]) -> dict[str, dict[str, Figures]]:
    """By phase, then contender; then the rows of several phases (``TOGETHER``)."""
    chosen = {
        row: [one for one in phases if one.phase in TOGETHER.get(row, (row,))] for row in (*PHASES, MORE, *TOGETHER)
    }
    return {
        phase: {name: figures(mine) for name in CONTENDERS if (mine := [one for one in ones if one.contender == name])}
        for phase, ones in chosen.items()
    }


def goals(found: Mapping[str, Mapping[str, Figures]]) -> Iterator[tuple[bool, str]]:
    """Whether each is met, and what was measured."""
    faster = found["all"]["direct"]["mean"] / found["all"]["edges"]["mean"]
    yield faster >= LEAST_SPEEDUP, f"mean of the whole mix: {faster:.1f} times lower than direct; at least 10"
    for phase in (*PHASES[:-1], HITS):
        ours = found[phase]["edges"]
        for column in COLUMNS:
            if phase == HITS and column == "bytes":
                continue  # nginx sends nothing while nobody asks; edges tell the router that they are there
            best = min(found[phase][name][column] for name in RIVALS)
            most = MOST_BEHIND if phase == HITS else 1.0
            said = f"{phase}, {column}: {ours[column] / best:.2f} of the better nginx's; at most {most:g}"
            yield ours[column] <= most * best, said


def show(phases: Sequence[Phase], where: Mapping[str, str]) -> bool:
    """The table, the goals, and what it was measured on. Whether all that was sent was right."""
    found, output = tables(phases), console()
    table = Table(title="Response times until the last byte, and bytes over the WAN")
    table.add_column("phase", no_wrap=True)
    table.add_column("by", no_wrap=True)
    for column in ("requests", "mean", "p50", "p95", "p99", "MB over the WAN", "busy cores", "stolen"):
        table.add_column(column, justify="right", no_wrap=True)
    for phase, by in found.items():
        for name, one in by.items():
            mine = [p for p in phases if p.contender == name and p.phase in TOGETHER.get(phase, (phase,))]
            table.add_row(
                phase if phase != "all" else "the whole mix",
                name,
                str(sum(len(p.samples) for p in mine)),
                *(f"{one[column] * 1e3:,.0f} ms" for column in COLUMNS[:-1]),
                f"{one['bytes'] / 1e6:.2f}",
                f"{max(p.busy for p in mine):.2f}",
                f"{max(p.stolen for p in mine):.2f}",
                end_section=name == "edges",
            )
    output.print(table)
    for met, said in goals(found):
        output.print(f"{'met' if met else 'NOT met'}: {said}", style="" if met else "bold")
    for name, value in where.items():
        output.print(f"{name}: {value}")
    cores = os.cpu_count() or 1
    for one_phase in phases:
        said = f"{one_phase.contender}, {one_phase.phase}"
        if one_phase.phase not in ("warm hits", MORE) and one_phase.busy > 0.9 * cores:
            note(f"warning: {said}: the machine was the limit ({one_phase.busy:.2f} cores)")
        if one_phase.stolen > MOST_STOLEN:
            note(f"warning: {said}: the machine's host took {one_phase.stolen:.2f} cores for others")
    wrong = [sample for one_phase in phases for sample in one_phase.samples if sample.error]
    for sample in wrong[:10]:
        note(f"error: {sample.path}: {sample.error}")
    return not wrong


def surroundings(wan: Wan, origin: Service, published: Published, options: argparse.Namespace) -> dict[str, str]:
    """What the numbers depend on."""
    links = ", ".join(
        f"{r.name} {r.rtt_ms:g} ms {r.mbit:g} Mbit/s loss {r.loss:.1%}" for r in (place.region for place in wan.places)
    )
    return {
        "processor": f"{processor()}, load average {os.getloadavg()[0]:.1f}",
        "kernel": platform.release(),
        "WAN": wan.how,
        "links": links,
        "bodies": published.note,
        "people": f"{options.people} in each region, {options.tasks} tasks and {options.warm} warm hits each, seed"
        f" {options.seed}, {options.rounds} rounds (direct: 1)",
        "ours": runtime(origin.pid),
        "nginx": version("nginx"),
    }


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.bench_regions", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="less of everything, so less to gain: under 4 minutes")
    parser.add_argument("--people", type=int, choices=range(1, 51), metavar="N", help="of each region (10)")
    parser.add_argument("--layers", type=int, choices=range(4, 65), metavar="N", help="of a model, 1 MiB each (9)")
    parser.add_argument("--tasks", type=int, default=2, choices=range(1, 11), metavar="N", help="of each person")
    parser.add_argument("--warm", type=int, choices=range(1, 101), metavar="N", help="warm hits of each person (2)")
    parser.add_argument("--rounds", type=int, choices=range(1, 11), metavar="N", help="of each but direct (2)")
    parser.add_argument("--congestion", default="bbr", metavar="NAME", help="of the kernel's")
    parser.add_argument("--proxies", action="store_true", help="delay proxies for links, as without root")
    parser.add_argument("--seed", type=int, default=SEED, metavar="N", help="of the requests and of loss")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write every sample")
    options = parser.parse_args(words)
    usual = (4, 4, 2, 1) if options.quick else (10, 9, 2, 2)
    for name, value in zip(("people", "layers", "warm", "rounds"), usual, strict=True):
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main() -> None:
    """Run the benchmark; the exit code says whether all bytes were right."""
    options = arguments()
    with workspace("bench-regions") as directory:
        phases, where = measure(directory, options)
    right = show(phases, where)
    if options.json:
        document: dict[str, Any] = {"where": where, "phases": [asdict(phase) for phase in phases]}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    sys.exit(not right)


if __name__ == "__main__":
    main()
