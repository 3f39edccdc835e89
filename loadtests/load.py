"""``make load``: people in several regions ask for models, and a report says how that went.

By default a network is started for it, on this machine only: an origin and a router at a hub, an edge in each region,
links between (``loadtests.regions``); two models have a course of things happen to them and their regions, which is the
scenario. With ``--url`` the people ask somebody else's router, edge or origin, and nothing happens but their number.
The people are locust's (``loadtests.load_users``): by itself, or with its web page (``--web``).

Everything is bounded: the people, the time, and, unless ``--beyond-loopback`` is given, the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import selectors
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from loadtests import regions
from loadtests.bodies import FILE, make_model, make_weights
from loadtests.delays import DelayProxy
from loadtests.load_report import Run, Sample, page
from loadtests.regions import Network, Wan
from loadtests.report import note, processor
from loadtests.scenarios import (
    MOST_SECONDS,
    MOST_USERS,
    REGIONS,
    SCENARIOS,
    BadOption,
    Event,
    Region,
    Scenario,
    check_number,
    check_url,
    parse_region,
    usable_events,
)
from loadtests.services import BenchmarkError, Process, bound, busy_seconds, environment, publish, workspace
from shared.ids import parse_task_id
from shared.paths import task_path

LAYERS = 5
MODELS = ("load/chat", "load/search")
"""The first one gets a new version where the scenario has a release."""
TASKS = {"embed-2l": 2, "embed": 0}
"""Of each model, beside all of it: how many layers go with the embedding."""
MOST_PATHS = 100
"""Tasks that are asked for of a network that is there."""
EVERY = 2.0
"""Seconds between two looks at what the links have carried."""
GRACE = 60.0
"""Seconds that locust has beyond the run."""


@dataclass(frozen=True)
class Target:
    """Whom the people ask, and what can be done to it."""

    people: Sequence[Mapping[str, Any]]
    """The fields of ``load_users.Person``, for each region."""
    paths: Sequence[str]
    """Most popular first."""
    act: Callable[[Event], None]
    carried: Callable[[], Mapping[str, int]]
    """Bytes over the WAN so far, by region; empty where nobody knows."""
    carried_by: str
    conditions: Mapping[str, str]


# A network of our own


@contextmanager
def our_own(directory: Path, options: argparse.Namespace) -> Iterator[Target]:
    """A hub and regions on this machine, with two models."""
    store = str(directory / "store")
    for number, model in enumerate(MODELS):
        folder = directory / f"model-{number}"
        make_model(folder, TASKS, layers=LAYERS, seed=options.seed + number)
        publish(folder, model, store)
    paths = [task_path(parse_task_id(f"{model}:{task}")) for task in ("all", *TASKS) for model in MODELS]
    with (
        regions.wan(options.regions, seed=options.seed, congestion="bbr", proxies=options.proxies) as wan,
        regions.origin(wan, directory, store) as origin,
        regions.network(wan, origin, directory) as network,
        ExitStack() as stack,
    ):
        people = [
            {
                "region": place.region.name,
                "weight": place.region.weight,
                "netns": place.netns,
                "beyond": bool(place.netns),
                "sources": [network.edges[place.region.name].url, network.router.url],
                "headers": {"Nearshard-Region": place.region.name},
                "ways": _ways(place, wan, network),
            }
            for place in wan.places
        ]
        course = Course(wan, network, directory, store, options.seed)
        stack.callback(course.finish)
        yield Target(
            people,
            paths,
            course.act,
            lambda: {place.region.name: place.carried() for place in wan.places},
            "Bytes over the WAN are what the links have brought to the regions, all heads counted, of their nodes' own "
            "business too.",
            {"WAN": wan.how, "links": "; ".join(_terms(place.region) for place in wan.places)},
        )


def _ways(place: regions.Place, wan: Wan, network: Network) -> dict[str, str]:
    """How somebody there reaches what is elsewhere, where that is not by its own address."""
    away = [network.router.url, *(edge.url for region, edge in network.edges.items() if region != place.region.name)]
    ways = {urlsplit(url).netloc: urlsplit(place.upstream(url)).netloc for url in away}
    return {one: other for one, other in ways.items() if one != other}


def _terms(region: Region) -> str:
    return f"{region.name} {region.rtt_ms:g} ms, {region.mbit:g} Mbit/s, loss {region.loss:.1%}"


@dataclass
class Course:
    """What happens to our own network."""

    wan: Wan
    network: Network
    directory: Path
    store: str
    seed: int
    _released: int = 0
    _publishing: list[threading.Thread] = field(default_factory=list)

    def finish(self) -> None:
        """Wait for what is still being published."""
        for thread in self._publishing:
            thread.join()

    def act(self, event: Event) -> None:
        """Have it happen."""
        places = {place.region.name: place for place in self.wan.places}
        match event.kind:
            case "cut":
                places[event.region].cut()
            case "mend":
                places[event.region].mend()
            case "lose":
                with suppress(ProcessLookupError):  # in a run before this one
                    os.kill(self.network.edges[event.region].pid, signal.SIGKILL)
            case "release":  # takes seconds, in which other things happen
                thread = threading.Thread(target=self._release)
                thread.start()
                self._publishing.append(thread)

    def _release(self) -> None:
        """One more layer of the first model is tuned; the router tells the edges."""
        self._released += 1
        folder = self.directory / "model-0"
        make_weights(folder / FILE, LAYERS, self.seed, tuned=range(min(self._released, LAYERS)))
        try:
            publish(folder, MODELS[0], self.store, "--router", self.network.router.url, inside=self.wan.inside)
        except BenchmarkError as error:
            note(f"the release failed: {error}")


# Somebody else's


@contextmanager
def at_url(options: argparse.Namespace) -> Iterator[Target]:
    """A router, an edge or an origin that is there."""
    paths = [task_path(parse_task_id(name)) for name in options.task] if options.task else listed(options.url)
    nodes = nodes_of(options.url)
    with ExitStack() as stack:
        people = []
        for region in options.regions:
            ways = {}
            if options.emulated:
                proxy = stack.enter_context(DelayProxy(rtt_ms=region.rtt_ms, mbit=region.mbit))
                for url in [options.url, *nodes]:
                    parts = urlsplit(url)
                    if parts.hostname and parts.scheme == "http":
                        ways[parts.netloc] = f"127.0.0.1:{proxy.forward(parts.hostname, parts.port or 80)}"
            people.append(
                {
                    "region": region.name,
                    "weight": region.weight,
                    "netns": "",
                    "beyond": options.beyond_loopback,
                    "sources": [options.url],
                    "headers": {"Nearshard-Region": region.name} if options.emulated else {},
                    "ways": ways,
                }
            )
        how = "none beside what is there"
        if options.emulated:
            how = "; ".join(_terms(region) for region in options.regions) + ": delay and rate by proxies, no loss"
        yield Target(
            people,
            paths,
            lambda _event: None,
            Upstream(nodes).bytes,
            "Bytes over the WAN are what the nodes say that they took from above (/status): from parents and origins."
            if nodes
            else "What crossed the WAN is not known: no edge node here says what it took from above.",
            {"asked": options.url, "nodes behind it": str(len(nodes)), "links of the people": how},
        )


def listed(url: str) -> list[str]:
    """Paths of the tasks that a network has for everybody, its models in turn. Raises BadOption where it has none."""
    tasks: list[list[str]] = []
    for model in _document(f"{url}/models").get("models", [])[:MOST_PATHS]:
        about = _document(f"{url}/models/{model}")
        tasks.append([f"{model}:{name}" for name in about.get("tasks", {})])
    names = [one[rank] for rank in range(max(map(len, tasks), default=0)) for one in tasks if rank < len(one)]
    if not names:
        raise BadOption("there is no model at that URL that everybody may read; publish one, or name --task")
    return [task_path(parse_task_id(name)) for name in names[:MOST_PATHS]]


def nodes_of(url: str) -> list[str]:
    """The edge nodes that say how much they took from above: the one at this URL, or those that a router knows."""
    with suppress(BadOption):
        status = _document(f"{url}/status")
        if "upstream_bytes" in status:
            return [url]
        return [str(node["url"]) for node in status.get("nodes", [])]
    return []


class Upstream:
    """What these nodes took from above."""

    def __init__(self, nodes: Sequence[str]) -> None:
        self._nodes = nodes
        self._last: dict[str, tuple[str, int]] = {}

    def bytes(self) -> dict[str, int]:
        """So far, by their regions; of a node that does not answer, what it said last."""
        for url in self._nodes:
            with suppress(BadOption):
                status = _document(f"{url}/status", timeout=1.0)
                self._last[url] = (str(status.get("region", "all")), int(status["upstream_bytes"]))
        return {name: sum(size for of, size in self._last.values() if of == name) for name, _ in self._last.values()}


def _document(url: str, timeout: float = 10.0) -> dict[str, Any]:
    try:
        with urllib.request.urlopen(url, timeout=timeout) as answer:
            document = json.loads(answer.read(1 << 24))
    except (OSError, ValueError) as error:
        raise BadOption(f"{url} does not answer as a service of nearshard does: {error}") from None
    if not isinstance(document, dict):
        raise BadOption(f"{url} does not answer as a service of nearshard does")
    return document


# The run


def load(target: Target, scenario: Scenario, directory: Path, options: argparse.Namespace) -> None:
    """Run locust, have the scenario's events happen, and write the report after each run; ``--web``: until Ctrl-C."""
    samples = directory / "samples.jsonl"
    work = directory / "work.json"
    work.write_text(
        json.dumps(
            {
                "regions": list(target.people),
                "paths": list(target.paths),
                "users": list(scenario.users),
                "most": options.concurrency,
                "seconds": options.seconds,
                "pause": options.pause,
                "seed": options.seed,
                "samples": str(samples),
                "web": options.web,
            }
        )
    )
    with started_locust(work, directory / "locust.log") as process:
        while word := follow(process, None):
            if word == "web":
                note(f"locust's page: http://127.0.0.1:{options.web} (start the run there; Ctrl-C ends it)")
            elif word == "started":
                run = one_run(process, target, scenario, options)
                read = [Sample(**json.loads(line)) for line in samples.read_text().splitlines()]
                write(replace(run, samples=read), options.report)
                if not options.web:
                    return
    raise BenchmarkError(f"locust ended by itself:\n{(directory / 'locust.log').read_text(errors='replace')[-2000:]}")


