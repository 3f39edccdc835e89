"""Reading anywhere in what is not here: the bytes are those of the whole, whatever is read in whatever order."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearshard.opened import BlockingFile, OpenFile, running
from shared.digest import Digest, digest_of
from shared.errors import IntegrityError, LocalError
from shared.layout import Layout, Slice
from tests.unit.strategies import quick


class Source:
    """Shards in memory, that counts what is asked of it."""

    def __init__(self, sizes: list[int], cuts: list[tuple[int, int, int]]) -> None:
        """``cuts``: shard, offset and length of each slice."""
        rng = random.Random(1)
        shards = [rng.randbytes(size) for size in sizes]
        self.shards = {digest_of(data): data for data in shards}
        slices = [
            Slice(digest_of(shards[n]), offset, length)
            for n, offset, length in ((n % len(sizes), o, w) for n, o, w in cuts)
            if length and offset + length <= len(shards[n])
        ]
        self.whole = b"".join(self.shards[s.digest][s.offset : s.offset + s.length] for s in slices)
        self.layout = Layout(len(self.whole), hashlib.sha256(self.whole).hexdigest(), tuple(slices))
        self.asked: list[Digest] = []
        self.broken = False

    async def fetch(self, digest: Digest) -> memoryview:
        self.asked.append(digest)
        await asyncio.sleep(0)
        if self.broken:
            raise IntegrityError("wrong")
        return memoryview(self.shards[digest])


def plain(count: int, size: int = 1000) -> Source:
    """A file of so many shards, one after the other."""
    return Source([size + n for n in range(count)], [(n, 0, size + n) for n in range(count)])


SOURCES = st.builds(
    Source,
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 20), st.integers(1, 40)), max_size=12),
)
ACTS = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.integers(-1, 90), st.just(0)),
        st.tuples(st.just("seek"), st.integers(-60, 120), st.sampled_from([os.SEEK_SET, os.SEEK_CUR, os.SEEK_END])),
        st.tuples(st.just("at"), st.integers(0, 200), st.integers(0, 90)),
    ),
    max_size=20,
)


@quick
@given(SOURCES, ACTS, st.integers(0, 3), st.sampled_from([0, 50, 10_000]))
def test_reads_give_what_a_file_of_the_whole_gives(
    source: Source, acts: list[tuple[str, int, int]], ahead: int, budget: int
) -> None:
    async def run() -> None:
        opened, model = OpenFile(source.layout, source.fetch, ahead=ahead, budget=budget), io.BytesIO(source.whole)
        for act, first, second in acts:
            if act == "read":
                assert await opened.read(first) == model.read(first)
            elif act == "at":
                assert await opened.read_at(first, second) == source.whole[first : first + second]
            else:
                base = {os.SEEK_SET: 0, os.SEEK_CUR: model.tell(), os.SEEK_END: len(source.whole)}[second]
                if base + first < 0:
                    with pytest.raises(ValueError):
                        opened.seek(first, second)
                else:
                    assert opened.seek(first, second) == model.seek(base + first)
            assert opened.tell() == model.tell()
        await opened.close()

    asyncio.run(run())


async def test_who_reads_from_front_to_back_has_the_next_shards_fetched_meanwhile() -> None:
    source = plain(6)
    opened = OpenFile(source.layout, source.fetch, ahead=2)
    await opened.read(10)
    assert len(source.asked) == 3
    assert await opened.read() == source.whole[10:]
    assert len(source.asked) == len(set(source.asked)) == 6, "each once"
    await opened.close()


async def test_who_jumps_about_fetches_only_what_is_read() -> None:
    source = plain(6)
    opened = OpenFile(source.layout, source.fetch, ahead=2)
    await opened.read_at(4500, 10)
    assert len(source.asked) == 1
    await opened.close()
    with pytest.raises(LocalError):
        await opened.read(1)


async def test_memory_is_bounded_by_the_budget() -> None:
    source = plain(50)
    opened = OpenFile(source.layout, source.fetch, ahead=1, budget=3000)
    assert await opened.read() == source.whole
    assert "3 shards" in repr(opened) or "2 shards" in repr(opened) or "1 shards" in repr(opened)
    await opened.close()


async def test_a_shard_that_could_not_be_had_is_tried_again_by_the_next_read() -> None:
    source = plain(3)
    source.broken = True
    opened = OpenFile(source.layout, source.fetch)
    with pytest.raises(IntegrityError):
        await opened.read(1)
    source.broken = False
    assert await opened.read() == source.whole
    await opened.close()


def test_a_blocking_file_is_one_of_io() -> None:
    source = plain(5)
    with running() as run:

        async def make() -> OpenFile:
            return OpenFile(source.layout, source.fetch)

        opened = run(make())
        with io.BufferedReader(BlockingFile(opened, run), 512) as reader:
            assert reader.read(700) == source.whole[:700]
            reader.seek(-100, os.SEEK_END)
            assert reader.read() == source.whole[-100:]
            assert reader.tell() == len(source.whole)
        run(opened.close())
