"""What a node did for its clients and what its link carried for it: one record of numbers, per model and day. Pure.

Days are of UTC, as ``2026-01-31``. Bytes are of bodies. A node keeps such records (``edge_node.account``), answers them
at ``/usage``, and today's in its ``/status``; ``nearshard report`` adds up those of all nodes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta

from shared.errors import BadId, DecodeError, RequestError
from shared.ids import parse_model

BOUNDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)
"""Seconds: the upper ends of the classes of times. One more has all that took longer."""
COUNTS = ("served", "link", "peers", "saved", "requests", "hits", "errors")
"""The numbers beside the times, in the order that they are kept in."""
KEEP_DAYS, MAX_MODELS = 400, 1000
"""Days that are kept, and models of one day; those that come later are OTHER."""
NO_MODEL, OTHER, PRIVATE = "", "other", "(private)"
"""In place of a model's name: of none that is known; of too many; of one that whoever asks may not see."""
PATH = "/usage"
_MOST = 1 << 63


@dataclass(slots=True)
class Usage:
    """The numbers of one model on one day, or of several added up."""

    served: int = 0
    """Bytes sent to clients; nodes of child regions are clients, peers are not."""
    link: int = 0
    """Bytes that came from parents and origins, for clients or ahead of them; parcels as the bytes that they are."""
    peers: int = 0
    """Bytes that came from nodes of the same region."""
    saved: int = 0
    """Bytes that did not come over the link since shards were made from deltas or compressed parcels."""
    requests: int = 0
    """Requests for bytes by clients."""
    hits: int = 0
    """Those of them that were answered from what was held."""
    errors: int = 0
    """Those that got no answer, or not all of it, for a reason that was not theirs."""
    ready: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    """Requests for all bytes of something, by the seconds until its last byte was sent (BOUNDS)."""

    def add(self, other: Usage) -> None:
        """Add another one's numbers."""
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.ready = [mine + theirs for mine, theirs in zip(self.ready, other.ready, strict=True)]

    def answered(self, size: int, seconds: float | None, *, hit: bool) -> None:
        """One request was answered with so many bytes; ``seconds`` where it had all of something."""
        self.requests += 1
        self.hits += hit
        self.served += size
        if seconds is not None:
            self.ready[bisect_left(BOUNDS, seconds)] += 1

    def counts(self) -> dict[str, int]:
        """The numbers without the times."""
        return {name: getattr(self, name) for name in COUNTS}

    def numbers(self) -> list[int]:
        """All of them, as ``from_numbers`` takes them."""
        return [*self.counts().values(), *self.ready]

    @property
    def spared(self) -> int:
        """Bytes that clients got and the link did not carry. Of one node it may be negative: peers got the rest."""
        return self.served - self.link

    def quantile(self, share: float) -> float | None:
        """Seconds in which this share of the whole answers was there, read within its class as if it was even; the
        last bound for what took longer. None where there were none."""
        total = sum(self.ready)
        if not total:
            return None
        rank, before = share * total, 0
        for index, count in enumerate(self.ready):
            if count and before + count >= rank:
                if index == len(BOUNDS):
                    break
                low = BOUNDS[index - 1] if index else 0.0
                return low + (BOUNDS[index] - low) * (rank - before) / count
            before += count
        return BOUNDS[-1]


Day = dict[str, Usage]
"""By model."""


def total(usages: Iterable[Usage]) -> Usage:
    """All of them added up."""
    sum_ = Usage()
    for one in usages:
        sum_.add(one)
    return sum_


def from_numbers(numbers: Sequence[object]) -> Usage:
    """What ``Usage.numbers`` gave. Raises DecodeError."""
    if len(numbers) != len(COUNTS) + len(BOUNDS) + 1:
        raise DecodeError("a record of usage with too few or too many numbers")
    checked = [_number(number) for number in numbers]
    usage = Usage(ready=checked[len(COUNTS) :])
    for name, number in zip(COUNTS, checked, strict=False):
        setattr(usage, name, number)
    return usage


def as_document(days: Mapping[str, Day]) -> dict[str, object]:
    """For JSON: by day and model the numbers by name, and ``ready`` with the times."""
    return {
        day: {model: {**one.counts(), "ready": one.ready} for model, one in day_.items()} for day, day_ in days.items()
    }


def parse_days(document: object) -> dict[str, Day]:
    """The days of a node's answer; as many as are kept, at most. Raises DecodeError."""
    if not isinstance(document, dict) or len(document) > KEEP_DAYS + 1:
        raise DecodeError("usage that is not by day")
    return {
        _checked_day(day): {_checked_model(name): _parse(one) for name, one in _models(models)}
        for day, models in document.items()
    }


def parse_day(text: str) -> str:
    """A day as it is written, ``2026-01-31``. Raises RequestError."""
    try:
        if date.fromisoformat(text).isoformat() == text:
            return text
    except ValueError:
        pass
    raise RequestError("a day is written YYYY-MM-DD")


def day_of(seconds: float) -> str:
    """The day of a time, in seconds since 1970."""
    return datetime.fromtimestamp(seconds, UTC).date().isoformat()


def days_before(day: str, count: int) -> str:
    """The day so many days before another one."""
    return (date.fromisoformat(day) - timedelta(days=count)).isoformat()


def _models(models: object) -> Iterable[tuple[str, object]]:
    if not isinstance(models, dict) or len(models) > MAX_MODELS + 2:
        raise DecodeError("usage that is not by model")
    return models.items()


def _parse(document: object) -> Usage:
    if not isinstance(document, dict) or not isinstance(ready := document.get("ready"), list):
        raise DecodeError("usage without its numbers")
    return from_numbers([*(document.get(name) for name in COUNTS), *ready])


def _number(number: object) -> int:
    if type(number) is not int or not 0 <= number < _MOST:
        raise DecodeError("usage with what is no count")
    return number


def _checked_day(text: str) -> str:
    try:
        return parse_day(text)
    except RequestError as error:
        raise DecodeError("usage of what is no day") from error


def _checked_model(name: str) -> str:
    try:
        return name if name in (NO_MODEL, OTHER, PRIVATE) else parse_model(name)
    except BadId as error:
        raise DecodeError("usage of what is no model") from error
