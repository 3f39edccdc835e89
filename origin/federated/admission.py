"""Whether a statement is for a round that takes it, and which update is too large: decisions over records. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from statistics import median

from origin.federated.documents import Round, Site
from origin.federated.transitions import State
from shared.errors import RequestError, SiteClock
from shared.federated import MAX_SKEW, Statement, accepts

OLDEST = 8
"""Rounds that a late update may be old."""
TOO_LARGE = 10.0
"""Times the usual norm: who sends more is refused; who sends less than that is scaled down."""


@dataclass(frozen=True, slots=True)
class Duplicate:
    """This body is counted already."""


@dataclass(frozen=True, slots=True)
class Takes:
    """The round that it would count in."""

    round: Round


def check_site(statement: Statement, site: Site, now: datetime) -> None:
    """Whether a proven site may say anything, and says it now. Raises RequestError (``quarantined``), SiteClock."""
    if site.quarantined:
        raise RequestError(f"{statement.site} is in quarantine after {site.strikes} strikes", code="quarantined")
    ahead = (statement.time - now).total_seconds()
    if abs(ahead) > MAX_SKEW:
        side = "ahead" if ahead > 0 else "behind"
        message = f"the statement's time is {abs(ahead):.0f} s {side}; {MAX_SKEW:.0f} are allowed"
        raise SiteClock(message, public={"seconds_ahead": round(ahead)})


def judge(statement: Statement, rounds: Sequence[Round], now: datetime) -> Takes | Duplicate:
    """What becomes of a statement. ``rounds``: the newest of the model, then older ones, as far back as the one that it
    is for, or as ``OLDEST``.

    Raises RequestError: ``not_in_round``, ``stale_round``, ``other_update``, ``too_large``, ``bad_update``.
    """
    counted = [found for known in rounds if (found := known.updates.get(statement.site))]
    if any(found.digest == statement.digest for found in counted):
        return Duplicate()
    if not rounds or statement.site not in rounds[0].sites:
        raise RequestError(code="not_in_round")
    current = rounds[0]
    check_takes(current, statement, now)
    if statement.round != current.number:
        stated = next((known for known in rounds if known.number == statement.round), None)
        if stated is None or stated.base != statement.base or statement.site not in stated.sites:
            raise _stale(f"round {statement.round} was upon another revision, or is too old")
        if any(found.round == statement.round for found in counted):
            raise RequestError(code="other_update")
    if statement.size > current.max_bytes:
        raise RequestError(
            f"{statement.size} bytes; {current.max_bytes} are allowed",
            code="too_large",
            public={"max_bytes": current.max_bytes},
        )
    if refused := [name for name in statement.codecs if not accepts(current.codecs, name)]:
        raise RequestError(f"codecs that the round does not take: {', '.join(refused)}", code="bad_update")
    return Takes(current)


def check_takes(current: Round, statement: Statement, now: datetime) -> None:
    """Whether the newest round takes this statement's body, as far as it alone says. Raises RequestError
    (``stale_round``, ``other_update``)."""
    if current.state is not State.OPEN or now >= current.deadline:
        raise _stale(f"round {current.number} is {current.state if current.state is not State.OPEN else 'over'}")
    own = statement.round == current.number
    if own and statement.base != current.base:
        raise _stale(f"round {current.number} is upon {current.base}")
    if not own and not (current.late and 0 < current.number - statement.round <= OLDEST):
        raise _stale(f"round {current.number} is open, and takes none for round {statement.round}")
    there = current.updates.get(statement.site)
    # a site's update of this round takes the place of its late one: one voice a site, whatever it brings
    if there and (not own or there.round == current.number):
        raise RequestError(code="other_update")


def _stale(message: str) -> RequestError:
    return RequestError(message, code="stale_round")


def usual_norm(norms: Iterable[float], sites: int) -> float | None:
    """The median norm of what is there; None while that is too few to say what is usual: the first to come must not
    decide whom the others are compared with. ``sites``: those that may take part."""
    found = list(norms)
    hostile = max(1, (sites - 1) // 4)
    return median(found) if len(found) > 2 * hostile else None


def reference_norm(current: Round, without: str = "") -> float | None:
    """The norm to which updates of a round are scaled down: fixed, or the median of what is there of other sites."""
    if current.noise:
        return current.noise.clip
    norms = [entry.norm for site, entry in current.updates.items() if site != without]
    return usual_norm(norms, len(current.sites))
