"""What is missing of a shard."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_node.gaps import Gap, Gaps

JUDGE = 0.5


def spans(gaps: list[Gap]) -> list[tuple[int, int]]:
    """As pairs."""
    return [(gap.start, gap.stop) for gap in gaps]


def test_a_shard_is_cut_into_equal_parts_and_a_small_rest_makes_none_of_its_own() -> None:
    assert spans(Gaps(100).cut(25)) == [(0, 25), (25, 50), (50, 75), (75, 100)]
    assert spans(Gaps(110).cut(50)) == [(0, 55), (55, 110)]
    assert spans(Gaps(10).cut(100)) == [(0, 10)]


def test_what_is_reached_ends_at_the_first_hole() -> None:
    gaps = Gaps(100)
    first, second = gaps.cut(50)
    second.start = 100
    assert (gaps.reached, gaps.missing) == (0, 50)
    first.start = 20
    assert (gaps.reached, gaps.missing) == (20, 30)
    assert spans(gaps.cut(1000)) == [(20, 50)]
    gaps.cut(1000)[0].start = 50
    assert (gaps.reached, gaps.missing) == (100, 0)


def test_neighbours_that_nothing_came_for_are_one_gap_again() -> None:
    gaps = Gaps(100)
    gaps.cut(10)[0].start = 5
    assert spans(gaps.cut(1000)) == [(5, 100)]


def test_a_gap_is_split_where_both_parts_are_worth_a_request() -> None:
    gaps = Gaps(100)
    gap = gaps.cut(100)[0]
    rest = gaps.split(gap, 40)
    assert rest and (gap.start, gap.stop, rest.start, rest.stop) == (0, 40, 40, 100)
    assert gaps.missing == 100
    assert gaps.split(rest, 50) is None, "the last ten would be a request for little"


def test_the_slowest_stream_is_helped_with_its_second_half() -> None:
    gaps = Gaps(1000)
    quick, slow = gaps.cut(500)
    quick.opened, slow.opened = (0.0, 0), (0.0, 500)
    quick.start, slow.start = 400, 510
    half = gaps.help(1.0, JUDGE, seconds=2.0, least=10)
    assert half is not None
    assert spans([slow, half]) == [(510, 755), (755, 1000)]
    assert gaps.missing == 100 + 490


@pytest.mark.parametrize(
    ("opened", "start", "now", "why"),
    [
        ((0.0, 0), 100, JUDGE / 2, "too new to judge"),
        (None, 0, 100.0, "no stream yet"),
        ((0.0, 0), 500, 1.0, "it is quick enough"),
        ((0.0, 0), 999, 1000.0, "too little is left"),
    ],
)
def test_no_help_where_it_is_not_worth_it(opened: tuple[float, int] | None, start: int, now: float, why: str) -> None:
    gaps = Gaps(1000)
    (gap,) = gaps.cut(1000)
    gap.opened, gap.start = opened, start
    assert gaps.help(now, JUDGE, seconds=2.0, least=10) is None, why


def test_a_stream_that_brings_nothing_is_helped() -> None:
    gaps = Gaps(1000)
    (gap,) = gaps.cut(1000)
    gap.opened = (0.0, 0)
    assert gaps.help(JUDGE, JUDGE, seconds=2.0, least=10) is not None


@given(st.data(), st.integers(1, 10_000))
def test_whatever_comes_in_whatever_order_every_byte_is_accounted_for(data: st.DataObject, size: int) -> None:
    gaps = Gaps(size)
    had = bytearray(size)
    streams = gaps.cut(data.draw(st.integers(1, 2 * size)))
    for _ in range(data.draw(st.integers(0, 30))):
        step = data.draw(st.sampled_from(["bytes", "help", "anew"]))
        if step == "anew":
            streams = gaps.cut(data.draw(st.integers(1, 2 * size)))
        elif step == "help":
            if half := gaps.help(JUDGE, JUDGE, seconds=0.0, least=1):
                streams.append(half)
        elif streams:
            gap = data.draw(st.sampled_from(streams))
            gap.opened = gap.opened or (0.0, gap.start)
            count = data.draw(st.integers(0, max(0, gap.stop - gap.start)))
            for position in range(gap.start, gap.start + count):
                assert not had[position], "fetched twice"
                had[position] = 1
            gap.start += count
        assert gaps.missing == had.count(0)
        assert gaps.reached == (had.find(0) if 0 in had else size)
