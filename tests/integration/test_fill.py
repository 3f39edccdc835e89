"""Fills against sources that misbehave: real sockets, a scripted other end, the edge's own parts."""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from itertools import pairwise
from pathlib import Path

import pytest

from edge_node.fill import HELP_LEAST
from edge_node.reach import Reach
from edge_node.shard_key import digest_in, path_of, shard_key
from edge_node.slots import AT_FIRST
from edge_node.upstream import PART, PART_LEAST
from shared.errors import IntegrityError, NotFound, UpstreamError
from shared.outcome import Outcome
from shared.web.send import FileRegion
from tests import scripted
from tests.node import Node, node_over, pread
from tests.scripted import Act, Asked, Script, source

DATA = random.Random(1).randbytes(1_000_000)


Edge = Callable[..., AbstractAsyncContextManager[Node]]


@pytest.fixture
def edge(tmp_path: Path) -> Edge:
    """Makes a node over the given sources."""
    return functools.partial(node_over, tmp_path)


async def test_two_hundred_readers_of_a_cold_shard_cause_one_fetch(edge: Edge) -> None:
    script = Script(acts=[scripted.held_after(1000)])
    key = shard_key(script.add(DATA))
    async with source(script), edge(script) as node:
        readers = [asyncio.create_task(node.read(key)) for _ in range(200)]
        await script.holding.wait()
        script.release.set()
        assert set(await asyncio.gather(*readers)) == {DATA}
    assert len(script.gets()) == 1


async def test_a_reader_follows_the_fill_from_its_first_byte(edge: Edge) -> None:
    script = Script(acts=[scripted.held_after(5000)])
    key = shard_key(script.add(DATA))
    async with source(script), edge(script) as node:
        reader = node.cache.open(key, None)
        assert reader.outcome is Outcome.FILL_ORIGIN
        pieces = reader.read(0, len(DATA))
        first = await anext(pieces)
        assert isinstance(first, FileRegion) and pread(first) == DATA[: first.length]
        assert not script.release.is_set()
        script.release.set()
        rest = [pread(piece) async for piece in pieces if isinstance(piece, FileRegion)]
        assert b"".join(rest) == DATA[first.length :]
        reader.close()


async def test_no_reader_gets_its_last_byte_before_the_digest_is_right(edge: Edge) -> None:
    """Also not of a range that was complete long before the shard was."""
    script = Script(acts=[scripted.held_after(500_000)])
    key = shard_key(script.add(DATA))
    async with source(script), edge(script) as node:
        reader = node.cache.open(key, None)
        pieces = reader.read(100, 1000)
        await script.holding.wait()
        had = 0
        while had < 999:
            piece = await anext(pieces)
            assert isinstance(piece, FileRegion)
            had += piece.length
        assert had == 999
        last = asyncio.ensure_future(anext(pieces))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not last.done()
        script.release.set()
        piece = await last
        assert isinstance(piece, FileRegion) and pread(piece) == DATA[1099:1100]
        await pieces.aclose()  # type: ignore[attr-defined]
        reader.close()


async def test_the_fill_goes_on_when_its_first_reader_leaves(edge: Edge) -> None:
    script = Script(acts=[scripted.held_after(1000)])
    key = shard_key(script.add(DATA))
    async with source(script), edge(script) as node:
        leader = asyncio.create_task(node.read(key))
        await script.holding.wait()
        follower = asyncio.create_task(node.read(key))
        await asyncio.sleep(0)
        leader.cancel()
        await asyncio.wait([leader])
        script.release.set()
        assert await follower == DATA
        await node.settled()
        assert node.cache.peek(key) is Outcome.HIT_DISK
    assert len(script.gets()) == 1


async def test_a_source_that_breaks_off_is_left_and_the_next_goes_on_from_the_byte_reached(edge: Edge) -> None:
    first, second = Script(acts=[scripted.broken_off(300_000)]), Script()
    key = shard_key(first.add(DATA))
    second.add(DATA)
    async with source(first), source(second), edge(first, second) as node:
        assert await node.read(key) == DATA
    assert len(first.gets()) == 1
    assert [asked.start for asked in second.gets()] == [300_000]


@pytest.mark.parametrize(
    "fault",
    [
        scripted.flipped_at(500_000),
        scripted.broken_off(10),
        scripted.gzip_encoded,
        scripted.close_delimited,
        scripted.unavailable,
        scripted.too_long,
        scripted.wrong_content_range,
    ],
)
async def test_readers_that_come_for_a_bad_source_get_right_bytes_from_the_next(edge: Edge, fault: Act) -> None:
    """F15, F16, F18: whoever has been given no byte of a wrong shard never sees one."""
    bad, good = Script(acts=[fault]), Script()
    key = shard_key(bad.add(DATA))
    good.add(DATA)
    async with source(bad), source(good), edge(bad, good) as node:
        try:
            assert await node.read(key) == DATA
        except IntegrityError:
            await node.settled()  # this reader had followed the wrong bytes: it was told, the next is served
            assert node.files() == []
            assert await node.read(key) == DATA
        await node.settled()
        assert [name for name in node.files() if not name.startswith("tmp")] == node.files()


