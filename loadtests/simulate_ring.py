"""The ring and the choice at the size of 10,000 nodes in 200 regions and 10 million shards: ``make simulate``.

No network: the project's own code (``shared.ring``, ``routing``, ``loads``) on made-up members and demand.
The 10 million shards are as many random places on the ring: a place is a BLAKE2b hash, so that is what digests give.
They are looked at a million at a time. Demand is drawn from all of them by Zipf's law (exponent 1); one region of 50
nodes is played through, for each request is one choice of the real code.
"""

from __future__ import annotations

import heapq
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from rich.table import Table

from loadtests.report import console, processor
from shared.codec import encode_json
from shared.health import Health
from shared.loads import BOUND, Loads
from shared.nearness import Nearness
from shared.node import Node, State
from shared.ring import MEMBER, Ring
from shared.routing import Routing, Snapshot

REGIONS, NODES = 200, 50
SHARDS, AT_ONCE = 10_000_000, 1_000_000
HEARTBEAT = 2.0
SEED = 7

T = TypeVar("T")
Places = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.uint64]


def main() -> None:
    """Print the tables."""
    started = time.perf_counter()
    console().print(processor())
    moved()
    snapshot = size()
    spread(snapshot)
    zipf()
    console().print(f"{time.perf_counter() - started:.0f} s in all")


