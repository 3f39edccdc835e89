"""The link's policy, its throttle and its slots."""

from __future__ import annotations

import asyncio
from datetime import datetime
from itertools import pairwise

import pytest

from edge_node.link import AT_FIRST, FORGET, MOST, LinkPolicy, Slots, Throttle, parse_policy
from shared.errors import RequestError
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
     {"windows": {"24:00-25:00": 1}}, {"metered": 1}, {"upstreams": {"http://a": "x"}}],
)  # fmt: skip
def test_a_bad_policy_is_refused(document: object) -> None:
    with pytest.raises(RequestError):
        parse_policy(document, LinkPolicy())


async def test_a_throttle_lets_bytes_pass_at_its_rate() -> None:
    clock = HandClock()
    throttle = Throttle(clock)
    for _ in range(50):
        await throttle.take(2000, 10_000)
    assert clock.slept == pytest.approx(10.0)
    await throttle.take(10**9, 0)
    assert clock.slept == pytest.approx(10.0), "no cap, no wait"


async def test_a_cap_that_is_raised_helps_within_a_second_or_so() -> None:
    clock = HandClock()
    throttle = Throttle(clock)
    await asyncio.gather(*(throttle.take(1000, 100) for _ in range(20)))
    before = clock.slept
    await throttle.take(1000, 10**9)
    assert clock.slept - before <= 12


def urgent() -> int:
    """The rank of what a client waits for."""
    return 0


async def test_clients_go_before_preheating() -> None:
    slots = Slots(HandClock())
    for _ in range(AT_FIRST):
        await slots.acquire(urgent)
    order: list[str] = []

    async def wait(name: str, *, background: bool) -> None:
        await slots.acquire(lambda: int(background))
        order.append(name)
        slots.release()

    tasks = [asyncio.create_task(wait("preheat", background=True))]
    await asyncio.sleep(0)
    tasks.append(asyncio.create_task(wait("client", background=False)))
    await asyncio.sleep(0)
    slots.release()
    await asyncio.gather(*tasks)
    assert order == ["client", "preheat"]


async def test_a_waiter_that_gives_up_loses_no_slot() -> None:
    slots = Slots(HandClock())
    for _ in range(AT_FIRST):
        await slots.acquire(urgent)
    waiter = asyncio.create_task(slots.acquire(urgent))
    await asyncio.sleep(0)
    waiter.cancel()
    await asyncio.wait([waiter])
    for _ in range(AT_FIRST):
        slots.release()
    for _ in range(AT_FIRST):
        await slots.acquire(urgent)
    assert slots.used == AT_FIRST


async def run_link(per_connection: int, whole: int, *, seconds: int = 60) -> list[int]:
    """Many waiting, over a link that gives each connection so much and all together no more than ``whole`` bytes a
    second: how many there were, second by second."""
    clock = HandClock()
    slots = Slots(clock)
    waiting = [asyncio.create_task(slots.acquire(urgent)) for _ in range(1000)]
    await asyncio.sleep(0)
    history = []
    for _ in range(seconds):
        clock.now += 1.0
        slots.count(min(slots.used * per_connection, whole))
        slots.release()
        await asyncio.sleep(0)
        history.append(slots.limit)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    return history


async def test_connections_are_added_where_each_brings_more_and_not_where_fewer_fill_the_link() -> None:
    assert (await run_link(1_000, 10**9, seconds=12))[-1] == MOST
    assert (await run_link(10_000, 10_000))[-1] == AT_FIRST


async def test_what_was_not_worth_it_is_given_up_one_by_one() -> None:
    history = await run_link(10_000, 10_000)
    assert max(history) == 2 * AT_FIRST
    assert all(later >= earlier - 1 for earlier, later in pairwise(history))


async def test_a_download_that_still_grows_by_itself_is_no_reason_for_more_connections() -> None:
    clock = HandClock()
    slots = Slots(clock)
    waiting = [asyncio.create_task(slots.acquire(urgent)) for _ in range(100)]
    await asyncio.sleep(0)
    for second in range(8):
        clock.now += 1.0
        slots.count(1000 * 2**second)
        assert slots.limit == AT_FIRST
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_what_was_learned_of_a_link_is_forgotten_when_it_is_not_used() -> None:
    clock = HandClock()
    slots = Slots(clock)
    slots.limit = MOST
    clock.now += FORGET + 1
    slots.count(1)
    assert slots.limit == AT_FIRST


async def test_who_becomes_urgent_while_it_waits_goes_first() -> None:
    slots = Slots(HandClock())
    for _ in range(AT_FIRST):
        await slots.acquire(urgent)
    ranks = {"first": 1, "second": 1}
    order: list[str] = []

    async def wait(name: str) -> None:
        await slots.acquire(lambda: ranks[name])
        order.append(name)
        slots.release()

    tasks = [asyncio.create_task(wait(name)) for name in ranks]
    await asyncio.sleep(0)
    ranks["second"] = 0
    slots.release()
    await asyncio.gather(*tasks)
    assert order == ["second", "first"]
