"""The page of a load test: its figures add up, its plots are drawn, and it is one file that asks for nothing else."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from loadtests.bench_regions import CONTENDERS, MORE, PHASES, Phase, goals, tables
from loadtests.load_report import FAILED, ORIGIN, OTHER, Run, Sample, outcome_of, page, rows, shares
from loadtests.percentiles import percentile
from loadtests.region_clients import Asked
from shared.outcome import Outcome, cache_status

SAMPLES = [
    *(Sample(float(at), "north", "/a", 0.1 * (at + 1), 1_000_000, "hit-memory", "") for at in range(8)),
    Sample(8.0, "north", "/a", 2.0, 1_000_000, "fill-origin", ""),
    Sample(9.0, "south", "/b", 9.0, 0, "", "TimeoutError"),
]
RUN = Run(
    "A <title>",
    10.0,
    ["north", "south", "idle"],
    SAMPLES,
    [(4.0, "the link of south is cut & gone")],
    [(0.0, {"north": 500, "south": 0}), (10.0, {"north": 2_000_500, "south": 1_000_000})],
    "as counted",
    {"WAN": "two tins & a string"},
)


class Parsed(HTMLParser):
    """Elements that were opened and not closed, and all that a page would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.seen: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """See HTMLParser."""
        self.seen.append(tag)
        self.fetched += [f"{name}={value}" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "path", "rect", "circle", "li", "tr", "th", "td", "p", "html", "head", "body"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """See HTMLParser."""
        if tag in self.open:
            assert self.open.pop() == tag


def test_figures_add_up() -> None:
    north, south, whole = rows(RUN)
    assert (north.requests, south.requests, whole.requests) == (9, 1, 10)
    assert (north.failed, south.failed, whole.failed) == (0, 1, 1)
    assert north.served == whole.served == 9_000_000
    assert (north.carried, south.carried, whole.carried) == (2_000_000, 1_000_000, 3_000_000)
    assert (north.p50, north.p99) == (0.5, 2.0)
    assert north.mean == pytest.approx((3.6 + 2.0) / 9)
    assert north.near == pytest.approx(8 / 9)
    assert shares(SAMPLES) == {"hit-memory": 0.8, "fill-origin": 0.1, FAILED: 0.1}


def test_the_page_stands_alone_and_says_what_it_shows() -> None:
    text = page(RUN)
    parsed = Parsed(text)
    assert parsed.open == []
    assert parsed.fetched == []
    assert parsed.seen.count("svg") == 3
    assert parsed.seen.count("script") == 0
    assert "url(" not in text
    assert "A &lt;title&gt;" in text
    assert "<title>the link of south is cut &amp; gone</title>" in text
    assert "two tins &amp; a string" in text
    assert "9.0 MB were served, 3.0 MB crossed the WAN: 3.0 bytes served for each" in text
    numbers = [float(number) for points in re.findall(r'points="([^"]+)"', text) for number in re.split("[ ,]", points)]
    assert numbers
    assert all(0 <= number <= 860 for number in numbers)


def test_what_is_not_known_is_not_shown() -> None:
    unknown = page(replace(RUN, carried=[], carried_by="Nobody knows."))
    assert "Nobody knows." in unknown
    assert "not known" in unknown
    assert "No request ended" in page(replace(RUN, samples=[]))
    assert page(replace(RUN, samples=SAMPLES[-1:])).count("100%") >= 2  # all failed: no curve, no division by nothing


def test_outcomes_are_those_of_the_nearest_cache() -> None:
    for outcome in Outcome:
        assert outcome_of(f"far; hit, {cache_status('near', outcome)}") == outcome.value
    assert outcome_of("") == ORIGIN
    assert outcome_of("someones; hit") == OTHER
    assert outcome_of("x; hit; detail=<script>") == OTHER


def test_percentiles_are_values_that_were_seen() -> None:
    assert [percentile(range(1, 101), part) for part in (0.0, 0.5, 0.95, 0.99, 1.0)] == [1, 50, 95, 99, 100]
    assert percentile([7.0], 0.99) == 7.0


def test_goals_of_the_comparison_are_met_by_figures_alone() -> None:
    def phase(contender: str, name: str, seconds: float, carried: int) -> Phase:
        return Phase(contender, name, [Asked("/", 0, seconds, 1, "", "")] * 4, carried, 0.5, 0.0)

    def found(edge: float, warm: float, carried: int) -> list[bool]:
        times = {"direct": 11.0, "edges": edge}
        phases = [
            phase(who, name, warm if who == "edges" and name in ("warm hits", MORE) else times.get(who, 1.0), carried
                  if who == "edges" else 100)
            for who in CONTENDERS
            for name in (*PHASES, MORE)
            if (who, name) != ("direct", MORE)
        ]  # fmt: skip
        return [met for met, _ in goals(tables(phases))]

    assert found(0.9, 1.05, 90) == [True] * 20
    assert found(0.9, 1.06, 90) == [True] * 16 + [False] * 4  # warm hits alone are behind
    assert found(0.9, 0.9, 101).count(False) == 3  # bytes of all but warm hits
    assert not found(1.2, 1.0, 90)[0]
