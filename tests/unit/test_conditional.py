"""Conditional requests and ranges: which bytes are sent, and which requests are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.conditional import MAX_RANGES, Conditions, Decision, NotModified, Partial, Whole, evaluate
from shared.errors import RequestError
from shared.layout import Span
from tests.unit.strategies import quick

ETAG = "ab" * 32
SIZE = 1000
QUOTED = f'"{ETAG}"'


def get(
    range: str = "", *, if_range: str = "", if_match: str = "", if_none_match: str = "", size: int | None = SIZE
) -> Decision:
    """What a GET with these fields is answered; an empty text leaves the field out."""
    fields = ([text] if text else [] for text in (range, if_range, if_match, if_none_match))
    return evaluate(Conditions("GET", *fields), ETAG, size)


def refusal(conditions: Conditions, size: int | None = SIZE) -> RequestError:
    """The error that these conditions are answered."""
    with pytest.raises(RequestError) as caught:
        evaluate(conditions, ETAG, size)
    return caught.value


# Ranges


@pytest.mark.parametrize(
    ("value", "span"),
    [
        ("bytes=0-0", Span(0, 1)),
        ("bytes=-5", Span(995, 1000)),
        ("bytes=990-", Span(990, 1000)),
        ("bytes=999-", Span(999, 1000)),
        ("bytes=10-19", Span(10, 20)),
        ("bytes=0-999", Span(0, 1000)),
        ("bytes=0-5000", Span(0, 1000)),  # a last position past the end means the end
        ("bytes=0-9999999999999999999", Span(0, 1000)),
        ("bytes=-5000", Span(0, 1000)),
        ("bytes=000-004", Span(0, 5)),
        ("BYTES=0-0", Span(0, 1)),  # units have no letter case
        ("bytes= 0-0\t", Span(0, 1)),
    ],
)
def test_a_range_in_reach_gives_exactly_its_bytes(value: str, span: Span) -> None:
    assert get(value) == Partial(span)


@pytest.mark.parametrize(
    "value",
    [
        "bytes=1000-", "bytes=1000-1001", "bytes=5000-6000",  # it starts at the end, or after it
        "bytes=-0", "bytes=5-3", "bytes=-", "bytes=", "bytes=abc", "bytes=--5", "bytes=1-2-3", "bytes=0 - 5",
        "bytes=\u0660-\u0665", "bytes=0x0-", "bytes=+0-5", "bytes=0-5.0", "bytes=0_0-1", "bytes=0-0\n",
        "bytes=" + "9" * 30 + "-", "bytes=0-" + "9" * 30,
    ],
)  # fmt: skip
def test_a_range_out_of_reach_or_malformed_is_416_and_tells_the_size(value: str) -> None:
    error = refusal(Conditions("GET", [value]))
    assert error.status == 416
    assert error.headers == {"Content-Range": "bytes */1000"}


@pytest.mark.parametrize("value", ["bytes=0-", "bytes=0-0", "bytes=-1", "bytes=-0"])
def test_nothing_of_an_empty_representation_is_in_reach(value: str) -> None:
    error = refusal(Conditions("GET", [value]), size=0)
    assert (error.status, error.headers) == (416, {"Content-Range": "bytes */0"})


@pytest.mark.parametrize("value", ["items=0-5", "seconds=1-", "byte=0-0", "0-5", "=0-5"])
def test_a_range_of_an_unknown_unit_is_ignored(value: str) -> None:
    assert get(value) == Whole()


@pytest.mark.parametrize(
    "value",
    [
        "bytes=0-0,5-5",
        "bytes=0-0, -1",
        "bytes=0-499,400-600",  # two that overlap are still few
        "bytes=" + ",".join(f"{n}-{n}" for n in range(MAX_RANGES)),
    ],
)
def test_a_few_ranges_are_answered_with_the_whole(value: str) -> None:
    assert get(value) == Whole()


@pytest.mark.parametrize(
    "value",
    [
        "bytes=0-,0-,0-",
        "bytes=0-99,50-149,100-199",
        "bytes=100-199,0-149,140-140",  # whatever their order
        "bytes=0-9,2-3,20-29,22-23",  # two pairs
        "bytes=" + ",".join(f"{n}-{n}" for n in range(MAX_RANGES + 1)),
        "bytes=" + "0-," * 5000 + "0-",
        "bytes=0-0,abc",
    ],
)
def test_many_or_overlapping_ranges_are_416(value: str) -> None:
    assert refusal(Conditions("GET", [value])).status == 416


def test_two_range_fields_are_a_bad_request() -> None:
    error = refusal(Conditions("GET", ["bytes=0-0", "bytes=1-1"]))
    assert (error.status, error.error_code) == (400, "bad_request")


@pytest.mark.parametrize("value", ["bytes=0-0", "bytes=5000-", "abc"])
def test_a_range_means_nothing_to_head(value: str) -> None:
    assert evaluate(Conditions("HEAD", [value]), ETAG, SIZE) == Whole()


def test_a_range_waits_until_the_size_is_known() -> None:
    assert get("bytes=0-0", size=None) == Whole()


@quick
@given(st.binary(max_size=30), st.integers(0, 40), st.integers(0, 40) | st.none())
def test_a_range_gives_the_bytes_of_a_python_slice(data: bytes, first: int, last: int | None) -> None:
    expected = data[first:] if last is None else data[first : last + 1]
    conditions = Conditions("GET", [f"bytes={first}-{'' if last is None else last}"])
    if not expected:
        assert refusal(conditions, len(data)).status == 416
        return
    decision = evaluate(conditions, ETAG, len(data))
    assert isinstance(decision, Partial)
    assert data[decision.span.start : decision.span.stop] == expected


@quick
@given(st.binary(min_size=1, max_size=30), st.integers(1, 40))
def test_a_suffix_range_gives_the_last_bytes(data: bytes, count: int) -> None:
    decision = evaluate(Conditions("GET", [f"bytes=-{count}"]), ETAG, len(data))
    assert isinstance(decision, Partial)
    assert data[decision.span.start : decision.span.stop] == data[-count:]


# If-Range


def test_a_range_is_served_when_if_range_names_this_version() -> None:
    assert get("bytes=5-", if_range=QUOTED) == Partial(Span(5, SIZE))


@pytest.mark.parametrize(
    "value",
    ['"other"', f"W/{QUOTED}", ETAG, "Wed, 21 Oct 2015 07:28:00 GMT", "*", '"', f'{QUOTED}, "other"', " "],
)
def test_the_whole_is_sent_when_if_range_does_not_name_this_version_strongly(value: str) -> None:
    assert get("bytes=5-", if_range=value) == Whole()


def test_a_range_out_of_reach_of_an_older_version_is_answered_with_the_whole_new_one() -> None:
    assert get("bytes=5000-", if_range='"other"') == Whole()


# If-None-Match


@pytest.mark.parametrize(
    "value",
    [QUOTED, f"W/{QUOTED}", "*", f'"other", {QUOTED}', f'{QUOTED},"other"', f'W/"x" , W/{QUOTED}', f"{QUOTED},"],
)
def test_a_client_that_has_this_version_gets_304(value: str) -> None:
    assert get(if_none_match=value) == NotModified()


@pytest.mark.parametrize("value", [f', {QUOTED}, "other"', f'"other",,{QUOTED}', f'"other", , {QUOTED} ,'])
def test_empty_members_of_a_list_are_skipped(value: str) -> None:
    """RFC 9110 §5.6.1.2: a recipient MUST ignore a reasonable number of them."""
    assert get(if_none_match=value) == NotModified()
    assert get(if_match=value) == Whole()


@pytest.mark.parametrize(
    "value", ['"other"', 'W/"other", "x"', ETAG, f"{QUOTED} {QUOTED}", f"w/{QUOTED}", f"*, {QUOTED}"]
)
def test_a_client_that_names_other_versions_or_nothing_gets_the_whole(value: str) -> None:
    assert get(if_none_match=value) == Whole()


def test_if_none_match_may_come_in_several_lines() -> None:
    assert evaluate(Conditions("HEAD", if_none_match=['"other"', QUOTED]), ETAG, SIZE) == NotModified()


@pytest.mark.parametrize("ranges", [["bytes=0-0"], ["bytes=5000-"], ["bytes=0-0", "bytes=1-1"]])
def test_304_comes_before_any_range(ranges: list[str]) -> None:
    assert evaluate(Conditions("GET", ranges, if_none_match=[QUOTED]), ETAG, SIZE) == NotModified()


def test_304_needs_no_size() -> None:
    assert get(if_none_match=QUOTED, size=None) == NotModified()


# If-Match


@pytest.mark.parametrize("value", [QUOTED, "*", f'"other", {QUOTED}'])
def test_if_match_lets_this_version_through(value: str) -> None:
    assert get("bytes=0-0", if_match=value) == Partial(Span(0, 1))


@pytest.mark.parametrize("value", ['"other"', f"W/{QUOTED}", ETAG, '"', "nonsense"])
def test_if_match_on_another_version_is_412(value: str) -> None:
    error = refusal(Conditions("GET", if_match=[value]))
    assert (error.status, error.error_code) == (412, "precondition_failed")


def test_412_comes_before_304_and_416() -> None:
    assert refusal(Conditions("GET", ["bytes=5000-"], (), ['"other"'], [QUOTED])).status == 412


# Whatever comes


LINES = st.lists(
    st.text(max_size=30)
    | st.from_regex(r"bytes=[0-9, -]{0,20}", fullmatch=True)
    | st.text(' \t,*W/"ab', max_size=12)
    | st.just(QUOTED),
    max_size=2,
)


@quick
@given(
    st.builds(Conditions, st.sampled_from(["GET", "HEAD"]), LINES, LINES, LINES, LINES),
    st.none() | st.integers(0, 100),
)
def test_any_text_is_answered_or_refused_as_a_request(conditions: Conditions, size: int | None) -> None:
    try:
        decision = evaluate(conditions, ETAG, size)
    except RequestError as error:
        assert error.status in (400, 412, 416)
    else:
        if isinstance(decision, Partial):
            assert size is not None
            assert 0 <= decision.span.start < decision.span.stop <= size
