"""What a run of faults and a soak say: slopes, verdicts, and the table. Pure."""

from __future__ import annotations

import ast
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

FAULTS = {
    "F1": "edge killed in the middle of fills",
    "F2": "publisher or origin killed at a step of a publish",
    "F3": "client killed in the middle of a download",
    "F4": "power cut",
    "F5": "edge stands still",
    "F6": "origin dead or standing still",
    "F7": "Redis killed",
    "F8": "Redis stands still",
    "F9": "Redis emptied, read-only, failed over",
    "F10": "poisoned records in Redis",
    "F11": "disk full",
    "F12": "no inode left, read-only disk",
    "F13": "I/O errors at read and fsync",
    "F14": "bit rot in a cached shard",
    "F15": "source ends short",
    "F16": "peer gives wrong bytes",
    "F17": "origin gives wrong bytes",
    "F18": "source answers ranges wrong, or compressed",
    "F19": "source drips or stalls",
    "F20": "source refuses, always or at times",
    "F21": "herd on a cold shard",
    "F22": "client that caused a fetch leaves",
    "F23": "slow headers and bodies",
    "F24": "slow readers",
    "F25": "WAN with delay and loss",
    "F26": "connections reset or swallowed upstream",
    "F27": "region cut off",
    "F28": "wrong clocks",
    "F29": "short of descriptors or memory",
    "F30": "node leaves and comes back empty",
    "F31": "no edge alive",
    "F32": "rolling restart",
    "F33": "aggregator or site killed in a round",
    "F34": "keys rotated and revoked",
    "F35": "hours of load",
}
"""What goes wrong, by number."""

INVARIANTS = {
    "I1": "no wrong byte was delivered or kept",
    "I2": "no version that was accepted fell",
    "I3": "every request ended by its deadline, with its bytes or a typed error",
    "I4": "memory, descriptors and tasks came back",
    "I5": "service came back in time",
    "I6": "nothing partial has a final name",
    "I7": "no traceback, no 500, no process gone",
    "F": "no request failed where none may",
}
"""What must hold after each fault."""

FEWEST = 12
"""Groups of samples that a slope is judged by."""
GROUPS = 60
SIGNIFICANT = 1.96
"""Standard deviations on each side: 95 in 100 slopes are within."""

_NUMBERS = re.compile(r"\bF([0-9]{1,2})(?: to F([0-9]{1,2}))?\b")


# Faults


@dataclass
class Case:
    """What was seen of one fault: injected into the live network, and by tests."""

    fault: str
    injected: int = 0
    recoveries: list[float] = field(default_factory=list)
    """Seconds from each fault's end until all was well."""
    served: int = 0
    """Requests of the load that were served from the fault's begin until it was over."""
    refused: int = 0
    """Those that ended with a typed error."""
    passed: int = 0
    """Tests of it."""
    skipped: int = 0
    broken: list[str] = field(default_factory=list)
    """Which invariant, and how: one line each."""
    covered: bool = True
    """Whether anything here is of it."""

    @property
    def verdict(self) -> str:
        """In a word or two."""
        if self.broken:
            return "BROKEN"
        if self.injected or self.passed:
            return "held"
        if not self.covered:
            return "not covered"
        return "skipped" if self.skipped else "not run"


def row(case: Case) -> list[str]:
    """A case as a row of the table."""
    seconds = case.recoveries
    took = f"{statistics.median(seconds):.1f} / {max(seconds):.1f}" if seconds else ""
    tests = f"{case.passed}" + (f" (+{case.skipped} skipped)" if case.skipped else "")
    counts = [
        f"{case.injected or ''}",
        f"{case.served or ''}",
        f"{case.refused or ''}",
        took,
        tests if tests != "0" else "",
    ]
    return [case.fault, FAULTS[case.fault], *counts, case.verdict]


COLUMNS = ["", "fault", "injected", "served", "refused", "recovery s (p50 / max)", "tests", "verdict"]


def exit_code(cases: Iterable[Case]) -> int:
    """1 where an invariant broke."""
    return int(any(case.broken for case in cases))


def named(docstring: str) -> set[str]:
    """The faults that a docstring names: ``F7, F8: …``, ``F15 to F18: …``."""
    found = set()
    for first, last in _NUMBERS.findall(docstring):
        found |= {f"F{number}" for number in range(int(first), int(last or first) + 1)}
    return found & set(FAULTS)


def ids_by_fault(root: Path, folders: Sequence[str]) -> dict[str, list[str]]:
    """Which tests are of which fault, by their docstrings or their module's: pytest's ids."""
    found: dict[str, list[str]] = {name: [] for name in FAULTS}
    for path in sorted(file for folder in folders for file in (root / folder).glob("test_*.py")):
        text = path.read_text()
        if not _NUMBERS.search(text):
            continue  # to parse takes long, and most files name none
        module = ast.parse(text)
        whole = named(ast.get_docstring(module) or "")
        for node in module.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                for fault in sorted(whole | named(ast.get_docstring(node) or "")):
                    found[fault].append(f"{path.relative_to(root)}::{node.name}")
    return found


# Soaks


