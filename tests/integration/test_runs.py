"""Runs of shards: one long answer for several fills, each of which checks its own."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from edge_node.runs import Trial
from edge_node.shard_key import ShardKey, digest_in, path_of, shard_key
from edge_node.slots import HOLD
from edge_node.upstream import Place
from shared.digest import hex_of
from shared.errors import IntegrityError, NearshardError
from shared.outcome import Outcome
from tests import scripted
from tests.node import Node, node_over
from tests.scripted import Script, source

SHARDS = [random.Random(seed).randbytes(size) for seed, size in enumerate((300_000, 200_000, 100_001, 100_000, 50_000))]
WHOLE = b"".join(SHARDS)
PATH = "/shards/acme/m:all@r"


def publisher(body: bytes = WHOLE) -> tuple[Script, list[ShardKey]]:
    """A source that has some shards, and the task that they are."""
    script = Script(blobs={PATH: body})
    return script, [shard_key(script.add(data)) for data in SHARDS]


async def fetch(node: Node, keys: Sequence[ShardKey], *, first: int = 0) -> list[bytes | NearshardError]:
    """All of a task's shards from ``first`` on, read as a request does: the next ones are opened ahead."""
    starts = [sum(map(len, SHARDS[:n])) for n in range(len(SHARDS))]
    readers = [node.cache.open(keys[n], len(SHARDS[n]), at=Place(PATH, starts[n])) for n in range(first, len(SHARDS))]
    got: list[bytes | NearshardError] = []
    for n, reader in enumerate(readers, first):
        try:
            await reader.verified()
            got.append(await node.read(keys[n]))
        except NearshardError as error:
            got.append(error)
        finally:
            reader.close()
    await node.settled()
    return got


async def test_shards_that_follow_one_another_come_in_one_answer(tmp_path: Path) -> None:
    script, keys = publisher()
    async with source(script), node_over(tmp_path, script) as node:
        assert await fetch(node, keys) == SHARDS
        asked = [(asked.path, asked.start, asked.stop) for asked in script.gets()]
        assert asked == [(PATH, 0, 700_001), (PATH, 700_001, len(WHOLE))], "and what was left for a trial"
        assert all(node.cache.peek(key) is Outcome.HIT_DISK for key in keys)


async def test_a_run_goes_around_what_is_held_and_a_shard_alone_is_asked_for_by_name(tmp_path: Path) -> None:
    script, keys = publisher()
    async with source(script), node_over(tmp_path, script) as node:
        await node.read(keys[1])
        await node.settled()
        assert await fetch(node, keys) == SHARDS
    asked = [(asked.path, asked.start) for asked in script.gets() if not asked.path.endswith(keys[1])]
    assert asked == [(PATH, 500_000), (path_of(keys[0]), 0)] or asked == [(path_of(keys[0]), 0), (PATH, 500_000)]


async def test_a_reader_that_jumps_ahead_does_not_wait_for_the_run_before_it(tmp_path: Path) -> None:
    """The run at the beginning is held; who wants the end has a run of its own meanwhile."""
    script, keys = publisher()
    script.acts = [scripted.held_after(1000), scripted.serve_whole]
    async with source(script), node_over(tmp_path, script) as node:
        first = node.cache.open(keys[0], len(SHARDS[0]), at=Place(PATH, 0))
        behind = node.cache.open(keys[1], len(SHARDS[1]), at=Place(PATH, len(SHARDS[0])))
        await script.holding.wait()
        end = [
            node.cache.open(keys[n], len(SHARDS[n]), at=Place(PATH, start)) for n, start in ((3, 600_001), (4, 700_001))
        ]
        assert await asyncio.wait_for(node.read(keys[3]), 5) == SHARDS[3]
        assert script.gets()[1].path == PATH
        for reader in end:
            reader.close()
        script.release.set()
        assert await node.read(keys[0]) == SHARDS[0] and await node.read(keys[1]) == SHARDS[1]
        first.close()
        behind.close()


@pytest.mark.parametrize(
    ("act", "asked_again"),
    [
        pytest.param(scripted.broken_off(350_000), True, id="broken-off"),
        pytest.param(scripted.wrong_content_range, False, id="another-range"),
        pytest.param(scripted.whole_for_a_range, False, id="no-ranges"),
        pytest.param(scripted.gzip_encoded, False, id="gzip"),
    ],
)
async def test_a_run_that_fails_costs_no_reader_its_bytes(tmp_path: Path, act: scripted.Act, asked_again: bool) -> None:
    """What came is kept; the shard that it broke off at goes on from the byte reached."""
    script, keys = publisher()

    async def only_the_run(script: Script, asked: scripted.Asked, writer: asyncio.StreamWriter) -> None:
        await (act if asked.path == PATH else scripted.serve_whole)(script, asked, writer)

    script.acts = [only_the_run]
    async with source(script), node_over(tmp_path, script) as node:
        assert await fetch(node, keys) == SHARDS
    if asked_again:
        resumed = next(asked for asked in script.gets() if asked.path.endswith(keys[1]))
        assert 0 < resumed.start <= 50_000


async def test_a_source_that_has_shards_only_is_asked_for_shards(tmp_path: Path) -> None:
    script, keys = publisher()
    del script.blobs[PATH]
    async with source(script), node_over(tmp_path, script) as node:
        assert await fetch(node, keys) == SHARDS
        assert [asked.path for asked in script.gets()].count(PATH) == 1


async def test_what_is_wrong_in_a_run_is_kept_from_nobody_but_its_own_readers(tmp_path: Path) -> None:
    """One shard of the answer has a wrong byte: it is fetched anew, and the others are as they should be."""
    wrong = bytearray(WHOLE)
    wrong[350_000] ^= 1
    script, keys = publisher(bytes(wrong))
    async with source(script), node_over(tmp_path, script) as node:
        got = await fetch(node, keys)
        assert got[0] == SHARDS[0] and got[2] == SHARDS[2]
        assert got[1] == SHARDS[1] or isinstance(got[1], IntegrityError)
        assert (
            not any(hex_of(digest_in(keys[1])) in name for name in node.files())
            or await node.read(keys[1]) == SHARDS[1]
        )


def rates(trial: Trial, seconds: int, rate: Callable[[bool], float]) -> list[int]:
    """Count for so long what ``rate`` says, given whether another connection is tried; the seconds when one was."""
    had, tried = 0.0, list[int]()
    trial.begin(0, 0.0)
    for now in range(1, seconds + 1):
        had += rate(bool(tried) and now - tried[-1] <= 2)
        if trial.due(int(had), float(now)):
            tried.append(now)
    return tried


def test_another_connection_is_tried_once_a_minute_where_it_brings_nothing() -> None:
    trial = Trial()
    tried = rates(trial, 130, lambda _: 25e6)
    assert not trial.many and tried == [2, 2 + int(HOLD), 2 + 2 * int(HOLD)]


def test_many_are_better_where_a_second_one_brings_more_or_one_brings_little() -> None:
    twice, little = Trial(), Trial()
    assert rates(twice, 4, lambda trying: 4e6 if trying else 2e6) == [2] and twice.many
    assert rates(little, 2, lambda _: 250e3) == [] and little.many


def test_a_rate_that_grows_by_itself_is_not_judged() -> None:
    steps = iter([1e6, 2e6, 4e6, 8e6, 16e6, 16e6, 16e6, 16e6])
    assert rates(Trial(), 8, lambda _: next(steps)) == [6]
