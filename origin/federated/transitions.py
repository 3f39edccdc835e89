"""The states of a round, and what leads from one to another: the one table. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from shared.errors import Conflict


class State(StrEnum):
    """Where a round is."""

    OPEN = "open"
    """Updates are taken in."""
    COLLECTED = "collected"
    """None is taken in any more; there are enough."""
    AGGREGATED = "aggregated"
    """Its candidate is stored and noted, and nobody sees it; the updates are not needed any more."""
    HELD = "held"
    """The candidate waits for a person: the gate found it worse, or somebody moved the ref."""
    PUBLISHING = "publishing"
    """The candidate is to be signed, whatever happens."""
    PUBLISHED = "published"
    EXPIRED = "expired"
    """There were too few sites at the deadline."""
    DISCARDED = "discarded"


class Event(StrEnum):
    """What happens to a round."""

    END = "end"
    EXPIRE = "expire"
    AGGREGATE = "aggregate"
    HOLD = "hold"
    SIGN = "sign"
    ACCEPT = "accept"
    PUBLISH = "publish"
    DISCARD = "discard"


TABLE: Mapping[tuple[State, Event], State] = {
    (State.OPEN, Event.END): State.COLLECTED,
    (State.OPEN, Event.EXPIRE): State.EXPIRED,
    (State.OPEN, Event.DISCARD): State.DISCARDED,
    (State.COLLECTED, Event.AGGREGATE): State.AGGREGATED,
    (State.COLLECTED, Event.EXPIRE): State.EXPIRED,  # beside the others, too many were beyond what is taken
    (State.COLLECTED, Event.DISCARD): State.DISCARDED,
    (State.AGGREGATED, Event.HOLD): State.HELD,
    (State.AGGREGATED, Event.SIGN): State.PUBLISHING,
    (State.AGGREGATED, Event.DISCARD): State.DISCARDED,
    (State.HELD, Event.ACCEPT): State.PUBLISHING,
    (State.HELD, Event.DISCARD): State.DISCARDED,
    (State.PUBLISHING, Event.HOLD): State.HELD,
    (State.PUBLISHING, Event.PUBLISH): State.PUBLISHED,
}
FINAL = frozenset(State) - {state for state, _ in TABLE}
"""Nothing leads out of these."""


def after(state: State, event: Event) -> State:
    """The state that follows. Raises Conflict (``round_state``)."""
    try:
        return TABLE[state, event]
    except KeyError:
        can = ", ".join(sorted(known for before, known in TABLE if before == state)) or "nothing"
        raise Conflict(f"the round is {state}: {event} cannot happen to it, only {can}", code="round_state") from None
