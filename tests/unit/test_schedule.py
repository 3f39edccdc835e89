"""When what is done again and again is due."""

from __future__ import annotations

import random
from datetime import datetime, timedelta

import pytest

from shared.schedule import AFTER_OPENING, BACKOFF, SPREAD, Schedule, parse_interval
from tests.clock import HandClock

HOUR = 3600.0
NOON = datetime(2027, 1, 5, 12).astimezone()


def scheduled(*hours: str, seed: int = 1, every: float = HOUR) -> tuple[Schedule, HandClock]:
    """One, at noon."""
    clock = HandClock(NOON.timestamp())
    return Schedule(every, hours, clock, random.Random(seed)), clock


def test_a_thousand_sites_that_begin_together_come_spread() -> None:
    dues = []
    for seed in range(1000):
        schedule, _ = scheduled(seed=seed)
        assert schedule.wait() == 0
        schedule.done()
        dues.append(schedule.wait())
    assert min(dues) >= HOUR * (1 - SPREAD) and max(dues) <= HOUR * (1 + SPREAD)
    assert max(dues) - min(dues) > 0.9 * 2 * SPREAD * HOUR and len({round(due) for due in dues}) > 300


def test_failures_are_tried_again_later_each_time_up_to_the_interval() -> None:
    schedule, clock = scheduled()
    waits = []
    for _ in range(12):
        schedule.failed()
        waits.append(schedule.wait())
        clock.now += schedule.wait()
    assert BACKOFF / 2 <= waits[0] <= BACKOFF < max(waits[3:]) and HOUR / 2 <= waits[-1] <= HOUR
    schedule.done()
    schedule.failed()
    assert schedule.failures == 1 and schedule.wait() <= BACKOFF


def test_outside_of_its_hours_nothing_is_due_and_what_changed_waits_for_them() -> None:
    schedule, clock = scheduled("22:00-06:00", "03:00-04:00")
    assert 10 * HOUR <= schedule.wait() <= 10 * HOUR + AFTER_OPENING and schedule.left() == 0
    schedule.hurry()
    assert schedule.wait() >= 10 * HOUR
    clock.now += schedule.wait()
    assert 0 < 8 * HOUR - schedule.left() <= AFTER_OPENING
    clock.now += 7 * HOUR
    schedule.done()
    begins = datetime.fromtimestamp(schedule.due).astimezone()
    assert begins - NOON < timedelta(days=1) or begins.hour in (22, 23)
    schedule.hurry()
    assert schedule.wait() == 0, "inside of them what changed is due at once"


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("1h", 3600), ("7d", 604_800), ("5", 5)])
def test_intervals_are_said_as_people_say_them(text: str, seconds: float) -> None:
    assert parse_interval(text) == seconds


@pytest.mark.parametrize("text", ["", "0s", "h", "1 h", "-1h", "1w", "1e3", "400d", "\u0661h"])
def test_intervals_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="interval"):
        parse_interval(text)
