"""Manners on a link: how fast, when, and whether it is metered. For a node's link upstream, and for a client's.

The policy is a value, changed as a whole while its owner runs.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from shared.clock import Clock
from shared.errors import RequestError

STEP = 1.0
"""Seconds after which who waits looks at the rate again: a cap that was raised, or a window that ended, helps soon."""
BURST = 0.05
"""Seconds of the rate that may be made up for: sleeps end late."""
DAY = 24 * 60
_WINDOW = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])-([01][0-9]|2[0-3]):([0-5][0-9])")


@dataclass(frozen=True, slots=True)
class LinkPolicy:
    """Rates in bytes a second; 0 is no cap."""

    rate: int = 0
    """The cap outside every window, for all upstreams together."""
    windows: Mapping[str, int] = field(default_factory=dict)
    """Caps by local time of day, as ``{"08:00-18:00": 5000000}``; one may cross midnight, the first that fits wins."""
    upstreams: Mapping[str, int] = field(default_factory=dict)
    """Caps by upstream URL, on top of that."""
    metered: bool = False
    """Whether only what is asked for is fetched."""

    def rate_at(self, now: datetime) -> int:
        """The cap for all together at a local time."""
        return next((rate for window, rate in self.windows.items() if _until_end(window, now)), self.rate)

    def as_json(self) -> dict[str, Any]:
        """For people and scripts."""
        return {
            "rate": self.rate,
            "windows": dict(self.windows),
            "upstreams": dict(self.upstreams),
            "metered": self.metered,
        }


def parse_window(text: str) -> str:
    """A time of day like ``08:00-18:00``. Raises ValueError."""
    _minutes(text)
    return text


def open_for(windows: Sequence[str], now: datetime) -> float:
    """Seconds that one of these times of day goes on at a local time; 0 where none is open; no end where there are
    none."""
    return max((_until_end(window, now) for window in windows), default=float("inf"))


def opens_in(windows: Sequence[str], now: datetime) -> float:
    """Seconds until the next of these times of day begins; 0 where one is open, or there are none."""
    if open_for(windows, now):
        return 0.0
    return min(60.0 * ((_minutes(window)[0] - _minute(now)) % DAY) - now.second for window in windows)


def local_time(clock: Clock, moment: float | None = None) -> datetime:
    """What people's clocks show here, now or at ``moment`` (seconds since 1970)."""
    return datetime.fromtimestamp(clock.time() if moment is None else moment).astimezone()


def parse_policy(document: object, current: LinkPolicy) -> LinkPolicy:
    """``current`` with the keys of ``document`` changed; rates as numbers or like ``5MB``. Raises RequestError."""
    known = current.as_json()
    if not isinstance(document, dict) or document.keys() - known.keys():
        raise RequestError(f"a link policy is a map with {', '.join(known)}", code="bad_json")
    values = known | document
    try:
        windows = {parse_window(str(window)): parse_rate(rate) for window, rate in dict(values["windows"]).items()}
        upstreams = {str(url): parse_rate(rate) for url, rate in dict(values["upstreams"]).items()}
        if not isinstance(values["metered"], bool):
            raise ValueError("metered is true or false")
        return LinkPolicy(parse_rate(values["rate"]), windows, upstreams, values["metered"])
    except (ValueError, TypeError) as error:
        raise RequestError(f"not a link policy: {error}", code="bad_json") from error


def parse_rate(value: object) -> int:
    """Bytes a second, from a number or from text like ``2M``, ``5MB`` or ``1MiB``. Raises ValueError."""
    rate = _bytes(value)
    if rate is None or rate < 0:
        raise ValueError("a rate is a number of bytes a second, like 5MB; 0 is no cap")
    return rate


def _bytes(value: object) -> int | None:
    if isinstance(value, bool):  # to pydantic it is a number: "rate": true would be one byte a second
        return None
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) <= 18:
        return int(value)
    from pydantic import ByteSize, TypeAdapter, ValidationError  # takes long to import, and "0" is what most say

    try:
        return int(TypeAdapter(ByteSize).validate_python(value))
    except ValidationError:
        return None


def _minute(now: datetime) -> int:
    return now.hour * 60 + now.minute


def _until_end(window: str, now: datetime) -> float:
    """Seconds that a time of day goes on; 0 outside of it. One that ends when it begins has no end."""
    start, stop = _minutes(window)
    if start == stop:
        return float("inf")
    gone, length = (_minute(now) - start) % DAY, (stop - start) % DAY
    return max(0.0, 60.0 * (length - gone) - now.second) if gone < length else 0.0


def _minutes(window: str) -> tuple[int, int]:
    match = _WINDOW.fullmatch(window)
    if match is None:
        raise ValueError(f"{window!r} is not a time of day like 08:00-18:00")
    hours, minutes, until_hours, until_minutes = map(int, match.groups())
    return hours * 60 + minutes, until_hours * 60 + until_minutes


class Throttle:
    """Lets bytes pass at a rate, whoever they are for: first come, first served. Whoever reads a socket asks after each
    read; TCP slows the sender down."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._free_at = clock.monotonic()
        self._turn = asyncio.Lock()

    async def take(self, size: int, rate: Callable[[], int]) -> None:
        """Wait until ``size`` bytes more fit into ``rate()`` bytes a second; at once where that is 0."""
        if not rate():
            return
        async with self._turn:  # one at a time, or each would wait beside the others for bytes of its own only
            owed = float(size)
            while owed > 0 and (cap := rate()):
                part = min(owed, cap * STEP)
                owed -= part
                self._free_at = max(self._free_at, self._clock.monotonic() - BURST) + part / cap
                if (left := self._free_at - self._clock.monotonic()) > 0:
                    await self._clock.sleep(left)


class Link:
    """A link and the policy that is kept on it. ``policy`` may be replaced at any time."""

    def __init__(self, clock: Clock, policy: LinkPolicy | None = None) -> None:
        self.policy = policy or LinkPolicy()
        self._clock = clock
        self._throttle = Throttle(clock)

    def __repr__(self) -> str:
        return f"<Link {self.policy}>"

    @property
    def dear(self) -> bool:
        """Whether each byte counts: the link is metered, or capped now."""
        return self.policy.metered or bool(self._rate()) or any(self.policy.upstreams.values())

    async def take(self, size: int) -> None:
        """Wait until ``size`` bytes more, which were read from any connection, fit into the policy's rate now."""
        await self._throttle.take(size, self._rate)

    def _rate(self) -> int:
        if not self.policy.windows:
            return self.policy.rate
        return self.policy.rate_at(local_time(self._clock))
