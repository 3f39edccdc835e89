"""Shards on their way: who is too slow is left, what breaks off goes on, whatever a source does to a range."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest

from nearshard.guide import Guide
from nearshard.kept import Kept
from nearshard.landing import MemoryLanding
from nearshard.transfer import Meter, Transfer
from shared.digest import Digest
from shared.errors import IntegrityError, UpstreamError
from shared.web.session import Sessions, make_session, open_blob
from tests import scripted
from tests.clock import HandClock
from tests.faults.client import until
from tests.scripted import Act, Asked, Script, head, source

DATA = random.Random(3).randbytes(3_000_000)


@asynccontextmanager
async def opened() -> AsyncIterator[Sessions]:
    """Sessions, closed at the end."""
    sessions = Sessions()
    try:
        yield sessions
    finally:
        await sessions.close()


async def fetch(digest: Digest, *urls: str) -> Transfer:
    """Have one shard from these sources, in this order."""
    clock = HandClock()
    async with opened() as sessions, source(Script()) as nobody:
        guide = Guide(sessions, [nobody.url], None, Kept(), clock)
        sources = [f"{url}/blobs/{digest}" for url in urls]
        transfer = Transfer(sessions, guide, clock, planned={digest: sources})
        landing = MemoryLanding(digest, len(DATA))
        try:
            await transfer.fetch(landing)
        finally:
            await landing.settle()
        assert bytes(landing.data) == DATA
        await guide.close()
        return transfer


@pytest.mark.parametrize(
    "act",
    [
        scripted.broken_off(1_000_000),
        scripted.broken_off(0),
        scripted.flipped_at(2_000_000),
        scripted.wrong_content_range,
        scripted.gzip_encoded,
        scripted.close_delimited,
        scripted.too_long,
        scripted.unavailable,
    ],
)
async def test_whatever_a_source_does_the_next_one_makes_it_right(act: Act) -> None:
    """F15, F16, F18 from the client's side."""
    async with source(Script(acts=[act])) as bad, source(Script()) as good:
        digest = bad.add(DATA)
        good.add(DATA)
        transfer = await fetch(digest, bad.url, good.url)
    had = sum(size for (url, _), size in transfer.sources.items() if url == bad.url)
    assert good.gets()[0].start in (0, had), "it goes on where that one was, or begins again"


async def test_who_answers_a_range_with_all_of_it_is_not_appended_blindly() -> None:
    """F18."""
    broken, blind = scripted.broken_off(1_000_000), scripted.whole_for_a_range
    async with source(Script(acts=[broken])) as bad, source(Script(acts=[blind])) as whole:
        digest = bad.add(DATA)
        whole.add(DATA)
        await fetch(digest, bad.url, whole.url)
    assert whole.gets()[0].start == 1_000_000


async def test_where_everybody_lies_there_is_an_integrity_error() -> None:
    async with source(Script(acts=[scripted.flipped_at(5)])) as bad:
        digest = bad.add(DATA)
        with pytest.raises(IntegrityError):
            await fetch(digest, bad.url)


async def test_where_nobody_is_there_is_an_upstream_error() -> None:
    with pytest.raises(UpstreamError):
        await fetch(Script().add(DATA), "http://127.0.0.1:9")


async def test_a_source_that_drips_while_another_one_is_fast_is_left_where_it_was() -> None:
    clock = HandClock()

    async def drip(script: Script, asked: Asked, writer: asyncio.StreamWriter) -> None:
        """A little of it; then it takes four seconds for a little more, and the rest never comes."""
        data = script.blobs[asked.path]
        head(writer, data, asked)
        writer.write(data[:1000])
        await writer.drain()
        script.holding.set()
        await script.release.wait()
        writer.write(data[1000:2000])
        await writer.drain()

    held = scripted.held_after(1_000_000)
    async with (
        opened() as sessions,
        source(Script(acts=[drip])) as slow,
        source(Script(acts=[held, scripted.serve_whole])) as fast,
    ):
        other = fast.add(DATA[::-1])
        digest = slow.add(DATA)
        fast.add(DATA)
        guide = Guide(sessions, ["http://127.0.0.1:9"], None, Kept(), clock)
        planned = {digest: [f"{u}/blobs/{digest}" for u in (slow.url, fast.url)], other: [f"{fast.url}/blobs/{other}"]}
        begun = asyncio.Event()
        meter = Meter(0, lambda had, _: begun.set() if had > 1000 else None)
        transfer = Transfer(sessions, guide, clock, planned=planned, meter=meter)
        landings = [MemoryLanding(name, len(DATA)) for name in (digest, other)]
        dripping = asyncio.create_task(transfer.fetch(landings[0]))
        await slow.holding.wait()
        quick = asyncio.create_task(transfer.fetch(landings[1]))
        await begun.wait()
        clock.now += 0.1
        fast.release.set()
        await quick
        clock.now += 4.0
        slow.release.set()
        await dripping
        assert bytes(landings[0].data) == DATA
        assert fast.gets()[-1].start == 2000, "from the byte reached"
        assert {u for u, _ in transfer.sources} == {slow.url, fast.url}
        await guide.close()


async def test_a_source_is_as_good_after_a_pause_as_before() -> None:
    """aiohttp leaves timers running on idle connections; who is asked again is not to blame for that."""
    async with source(Script()) as good, make_session(idle=1.0) as session:
        url = f"{good.url}/blobs/{good.add(DATA)}"
        for _ in range(2):
            async with open_blob(session, url, start=0, size=len(DATA), max_size=len(DATA)) as body:
                assert sum([len(chunk) async for chunk in body.chunks]) == len(DATA)
            await until(lambda: _has_no_connection(session), "no idle connection", deadline=5)


def _has_no_connection(session: aiohttp.ClientSession) -> bool:
    assert session.connector is not None
    return not session.connector._conns
