"""How many streams, and which are too slow, by what came when."""

from __future__ import annotations

from nearshard.pace import FIRST, HOLD, MOST, PATIENCE, Pace, Width


def test_streams_are_added_while_that_brings_more() -> None:
    width = Width()
    assert width.streams == FIRST
    for _ in range(10):
        width.look(width.streams * 1e6)
    assert width.streams == MOST


def test_what_brought_nothing_is_taken_back_and_tried_again_later() -> None:
    width = Width()
    seen = [width.look(1e6) for _ in range(2 * HOLD + 8)]
    assert max(seen) > FIRST and seen[1] == FIRST
    assert seen.count(FIRST) > len(seen) - 4, "it is at what is enough nearly all the time"
    assert max(seen[2:]) > FIRST, "and tries again"


def test_a_number_that_was_asked_for_stays() -> None:
    width = Width(1)
    assert {width.look(rate * 1e6) for rate in range(1, 50)} == {1}


def test_a_stream_that_is_far_slower_than_another_source_is_left() -> None:
    pace = Pace()
    fast, slow = pace.begin("http://a", "hit", 0.0), pace.begin("http://b", "hit", 0.0)
    assert not pace.add(fast, 50_000_000, PATIENCE)
    assert not pace.add(slow, 1000, PATIENCE / 2), "it has a moment to show better"
    assert pace.add(slow, 1000, PATIENCE)
    assert pace.slow("http://b") and not pace.slow("http://a")


def test_all_that_are_as_slow_as_each_other_are_kept() -> None:
    pace = Pace()
    streams = [pace.begin(f"http://{name}", "hit", 0.0) for name in "abc"]
    assert not any(pace.add(stream, 10_000 * (n + 1), PATIENCE) for n, stream in enumerate(streams))


def test_a_node_that_has_to_fetch_first_is_not_compared_with_one_that_has_it() -> None:
    pace = Pace()
    warm, cold = pace.begin("http://a", "hit", 0.0), pace.begin("http://b", "fill", 0.0)
    assert not pace.add(warm, 50_000_000, PATIENCE) and not pace.add(cold, 10_000, PATIENCE)


def test_a_few_bytes_from_a_buffer_tell_nothing() -> None:
    pace = Pace()
    tiny = pace.begin("http://a", "hit", 0.0)
    pace.add(tiny, 1000, 1e-6)
    pace.end(tiny, 1e-6)
    other = pace.begin("http://b", "hit", 0.0)
    assert not pace.add(other, 1_000_000, PATIENCE)
