"""The report of a load test, as one HTML page with all in it: plots as SVG, what they show in words, figures. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import log10
from statistics import mean

from loadtests.percentiles import percentile
from shared.outcome import Outcome

ORIGIN, OTHER, FAILED = "straight from the origin", "other", "failed"
"""What is no outcome of an edge: no Cache-Status, one that is not ours, and no right answer."""
HERE = {Outcome.HIT_MEMORY.value, Outcome.HIT_DISK.value, Outcome.COLLAPSED.value, Outcome.STALE.value}
"""Outcomes for which no byte was fetched for the sake of this request."""
MEANING = {
    "hit-memory": "from the edge's memory",
    "hit-disk": "from the edge's disk",
    "collapsed": "joined a fetch that was under way",
    "fill-peer": "fetched from another edge of the region",
    "fill-parent": "fetched from a parent region",
    "fill-origin": "fetched from the origin for this request",
    "stale": "held, while the origin could not confirm it",
    ORIGIN: "an answer without Cache-Status",
    OTHER: "a Cache-Status that is not an edge's of ours",
    FAILED: "no whole and right answer",
}
COLOURS = ("#2f6fde", "#d9822b", "#2e9e6b", "#a04fc4", "#c23b4b", "#4aa3b5", "#8a8f2c", "#7a6a5b")
OUTCOME_COLOURS = {
    "hit-memory": "#2e9e6b",
    "hit-disk": "#7cc79a",
    "collapsed": "#4aa3b5",
    "fill-peer": "#8fb3f0",
    "fill-parent": "#5b8de6",
    "fill-origin": "#2f6fde",
    "stale": "#b9a13a",
    ORIGIN: "#a04fc4",
    OTHER: "#888888",
    FAILED: "#c23b4b",
}
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 860, 300, 70, 40, 26
"""Of a plot, and of the room around it."""
BINS = 40
"""Points of a curve over time."""


@dataclass(frozen=True)
class Sample:
    """One request of a person."""

    at: float
    """Seconds from the start of the run when it began."""
    region: str
    path: str
    seconds: float
    """Until the last byte."""
    size: int
    outcome: str
    error: str
    """Empty where all came and was right."""

    @property
    def shown(self) -> str:
        """The outcome that it counts as."""
        return FAILED if self.error else self.outcome


@dataclass(frozen=True)
class Run:
    """All that a report is made of."""

    title: str
    seconds: float
    regions: Sequence[str]
    samples: Sequence[Sample]
    events: Sequence[tuple[float, str]]
    """(seconds from the start, what happened)."""
    carried: Sequence[tuple[float, Mapping[str, int]]]
    """(seconds from the start, bytes over the WAN until then, by region); empty where that is not known."""
    carried_by: str
    """How these bytes were counted."""
    conditions: Mapping[str, str]


def outcome_of(cache_status: str) -> str:
    """What a Cache-Status field says (RFC 9211): of its last member, which is the cache nearest to who asked."""
    if not cache_status.strip():
        return ORIGIN
    for parameter in cache_status.rpartition(",")[2].split(";"):
        name, _, value = parameter.strip().partition("=")
        if name == "detail" and value in {outcome.value for outcome in Outcome}:
            return value
    return OTHER


# Figures


@dataclass(frozen=True)
class Row:
    """The figures of one region, or of all."""

    name: str
    requests: int
    failed: int
    mean: float
    p50: float
    p95: float
    p99: float
    served: int
    """Bytes that people got."""
    carried: int | None
    """Bytes over the WAN meanwhile."""
    near: float
    """The share of requests that were answered without a byte being fetched for them."""


def rows(run: Run) -> list[Row]:
    """One of each region that had requests, and one of all as the last; none where there were none."""
    crossed = _crossed(run)
    found = [
        _row(name, mine, crossed.get(name))
        for name in run.regions
        if (mine := [sample for sample in run.samples if sample.region == name])
    ]
    return [*found, _row("all", run.samples, sum(crossed.values()) if crossed else None)] if found else []


def _row(name: str, samples: Sequence[Sample], carried: int | None) -> Row:
    times = [sample.seconds for sample in samples if not sample.error] or [0.0]
    return Row(
        name=name,
        requests=len(samples),
        failed=sum(bool(sample.error) for sample in samples),
        mean=mean(times),
        p50=percentile(times, 0.50),
        p95=percentile(times, 0.95),
        p99=percentile(times, 0.99),
        served=sum(sample.size for sample in samples if not sample.error),
        carried=carried,
        near=sum(sample.shown in HERE for sample in samples) / len(samples),
    )


def _crossed(run: Run) -> dict[str, int]:
    if not run.carried:
        return {}
    first, last = run.carried[0][1], run.carried[-1][1]
    return {name: last[name] - first.get(name, 0) for name in last}


def shares(samples: Iterable[Sample]) -> dict[str, float]:
    """The share of each outcome, in the order of ``MEANING``; they add up to 1."""
    counted = Counter(sample.shown for sample in samples)
    return {name: counted[name] / counted.total() for name in MEANING if counted[name]}


# The page


def page(run: Run) -> str:
    """The whole report."""
    table = rows(run)
    if not table:
        return _document(run, "<p>No request ended in this time, so there is nothing to show.</p>")
    return _document(run, _summary(run, table) + _latency(run, table) + _outcomes(run) + _bytes(run, table))


def _document(run: Run, body: str) -> str:
    conditions = "".join(
        f"<tr><th scope=row>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in run.conditions.items()
    )
    events = "".join(f"<li>after {at:.0f} s: {escape(text)}</li>" for at, text in run.events)
    happened = f"<h2>What happened</h2><ul>{events}</ul>" if events else ""
    return (
        f'<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width">'
        f"<title>{escape(run.title)}</title><style>{_STYLE}</style></head><body><main><h1>{escape(run.title)}</h1>"
        f"{body}{happened}<h2>Conditions</h2><table>{conditions}</table>{_WORDS}</main></body></html>\n"
    )


def _summary(run: Run, table: Sequence[Row]) -> str:
    whole = table[-1]
    failed = f"{whole.failed} of them failed" if whole.failed else "none failed"
    said = (
        f"In {run.seconds:.0f} seconds {len(table) - 1} region{'s' * (len(table) > 2)} made {whole.requests} requests, "
        f"{failed}. Half of the answers were whole within {_time(whole.p50)}, and 99 of 100 within {_time(whole.p99)}. "
        f"{whole.near:.0%} were answered without a byte being fetched for them. " + _saved(whole)
    )
    head = "".join(
        f"<th scope=col>{name}</th>"
        for name in (
            "region", "requests", "failed", "mean", "p50", "p95", "p99", "MB served", "MB over the WAN", "near",
        )
    )  # fmt: skip
    lines = "".join(
        f"<tr><th scope=row>{escape(row.name)}</th><td>{row.requests}</td><td>{row.failed}</td>"
        + "".join(f"<td>{_time(value)}</td>" for value in (row.mean, row.p50, row.p95, row.p99))
        + f"<td>{row.served / 1e6:,.1f}</td><td>{_mega(row.carried)}</td><td>{row.near:.0%}</td></tr>"
        for row in table
    )
    return f"<p class=lead>{escape(said)}</p><table class=figures><thead><tr>{head}</tr></thead>{lines}</table>"


def _saved(row: Row) -> str:
    if row.carried is None:
        return "How much crossed the WAN is not known here."
    if not row.carried:
        return f"{row.served / 1e6:,.1f} MB were served, and nothing crossed the WAN."
    return (
        f"{row.served / 1e6:,.1f} MB were served, {row.carried / 1e6:,.1f} MB crossed the WAN: "
        f"{row.served / row.carried:.1f} bytes served for each."
    )


def _latency(run: Run, table: Sequence[Row]) -> str:
    slowest = max(table[:-1], key=lambda row: row.p95)
    fastest = min(table[:-1], key=lambda row: row.p95)
    said = f"The time until the last byte, by region: each point is the 95th percentile of {run.seconds / BINS:.1f} s. "
    if len(table) > 2:
        said += (
            f"Over the whole run 95 of 100 answers took at most {_time(fastest.p95)} in {fastest.name}, and "
            f"{_time(slowest.p95)} in {slowest.name}, the slowest."
        )
    else:
        said += f"Over the whole run 95 of 100 answers took at most {_time(slowest.p95)}."
    lines = {
        name: _over_time(run, [sample for sample in run.samples if sample.region == name and not sample.error])
        for name in run.regions
    }
    return _figure("Latency by region", said, _curves(run, lines, "ms", logarithmic=True))


def _over_time(run: Run, samples: Sequence[Sample]) -> list[tuple[float, float]]:
    """(seconds, p95 in ms) of each part of the time that has samples."""
    parts: dict[int, list[float]] = {}
    for sample in samples:
        parts.setdefault(min(BINS - 1, int(sample.at / run.seconds * BINS)), []).append(sample.seconds)
    return [((part + 0.5) / BINS * run.seconds, percentile(times, 0.95) * 1e3) for part, times in sorted(parts.items())]


def _outcomes(run: Run) -> str:
    whole = shares(run.samples)
    most = max(whole, key=lambda name: whole[name])
    said = f"How answers were had, by Cache-Status: most were “{most}” ({MEANING[most]}), {whole[most]:.0%} of all."
    if FAILED in whole:
        said += f" {whole[FAILED]:.1%} failed."
    bars, top, step = [], TOP, 46
    names = [name for name in run.regions if any(sample.region == name for sample in run.samples)]
    for name in [*names, "all"]:
        mine = [sample for sample in run.samples if name in (sample.region, "all")]
        bars.append(f'<text x="{LEFT - 8}" y="{top + 20}" text-anchor="end">{escape(name)}</text>')
        x = float(LEFT)
        for outcome, share in shares(mine).items():
            width = share * (WIDTH - LEFT - 10)
            label = f"{name}: {outcome} {share:.1%}"
            bars.append(
                f'<rect x="{x:.1f}" y="{top}" width="{width:.1f}" height="30" fill="{OUTCOME_COLOURS[outcome]}">'
                f"<title>{escape(label)}</title></rect>"
            )
            if width > 44:
                bars.append(
                    f'<text class=on x="{x + width / 2:.1f}" y="{top + 20}" text-anchor="middle">{share:.0%}</text>'
                )
            x += width
        top += step
    legend = _legend({f"{name}: {MEANING[name]}": OUTCOME_COLOURS[name] for name in whole})
    return _figure("Outcomes", said, _svg("".join(bars), top, said) + legend)


def _bytes(run: Run, table: Sequence[Row]) -> str:
    if not run.carried:
        return "<h2>Bytes over the WAN</h2><p>" + escape(run.carried_by) + "</p>"
    whole = table[-1]
    served = [(0.0, 0.0)]
    for sample in sorted(run.samples, key=lambda sample: sample.at + sample.seconds):
        if not sample.error:
            served.append((min(run.seconds, sample.at + sample.seconds), served[-1][1] + sample.size / 1e6))
    first = run.carried[0][1]
    crossed = [
        (min(at, run.seconds), sum(size - first.get(name, 0) for name, size in by.items()) / 1e6)
        for at, by in run.carried
    ]
    said = f"Bytes that people got, and bytes that crossed the WAN for them, added up. {_saved(whole)}"
    lines = {"served": _thinned(served), "over the WAN": crossed}
    return _figure("Bytes over the WAN against bytes served", said, _curves(run, lines, "MB")) + (
        f"<p class=small>{escape(run.carried_by)}</p>"
    )


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Some 300 of them, the last one among them."""
    return [*points[:: max(1, len(points) // 300)], points[-1]]


# Drawing


def _curves(
    run: Run, lines: Mapping[str, Sequence[tuple[float, float]]], unit: str, *, logarithmic: bool = False
) -> str:
    """Curves over the time of the run; what happened meanwhile is marked."""
    values = [value for points in lines.values() for _, value in points]
    ticks = _powers(values) if logarithmic else _steps(max(values, default=1.0))
    low, high = _scale(ticks[0], logarithmic), _scale(ticks[-1], logarithmic)

    def place(at: float, value: float) -> tuple[float, float]:
        height = (_scale(max(value, ticks[0]), logarithmic) - low) / (high - low)
        return LEFT + at / run.seconds * (WIDTH - LEFT - 10), HEIGHT - BOTTOM - height * (HEIGHT - BOTTOM - TOP)

    drawn = []
    for tick in ticks:
        _, y = place(0, tick)
        drawn.append(f'<path class=grid d="M{LEFT} {y:.1f}H{WIDTH - 10}"/>')
        drawn.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:,g} {unit}</text>')
    for tick in _steps(run.seconds):
        if tick <= run.seconds:
            x, _ = place(tick, ticks[0])
            drawn.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{tick:g} s</text>')
    for number, (at, text) in enumerate(run.events, 1):
        x, _ = place(min(at, run.seconds), ticks[0])
        drawn.append(
            f'<g><title>{escape(text)}</title><path class=event d="M{x:.1f} {TOP - 6}V{HEIGHT - BOTTOM}"/>'
            f'<text class=small x="{x:.1f}" y="{TOP - 10}" text-anchor="middle">{number}</text></g>'
        )
    colours = dict(zip(lines, COLOURS * (len(lines) // len(COLOURS) + 1), strict=False))
    for name, points in lines.items():
        if points:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
            drawn.append(
                f'<polyline points="{path}" stroke="{colours[name]}"><title>{escape(name)}</title></polyline>'
                + "".join(
                    f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{colours[name]}"/>'
                    for x, y in (place(*point) for point in points if len(points) <= BINS)
                )
            )
    marks = "; ".join(f"{number}: {text}" for number, (_, text) in enumerate(run.events, 1))
    noted = f"<p class=small>{escape(marks)}</p>" if marks else ""
    return _svg("".join(drawn), HEIGHT, ", ".join(lines)) + _legend(colours) + noted


def _scale(value: float, logarithmic: bool) -> float:
    return log10(value) if logarithmic else value


def _powers(values: Sequence[float]) -> list[float]:
    """Powers of ten around all values above nothing."""
    real = [value for value in values if value > 0] or [1.0]
    tick = 1.0
    while tick > min(real):
        tick /= 10
    while tick * 10 <= min(real):
        tick *= 10
    ticks = [tick]
    while ticks[-1] < max(real) or len(ticks) < 2:
        ticks.append(ticks[-1] * 10)
    return ticks


def _steps(most: float) -> list[float]:
    """From 0 to ``most`` or a little more, in four to ten round steps."""
    step = 1e-3
    factors = (2.0, 2.5, 2.0)
    number = 0
    while most / step > 8:
        step *= factors[number % 3]
        number += 1
    ticks = [0.0]
    while ticks[-1] < most or len(ticks) < 2:
        ticks.append(round(ticks[-1] + step, 9))
    return ticks


def _svg(drawn: str, height: float, label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">{drawn}</svg>'


def _legend(colours: Mapping[str, str]) -> str:
    items = "".join(
        f'<li><span style="background:{colour}"></span>{escape(name)}</li>' for name, colour in colours.items()
    )
    return f"<ul class=legend>{items}</ul>"


def _figure(title: str, said: str, drawn: str) -> str:
    return f"<h2>{escape(title)}</h2><p>{escape(said)}</p><figure>{drawn}</figure>"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"


def _mega(size: int | None) -> str:
    return "not known" if size is None else f"{size / 1e6:,.1f}"


_STYLE = """\
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#5d6671;--line:#d8dde3;--back:#fff}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ed;--soft:#9aa4af;--line:#373e47;--back:#15191e}}
body{margin:0;background:var(--back);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:900px;margin:auto;padding:1rem}h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}
.lead{font-size:1.05rem}.small{color:var(--soft);font-size:.85rem}figure{margin:0}
svg{width:100%;height:auto;display:block}svg text{fill:var(--soft);font:12px system-ui,sans-serif}
svg text.on{fill:#fff;font-weight:600}.grid{stroke:var(--line);stroke-width:1}
.event{stroke:var(--soft);stroke-dasharray:3 3}
polyline{fill:none;stroke-width:2;stroke-linejoin:round}
table{border-collapse:collapse;display:block;overflow-x:auto}.figures th,.figures td{white-space:nowrap}
th,td{padding:.25rem .6rem;border-bottom:1px solid var(--line)}
th[scope=row]{text-align:left;font-weight:600;vertical-align:top}
.figures td{text-align:right;font-variant-numeric:tabular-nums}
.legend{list-style:none;padding:0;display:flex;flex-wrap:wrap;gap:.3rem 1.2rem}
.legend span{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin-right:.4em}"""

_WORDS = """\
<h2>The words</h2><ul>
<li><b>Time</b>: from the request to the last byte, redirects and a second try at the router included; of answers that
were whole and right.</li>
<li><b>p50, p95, p99</b>: 50, 95 and 99 of 100 answers took no longer.</li>
<li><b>Near</b>: the share of requests for which no byte was fetched: what the edge held, and what joined a fetch
that was under way.</li>
<li><b>Failed</b>: refused, cut short, too late, or other bytes than their ETag names.</li>
<li><b>MB</b>: 10<sup>6</sup> bytes.</li></ul>"""
