"""Whether nodes are well: a trend of what probes and clients say of each. Pure.

- ``THRESHOLD`` probes that fail one after the other eject a node, for 30 seconds times the number of its ejections
  (at most 300). Then it is on probation: one more failure ejects it again, a success ends that.
- Each ``FORGIVE`` seconds without a failure take one ejection off its record.
- What clients say is not signed and weighs little: each address counts once a node, as ``REPORT`` of a failure, for
  ``REPORT_LIFETIME`` seconds, and for nothing until ``REPORTERS`` addresses say the same. An address is a whole /64 of
  IPv6: that is what one customer has.
- Heartbeats are no evidence here. A node that sends none is out of the membership within their TTL, sooner than it
  could be ejected; and one that sends them while nobody reaches it would be found well.

How many of a region may be passed over is not for a node's trend to say: see ``shared.routing`` (panic).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv6Address, ip_address
from typing import Any

THRESHOLD = 5
EJECTION, LONGEST = 30.0, 300.0
"""Seconds of the first ejection, and of the longest."""
FORGIVE = 30.0
REPORT = 0.5
REPORTERS = 3
REPORT_LIFETIME = 60.0
MAX_REPORTERS = 32
"""Addresses kept a node, the latest ones: what a flood of reports may cost."""


@dataclass(slots=True)
class Trend:
    """What is known of one node."""

    failures: int = 0
    """Probes that failed since the last that did not."""
    ejections: int = 0
    ejected_until: float = 0.0
    forgiven: float = 0.0
    """When its record was last made shorter, or it last failed."""
    reports: OrderedDict[str, float] = field(default_factory=OrderedDict)
    """When an address last said that it fails, oldest first."""


class Health:
    """The trends of all nodes of one observer. ``now`` is in seconds that only grow."""

    def __init__(self) -> None:
        self._trends: dict[str, Trend] = {}
        self._ejected: dict[str, Trend] = {}
        self.changes = 0
        """Ejections, and their ends that were seen: views made from an older count are out of date."""

    def __repr__(self) -> str:
        return f"<Health of {len(self._trends)} nodes, {len(self._ejected)} ejected>"

    def succeeded(self, node: str, now: float) -> None:
        """A probe was answered."""
        trend = self._trends.get(node)
        if trend is None:
            return
        trend.failures = 0
        if trend.ejections and now >= trend.ejected_until and now - trend.forgiven >= FORGIVE:
            trend.ejections -= 1
            trend.forgiven = now

    def failed(self, node: str, now: float) -> bool:
        """A probe was not answered. Gives whether the node is ejected for it."""
        trend = self._trends.setdefault(node, Trend())
        if now < trend.ejected_until:
            return False
        trend.failures += 1
        trend.forgiven = now
        return self._judge(node, trend, now)

    def report(self, node: str, ok: bool, address: str, now: float) -> bool:
        """A client at ``address`` says how it went. Gives whether the node is ejected for it."""
        who = reporter(address)
        trend = self._trends.get(node)
        if ok:
            if trend is not None:
                trend.reports.pop(who, None)
            return False
        if trend is None:
            trend = self._trends[node] = Trend()
        trend.reports[who] = now
        trend.reports.move_to_end(who)
        if len(trend.reports) > MAX_REPORTERS:
            trend.reports.popitem(last=False)
        return now >= trend.ejected_until and self._judge(node, trend, now)

    def _judge(self, node: str, trend: Trend, now: float) -> bool:
        if trend.failures + self._reported(trend, now) < THRESHOLD:
            return False
        trend.ejections += 1
        trend.ejected_until = now + min(EJECTION * trend.ejections, LONGEST)
        trend.failures = THRESHOLD - 1
        trend.forgiven = trend.ejected_until
        trend.reports.clear()
        self._ejected[node] = trend
        self.changes += 1
        return True

    def _reported(self, trend: Trend, now: float) -> float:
        while trend.reports and next(iter(trend.reports.values())) <= now - REPORT_LIFETIME:
            trend.reports.popitem(last=False)
        return REPORT * len(trend.reports) if len(trend.reports) >= REPORTERS else 0.0

    def ejected(self, now: float) -> Mapping[str, Trend]:
        """The nodes that are out now."""
        for node in [node for node, trend in self._ejected.items() if trend.ejected_until <= now]:
            del self._ejected[node]
            self.changes += 1
        return self._ejected

    def keep(self, nodes: Mapping[str, object]) -> None:
        """Forget all others, but those that are ejected: leaving and coming back is no cure."""
        for gone in self._trends.keys() - nodes.keys() - self._ejected.keys():
            del self._trends[gone]

    def describe(self, node: str, now: float) -> dict[str, Any]:
        """For people: failures, ejections, seconds that it is still out, and clients that complain."""
        trend = self._trends.get(node, Trend())
        left = max(0.0, trend.ejected_until - now)
        return {
            "ejected": left > 0,
            "seconds_left": round(left, 1),
            "failures": trend.failures,
            "ejections": trend.ejections,
            "complaints": sum(when > now - REPORT_LIFETIME for when in trend.reports.values()),
        }


def reporter(address: str) -> str:
    """Whom a report from ``address`` is counted for."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return ""
    if isinstance(parsed, IPv6Address):
        return str(parsed.ipv4_mapped) if parsed.ipv4_mapped else f"{int(parsed) >> 64:x}::"
    return address