async def test_a_wrong_byte_never_reaches_the_disk_and_no_reader_gets_the_whole(edge: Edge) -> None:
    """F17: every source is wrong."""
    script = Script(acts=[scripted.flipped_at(7)])
    key = shard_key(script.add(DATA))
    async with source(script), edge(script) as node:
        reader = node.cache.open(key, None)
        had = 0
        with pytest.raises(IntegrityError):
            async for piece in reader.read(0, len(DATA)):
                assert isinstance(piece, FileRegion)
                had += piece.length
        reader.close()
        assert had < len(DATA)
        await node.settled()
        assert node.files() == []
        assert node.cache.disk.ledger.used == 0
        assert node.cache.peek(key) is Outcome.FILL_ORIGIN


async def test_a_whole_answer_to_a_range_is_not_appended(edge: Edge) -> None:
    """F18: the second source ignores Range: it is asked for all, and then given no more ranges to ignore."""
    first, second = Script(acts=[scripted.broken_off(400_000)]), Script(acts=[scripted.whole_for_a_range])
    key = shard_key(first.add(DATA))
    second.add(DATA)
    async with source(first), source(second), edge(first, second) as node:
        assert await node.read(key) == DATA
    assert [(asked.start, asked.ranged) for asked in second.gets()] == [(400_000, True), (0, False)]


async def test_a_lie_in_content_range_is_refused(edge: Edge) -> None:
    first, second, third = (
        Script(acts=[scripted.broken_off(400_000)]),
        Script(acts=[scripted.wrong_content_range]),
        Script(),
    )
    key = shard_key(first.add(DATA))
    second.add(DATA), third.add(DATA)
    async with source(first), source(second), source(third), edge(first, second, third) as node:
        assert await node.read(key) == DATA
    assert [asked.start for asked in third.gets()] == [400_000]


async def test_a_shard_that_no_source_has_is_not_found(edge: Edge) -> None:
    script = Script()
    key = shard_key(Script().add(DATA))
    async with source(script), edge(script) as node:
        with pytest.raises(NotFound):
            await node.read(key)
    assert len(script.gets()) == 1, "asking again does not help"


async def test_sources_that_are_all_away_are_tried_twice_and_reported(edge: Edge) -> None:
    script = Script(acts=[scripted.unavailable])
    key = shard_key(script.add(DATA))
    async with source(script), edge(script) as node:
        with pytest.raises(UpstreamError):
            await node.read(key)
    assert len(script.gets()) == 2


async def test_budgets_are_never_overshot_and_pinned_shards_stay(edge: Edge) -> None:
    script = Script()
    shards = [random.Random(n).randbytes(100_000) for n in range(20)]
    keys = [shard_key(script.add(data)) for data in shards]
    async with source(script), edge(script, disk=450_000, memory=0) as node:
        held = node.cache.open(keys[0], None)
        await held.size()
        for key, data in zip(keys, shards, strict=True):
            assert await node.read(key) == data
            assert node.cache.disk.ledger.used <= 450_000
        assert keys[0] in node.cache.disk.ledger, "a reader holds it"
        held.close()
        await node.settled()
        assert sum(path.stat().st_size for path in node.folder.rglob("*") if path.is_file()) <= 450_000


async def test_a_disk_without_room_means_serving_through(edge: Edge) -> None:
    script = Script()
    key = shard_key(script.add(DATA))
    async with source(script), edge(script, disk=1000, memory=1000) as node:
        assert await node.read(key) == DATA
        await node.settled()
        assert await node.read(key) == DATA
        assert node.files() == []
    assert len(script.gets()) == 2, "nothing was kept, nothing failed"


