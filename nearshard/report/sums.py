"""What a network's nodes served, and what their sites' links were spared: added up for people. Pure.

A site is a region: what its nodes had from each other is no traffic of its link. Bytes are counted on each link that
they crossed, so what a parent region passed on to another one is served twice, once by each.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from itertools import groupby

from shared.errors import RequestError
from shared.usage import (
    BOUNDS,
    COUNTS,
    KEEP_DAYS,
    NO_MODEL,
    OTHER,
    PRIVATE,
    Day,
    Usage,
    days_before,
    parse_day,
    total,
)

_PRICE = re.compile(
    r"(?P<sign>[$€£¥]?)\s?(?P<amount>[0-9]{1,9}(?:\.[0-9]{1,9})?)\s?(?P<code>[A-Z]{3})?/(?P<unit>[kMGT]i?B)"
)
_UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "kiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_NAMES = {NO_MODEL: "shards of no known model", OTHER: "other models", PRIVATE: "private models"}


@dataclass(frozen=True)
class Price:
    """What a byte on a link costs."""

    text: str
    """As it was given."""
    currency: str
    """Before the amount; may be empty."""
    amount: Decimal
    """For ``unit`` bytes."""
    unit: int

    def of(self, size: int) -> Decimal:
        """What so many bytes cost."""
        return self.amount * size / self.unit

    def show(self, size: int) -> str:
        """The same, for people."""
        cost = self.of(size)
        return f"{'-' if cost < 0 else ''}{self.currency}{abs(cost):,.2f}"


@dataclass(frozen=True)
class NodeUsage:
    """What a node of a site answered."""

    node: str
    site: str
    days: Mapping[str, Day]


@dataclass(frozen=True)
class Silent:
    """A node whose numbers are missing."""

    node: str
    site: str
    reason: str


@dataclass(frozen=True)
class Row:
    """The numbers of one model at one site on one day."""

    day: str
    site: str
    model: str
    usage: Usage


@dataclass(frozen=True)
class Report:
    """All of it. Days are of UTC, ``since`` and ``until`` among them."""

    since: str
    until: str
    price: Price | None
    rows: Sequence[Row]
    """By day, site and model."""
    nodes: Mapping[str, int]
    """Nodes that answered, by site."""
    silent: Sequence[Silent]

    @property
    def whole(self) -> Usage:
        """Everything."""
        return total(row.usage for row in self.rows)

    @property
    def sites(self) -> dict[str, Usage]:
        """By site, who served most first; also those that served nothing."""
        return {**self._by(lambda row: row.site), **{site: Usage() for site in self._idle()}}

    @property
    def models(self) -> dict[str, Usage]:
        """By model, the one that was served most first."""
        return self._by(lambda row: row.model)

    def days(self, site: str | None = None) -> dict[str, Usage]:
        """By day, every one of them in its order; of one site, or of all."""
        found = {day: Usage() for day in all_days(self.since, self.until)}
        for row in self.rows:
            if site in (None, row.site):
                found[row.day].add(row.usage)
        return found

    def _by(self, key: Callable[[Row], str]) -> dict[str, Usage]:
        rows = sorted(self.rows, key=key)
        sums = {name: total(row.usage for row in group) for name, group in groupby(rows, key)}
        return dict(sorted(sums.items(), key=lambda item: (-item[1].served, item[0])))

    def _idle(self) -> Iterator[str]:
        busy = {row.site for row in self.rows}
        return (site for site in sorted(self.nodes) if site not in busy)


def build(nodes: Iterable[NodeUsage], silent: Iterable[Silent], since: str, until: str, price: Price | None) -> Report:
    """Of what nodes answered; days before ``since`` and after ``until`` are left out."""
    cells: dict[tuple[str, str, str], Usage] = {}
    counted: dict[str, int] = {}
    for one in nodes:
        counted[one.site] = counted.get(one.site, 0) + 1
        for day, models in one.days.items():
            if since <= day <= until:
                for model, usage in models.items():
                    cells.setdefault((day, one.site, model), Usage()).add(usage)
    rows = [Row(*cell, usage) for cell, usage in sorted(cells.items())]
    return Report(since, until, price, rows, counted, sorted(silent, key=lambda one: (one.site, one.node)))


def parse_since(text: str, today: str) -> str:
    """The first day: ``30d`` is the last thirty, today among them; or a day. Raises RequestError."""
    if match := re.fullmatch(r"([0-9]{1,3})d", text):
        count = int(match[1])
        if not 1 <= count <= KEEP_DAYS:
            raise RequestError(f"nodes keep {KEEP_DAYS} days: since is from 1d to {KEEP_DAYS}d, or a day")
        return days_before(today, count - 1)
    day = parse_day(text)
    if not days_before(today, KEEP_DAYS) <= day <= today:
        raise RequestError(f"since is a day that was, at most {KEEP_DAYS} days ago")
    return day


def parse_price(text: str) -> Price:
    """``0.08/GB``, ``$0.08/GB`` or ``0.08 EUR/GB``. Raises RequestError."""
    match = _PRICE.fullmatch(text.strip())
    if not match:
        raise RequestError("a price is like 0.08/GB, $0.08/GB or 0.08 EUR/GB; units are kB, MB, GB, TB, MiB, GiB, TiB")
    currency = match["sign"] or (f"{match['code']} " if match["code"] else "")
    return Price(match[0], currency, Decimal(match["amount"]), _UNITS[match["unit"]])


def all_days(since: str, until: str) -> list[str]:
    """Every day from one to another, both among them."""
    first, last = date.fromisoformat(since).toordinal(), date.fromisoformat(until).toordinal()
    return [date.fromordinal(day).isoformat() for day in range(first, last + 1)]


# What is made of it


def sentences(report: Report) -> list[str]:
    """What there is to say, the most important first."""
    whole, price = report.whole, report.price
    if not whole.requests and not whole.link:
        return [f"{_span(report)}, nothing was served.", *_missing(report)]
    served = f"{_span(report)}, {_sites(report)} served {size_text(whole.served)} of models to their clients"
    if whole.spared >= 0:
        money = f": at {price.text} that saved {price.show(whole.spared)}" if price else ""
        share = f" ({percent(whole.spared, whole.served)})" if whole.served else ""
        said = [
            f"{served}, and {size_text(whole.spared)} of it{share} did not cross a link{money}.",
            f"{size_text(whole.link)} crossed the links to origins and other regions.",
        ]
    else:
        money = f" At {price.text} that cost {price.show(-whole.spared)}." if price else ""
        said = [
            f"{served}.",
            f"{size_text(whole.link)} crossed the links to origins and other regions: {size_text(-whole.spared)} more"
            f" than was served, since models were brought ahead of clients, or new to their sites.{money}",
        ]
    if whole.saved:
        said.append(f"Without deltas and compression {size_text(whole.saved)} more would have crossed them.")
    if whole.requests:
        said.append(_speed(whole))
        said.append(
            f"{whole.errors:,} of {whole.requests:,} requests failed." if whole.errors else "No request failed."
        )
    return [*said, *_missing(report)]


def table(report: Report) -> str:
    """One line a day, site and model, as CSV (RFC 4180) with a header."""
    out = io.StringIO()
    writer = csv.writer(out)
    names = [name if name in ("requests", "hits", "errors") else f"{name}_bytes" for name in COUNTS]
    money = ["money_saved"] if report.price else []
    times = ["ready_p50_seconds", "ready_p95_seconds"]
    writer.writerow(["day", "site", "model", *names, "spared_bytes", *times, *money])
    for row in report.rows:
        usage = row.usage
        seconds = ["" if value is None else f"{value:.3f}" for value in (usage.quantile(0.5), usage.quantile(0.95))]
        worth = [f"{report.price.of(usage.spared):.4f}"] if report.price else []
        model = _NAMES.get(row.model, row.model)
        writer.writerow([row.day, row.site, model, *usage.counts().values(), usage.spared, *seconds, *worth])
    return out.getvalue()


def as_document(report: Report) -> dict[str, object]:
    """For JSON. ``money_saved`` is there with a price; shares and times are null where there is nothing to tell."""
    return {
        "since": report.since,
        "until": report.until,
        "price": report.price.text if report.price else None,
        "summary": sentences(report),
        "total": _record(report, report.whole),
        "sites": {
            name: {**_record(report, one), "nodes": report.nodes.get(name, 0)} for name, one in report.sites.items()
        },
        "models": {name: _record(report, one) for name, one in report.models.items()},
        "days": {day: _record(report, one) for day, one in report.days().items()},
        "silent": [{"node": one.node, "site": one.site, "reason": one.reason} for one in report.silent],
    }


def _record(report: Report, usage: Usage) -> dict[str, object]:
    money = {"money_saved": round(float(report.price.of(usage.spared)), 4)} if report.price else {}
    return {
        **usage.counts(),
        "spared": usage.spared,
        "hit_ratio": round(usage.hits / usage.requests, 4) if usage.requests else None,
        "ready_p50": usage.quantile(0.5),
        "ready_p95": usage.quantile(0.95),
        **money,
    }


def _span(report: Report) -> str:
    days = len(all_days(report.since, report.until))
    return f"From {report.since} to {report.until} ({days} days)" if days > 1 else f"On {report.since}"


def _sites(report: Report) -> str:
    nodes = sum(report.nodes.values())
    return f"{_count(len(report.nodes), 'site')} with {_count(nodes, 'node')}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _speed(usage: Usage) -> str:
    said = f"{percent(usage.hits, usage.requests)} of {usage.requests:,} requests were answered from what was there"
    half, most = usage.quantile(0.5), usage.quantile(0.95)
    if half is None:
        return f"{said}."
    return (
        f"{said}; half of all whole downloads took up to about"
        f" {seconds_text(half)}, 95 of 100 up to about {seconds_text(most)}."
    )


def _missing(report: Report) -> list[str]:
    if not report.silent:
        return []
    named = ", ".join(f"{one.node} ({one.site})" for one in report.silent)
    return [f"{_count(len(report.silent), 'node')} did not answer; what was served there is missing here: {named}."]


def model_text(model: str) -> str:
    """A model's name, or what stands in its place, for people."""
    return _NAMES.get(model, model)


def size_text(size: int) -> str:
    """Bytes with three digits, in the units that links are billed in: ``1.23 GB`` is 1,230,000,000."""
    number, units = float(abs(size)), ["bytes", "kB", "MB", "GB", "TB", "PB"]
    while number >= 999.5 and len(units) > 1:
        number /= 1000
        units.pop(0)
    digits = 0 if units[0] == "bytes" or number >= 99.95 else 1 if number >= 9.995 else 2
    return f"{'-' if size < 0 else ''}{number:,.{digits}f} {units[0]}"


def percent(part: int, whole: int) -> str:
    """A share; 100 % only where it is all."""
    if not whole:
        return "-"
    share = 100 * part / whole
    if part < whole and share > 99.9:
        return "99.9 %"
    return f"{share:.1f} %" if share < 10 or share > 99 else f"{share:.0f} %"


def seconds_text(seconds: float | None) -> str:
    """A time of a Usage, as exactly as its classes are."""
    if seconds is None:
        return "-"
    if seconds >= BOUNDS[-1]:
        return f"over {BOUNDS[-1]:,.0f} s"
    seconds = max(seconds, BOUNDS[0])
    return f"{seconds:.2f} s" if seconds < 0.1 else f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
