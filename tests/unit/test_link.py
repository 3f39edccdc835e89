"""The link's policy, and the throttle that keeps it."""

from __future__ import annotations

import asyncio
from datetime import datetime

import pytest

from shared.clock import SystemClock
from shared.errors import RequestError
from shared.link import STEP, Link, LinkPolicy, Throttle, parse_policy
from tests.clock import HandClock


def at(hour: int, minute: int = 0) -> datetime:
    """A time of day."""
    return datetime(2026, 1, 5, hour, minute).astimezone()


def test_windows_cap_by_time_of_day_also_across_midnight() -> None:
    policy = LinkPolicy(rate=7, windows={"08:00-18:00": 5, "22:00-06:00": 0})
    assert [policy.rate_at(at(*time)) for time in ((7, 59), (8,), (17, 59), (18,), (22,), (0,), (5, 59), (6,))] == [
        7, 5, 5, 7, 0, 0, 0, 7,
    ]  # fmt: skip


def test_a_policy_is_changed_by_key_and_rates_may_be_written_as_people_do() -> None:
    policy = parse_policy({"rate": "5MB", "windows": {"08:00-18:00": "1MiB"}}, LinkPolicy(metered=True))
    assert policy == LinkPolicy(5_000_000, {"08:00-18:00": 1 << 20}, {}, metered=True)
    assert parse_policy({"metered": False}, policy) == LinkPolicy(5_000_000, {"08:00-18:00": 1 << 20})


@pytest.mark.parametrize(
    "document",
    [5, {"speed": 1}, {"rate": -1}, {"rate": "fast"}, {"windows": {"8-18": 1}}, {"windows": 5},
     {"windows": {"24:00-25:00": 1}}, {"metered": 1}, {"upstreams": {"http://a": "x"}},
     {"rate": True}, {"upstreams": {"http://a": False}}],
)  # fmt: skip
def test_a_bad_policy_is_refused(document: object) -> None:
    with pytest.raises(RequestError):
        parse_policy(document, LinkPolicy())


async def test_a_throttle_lets_bytes_pass_at_its_rate() -> None:
    clock = HandClock()
    throttle = Throttle(clock)
    for _ in range(50):
        await throttle.take(2000, lambda: 10_000)
    assert clock.slept == pytest.approx(10.0)
    await throttle.take(10**9, lambda: 0)
    assert clock.slept == pytest.approx(10.0), "no cap, no wait"


async def test_connections_share_a_rate_also_where_one_read_takes_seconds_of_it() -> None:
    clock = HandClock()
    throttle = Throttle(clock)
    await asyncio.gather(*(throttle.take(300_000, lambda: 100_000) for _ in range(4)))
    assert clock.slept == pytest.approx(12.0)


async def test_time_that_was_slept_too_long_is_made_up_for_and_time_without_readers_is_not() -> None:
    clock = HandClock(late=0.01)
    throttle = Throttle(clock)
    for _ in range(1000):
        await throttle.take(1000, lambda: 100_000)
    assert clock.monotonic() - 1000.0 == pytest.approx(10.0, abs=0.1)
    clock.now += 3600
    before = clock.now
    await throttle.take(100_000, lambda: 100_000)
    assert clock.now - before > 0.9


async def test_a_cap_that_is_raised_helps_at_once_also_those_who_wait() -> None:
    clock = HandClock()
    throttle = Throttle(clock)
    rates = iter([100] * 4)
    await asyncio.gather(*(throttle.take(1000, lambda: next(rates, 10**9)) for _ in range(20)))
    assert clock.slept <= 4 * STEP


async def test_a_link_keeps_the_rate_of_the_hour_and_the_next_ones_when_that_comes() -> None:
    midnight = datetime(2026, 1, 5).astimezone().timestamp()
    clock = HandClock(midnight + 8 * 3600 - 10)
    link = Link(clock, LinkPolicy(1000, {"08:00-18:00": 100}))
    await link.take(10_000)
    assert clock.slept == pytest.approx(10.0)
    await link.take(1000)
    assert clock.slept == pytest.approx(20.0)
    link.policy = LinkPolicy()
    await link.take(10**9)
    assert clock.slept == pytest.approx(20.0)


async def test_a_reader_that_gives_up_stands_in_nobodys_way() -> None:
    throttle = Throttle(SystemClock())
    first = asyncio.create_task(throttle.take(10**9, lambda: 1))
    await asyncio.sleep(0)
    second = asyncio.create_task(throttle.take(1, lambda: 10**9))
    await asyncio.sleep(0)
    first.cancel()
    async with asyncio.timeout(10):
        await second
    assert first.cancelled()
