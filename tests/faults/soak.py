"""``make soak MINUTES=30``: the network of ``make faults`` under load, with new versions now and then and no faults.

Memory, descriptors and tasks of each process are sampled; at the end each has a slope and a verdict, in a table and
on a page with plots. 1 where something grows, or what must hold did not.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from loadtests.report import console, note, processor
from tests.faults.__main__ import workplace
from tests.faults.figures import SOAK_COLUMNS, Series, page
from tests.faults.live import Options, Scene, looked, scene, usage
from tests.faults.load import Broken
from tests.faults.network import now
from tests.harness import Lab, Service

LIMITS = {"RSS MB": (1.0, 4.0), "descriptors": (4.0, 12.0), "tasks": (4.0, 12.0)}
"""Growth an hour that is no leak, and growth in all that says nothing yet: what comes and goes with the load."""
WARM = 0.2
"""Of the time, that does not count."""


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What is asked for."""
    parser = argparse.ArgumentParser(prog="make soak MINUTES=... ARGS=...", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30, help="how long the load is looked at")
    parser.add_argument("--every", type=float, default=5, help="seconds between two samples")
    parser.add_argument("--publish", type=float, default=300, help="seconds between two new versions")
    parser.add_argument("--clients", type=int, default=24, help="clients of the load")
    parser.add_argument("--seed", type=int, default=0, help="of the clients' choices")
    parser.add_argument("--html", type=Path, default=Path("soak.html"), help="the page")
    return parser.parse_args(words)


async def soak(lab: Lab, asked: argparse.Namespace) -> tuple[list[Series], int, list[Broken]]:
    """All samples, how many requests were served, and what does not hold."""
    options = Options(seed=asked.seed, clients=asked.clients)
    async with scene(lab, options) as made:
        series = {
            (name, measure): Series(name, measure, limit, warm=asked.minutes * 60 * WARM, least=least)
            for name in made.services
            for measure, (limit, least) in LIMITS.items()
        }
        made.load.served.clear()
        made.load.go_on()
        published = asyncio.create_task(_publish(made, asked.publish))
        started, told = now(), 0.0
        while (at := now() - started) < asked.minutes * 60:
            for name, service in made.services.items():
                for measure, value in sample(service).items():
                    series[name, measure].samples.append((at, value))
            if at - told > 60:
                told = at
                note(f"{at / 60:.0f} min: {made.load.served.total()} served, {len(made.load.refused)} refused")
            await asyncio.sleep(asked.every)
        published.cancel()
        await asyncio.gather(published, return_exceptions=True)
        await made.load.pause()
        found = [*made.load.broken, *await looked(made)]
        if made.load.refused:
            found.append(Broken("F", f"{len(made.load.refused)} requests failed, the first: {made.load.refused[0]}"))
        return list(series.values()), made.load.served.total(), found


def sample(service: Service) -> dict[str, float]:
    """What a process has now; nothing of one that is just writing down its tasks."""
    try:
        seen = usage(service)
    except ValueError:
        return {}
    return {"RSS MB": seen.memory / 1e6, "descriptors": float(seen.files), "tasks": float(seen.tasks)}


async def _publish(made: Scene, every: float) -> None:
    while True:
        await asyncio.sleep(every)
        await asyncio.shield(made.publish())


def main() -> int:
    """Run it; the exit code."""
    asked = arguments()
    with workplace("soak") as lab:
        series, served, broken = asyncio.run(soak(lab, asked))
    facts = {
        "load": f"{asked.clients} clients, {served} requests served in {asked.minutes:g} minutes, seed {asked.seed}",
        "versions": f"a new one every {asked.publish:g} s",
        "machine": processor(),
        "slopes": f"an hour, Theil and Sen's, after {asked.minutes * WARM:g} minutes of warming up",
        "limits": ", ".join(
            f"{measure} {limit:g} an hour, {least:g} in all" for measure, (limit, least) in LIMITS.items()
        ),
        "broken": "; ".join(map(str, broken)) or "nothing",
    }
    table = Table(*SOAK_COLUMNS, title=facts["load"], title_justify="left")
    for one in series:
        table.add_row(*one.row())
    out = console()
    out.print(table)
    for name in ("slopes", "limits", "broken"):
        out.print(f"{name}: {facts[name]}", markup=False)
    asked.html.write_text(page("Soak", facts, series))
    out.print(f"plots: {asked.html}", markup=False)
    return int(bool(broken) or any(one.verdict == "grows" for one in series))


if __name__ == "__main__":
    sys.exit(main())
