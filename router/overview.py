"""What a router shows people of its network: made of what it knows and of what nodes say of themselves. Pure.

A node's ``/status`` is data of another machine: what is no count is none, and names that are no models' are left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shared.errors import BadId
from shared.ids import parse_model
from shared.node import Node
from shared.usage import COUNTS, NO_MODEL, OTHER, PRIVATE, Usage, from_numbers, total

MAX_MODELS = 50
"""Models of one node that are kept by name, the largest ones; the others are one."""
MAX_SHOWN = 100
"""Models of the network that are shown by name."""
MAX_SITES = 64
"""Regions that a model is told by, those that had most of it."""
MAX_ERRORS = 50
UNNAMED = (OTHER, PRIVATE)
_MAX = 1 << 53


def as_json(usage: Usage) -> dict[str, Any]:
    """The counts, with what they come to: ``spared``, the bytes that would have crossed the link had clients gone to
    the origin and did not (below 0 where more was fetched than asked for), and the share of hits; None of nothing."""
    ratio = round(usage.hits / usage.requests, 4) if usage.requests else None
    return {**usage.counts(), "spared": usage.spared, "hit_ratio": ratio}


@dataclass(frozen=True, slots=True)
class Report:
    """What is used of a node's status. Bytes."""

    sent: int = 0
    """To clients since it started."""
    received: int = 0
    """Over its link since it started."""
    fills: int = 0
    memory: tuple[int, int] = (0, 0)
    """Used, and its budget."""
    disk: tuple[int, int] = (0, 0)
    day: str = ""
    """That ``models`` is of, as 2026-01-31; empty where the node does not say."""
    models: Mapping[str, Usage] = field(default_factory=dict)
    errors: tuple[Mapping[str, Any], ...] = ()

    @property
    def usage(self) -> Usage:
        """Of all models."""
        return total(self.models.values())


def parse_report(document: object) -> Report:
    """A node's status. Never fails: whatever is not as it should be is not there."""
    status = _map(document)
    usage = _map(status.get("usage"))
    models: dict[str, Usage] = defaultdict(Usage)
    for name, counts in _map(usage.get("models")).items():
        if known := _model(name):
            models[known].add(from_numbers([*(_count(_map(counts).get(part)) for part in COUNTS), *Usage().ready]))
    return Report(
        sum(map(_count, _map(status.get("sent_bytes")).values())),
        _count(status.get("upstream_bytes")),
        _count(status.get("fills")),
        _tier(status.get("memory")),
        _tier(status.get("disk")),
        day if isinstance(day := usage.get("day"), str) and len(day) == 10 else "",
        _largest(models, MAX_MODELS),
        _errors(status.get("errors")),
    )


def _largest(models: Mapping[str, Usage], count: int) -> dict[str, Usage]:
    """The models that most was served of, largest first; the others together come last."""
    ordered = sorted(models.items(), key=lambda item: (-item[1].served, -item[1].link, item[0]))
    named = [item for item in ordered if item[0] not in UNNAMED]
    kept = dict(named[:count])
    kept |= {name: usage for name, usage in ordered if name in UNNAMED}
    if rest := [usage for _, usage in named[count:]]:
        kept[OTHER] = total([kept.pop(OTHER, Usage()), *rest])
    return kept


def _errors(value: object) -> tuple[Mapping[str, Any], ...]:
    found = []
    for item in value[:MAX_ERRORS] if isinstance(value, list) else ():
        said = _map(item)
        texts = {name: str(said[name])[:200] for name in ("event", "code", "node", "region") if name in said}
        if "event" in texts:
            level = "error" if said.get("level") == "error" else "warning"
            found.append(
                {"time": _count(said.get("time")), "level": level, "count": _count(said.get("count")), **texts}
            )
    return tuple(found)


def _model(name: str) -> str:
    if name in (NO_MODEL, *UNNAMED):
        return name or OTHER
    try:
        return parse_model(name)
    except BadId:
        return ""


def _tier(value: object) -> tuple[int, int]:
    tier = _map(value)
    return _count(tier.get("used")), _count(tier.get("budget"))


def _count(value: object) -> int:
    return value if type(value) is int and 0 <= value < _MAX else 0