@dataclass(frozen=True)
class Slope:
    """How fast something grows, a hour, and between what its slope is in 95 of 100 such runs."""

    middle: float
    low: float
    high: float
    first: float
    last: float


def slope(samples: Sequence[tuple[float, float]]) -> Slope | None:
    """Theil and Sen's: the median of the slopes between all pairs, of medians of groups of samples.

    ``samples``: seconds, and the value then, in order. A jump or a spike moves it little. None where they are too few.
    The bounds are Sen's (1968): by how many pairs would rise among as many values that rise and fall at random.
    """
    if len(samples) < FEWEST:
        return None
    size = max(1, math.ceil(len(samples) / GROUPS))
    groups = [samples[start : start + size] for start in range(0, len(samples), size)]
    points = [tuple(statistics.median(column) for column in zip(*group, strict=True)) for group in groups]
    pairs = ((a, b) for number, a in enumerate(points) for b in points[number + 1 :])
    slopes = sorted((b[1] - a[1]) / (b[0] - a[0]) * 3600 for a, b in pairs if b[0] > a[0])
    n = len(points)
    spread = SIGNIFICANT * math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    low = max(0, round((len(slopes) - spread) / 2))
    high = min(len(slopes) - 1, round((len(slopes) + spread) / 2))
    return Slope(statistics.median(slopes), slopes[low], slopes[high], points[0][1], points[-1][1])


def grows(found: Slope | None, limit: float, least: float = 0.0) -> str:
    """``flat``, ``grows`` (by all that the samples say more than ``limit`` an hour, and by ``least`` already), or
    ``unclear``: run longer."""
    if found is None:
        return "unclear"
    if found.high <= limit:
        return "flat"
    return "grows" if found.low > limit and found.last - found.first >= least else "unclear"


@dataclass
class Series:
    """One measure of one process."""

    process: str
    measure: str
    limit: float
    """Growth an hour that is no leak, in the measure's unit."""
    samples: list[tuple[float, float]] = field(default_factory=list)
    warm: float = 0.0
    """Seconds at which what counts begins."""
    least: float = 0.0
    """Growth in all that may be an allocator's, or a client more."""

    @property
    def slope(self) -> Slope | None:
        """Of what counts."""
        return slope([sample for sample in self.samples if sample[0] >= self.warm])

    @property
    def verdict(self) -> str:
        """In a word."""
        return grows(self.slope, self.limit, self.least)

    def row(self) -> list[str]:
        """As a row of a table."""
        found = self.slope
        figures = [""] * 4
        if found:
            bounds = f"{found.low:+.2f} to {found.high:+.2f}"
            figures = [f"{found.first:.1f}", f"{found.last:.1f}", f"{found.middle:+.2f}", bounds]
        return [self.process, self.measure, *figures, self.verdict]


SOAK_COLUMNS = ["process", "measure", "first", "last", "an hour", "95 %", "verdict"]
WIDTH, HEIGHT = 640, 120


def page(title: str, facts: Mapping[str, str], series: Sequence[Series]) -> str:
    """A page that needs nothing else: the facts, the table, and a plot of each series."""
    head = "".join(f"<th>{escape(name)}</th>" for name in SOAK_COLUMNS)
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in one.row())}</tr>" for one in series)
    said = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>'
        "body{font:15px system-ui;margin:2em;max-width:60em}td,th{padding:.2em .8em;text-align:right}"
        "td:first-child{text-align:left}svg{background:#8881;display:block}dt{font-weight:bold}</style>"
        f"<h1>{escape(title)}</h1><dl>{said}</dl><table><tr>{head}</tr>{rows}</table>{''.join(map(plot, series))}"
    )


def plot(series: Series) -> str:
    """A series as inline SVG, with the line where what counts begins."""
    points = series.samples
    if len(points) < 2:
        return ""
    start, end = points[0][0], points[-1][0]
    low, high = (extreme(value for _, value in points) for extreme in (min, max))
    across, up = WIDTH / max(end - start, 1e-9), (HEIGHT - 20) / max(high - low, 1e-9)
    place = [f"{(x - start) * across:.1f},{HEIGHT - 10 - (y - low) * up:.1f}" for x, y in points]
    warm = (series.warm - start) * across
    name = escape(f"{series.process}: {series.measure}, {low:.1f} to {high:.1f} in {(end - start) / 60:.0f} min")
    return (
        f'<h3>{name}</h3><svg role="img" aria-label="{name}" width="{WIDTH}" height="{HEIGHT}">'
        f'<line x1="{warm:.1f}" x2="{warm:.1f}" y1="0" y2="{HEIGHT}" stroke="#888" stroke-dasharray="4"/>'
        f'<polyline fill="none" stroke="#06c" stroke-width="1.5" points="{" ".join(place)}"/></svg>'
    )


def outcomes(junit: Iterable[tuple[str, str, str]]) -> dict[str, Counter[str]]:
    """Of tests, by pytest's id without parameters: how many ``passed``, ``failed``, ``skipped``.

    ``junit``: module with dots, name, and outcome of each."""
    found: dict[str, Counter[str]] = {}
    for module, name, outcome in junit:
        found.setdefault(f"{module.replace('.', '/')}.py::{name.partition('[')[0]}", Counter())[outcome] += 1
    return found
