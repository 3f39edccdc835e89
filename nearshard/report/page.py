"""A report as one HTML page that needs nothing else: sentences, then days, sites and models. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import zip_longest

from nearshard.report.sums import Report, model_text, percent, seconds_text, sentences, size_text
from shared.usage import Usage

STYLE = """
:root { color-scheme: light dark; --ink: #1c2128; --soft: #57606a; --line: #d0d7de; --page: #fff; --spared: #2f8f5b;
  --link: #b8590a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa4af; --line: #30363d; --page: #0f141a;
  --spared: #4cc38a; --link: #f0934a; } }
* { box-sizing: border-box; }
body { margin: 2rem auto; max-width: 68rem; padding: 0 1.25rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 1rem; } h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
.lead { font-size: 1.2rem; margin: 0 0 .5rem; } .missing { border-left: 4px solid var(--link); padding-left: .75rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: 1rem 1.5rem;
  margin: 1.5rem 0; padding: 0; list-style: none; }
.figures b { display: block; font-size: 1.6rem; line-height: 1.2; }
.figures span, .note, figcaption { color: var(--soft); }
.note, figcaption { font-size: .875rem; } figure { margin: 0; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
thead th { color: var(--soft); font-weight: 600; font-size: .875rem; vertical-align: bottom; white-space: normal; }
tbody th, thead th:first-child { text-align: left; font-weight: 600; white-space: normal;
  overflow-wrap: anywhere; min-width: 7.5rem; }
svg { display: block; width: 100%; height: auto; } svg .spared { fill: var(--spared); } svg .link { fill: var(--link); }
figure svg { min-width: 40rem; } svg text { fill: var(--soft); font-size: 12px; }
svg line { stroke: var(--line); } td svg { width: 6.5rem; }
.key { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 .9em; border-radius: 2px; }
@media print { body { margin: 0; max-width: none; } }
""".strip()
WIDE, HIGH, LEFT, LOW = 960, 220, 70, 24
"""Of the chart, and what its labels take at the left and below."""
STEPS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20)
"""Halves of a power of ten that a scale ends at."""
MOST_MODELS = 50
"""Models in the table; all of them are in the CSV."""


def page(report: Report) -> str:
    """The whole page."""
    first, *rest = sentences(report)
    title = f"Models delivered, {report.since} to {report.until}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(first)}</p>',
        *(f"<p{_missing(report, text)}>{escape(text)}</p>" for text in rest),
        _figures(report),
        _chart(report.days()),
        _sites(report),
        _models(report),
        _silent(report),
        _notes(report),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE}\n</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _missing(report: Report, text: str) -> str:
    return ' class="missing"' if report.silent and text == sentences(report)[-1] else ""


def _figures(report: Report) -> str:
    whole = report.whole
    if not report.rows:
        return ""
    shown = [
        (size_text(whole.served), "served to clients"),
        (size_text(whole.spared), "spared on the links"),
        *([(report.price.show(whole.spared), f"saved at {report.price.text}")] if report.price else []),
        (percent(whole.hits, whole.requests), "of requests from what was there"),
        (seconds_text(whole.quantile(0.5)), "took half of the downloads"),
    ]
    items = "".join(f"<li><b>{escape(value)}</b><span>{escape(what)}</span></li>" for value, what in shown)
    return f'<ul class="figures">{items}</ul>'


def _chart(days: Mapping[str, Usage]) -> str:
    """Bars by day: what crossed the links, and above it what clients got without that."""
    top = max((max(one.served, one.link) for one in days.values()), default=0)
    if not top:
        return ""
    step = _round_up(top)
    lines, high = [], HIGH - LOW - 10
    for part in (0.0, 0.5, 1.0):
        y = 10 + high * (1 - part)
        lines.append(f'<line x1="{LEFT}" x2="{WIDE}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{size_text(int(step * part))}</text>')
    bars = _bars(list(days.values()), LEFT, WIDE - LEFT, 10, high, step, list(days))
    names, width = list(days), (WIDE - LEFT) / len(days)
    ends = {0: "start", len(names) // 2: "middle", len(names) - 1: "end"} if len(names) > 2 else {0: "start"}
    for index, anchor in ends.items():
        x = LEFT + width * (index + {"start": 0, "middle": 0.5, "end": 1}[anchor])
        lines.append(f'<text x="{x:.1f}" y="{HIGH - 6}" text-anchor="{anchor}">{names[index]}</text>')
    key = (
        '<span class="key" style="background:var(--link);margin-left:0"></span>crossed the links'
        '<span class="key" style="background:var(--spared)"></span>served without that'
    )
    return (
        '<h2>Day by day</h2>\n<figure><div class="scroll" tabindex="0" role="region" aria-label="Day by day">'
        f'<svg viewBox="0 0 {WIDE} {HIGH}" role="img" aria-label="Bytes by day: over the links, and served without">'
        f"{''.join(lines)}{bars}</svg></div><figcaption>{key}</figcaption></figure>"
    )


def _bars(
    days: Sequence[Usage], left: float, wide: float, top: float, high: float, most: int, titles: Sequence[str] = ()
) -> str:
    width = wide / len(days)
    gap = min(2.0, width * 0.2)
    drawn = []
    for index, (one, title) in enumerate(zip_longest(days, titles, fillvalue=None)):
        assert one is not None
        if not one.served and not one.link:
            continue
        x, link = left + index * width, high * one.link / most
        spared = high * max(0, one.spared) / most
        place = f'x="{x:.1f}" width="{max(0.5, width - gap):.1f}"'
        told = f"{title}: {size_text(one.served)} served, {size_text(one.link)} over the links" if title else ""
        drawn.append(
            f"<g>{f'<title>{told}</title>' if told else ''}"
            f'<rect class="link" {place} y="{top + high - link:.1f}" height="{link:.1f}"/>'
            f'<rect class="spared" {place} y="{top + high - link - spared:.1f}" height="{spared:.1f}"/></g>'
        )
    return "".join(drawn)


def _round_up(size: int) -> int:
    """The next number with one digit, or a half of it."""
    unit: int = 10 ** (len(str(size)) - 1)
    return next(unit * step // 2 for step in STEPS if unit * step // 2 >= size)


def _sites(report: Report) -> str:
    rows = [_row(report, site, one, [_spark(report, site)]) for site, one in report.sites.items()]
    return _table("By site", "Site", report, ["Trend"], rows) if rows else ""


def _models(report: Report) -> str:
    models = list(report.models.items())
    rows = [_row(report, model_text(model), one, []) for model, one in models[:MOST_MODELS]]
    left = len(models) - MOST_MODELS
    more = f'<p class="note">{left} more models are in report.csv.</p>' if left > 0 else ""
    return _table("By model", "Model", report, [], rows) + more if rows else ""


def _table(title: str, what: str, report: Report, more: Sequence[str], rows: Sequence[str]) -> str:
    money = ["Saved"] if report.price else []
    names = ["Served", "Over the link", "Spared", "Share spared", *money, "Hit ratio", "Half within", "95 % within"]
    heads = "".join(f'<th scope="col">{name}</th>' for name in [what, *names, "Failed", *more])
    return (
        f'<h2>{title}</h2>\n<div class="scroll" tabindex="0" role="region" aria-label="{title}">'
        f"<table><thead><tr>{heads}</tr></thead><tbody>\n{chr(10).join(rows)}\n</tbody></table></div>"
    )


def _row(report: Report, name: str, one: Usage, more: Sequence[str]) -> str:
    cells = [
        size_text(one.served),
        size_text(one.link),
        size_text(one.spared),
        percent(one.spared, one.served) if one.spared >= 0 else "-",
        *([report.price.show(one.spared)] if report.price else []),
        percent(one.hits, one.requests),
        seconds_text(one.quantile(0.5)),
        seconds_text(one.quantile(0.95)),
        f"{one.errors:,}",
    ]
    shown = [escape(cell) for cell in cells] + list(more)
    return f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{cell}</td>" for cell in shown)}</tr>'


def _spark(report: Report, site: str) -> str:
    days = list(report.days(site).values())
    most = max(max(one.served, one.link) for one in days)
    if not most:
        return ""
    bars = _bars(days, 0, 160, 0, 28, most)
    return f'<svg viewBox="0 0 160 28" role="img" aria-label="Bytes by day at {escape(site)}">{bars}</svg>'


def _silent(report: Report) -> str:
    if not report.silent:
        return ""
    items = "".join(f"<li>{escape(f'{one.node} ({one.site}): {one.reason}')}</li>" for one in report.silent)
    return f"<h2>Nodes that did not answer</h2>\n<ul>{items}</ul>"


def _notes(report: Report) -> str:
    return (
        '<h2>What is counted</h2>\n<p class="note">Days are of UTC. Served: bytes sent to clients; nodes of other'
        " regions are clients of the region that they ask. Over the link: bytes from origins and other regions, also"
        " those that came ahead of clients. Spared: the one less the other; a site that was filled ahead can have less"
        " than nothing on a day, and gets it back when its clients come. Hit ratio: requests that were answered from"
        " what the site had. Ready: from a request for all of a file, a task or a shard to its last byte. Bytes are in"
        " decimal units: 1 GB is 1,000,000,000 bytes.</p>"
    )