def places() -> Iterator[Places]:
    """Where the shards are on every ring, some at a time; the same each time."""
    rng = np.random.default_rng(SEED)
    for _ in range(SHARDS // AT_ONCE):
        yield rng.integers(0, 1 << 64, AT_ONCE, dtype=np.uint64)


def owners(words: Numbers, where: Places) -> Numbers:
    """The number of the member that owns each place: ``Ring.owners``, for many at once."""
    at = np.searchsorted(words, where, side="right") % len(words)
    found: Numbers = words[at] & np.uint64(MEMBER)
    return found


def moved() -> None:
    """One of ten nodes leaves, or an eleventh comes: the share of shards that change their owner."""
    ten = [f"north-{number}" for number in range(10)]
    before = Ring(dict.fromkeys(ten, 1))
    changes = {f"without {gone}": [n for n in ten if n != gone] for gone in ten} | {"one more": [*ten, "north-10"]}
    rings = {name: Ring(dict.fromkeys(members, 1)) for name, members in changes.items()}
    counts: Counter[str] = Counter()
    for where in places():
        names = np.array(before.names)[owners(np.asarray(before.words), where)]
        for change, ring in rings.items():
            counts[change] += int((np.array(ring.names)[owners(np.asarray(ring.words), where)] != names).sum())
    shares = [counts[change] / SHARDS for change in changes]
    table(
        ["one region of 10 nodes, 10 million shards", "share that moves"],
        [
            ["one of ten leaves: least", f"{min(shares[:-1]):.2%}"],
            ["one of ten leaves: most", f"{max(shares[:-1]):.2%}"],
            ["an eleventh comes", f"{shares[-1]:.2%}"],
        ],
    )
    assert max(shares) <= 0.12


def size() -> Snapshot:
    """What the whole membership costs: memory, time, bytes."""
    nodes = [
        Node(f"r{region:03}-{number:02}", f"http://r{region:03}-{number:02}.edge.example.org:8720", f"r{region:03}", 1)
        for region in range(REGIONS)
        for number in range(NODES)
    ]
    before = resident()
    snapshot, cold = timed(lambda: Snapshot(nodes, 1))
    grown = resident() - before
    words = sum(ring.words.itemsize * len(ring.words) for ring in snapshot.rings.values())
    changed, one = timed(lambda: Snapshot(nodes[1:], 2, snapshot))
    choice = Routing(Nearness(), Loads(), Health())
    states = {node.id: State(5, rtt={f"r{n:03}": 10.0 + n for n in range(32)}) for node in nodes}
    choice.update(snapshot, states, lambda _: 0.0, 100.0)
    _, view = timed(lambda: choice.update(changed, states, lambda _: 0.0, 100.0))
    _, refresh = timed(lambda: choice.update(changed, states, lambda _: 0.0, 100.5))
    _, order = timed(lambda: choice.order("r007"))
    record = nodes[0].record() | {"draining": False}
    beat = encode_json(nodes[0].record() | states[nodes[0].id].record())
    full = encode_json({"epoch": 1, "region": None, "nodes": [node.record() | {"draining": False} for node in nodes]})
    region = encode_json(
        {"epoch": 1, "region": "r000", "nodes": [n.record() | {"draining": False} for n in nodes[:NODES]]}
    )
    table(
        [f"{REGIONS * NODES:,} nodes in {REGIONS} regions", ""],
        [
            ["rings of all regions", f"{words / 1e6:.0f} MB"],
            ["memory that a snapshot takes", f"{grown / 1e6:.0f} MB"],
            ["all rings", f"{cold:.2f} s"],
            ["one node changed: a new snapshot, one region's ring", f"{one * 1e3:.1f} ms"],
            ["the same: making the choice ready again, all regions", f"{view * 1e3:.1f} ms"],
            ["taking all loads, twice a second", f"{refresh * 1e3:.1f} ms"],
            ["ordering the regions for one of them, each 10 s", f"{order * 1e3:.1f} ms"],
            ["membership on the wire, whole", f"{len(full):,} bytes"],
            ["one region", f"{len(region):,} bytes"],
            ["one node", f"{len(encode_json(record)):,} bytes"],
            ["a heartbeat, with times to 32 regions", f"{len(beat):,} bytes"],
        ],
    )
    return snapshot


def spread(snapshot: Snapshot) -> None:
    """How evenly the shards lie on the disks of a region: the ring alone."""
    ring = snapshot.rings["r000"]
    words = np.asarray(ring.words)
    counts = np.zeros(NODES, dtype=np.int64)
    for where in places():
        counts += np.bincount(owners(words, where).astype(np.int64), minlength=NODES)
    mean = counts.mean()
    table(
        ["shards owned in a region of 50", "of the mean"],
        [["fewest", f"{counts.min() / mean:.3f}"], ["most", f"{counts.max() / mean:.3f}"]],
    )


def zipf() -> None:
    """Load under Zipf's law, with bounded loads and with the ring alone."""
    rows = []
    for bound, routers, rate, each in (
        (math.inf, 1, 5000, 1.0),
        (BOUND, 1, 5000, 1.0),
        (BOUND, 2, 5000, 1.0),
        (BOUND, 2, 1000, 20.0),
    ):
        found = play(bound, routers, rate, each)
        what = "ring alone" if bound == math.inf else f"bounded, routers: {routers}"
        numbers = [f"{found[key]:.2f}" for key in ("sent", "median", "worst", "owner")]
        rows.append([what, f"{rate:,}/s of {each:g} s", *numbers, f"{found['us']:.1f}"])
        assert bound == math.inf or found["sent"] < BOUND + 0.05
    head = ["50 nodes, Zipf", "requests", "sent", "in flight, median", "worst moment", "at the owner", "µs a choice"]
    table(head, rows)


def play(bound: float, routers: int, rate: float, each: float) -> dict[str, float]:
    """One region for a while: requests come, are sent by the real choice, and end; nodes report, each in its turn.

    Gives the largest of the nodes' loads divided by their mean: of requests ``sent``, and in flight at the ``median``
    moment and the ``worst`` one; the share that went to the key's ``owner``; and microseconds a choice.
    """
    seconds = 24 + 3 * each
    rng = random.Random(SEED)
    nodes = [Node(f"n{number:02}", f"http://n{number:02}", "north", 1) for number in range(NODES)]
    snapshot = Snapshot(nodes, 1)
    views = [Routing(Nearness(), Loads(bound), Health()) for _ in range(routers)]
    in_flight = dict.fromkeys(snapshot.nodes, 0)
    states = dict.fromkeys(snapshot.nodes, State())
    sent: Counter[str] = Counter()
    phases = {node: rng.random() * HEARTBEAT for node in in_flight}
    ends: list[tuple[float, str]] = []
    reports = sorted((phase + HEARTBEAT * n, node) for node, phase in phases.items() for n in range(int(seconds)))
    heapq.heapify(reports)
    now, look, spent, first, worst = 0.0, 0.0, 0.0, 0, []
    requests = int(rate * seconds)
    for _ in range(requests):
        now += rng.expovariate(rate)
        while ends and ends[0][0] <= now:
            in_flight[heapq.heappop(ends)[1]] -= 1
        while reports and reports[0][0] <= now:
            node = heapq.heappop(reports)[1]
            states[node] = State(in_flight[node])
        if now >= look:
            look += 0.5
            for view in views:
                view.update(snapshot, states, lambda _: -1e6, now)
            if now > seconds / 2:
                values = list(in_flight.values())
                worst.append(max(values) / (sum(values) / NODES))
        key = f"sha256:{int(float(SHARDS) ** rng.random()):064x}"
        view = rng.choice(views)
        begun = time.perf_counter()
        chosen = view.choose("north", key, 3, now)
        view.sent(chosen, now)
        spent += time.perf_counter() - begun
        node = chosen[0].node.id
        first += snapshot.rings["north"].owners(key, 1)[0] == node
        sent[node] += 1
        in_flight[node] += 1
        heapq.heappush(ends, (now + rng.expovariate(1 / each), node))
    return {
        "sent": max(sent.values()) / (requests / NODES),
        "worst": max(worst),
        "median": median(worst),
        "owner": first / requests,
        "us": spent / requests * 1e6,
    }


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print one."""
    shown = Table(*head)
    for row in rows:
        shown.add_row(*row)
    console().print(shown)


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """What ``work`` gives, and the seconds that it took."""
    begun = time.perf_counter()
    found = work()
    return found, time.perf_counter() - begun


if __name__ == "__main__":
    main()
