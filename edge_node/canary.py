"""What this node sees of the revisions that are in a rollout: counted here, told with heartbeats."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

from shared.clock import Clock
from shared.digest import Digest
from shared.errors import NearshardError
from shared.trials import MAX_TRIALS, Trial

LAST = 101
"""Times that a median is of."""


@dataclass
class _Seen:
    requests: int = 0
    errors: int = 0
    ready: deque[float] = field(default_factory=lambda: deque(maxlen=LAST))
    """Milliseconds."""


class Canary:
    """Of one node. Only public models: what it tells, everybody may read."""

    def __init__(self, clock: Clock, on_trial: Callable[[str], Collection[Digest]]) -> None:
        """``on_trial``: the revisions of a model that are in a rollout now, new and old."""
        self._clock, self._on_trial = clock, on_trial
        self._seen: OrderedDict[tuple[str, Digest], _Seen] = OrderedDict()

    def watches(self, model: str) -> bool:
        """Whether what is asked of a model is to be counted."""
        return bool(self._on_trial(model))

    @contextmanager
    def counted(self, model: str, revision: Digest, *, whole: bool) -> Iterator[None]:
        """One request, answered in the block. ``whole``: it asks for all bytes, so its time is that until they are
        ready. A client that goes away is no error, and gives no time."""
        if revision not in self._on_trial(model):
            yield
            return
        seen = self._find(model, revision)
        seen.requests += 1
        began = self._clock.monotonic()
        try:
            yield
        except NearshardError as error:
            seen.errors += error.status >= 500
            raise
        if whole:
            seen.ready.append(1000 * (self._clock.monotonic() - began))

    def trials(self) -> list[Trial]:
        """What was seen of the revisions that are in a rollout now; what is not any more is forgotten."""
        for model, revision in list(self._seen):
            if revision not in self._on_trial(model):
                del self._seen[model, revision]
        return [
            Trial(model, revision, seen.requests, seen.errors, round(median(seen.ready), 1) if seen.ready else None)
            for (model, revision), seen in sorted(self._seen.items())
        ]

    def _find(self, model: str, revision: Digest) -> _Seen:
        seen = self._seen.setdefault((model, revision), _Seen())
        self._seen.move_to_end((model, revision))
        while len(self._seen) > MAX_TRIALS:
            self._seen.popitem(last=False)
        return seen