async def test_what_a_neighbour_owns_passes_through_the_disk_where_memory_is_full(edge: Edge) -> None:
    """Its room is counted while it is read; nothing of it is left after its last reader."""
    script = Script()
    keys = [shard_key(script.add(random.Random(n).randbytes(100_000))) for n in range(40)]
    async with source(script), edge(script, memory=200_000) as node:
        node.upstreams.peers.update({"edge": ("http://127.0.0.1:1", 1), "owner": (script.url, 10)})
        passing = [key for key in keys if not node.upstreams.owned(key)][:12]
        memory, disk = node.cache.memory.ledger, node.cache.disk.ledger
        readers = [node.cache.open(key, 100_000) for key in passing]
        for reader, key in zip(readers, passing, strict=True):
            pieces = [p async for p in reader.read(0, 100_000)]
            data = b"".join(pread(piece) if isinstance(piece, FileRegion) else piece for piece in pieces)
            assert data == script.blobs[f"/blobs/{key}"]
        await node.settled()
        assert memory.used == 200_000
        assert disk.used == 100_000 * (len(passing) - 2), "all at once: none waited for another one's end"
        assert not list(disk) and not list((node.folder / "blobs").rglob("*/*"))
        for reader in readers:
            reader.close()
        assert disk.used == 0 and not list((node.folder / "tmp").iterdir())
        assert await node.read(passing[-1]) == script.blobs[f"/blobs/{passing[-1]}"]
        await node.settled()
        assert set(memory) < set(passing) and memory.used <= 200_000


async def test_without_disk_a_shard_is_kept_in_memory(edge: Edge) -> None:
    script = Script()
    key = shard_key(script.add(DATA))
    async with source(script), edge(script, disk=0) as node:
        assert await node.read(key) == DATA
        await node.settled()
        assert node.cache.peek(key) is Outcome.HIT_MEMORY
        assert await node.read(key, 5, 10) == DATA[5:15]


