"""How many fetches run at once, and who goes first."""

from __future__ import annotations

import asyncio

from edge_node.slots import AT_FIRST, FORGET, MORE, MOST, Slots
from tests.clock import HandClock


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
    assert (await run_link(1_000_000, 10**9, seconds=25))[-1] == MOST
    assert (await run_link(10_000_000, 10_000_000))[-1] == AT_FIRST


async def test_where_each_brings_little_four_times_as_many_are_tried_at_once() -> None:
    history = await run_link(1_000, 10**9, seconds=5)
    assert (history[0], history[-1]) == (4 * AT_FIRST, MOST)
    assert (await run_link(10_000, 10_000))[-1] == AT_FIRST, "unless all together bring no more"


async def test_what_was_not_worth_it_is_given_up_and_not_tried_again_for_a_while() -> None:
    history = await run_link(10_000_000, 10_000_000)
    assert max(history) == round(AT_FIRST * MORE)
    assert sum(limit > AT_FIRST for limit in history) == 2, "one trial a minute"


async def test_a_rate_that_falls_for_a_moment_is_no_reason_for_more_connections() -> None:
    clock = HandClock()
    slots = Slots(clock)
    waiting = [asyncio.create_task(slots.acquire(urgent)) for _ in range(100)]
    await asyncio.sleep(0)
    for rate in (10_000_000, 20_000_000, 6_000_000, 24_000_000):
        clock.now += 1.0
        slots.count(rate)
        assert slots.limit == AT_FIRST
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_a_link_that_brings_what_it_ever_did_is_full_and_one_window_alone_says_nothing() -> None:
    clock = HandClock()
    slots = Slots(clock)
    await slots.acquire(urgent)
    seen = []
    for rate in (300, 100, 100, 50, 90):
        clock.now += 1.0
        slots.count(rate)
        seen.append(slots.filled)
    assert seen == [False, True, True, False, True]


async def test_the_work_is_shared_among_free_connections_where_few_wait() -> None:
    slots = Slots(HandClock())
    await slots.acquire(urgent)
    assert slots.shares == AT_FIRST + 1
    for _ in range(AT_FIRST - 1):
        await slots.acquire(urgent)
    assert slots.shares == 2
    waiting = [asyncio.create_task(slots.acquire(urgent)) for _ in range(AT_FIRST)]
    await asyncio.sleep(0)
    assert slots.shares == 1
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_a_download_that_still_grows_by_itself_is_no_reason_for_more_connections() -> None:
    clock = HandClock()
    slots = Slots(clock)
    waiting = [asyncio.create_task(slots.acquire(urgent)) for _ in range(100)]
    await asyncio.sleep(0)
    for second in range(8):
        clock.now += 1.0
        slots.count(10_000_000 * 2**second)
        assert slots.limit == AT_FIRST
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_what_was_learned_of_a_link_is_forgotten_when_it_is_not_used() -> None:
    clock = HandClock()
    slots = Slots(clock)
    slots.limit = MOST
    clock.now += FORGET + 1
    await slots.acquire(urgent)
    assert slots.limit == AT_FIRST


async def test_a_time_without_fetches_is_not_judged() -> None:
    """The first bytes after it are not the rate of all that time."""
    clock = HandClock()
    slots = Slots(clock)
    clock.now += 60
    waiting = [asyncio.create_task(slots.acquire(urgent)) for _ in range(100)]
    await asyncio.sleep(0)
    slots.count(1000)
    assert slots.limit == AT_FIRST and slots.each == 0
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


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
