"""Metadata that has expired and that an operator accepts all the same: by the model's name, until a day. Pure.

    acme/llm@main until 2027-01-31      this ref, to the end of that day (UTC)
    acme/llm until 2027-01-31           all refs of the model

What is accepted is that nobody could be asked for newer. Signatures, versions and hashes are checked as ever, and
nothing older than what is known is taken. No acceptance reaches further ahead than MAX_AHEAD.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from shared.errors import BadId, ConfigError
from shared.ids import parse_model, parse_ref

MAX_AHEAD = timedelta(days=90)
_SPELLED = re.compile(r"([^ @]+)(?:@([^ @]+))? until ([0-9]{4}-[0-9]{2}-[0-9]{2})")


@dataclass(frozen=True, slots=True)
class Acceptance:
    """One of them."""

    text: str
    """As the operator said it."""
    model: str
    ref: str
    """Empty for all refs."""
    until: float
    """When it ends, in seconds since 1970."""

    def covers(self, model: str, ref: str, now: float) -> bool:
        """Whether what ``ref`` means (empty: whether there is such a model) is accepted ``now``."""
        return model == self.model and (not ref or self.ref in ("", ref)) and now < self.until


def parse_acceptance(text: str) -> Acceptance:
    """One, as it is spelled above. Raises ValueError."""
    match = _SPELLED.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not like 'org/name@ref until 2027-01-31'")
    try:
        model, ref = parse_model(match[1]), parse_ref(match[2]) if match[2] else ""
    except BadId as error:
        raise ValueError(str(error)) from error
    day = datetime.strptime(match[3], "%Y-%m-%d").replace(tzinfo=UTC)
    return Acceptance(text, model, ref, (day + timedelta(days=1)).timestamp())


def accept(texts: Sequence[str], now: float, what: str) -> tuple[Acceptance, ...]:
    """All of them. Raises ConfigError, which begins with ``what``: misspelled, or further ahead than MAX_AHEAD."""
    found = []
    for text in texts:
        try:
            found.append(parse_acceptance(text))
        except ValueError as error:
            raise ConfigError(f"{what}: {error}") from error
        if found[-1].until - now > (MAX_AHEAD + timedelta(days=1)).total_seconds():
            raise ConfigError(f"{what}: {text!r} is more than {MAX_AHEAD.days} days ahead")
    return tuple(found)