async def test_a_disk_that_fills_up_in_the_middle_loses_nothing(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    """F11: ENOSPC while a fill is written; it goes on in memory, and no byte is fetched twice."""
    import errno
    import os

    script = Script()
    key = shard_key(script.add(DATA))
    real, written = os.pwrite, 0

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal written
        if written > 300_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = real(descriptor, data[:50_000], offset)  # the kernel may take a part
        written += done
        return done

    monkeypatch.setattr(os, "pwrite", pwrite)
    async with source(script), edge(script) as node:
        assert await node.read(key) == DATA
        await node.settled()
        assert node.files() == []
        assert node.cache.peek(key) is Outcome.HIT_MEMORY
    assert len(script.gets()) == 1


async def test_a_damaged_file_is_dropped_and_fetched_again(edge: Edge) -> None:
    """F14, short: a file that is not the size that was committed."""
    script = Script()
    key = shard_key(script.add(DATA))
    async with source(script), edge(script, memory=0) as node:
        await node.read(key)
        await node.settled()
        (path,) = [node.folder / name for name in node.files()]
        with path.open("r+b") as file:
            file.truncate(100)
        assert await node.read(key) == DATA
    assert len(script.gets()) == 2


async def test_the_disk_cache_is_found_again_and_leftovers_are_not(edge: Edge) -> None:
    script = Script()
    key = shard_key(script.add(DATA))
    async with source(script):
        async with edge(script) as node:
            await node.read(key)
            await node.settled()
            (node.folder / "tmp" / "leftover.1").write_bytes(b"half a shard")
            (node.folder / "blobs" / "zz").mkdir()
        async with edge(script) as again:
            assert again.cache.peek(key) is Outcome.HIT_DISK
            assert await again.read(key) == DATA
            assert list((again.folder / "tmp").iterdir()) == []
    assert len(script.gets()) == 1


async def test_private_shards_are_kept_apart_from_public_ones_and_from_each_other(edge: Edge) -> None:
    """What one may see who has a token is never found by who asks another way, also after a restart."""
    script = Script()
    public = shard_key(script.add(DATA))
    mine, yours = (shard_key(digest_in(public), model) for model in ("acme/mine", "acme/yours"))
    script.blobs[path_of(mine)] = DATA
    async with source(script):
        async with edge(script) as node:
            assert await node.read(mine) == DATA
            await node.settled()
            assert node.cache.peek(mine) is Outcome.HIT_DISK
            for other in (public, yours):
                assert node.cache.open_held(other) is None and node.cache.known_size(other) is None
        async with edge(script) as again:
            assert again.cache.peek(mine) is Outcome.HIT_DISK
            assert again.cache.open_held(public) is None and again.cache.open_held(yours) is None
            with pytest.raises(NotFound):
                await again.read(yours)
            assert await again.read(public) == DATA
            await again.settled()
            again.cache.disk.drop(public)
            assert await again.read(mine) == DATA
    assert [asked.path for asked in script.gets()].count(path_of(mine)) == 1


LARGE = random.Random(2).randbytes(3 * PART)


async def test_a_large_shard_comes_from_an_origin_in_parts_at_once(edge: Edge) -> None:
    script = Script(acts=[scripted.held_after(1000), scripted.serve_whole])
    key = shard_key(script.add(LARGE))
    async with source(script), edge(script) as node:
        reader = asyncio.create_task(node.read(key, size=len(LARGE)))
        await script.holding.wait()
        while len(script.gets()) < AT_FIRST:
            await asyncio.sleep(0)
        parts = sorted((asked.start, asked.stop or 0) for asked in script.gets()[:AT_FIRST])
        assert parts[0][0] == 0 and all(stop <= start for (_, stop), (start, _) in pairwise(parts))
        assert all(PART_LEAST <= stop - start <= PART for start, stop in parts), "one for each connection"
        script.release.set()
        assert await reader == LARGE
        await node.settled()
        assert node.cache.peek(key) is Outcome.HIT_DISK


async def test_a_slow_stream_is_helped_by_others(edge: Edge) -> None:
    """The connection that brings nothing more keeps nobody from the rest of its part, but for the last of it."""
    script = Script(acts=[scripted.held_after(1000), scripted.serve_whole])
    key = shard_key(script.add(LARGE))
    async with source(script), edge(script) as node:
        reader = node.cache.open(key, len(LARGE))
        pieces = reader.read(0, len(LARGE))
        await anext(pieces)
        fill = node.cache.fills.get(key, Reach.ANYWHERE)
        assert fill is not None
        while fill.missing is None or fill.missing > 2 * HELP_LEAST:
            await asyncio.sleep(0.01)  # real time: streams are judged by it
        assert not script.release.is_set()
        script.release.set()
        rest = [pread(piece) async for piece in pieces if isinstance(piece, FileRegion)]
        assert LARGE.endswith(b"".join(rest))
        reader.close()
        await node.settled()
        assert node.cache.peek(key) is Outcome.HIT_DISK


async def test_peers_join_what_an_owner_fetches_for_itself(edge: Edge) -> None:
    """It asks no peer, so nobody waits in a circle; a second fetch would cross the link."""
    script = Script(acts=[scripted.held_after(1000)])
    key = shard_key(script.add(LARGE))
    async with source(script), edge(script) as node:
        own = asyncio.create_task(node.read(key, size=len(LARGE)))
        await script.holding.wait()
        theirs = node.cache.open(key, len(LARGE), Reach.ABOVE)
        assert len(node.cache.fills) == 1
        script.release.set()
        assert await own == b"".join([pread(piece) async for piece in theirs.read(0, len(LARGE))])  # type: ignore[arg-type]
        theirs.close()
        await node.settled()


async def test_a_source_without_ranges_is_asked_for_the_whole_from_then_on(edge: Edge) -> None:
    script = Script(acts=[scripted.whole_for_a_range])
    key, other = shard_key(script.add(LARGE)), shard_key(script.add(LARGE[::-1]))
    async with source(script), edge(script) as node:
        assert await node.read(key, size=len(LARGE)) == LARGE
        before = len(script.gets())
        assert await node.read(other, size=len(LARGE)) == LARGE[::-1]
        assert [asked.ranged for asked in script.gets()[before:]] == [False]


async def test_parts_of_a_source_that_breaks_off_are_kept_and_the_next_gives_what_is_missing(edge: Edge) -> None:
    first, second = Script(acts=[scripted.broken_off(PART // 2)]), Script()
    key = shard_key(first.add(LARGE))
    second.add(LARGE)
    async with source(first), source(second), edge(first, second) as node:
        assert await node.read(key, size=len(LARGE)) == LARGE
    asked = sum((asked.stop or len(LARGE)) - asked.start for asked in second.gets())
    assert asked < len(LARGE)


async def test_wrong_bytes_in_a_later_part_are_found(edge: Edge) -> None:
    script, good = Script(acts=[flipped_in_the_shard]), Script()
    key = shard_key(script.add(LARGE))
    good.add(LARGE)
    async with source(script), edge(script) as node:
        with pytest.raises(IntegrityError):
            await node.read(key, size=len(LARGE))
        await node.settled()
        assert node.files() == []


async def flipped_in_the_shard(script: Script, asked: Asked, writer: asyncio.StreamWriter) -> None:
    """One bit of the last part is wrong."""
    data = bytearray(script.blobs[asked.path])
    data[-5] ^= 1
    scripted.head(writer, data, asked)
    writer.write(bytes(data[asked.start : asked.stop]))


async def test_a_disk_that_does_not_give_back_what_was_written_costs_a_fetch_not_an_error(
    edge: Edge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F13: parts that came early are read again to be hashed."""
    import errno
    import os

    script = Script(acts=[scripted.held_after(1000), scripted.serve_whole])
    key = shard_key(script.add(LARGE))

    def pread(descriptor: int, length: int, offset: int) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    async with source(script), edge(script, memory=64 << 20) as node:
        fetching = asyncio.create_task(node.cache.fetch(key, len(LARGE)))
        await script.holding.wait()
        monkeypatch.setattr(os, "pread", pread)
        script.release.set()
        await fetching
        assert node.cache.peek(key) is Outcome.HIT_MEMORY
        assert await node.read(key) == LARGE
