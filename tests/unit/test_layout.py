"""Layouts: whatever is cut or joined, the bytes are those of the whole."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.digest import digest_of
from shared.layout import Layout, Slice, Span, join
from tests.unit.strategies import Blobs, layouts, quick, read

A, B = digest_of(b"a"), digest_of(b"b")


@quick
@given(layouts(), st.data())
def test_a_cut_gives_the_bytes_that_slicing_the_whole_gives(drawn: tuple[Layout, Blobs], data: st.DataObject) -> None:
    layout, blobs = drawn
    start = data.draw(st.integers(0, layout.size))
    stop = data.draw(st.integers(start, layout.size))
    assert read(layout.cut(Span(start, stop)), blobs) == read(layout.slices, blobs)[start:stop]


@quick
@given(layouts(), st.data())
def test_a_cut_gives_no_empty_slice_and_none_that_leaves_its_shard(
    drawn: tuple[Layout, Blobs], data: st.DataObject
) -> None:
    layout, blobs = drawn
    start = data.draw(st.integers(0, layout.size))
    stop = data.draw(st.integers(start, layout.size))
    for piece in layout.cut(Span(start, stop)):
        assert piece.length > 0
        assert 0 <= piece.offset <= piece.offset + piece.length <= len(blobs[piece.digest])


@quick
@given(layouts())
def test_the_whole_is_every_slice_as_it_stands(drawn: tuple[Layout, Blobs]) -> None:
    layout, _ = drawn
    assert layout.whole.length == layout.size
    assert tuple(layout.cut(layout.whole)) == layout.slices


@pytest.mark.parametrize("span", [Span(-1, 3), Span(0, 11), Span(11, 11), Span(5, 4)])
def test_a_span_outside_the_layout_is_refused(span: Span) -> None:
    layout = Layout(10, "0" * 64, (Slice(A, 0, 4), Slice(B, 2, 6)))
    with pytest.raises(ValueError, match="not within 10 bytes"):
        list(layout.cut(span))


def test_an_empty_layout_has_one_empty_cut() -> None:
    assert list(Layout(0, "0" * 64, ()).cut(Span(0, 0))) == []


@quick
@given(layouts())
def test_joining_keeps_the_bytes(drawn: tuple[Layout, Blobs]) -> None:
    layout, blobs = drawn
    assert read(join(layout.slices), blobs) == read(layout.slices, blobs)


@quick
@given(layouts(), st.data())
def test_joining_puts_together_what_was_cut_apart(drawn: tuple[Layout, Blobs], data: st.DataObject) -> None:
    layout, _ = drawn
    middle = data.draw(st.integers(0, layout.size))
    halves = [*layout.cut(Span(0, middle)), *layout.cut(Span(middle, layout.size))]
    assert join(halves) == join(layout.slices)


@pytest.mark.parametrize(
    ("slices", "joined"),
    [
        ([Slice(A, 0, 4), Slice(A, 4, 2)], [Slice(A, 0, 6)]),
        ([Slice(A, 0, 1), Slice(A, 1, 1), Slice(A, 2, 1)], [Slice(A, 0, 3)]),
        ([Slice(A, 0, 4), Slice(A, 3, 2)], [Slice(A, 0, 4), Slice(A, 3, 2)]),  # they overlap
        ([Slice(A, 0, 4), Slice(A, 5, 2)], [Slice(A, 0, 4), Slice(A, 5, 2)]),  # a byte is left out
        ([Slice(A, 4, 2), Slice(A, 0, 4)], [Slice(A, 4, 2), Slice(A, 0, 4)]),  # the order counts
        ([Slice(A, 0, 4), Slice(B, 4, 2)], [Slice(A, 0, 4), Slice(B, 4, 2)]),  # another shard
        ([Slice(A, 0, 4), Slice(B, 0, 0), Slice(A, 4, 2)], [Slice(A, 0, 6)]),  # an empty one is nothing
        ([], []),
    ],
)
def test_only_neighbours_that_continue_each_other_become_one(slices: list[Slice], joined: list[Slice]) -> None:
    assert join(slices) == tuple(joined)


def test_shards_are_named_once_in_order_of_first_use() -> None:
    for first, second in ((A, B), (B, A)):
        slices = Slice(first, 0, 1), Slice(second, 0, 1), Slice(first, 1, 1), Slice(second, 9, 1)
        assert Layout(4, "0" * 64, slices).shards() == (first, second)