def _map(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


# The network


@dataclass(frozen=True, slots=True)
class Seen:
    """One node as it is known now."""

    node: Node
    told: Mapping[str, Any] | None
    """``Selection.describe``; None for one that may join and is not a member."""
    share: float = 0.0
    """Of the keys of its region."""
    report: Report | None = None
    """What it said last; None before it has said anything."""
    heard: float | None = None
    """Seconds since then."""
    trouble: str = ""
    """The code of why it could not be asked last time."""
    rate: float | None = None
    """Bytes a second to clients, between the last two answers; None where that is not known."""
    link_rate: float | None = None

    @property
    def state(self) -> str:
        """``well``, ``failing`` (probes fail), ``ejected``, ``draining`` or ``away`` (not a member)."""
        if self.told is None:
            return "away"
        health = self.told["health"]
        if health["ejected"]:
            return "ejected"
        if self.told["draining"]:
            return "draining"
        return "failing" if health["failures"] else "well"

    def usage(self, day: str) -> Usage | None:
        """Of a day; None where it is not known."""
        return self.report.usage if self.report and self.report.day == day else None

    def as_json(self, day: str) -> dict[str, Any]:
        """A line of the table."""
        usage, report = self.usage(day), self.report
        told = {name: self.told[name] for name in ("in_flight", "draining", "load", "health")} if self.told else {}
        return {
            **self.node.record(),
            "state": self.state,
            **told,
            "share": round(self.share, 4),
            "heard": None if self.heard is None else round(self.heard, 1),
            "trouble": self.trouble,
            "rate": _rounded(self.rate),
            "link_rate": _rounded(self.link_rate),
            "fills": report.fills if report else None,
            "memory": _used(report.memory) if report else None,
            "disk": _used(report.disk) if report else None,
            "today": as_json(usage) if usage else None,
        }


def _used(tier: tuple[int, int]) -> dict[str, int]:
    return {"used": tier[0], "budget": tier[1]}


def _rounded(rate: float | None) -> int | None:
    return None if rate is None else round(rate)


def order(seen: Iterable[Seen]) -> list[Seen]:
    """Those that somebody should look at first, then by region and name."""
    return sorted(seen, key=lambda one: (one.state == "well", one.node.region, one.node.id))


def network(seen: Sequence[Seen], day: str, shown: int) -> dict[str, Any]:
    """``regions``, ``nodes`` (at most so many; ``left_off`` says how many more there are), ``models`` and ``total``."""
    by_region: dict[str, list[Seen]] = defaultdict(list)
    for one in seen:
        by_region[one.node.region].append(one)
    listed = sorted(order(seen)[:shown], key=lambda one: (one.node.region, one.node.id))
    return {
        "day": day,
        "total": _sum(seen, day),
        "regions": [{"region": name, **_sum(ones, day)} for name, ones in sorted(by_region.items())],
        "nodes": [one.as_json(day) for one in listed],
        "left_off": len(seen) - len(listed),
        "models": _models(by_region, day),
    }


def _sum(seen: Sequence[Seen], day: str) -> dict[str, Any]:
    """Some nodes as one. ``today`` is of those that said it: ``known`` of them."""
    states = [one.state for one in seen]
    usages = [found for one in seen if (found := one.usage(day)) is not None]
    up = sum(state in ("well", "failing", "draining") for state in states)
    state = "lost" if not up else "well" if all(one in ("well", "draining") for one in states) else "impaired"
    return {
        "state": state if states else "empty",
        "nodes": len(states),
        "up": up,
        "in_flight": sum(one.told["in_flight"] for one in seen if one.told),
        "known": len(usages),
        "rate": _total(one.rate for one in seen),
        "link_rate": _total(one.link_rate for one in seen),
        "today": as_json(total(usages)) if usages else None,
    }


def _total(rates: Iterable[float | None]) -> int | None:
    known = [rate for rate in rates if rate is not None]
    return round(sum(known)) if known else None


def _models(by_region: Mapping[str, Sequence[Seen]], day: str) -> list[dict[str, Any]]:
    """What was served of each model, in all and site by site."""
    network: dict[str, Usage] = defaultdict(Usage)
    sites: dict[str, dict[str, Usage]] = defaultdict(lambda: defaultdict(Usage))
    for region, ones in by_region.items():
        for one in ones:
            for model, usage in one.report.models.items() if one.report and one.report.day == day else ():
                network[model].add(usage)
                sites[model][region].add(usage)
    kept = _largest(network, MAX_SHOWN)
    for model in sites.keys() - kept.keys():
        for region, usage in sites.pop(model).items():
            sites[OTHER][region].add(usage)
    return [
        {
            "model": model,
            **as_json(usage),
            "sites": [
                {"region": region, **as_json(part)}
                for region, part in sorted(sites[model].items(), key=lambda item: (-item[1].served, item[0]))[
                    :MAX_SITES
                ]
            ],
        }
        for model, usage in kept.items()
    ]


def _by_served(item: tuple[str, Usage]) -> tuple[int, str]:
    return -item[1].served, item[0]


def last_errors(own: Sequence[Mapping[str, Any]], seen: Iterable[Seen]) -> list[dict[str, Any]]:
    """The router's and the nodes', the latest first; ``from`` is the node, or empty."""
    found = [{"from": "", **error} for error in own]
    found += [{"from": one.node.id, **error} for one in seen if one.report for error in one.report.errors]
    return sorted(found, key=lambda error: -error["time"])[:MAX_ERRORS]
