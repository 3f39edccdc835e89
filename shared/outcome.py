"""How a request for bytes was served: one enum for metrics, logs and the Cache-Status field. Pure."""

from __future__ import annotations

from enum import Enum


class Outcome(Enum):
    """Ordered from the cheapest to the dearest; a response of many slices has the dearest of theirs."""

    HIT_MEMORY = "hit-memory"
    HIT_DISK = "hit-disk"
    COLLAPSED = "collapsed"
    FILL_PEER = "fill-peer"
    FILL_PARENT = "fill-parent"
    FILL_ORIGIN = "fill-origin"
    STALE = "stale"

    @property
    def cost(self) -> int:
        """For comparing: higher is dearer."""
        return list(Outcome).index(self)


HITS = frozenset((Outcome.HIT_MEMORY, Outcome.HIT_DISK))
"""What was held already."""


def dearest(outcomes: list[Outcome]) -> Outcome:
    """The outcome that a whole response is reported under."""
    return max(outcomes, key=lambda outcome: outcome.cost)


def cache_status(node: str, outcome: Outcome) -> str:
    """The Cache-Status member of this node (RFC 9211 §2): ``hit`` and ``fwd`` exclude each other."""
    name = f'"{node}"'
    match outcome:
        case Outcome.HIT_MEMORY | Outcome.HIT_DISK:
            return f"{name}; hit; detail={outcome.value}"
        case Outcome.STALE:
            return f"{name}; hit; ttl=-1; detail={outcome.value}"
        case Outcome.COLLAPSED:
            return f"{name}; fwd=uri-miss; collapsed; detail={outcome.value}"
        case _:
            return f"{name}; fwd=uri-miss; detail={outcome.value}"
