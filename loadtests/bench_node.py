"""``make bench-node``: what one edge node costs in memory, and what a crowd of clients of a cold model costs.

* **Idle**: the memory of an edge that does nothing, with an empty cache and with 10,000 shards on disk.
* **Load**: a hundred clients at once stream a gigabyte of shards, far more than the cache in memory may hold: cold,
  then again. Once from an edge that is alone, so has every shard on disk, and once from one whose neighbour owns nearly
  all of them, so that they go through its memory. One client in ten is slow. The peak of the edge's memory.
* **Herd**: clients at once ask an edge with an empty cache for the same large task. Bytes that crossed the origin's
  link, over the task's size; and the longest wait of any of them for its first byte, over that of a client that comes
  alone to an edge as cold.

The digest of everything that comes is checked, and a request that fails ends the benchmark. Memory is what is
resident (RSS), of which the kernel's page cache is no part. All is on loopback, bounded in count and time, and gone at
the end.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import platform
import re
import tempfile
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from loadtests.bodies import SHARD, Body, make_file
from loadtests.memory import Memory, at_rest, peak
from loadtests.readers import Answer, get, read
from loadtests.report import console, note, processor, runtime
from loadtests.services import BenchmarkError, Service, publish, service, workspace
from shared.ids import parse_task_id
from shared.paths import file_path, task_path

HERD, MANY = "bench/herd", "bench/many"
FILES, FILE_SIZE, READERS = 10, 12 * SHARD, 10
"""Files that are streamed under load, their bytes, and readers of each: every one reads its share of it."""
SLOW, PACE = 10, 2_000_000
"""Of so many readers one is slow: bytes a second that it takes."""
HELD = 10_000
"""Shards on disk of the idle node."""
IDLE_GOAL, SPARE_GOAL, LINK_GOAL, WAIT_GOAL = 80e6, 64 << 20, 1.0, 1.5
"""Bytes of an idle node; bytes beside the cache in memory; the link's bytes over the task's; wait over wait."""
LIMIT = 60.0
"""Seconds that any one step may take."""


@dataclass(frozen=True)
class Share:
    """What one reader reads, and the digest of it."""

    path: str
    span: range
    sha256: str
    pace: int


@dataclass(frozen=True)
class Loaded:
    """One stream under load. ``peak`` and ``after``: memory then, and at rest again."""

    name: str
    peak: Memory
    after: Memory
    seconds: float
    size: int
    """Bytes that clients got."""
    upstream: int
    """Bytes that the edge got from above or from its neighbour."""


@dataclass(frozen=True)
class Round:
    """One round of the herd; seconds."""

    alone: float
    worst: float
    link: float
    """Bytes that crossed the origin's link for the herd, over the task's."""
    seconds: float
    """Until the last of the herd had everything."""


@dataclass(frozen=True)
class Result:
    """All figures."""

    idle: Mapping[str, Memory]
    loaded: Sequence[Loaded]
    budget: int
    """Bytes of the cache in memory, under load."""
    herd: Sequence[Round]


# Idle


async def idle(directory: Path, origin: Service) -> dict[str, Memory]:
    """The memory of a node at rest, by what its cache holds."""
    found = {}
    for name, count in (("an empty cache", 0), (f"{HELD:,} shards on disk", HELD)):
        with tempfile.TemporaryDirectory(dir=directory) as place:
            hold(Path(place) / "cache", count)
            async with edge(Path(place), origin) as node:
                if status(node)["disk"]["entries"] != count:
                    raise BenchmarkError("the edge did not take up its shards")
                found[name] = await at_rest(node.pid)
        note(f"idle with {name}: {mb(found[name].rss)}")
    return found


def hold(cache: Path, count: int) -> None:
    """A disk cache with so many shards; small ones, as a node at rest has none of their bytes in memory."""
    for number in range(count):
        data = b"%d" % number
        name = hashlib.sha256(data).hexdigest()
        path = cache / "blobs" / name[:2] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


# Load


async def load(directory: Path, origin: Service, shares: Sequence[Share], memory: str) -> list[Loaded]:
    """Cold and again, from a node that is alone, then from one whose neighbour owns nearly every shard."""
    loaded: list[Loaded] = []
    with tempfile.TemporaryDirectory(dir=directory) as place:
        async with edge(Path(place), origin, "--memory", memory) as node:
            loaded += [await stream(f"alone, {how}", node, shares) for how in ("cold", "from disk")]
    with tempfile.TemporaryDirectory(dir=directory) as place:
        async with neighbours(Path(place), origin, memory) as node:
            loaded += [await stream(f"beside the owner, {how}", node, shares) for how in ("cold", "again")]
    return loaded


@asynccontextmanager
async def neighbours(directory: Path, origin: Service, memory: str) -> AsyncIterator[Service]:
    """A node with a tenth of the weight of its neighbour, once they know of each other."""
    with service("router", directory, "--origin", origin.url, "--redis", "") as router:
        member = ["--router", router.url, "--heartbeat", "0.5", "--memory", memory]
        (directory / "owner").mkdir()
        async with (
            edge(directory / "owner", origin, *member, "--node", "owner", "--weight", "10") as owner,
            edge(directory, origin, *member, "--node", "asked", "--weight", "1") as asked,
        ):
            async with asyncio.timeout(LIMIT):
                while any(status(node)["peers"] != 2 for node in (owner, asked)):
                    await asyncio.sleep(0.1)
            yield asked


async def stream(name: str, node: Service, shares: Sequence[Share]) -> Loaded:
    """All shares at once. Raises BenchmarkError where one is not what was published."""
    before = received(node)
    loop = asyncio.get_running_loop()
    started = loop.time()
    async with peak(node.pid) as most:
        answers = await all_of(*(read(node.url, share.path, span=share.span, pace=share.pace) for share in shares))
        seconds = loop.time() - started
    for share, answer in zip(shares, answers, strict=True):
        check(answer, 206, share.sha256)
    loaded = Loaded(
        name,
        most,
        await at_rest(node.pid),
        seconds,
        sum(answer.size for answer in answers),
        received(node) - before,
    )
    note(f"load, {name}: at most {mb(most.rss)}, {seconds:.1f} s")
    return loaded


def make_shares(directory: Path) -> list[Share]:
    """The files of the model that is streamed, and who reads what of them."""
    directory.mkdir()
    shares: list[Share] = []
    for number in range(FILES):
        name = f"part-{number}.safetensors"
        body = make_file(directory / name, FILE_SIZE, number)
        with (directory / name).open("rb") as file:
            for reader in range(READERS):
                span = range(body.size * reader // READERS, body.size * (reader + 1) // READERS)
                digest = hashlib.sha256(file.read(len(span))).hexdigest()
                pace = 0 if len(shares) % SLOW else PACE
                shares.append(Share(file_path(MANY, "main", name), span, digest, pace))
    return shares


# Herd


async def herd(directory: Path, origin: Service, body: Body, options: argparse.Namespace) -> list[Round]:
    """A client alone, then a herd, each on an edge of its own that has nothing yet."""
    rounds: list[Round] = []
    for number in range(options.rounds):
        [alone], _ = await cold(directory, origin, body, 1)
        answers, link = await cold(directory, origin, body, options.herd)
        worst, seconds = (max(getattr(answer, name) for answer in answers) for name in ("first", "seconds"))
        rounds.append(Round(alone.first, worst, link / body.size, seconds))
        note(
            f"herd, round {number + 1} of {options.rounds}: first byte after {worst * 1e3:.1f} ms, "
            f"alone {alone.first * 1e3:.1f} ms; {link / body.size:.3f} times the task over the link"
        )
    return rounds


async def cold(directory: Path, origin: Service, body: Body, clients: int) -> tuple[Sequence[Answer], int]:
    """What so many clients at once get, and the bytes that the origin sent for them."""
    with tempfile.TemporaryDirectory(dir=directory) as place:
        async with edge(Path(place), origin) as node:
            before = sent(origin)
            path = task_path(parse_task_id(HERD))
            answers = await all_of(*(read(node.url, path) for _ in range(clients)))
            link = max(received(node), sent(origin) - before)
    for answer in answers:
        check(answer, 200, body.sha256)
    return answers, link


# What all of them need


@asynccontextmanager
async def edge(directory: Path, origin: Service, *flags: str) -> AsyncIterator[Service]:
    """An edge with its cache in ``directory``."""
    with ExitStack() as stack:
        words = ["--origin", origin.url, "--data", str(directory / "cache"), *flags]
        yield await asyncio.to_thread(lambda: stack.enter_context(service("edge_node", directory, *words)))


async def all_of(*reading: Awaitable[Answer]) -> list[Answer]:
    """At once. Raises BenchmarkError where that takes too long."""
    try:
        async with asyncio.timeout(LIMIT):
            return await asyncio.gather(*reading)
    except TimeoutError:
        raise BenchmarkError(f"clients did not get everything in {LIMIT:.0f} s") from None


def check(answer: Answer, expected: int, sha256: str) -> None:
    """Raises BenchmarkError where it is not what was published."""
    if answer.status != expected or answer.sha256 != sha256:
        raise BenchmarkError(f"not what was published: status {answer.status}, {answer.size} bytes")


def status(node: Service) -> dict[str, Any]:
    """Its own account."""
    found: dict[str, Any] = json.loads(get(node.url, "/status")[2])
    return found


def received(node: Service) -> int:
    """Bytes of shards that an edge got from elsewhere."""
    found = status(node)
    return int(found["upstream_bytes"] + found["peer_bytes"])


def sent(origin: Service) -> int:
    """Bytes of shards that the origin has sent."""
    lines = get(origin.url, "/metrics")[2].decode()
    found = re.search(r'^nearshard_sent_bytes_total\{outcome="origin"\} (\S+)$', lines, re.MULTILINE)
    return int(float(found[1])) if found else 0


def measure(directory: Path, options: argparse.Namespace) -> tuple[Result, dict[str, str]]:
    """The whole benchmark, and where it ran."""
    store = str(directory / "store")
    shares = make_shares(directory / "many")
    publish(directory / "many", MANY, store)
    (directory / "herd").mkdir()
    body = make_file(directory / "herd" / "model.safetensors", options.size << 20, FILES)
    publish(directory / "herd", HERD, store)
    with service("origin", directory, "--store", store) as origin:

        async def run() -> Result:
            return Result(
                await idle(directory, origin),
                await load(directory, origin, shares, f"{options.memory}MiB"),
                options.memory << 20,
                await herd(directory, origin, body, options),
            )

        result = asyncio.run(run())
        return result, {
            "processor": processor(),
            "kernel": platform.release(),
            "edge, origin": runtime(origin.pid),
            "load": f"{len(shares)} clients, {len(shares) // SLOW} of them at {PACE / 1e6:g} MB/s, "
            f"{FILES} files, shards of {SHARD >> 20} MiB, --memory {options.memory}MiB",
            "herd": f"{options.herd} clients, a task of {body.size / 1e6:.1f} MB, {options.rounds} rounds",
        }


# The report


def rows(result: Result) -> Iterator[tuple[str, str, str, bool, str]]:
    """What was measured, the figure, its goal, whether that is met, and what else is known of it."""
    for name, found in result.idle.items():
        yield f"idle, {name}", mb(found.rss), f"< {mb(IDLE_GOAL)}", found.rss < IDLE_GOAL, f"{mb(found.anon)} anonymous"
    most = result.budget + SPARE_GOAL
    for loaded in result.loaded:
        more = f"{mb(loaded.peak.anon)} anonymous; at rest after it {mb(loaded.after.rss)}; {loaded.seconds:.1f} s; "
        more += f"{loaded.upstream / loaded.size:.2f} B fetched a byte served"
        yield f"load, {loaded.name}", mb(loaded.peak.rss), f"<= {mb(most)}", loaded.peak.rss <= most, more
    link = max(found.link for found in result.herd)
    more = f"the most of {len(result.herd)} rounds"
    yield "herd, bytes over the link / task", f"{link:.3f}", f"{LINK_GOAL:.2f}", round(link, 2) <= LINK_GOAL, more
    ratio = median(found.worst / found.alone for found in result.herd)
    worst, alone, seconds = (
        median(getattr(found, name) for found in result.herd) for name in ("worst", "alone", "seconds")
    )
    more = f"{worst * 1e3:.1f} ms, alone {alone * 1e3:.1f} ms; all had everything after {seconds:.1f} s; medians"
    yield "herd, worst first byte / alone", f"{ratio:.2f}", f"<= {WAIT_GOAL}", ratio <= WAIT_GOAL, more


def mb(size: float) -> str:
    """Bytes for people; 10^6, as all sizes here."""
    return f"{size / 1e6:.1f} MB"


def show(result: Result, where: Mapping[str, str]) -> None:
    """The table, and what it was measured on."""
    table = Table(title="One edge node")
    table.add_column("figure", no_wrap=True)
    for column in ("result", "goal", "met"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("beside it")
    for name, figure, goal, met, more in rows(result):
        table.add_row(name, figure, goal, "yes" if met else "NO", more)
    output = console()
    output.print(table)
    for name, value in where.items():
        output.print(f"{name}: {value}")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.bench_node", description=__doc__.partition("\n")[0])
    parser.add_argument("--memory", type=int, default=64, choices=range(0, 4097), metavar="MIB", help="under load")
    parser.add_argument("--herd", type=int, default=8, choices=range(1, 101), metavar="N", help="clients of the herd")
    parser.add_argument(
        "--size", type=int, default=256, choices=range(8, 4097), metavar="MIB", help="of the herd's task"
    )
    parser.add_argument("--rounds", type=int, default=5, choices=range(1, 101), metavar="N", help="of the herd")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write every figure")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark; the exit code says whether its result means something."""
    options = arguments()
    with workspace("bench-node") as directory:
        result, where = measure(directory, options)
    show(result, where)
    if options.json:
        options.json.write_text(json.dumps({"where": where, **asdict(result)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