@contextmanager
def started_locust(work: Path, log: Path) -> Iterator[Process]:
    """locust, with what it says of itself in a log."""
    with log.open("ab") as errors:
        process = subprocess.Popen(
            bound([sys.executable, "-m", "loadtests.load_users", str(work)]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            bufsize=0,  # so that what was not read yet is seen by select
            stderr=errors,
            env=environment() | {"LOCUST_SKIP_URLLIB3_PATCH": "1"},
            cwd=Path(__file__).parents[1],
            start_new_session=True,  # Ctrl-C is for us
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def one_run(process: Process, target: Target, scenario: Scenario, options: argparse.Namespace) -> Run:
    """From locust's start to its end: what happened, and what the links carried."""
    begun, busy = time.monotonic(), busy_seconds()
    events = usable_events(scenario.events, options.regions) if not options.url else []
    note(f"load for {options.seconds:g} s: {scenario.title}")
    happened, carried = until_stopped(process, target, events, options.seconds)
    seconds = time.monotonic() - begun
    cores = (busy_seconds() - busy) / seconds
    limit = ", so the machine may have been the limit" if cores > 0.9 * (os.cpu_count() or 1) else ""
    conditions = {
        "scenario": scenario.title,
        "people": f"up to {options.concurrency}, each with {options.pause:g} s between two requests on average",
        "asked for": f"{len(target.paths)} tasks by Zipf's law, seed {options.seed}",
        **target.conditions,
        "machine": f"{processor()}, Linux {platform.release()}, {cores:.1f} cores busy{limit}",
        "load by": f"locust {metadata.version('locust')}",
    }
    names = [region.name for region in options.regions]
    return Run(f"Load test: {scenario.title}", seconds, names, [], happened, carried, target.carried_by, conditions)


def until_stopped(
    process: Process, target: Target, events: Sequence[Event], seconds: float
) -> tuple[list[tuple[float, str]], list[tuple[float, Mapping[str, int]]]]:
    """Have the events happen in their time, until locust says that the run is over.

    What happened when, and what the links had carried when (nothing where that is not known). Raises BenchmarkError.
    """
    begun = time.monotonic()
    coming = sorted(events, key=lambda event: event.at)
    happened: list[tuple[float, str]] = []
    carried = [(0.0, target.carried())]
    word = None
    while word is None:
        now = time.monotonic() - begun
        if now > seconds + GRACE:
            raise BenchmarkError("locust did not end in time")
        while coming and coming[0].at * seconds <= now:
            event = coming.pop(0)
            target.act(event)
            happened.append((now, event.text))
            note(f"{now:.0f} s: {event.text}")
        following = coming[0].at * seconds - now if coming else EVERY
        word = follow(process, min(EVERY, max(0.0, following)))
        now = time.monotonic() - begun
        if word is not None or now - carried[-1][0] >= EVERY:
            carried.append((now, target.carried()))
    if word != "stopped":
        raise BenchmarkError("locust ended by itself")
    return happened, [(at, by) for at, by in carried if by]


def follow(process: Process, timeout: float | None) -> str | None:
    """The next word of locust's, None where there is none within ``timeout`` seconds, empty where it has ended."""
    assert process.stdout
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if not selector.select(timeout):
            return None
    return process.stdout.readline().decode().strip()


def write(run: Run, report: Path) -> None:
    """The page, and a line on how it went."""
    report.write_text(page(run), encoding="utf-8")
    failed = sum(bool(sample.error) for sample in run.samples)
    print(f"{len(run.samples)} requests, {failed} failed: {report}", flush=True)


# The command line


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Checked options; a wrong one is said, and ends the program with 2."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.load", description=__doc__.partition("\n")[0])
    parser.add_argument("--scenario", default="day", choices=list(SCENARIOS), help="what happens (day: all of it)")
    parser.add_argument("--seconds", type=float, default=120, metavar="S", help="how long (120)")
    parser.add_argument("--concurrency", type=float, default=24, metavar="N", help="people at most (24)")
    parser.add_argument("--pause", type=float, default=3, metavar="S", help="mean between a person's requests (3)")
    parser.add_argument("--url", metavar="URL", help="a router, an edge or an origin that is there")
    parser.add_argument("--task", action="append", metavar="ID", help="a task to ask it for; again for more")
    parser.add_argument(
        "--region", action="append", metavar="R", help="NAME:RTT_MS:MBIT[:LOSS[:WEIGHT]]; again for more"
    )
    parser.add_argument("--beyond-loopback", action="store_true", help="the URL may be of another machine")
    parser.add_argument("--proxies", action="store_true", help="delay proxies for links, as without root")
    parser.add_argument("--web", type=int, nargs="?", const=8089, default=0, metavar="PORT", help="locust's page")
    parser.add_argument("--seed", type=int, default=40, metavar="N", help="of requests, models and loss")
    parser.add_argument("--report", type=Path, default=Path("load.html"), metavar="FILE", help="what to write")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write every sample")
    options = parser.parse_args(words)
    try:
        return checked(options)
    except BadOption as error:
        parser.error(str(error))


def checked(options: argparse.Namespace) -> argparse.Namespace:
    """The same, with ``regions``, and whether they are ``emulated`` before a URL. Raises BadOption."""
    check_number(options.concurrency, 1, MOST_USERS, "--concurrency")
    if options.concurrency != int(options.concurrency):
        raise BadOption("--concurrency is a whole number of people")
    options.concurrency = int(options.concurrency)
    check_number(options.seconds, 1, MOST_SECONDS, "--seconds")
    check_number(options.pause, 0.01, 600, "--pause")
    check_number(options.web, 0, 65535, "--web")
    if options.url is not None:
        options.url = check_url(options.url, beyond_loopback=options.beyond_loopback)
    options.regions = [parse_region(text) for text in options.region or ()]
    options.emulated = bool(options.regions)
    if len({region.name for region in options.regions}) < len(options.regions):
        raise BadOption("two regions have the same name")
    if options.emulated and options.url and options.url.startswith("https:"):
        raise BadOption("--region needs an http:// URL: what is inside TLS cannot be led over an emulated link")
    if not options.regions:
        options.regions = [Region("here", rtt_ms=0, mbit=0)] if options.url else list(REGIONS)
    if not options.report.resolve().parent.is_dir():
        raise BadOption("--report is in a folder that does not exist")
    if options.task and not options.url:
        raise BadOption("--task goes with --url")
    return options


def main() -> None:
    """Run the load; 2 for options that cannot be run with."""
    options = arguments()
    with workspace("load") as directory, ExitStack() as stack:
        try:
            target = stack.enter_context(at_url(options) if options.url else our_own(directory, options))
        except BadOption as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        load(target, SCENARIOS[options.scenario], directory, options)
        if options.json:
            options.json.write_bytes((directory / "samples.jsonl").read_bytes())


if __name__ == "__main__":
    main()
