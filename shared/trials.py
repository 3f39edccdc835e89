"""What a rollout's revisions did at the nodes: few numbers, so that they go with every heartbeat. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from shared.digest import Digest, parse_digest
from shared.errors import BadId, RequestError
from shared.ids import parse_model

MAX_TRIALS = 16
"""Revisions that one node reports of: some 200 bytes each."""
MAX_COUNT = 2**52
MAX_READY = 1e9


@dataclass(frozen=True, slots=True)
class Trial:
    """What one node has seen of one revision while a rollout had it in it, as the new one or as the old."""

    model: str
    revision: Digest
    requests: int
    """For tasks and files of it, whole or in part."""
    errors: int
    """Those among them that this side failed: answered with a 5xx, or broken off."""
    ready: float | None
    """Milliseconds from a request for the whole to its last byte being sent, the median of the last ones; None where
    there was none yet."""

    def record(self) -> list[Any]:
        """For a heartbeat."""
        return [self.model, self.revision, self.requests, self.errors, self.ready]


def parse_trials(record: object) -> tuple[Trial, ...]:
    """What a heartbeat has of them. Raises RequestError (``bad_node``)."""
    if not isinstance(record, list) or len(record) > MAX_TRIALS:
        raise RequestError(f"trials are a list of {MAX_TRIALS} at most", code="bad_node")
    return tuple(_parse(item) for item in record)


def _parse(item: object) -> Trial:
    if not isinstance(item, list) or len(item) != 5:
        raise RequestError("a trial has a model, a revision, requests, errors and a time", code="bad_node")
    model, revision, requests, errors, ready = item
    if not all(type(count) is int and 0 <= count <= MAX_COUNT for count in (requests, errors)):
        raise RequestError("a trial has counts", code="bad_node")
    if ready is not None and not (type(ready) in (int, float) and math.isfinite(ready) and 0 <= ready <= MAX_READY):
        raise RequestError("a trial has milliseconds", code="bad_node")
    if not isinstance(model, str) or not isinstance(revision, str):
        raise RequestError("a trial is of a revision", code="bad_node")
    try:
        return Trial(parse_model(model), parse_digest(revision), requests, errors, ready)
    except BadId as error:
        raise RequestError(str(error), code="bad_node") from error


def together(trials: Sequence[Trial]) -> dict[str, Any]:
    """The same revision at several nodes, for people. The time is that of the node in the middle of the requests."""
    timed = sorted((trial.ready, trial.requests) for trial in trials if trial.ready is not None)
    left = sum(requests for _, requests in timed) / 2
    ready = None
    for ready, requests in timed:  # noqa: B007 - the last one looked at is meant
        left -= requests
        if left <= 0:
            break
    return {
        "requests": sum(trial.requests for trial in trials),
        "errors": sum(trial.errors for trial in trials),
        "ready_p50_ms": ready,
        "nodes": len(trials),
    }


def by_site(sites: Iterable[tuple[str, Trial]]) -> list[dict[str, Any]]:
    """What the nodes of each site have seen of each revision. ``sites``: the site of a node, and one trial of it."""
    grouped: dict[tuple[str, Digest], list[Trial]] = {}
    for site, trial in sites:
        grouped.setdefault((site, trial.revision), []).append(trial)
    return [
        {"site": site, "revision": revision, **together(trials)} for (site, revision), trials in sorted(grouped.items())
    ]


def moved(old: Sequence[Trial], new: Sequence[Trial]) -> bool:
    """Whether there is enough that is new to be told on: a revision, an error, or a quarter and four requests."""
    before = {(trial.model, trial.revision): trial for trial in old}
    if before.keys() != {(trial.model, trial.revision) for trial in new}:
        return True
    pairs = [(before[trial.model, trial.revision], trial) for trial in new]
    return any(a.errors != b.errors or abs(a.requests - b.requests) >= max(4, b.requests / 4) for a, b in pairs)
