"""Strict msgpack and JSON: what is let through, what is refused, and that refusing is cheap."""

from __future__ import annotations

import struct
import tracemalloc
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.codec import MAX_ARRAY, MAX_DEPTH, MAX_JSON, MAX_MAP, decode, decode_json, encode, encode_json
from shared.errors import DecodeError
from tests.unit.strategies import quick, texts

LIMIT = 1 << 20
BODY = 64 << 10
"""Bytes of a hostile body."""
CHEAP = 5_000_000
"""Bytes that refusing it may take."""

scalars = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
)
plain = st.recursive(
    scalars | texts | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts.filter("pages".__ne__), inner, max_size=4),
    max_leaves=10,
)


def nested(wrapper: bytes, core: bytes, depth: int) -> bytes:
    """``depth`` containers around ``core``."""
    return wrapper * depth + core


def cost_of_refusing(data: bytes) -> int:
    """Bytes that were allocated at most while ``data`` was refused."""
    tracemalloc.start()
    try:
        with pytest.raises(DecodeError):
            decode(data, LIMIT)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# msgpack


@quick
@given(plain)
def test_plain_values_come_back_as_they_were(value: object) -> None:
    assert decode(encode(value), LIMIT) == value


@quick
@given(plain)
def test_a_value_has_one_encoding(value: object) -> None:
    assert encode(decode(encode(value), LIMIT)) == encode(value)


@pytest.mark.parametrize("length", [MAX_ARRAY, MAX_ARRAY + 1, 3 * MAX_ARRAY + 5])
def test_a_list_of_any_length_comes_back_as_one_list(length: int) -> None:
    value = {"numbers": list(range(length)), "nested": [[*range(length)], []]}
    assert decode(encode(value), LIMIT) == value


def test_a_list_of_more_pages_than_a_list_may_have_comes_back_as_one_list() -> None:
    value = [None] * (MAX_ARRAY**2 + MAX_ARRAY + 1)
    assert decode(encode(value), LIMIT) == value


@pytest.mark.parametrize("value", [{"pages": []}, {"pages": [[1], [2, 3]]}, {"pages": {"pages": [[1]]}}])
def test_a_map_that_looks_like_a_long_list_is_never_turned_into_one(value: object) -> None:
    """Refusing to encode it is as good as keeping it."""
    try:
        packed = encode(value)
    except ValueError:
        return
    assert decode(packed, LIMIT) == value


def test_tuples_travel_as_lists() -> None:
    assert decode(encode({"a": (1, (2,))}), LIMIT) == {"a": [1, [2]]}


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\xc1", b"\xc0\xc0", b"\x91", b"\x81\xa1a", b"\xd9", b"\xc4\x05ab",  # truncated, or followed by more
        b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff",
        b"\xa2\xff\xfe", b"\xa3\xed\xa0\x80", b"\x81\xa1\xff\x01",  # not UTF-8
        b"\x81\x01\x02", b"\x81\xc0\x02", b"\x81\xc3\x02", b"\x81\xc4\x01a\x02", b"\x81\x90\x02",
        b"\x81\xca\0\0\0\0\x02",
        b"\x82\xa1a\x01\xa1a\x02", b"\x91\x82\xa1a\x01\xa1a\x01",  # a key twice
        msgpack.packb(msgpack.ExtType(5, b"")), msgpack.packb(msgpack.ExtType(5, b"data")),
        msgpack.packb([msgpack.Timestamp(1, 2)]), msgpack.packb({"a": msgpack.ExtType(127, b"")}),
        msgpack.packb(float("nan")), msgpack.packb([float("inf")]), msgpack.packb({"a": float("-inf")}),
        b"\xca" + struct.pack(">f", float("nan")),
        msgpack.packb([0] * (MAX_ARRAY + 1)), msgpack.packb({str(n): n for n in range(MAX_MAP + 1)}),
        msgpack.packb({"pages": 1}), msgpack.packb({"pages": [1]}), msgpack.packb({"pages": [[1], {}]}),
        msgpack.packb({"pages": []}), msgpack.packb({"pages": [[1]]}), msgpack.packb({"pages": [[1], [2]]}),  # not full
    ],
)  # fmt: skip
def test_msgpack_that_is_not_plain_and_bounded_is_refused(data: bytes) -> None:
    with pytest.raises(DecodeError) as caught:
        decode(data, LIMIT)
    assert (caught.value.status, caught.value.error_code) == (400, "bad_body")


@pytest.mark.parametrize(
    ("wrapper", "core"), [(b"\x91", b"\xc0"), (b"\x81\xa1a", b"\xc0"), (b"\x91\x81\xa1a", b"\x01")]
)
def test_msgpack_may_be_32_deep_and_no_deeper(wrapper: bytes, core: bytes) -> None:
    levels = MAX_DEPTH // (wrapper.count(b"\x91") + wrapper.count(b"\x81"))
    decode(nested(wrapper, core, levels), LIMIT)
    for depth in (levels + 1, 500, 1100, 20_000):
        with pytest.raises(DecodeError):
            decode(nested(wrapper, core, depth), LIMIT)


@pytest.mark.parametrize("innermost", [b"\x90", b"\x80"])
def test_an_empty_container_is_as_deep_as_a_full_one(innermost: bytes) -> None:
    decode(nested(b"\x91", innermost, MAX_DEPTH - 1), LIMIT)
    with pytest.raises(DecodeError):
        decode(nested(b"\x91", innermost, MAX_DEPTH), LIMIT)


def test_every_beginning_of_a_body_is_refused() -> None:
    whole = encode({"a": [1, 2.5, None, True, b"bin", "text"], "b": {"c": 2**40}})
    for length in range(len(whole)):
        with pytest.raises(DecodeError):
            decode(whole[:length], LIMIT)


def test_a_body_over_its_limit_is_too_large() -> None:
    assert decode(encode("a" * 10), 11) == "a" * 10
    with pytest.raises(DecodeError) as caught:
        decode(encode("a" * 10), 10)
    assert caught.value.status == 413


@pytest.mark.parametrize(
    "header",
    [
        b"\xdd\xff\xff\xff\xff", b"\xdd\x00\x01\x00\x00", b"\xdd\x00\x00\x10\x00", b"\xdc\x10\x00", b"\x9f", b"\x91",
        b"\xdf\xff\xff\xff\xff", b"\xdf\x00\x00\x01\x00\xa1a", b"\xde\x01\x00\xa1a", b"\x81\xa1a",
        b"\x81\xa5pages\xdc\x10\x00",
    ],
)  # fmt: skip
def test_a_bomb_of_headers_costs_little(header: bytes) -> None:
    assert cost_of_refusing(header * (BODY // len(header))) < CHEAP


@quick
@given(st.binary(max_size=60) | plain.map(msgpack.packb))
def test_any_bytes_are_a_plain_value_or_a_decode_error(data: bytes) -> None:
    try:
        value = decode(data, LIMIT)
    except DecodeError:
        return
    assert decode(encode(value), LIMIT) == value


# JSON

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=10,
)


@quick
@given(json_values)
def test_json_values_come_back_as_they_were(value: object) -> None:
    assert decode_json(encode_json(value)) == value


@pytest.mark.parametrize(
    "data",
    [
        b"NaN", b"[Infinity]", b'{"a": -Infinity}', b"1e999", b"[-1e999]",
        b'{"a": 1, "a": 2}', b'[{"a": {"b": 1, "b": 1}}]', b'{"a": 1, "\\u0061": 1}',
        b"1" * 5000, b"-" + b"1" * 5000,
        b"", b"{", b"{}{}", b'{"a": 1}x', b"{'a': 1}", b"[1,]", b"\xff", b"\0", b"nul",
        b'"\xed\xa0\x80"', b'"\\ud800"', b'{"\\udfff": 1}',  # text that UTF-8 cannot carry
        b"\xef\xbb\xbf{}", '{"a": 1}'.encode("utf-16-le"), '{"a": 1}'.encode("utf-32"),  # not UTF-8
        b"[" * 100_000, b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    ],
)  # fmt: skip
def test_json_that_is_ambiguous_or_unbounded_is_refused(data: bytes) -> None:
    with pytest.raises(DecodeError) as caught:
        decode_json(data)
    assert (caught.value.status, caught.value.error_code) == (400, "bad_json")


@pytest.mark.parametrize("core", [b"", b"1"])
@pytest.mark.parametrize(("start", "end"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_json_may_be_32_deep_and_no_deeper(start: bytes, end: bytes, core: bytes) -> None:
    innermost = start + core + end if start == b"[" else (b'{"a":1}' if core else b"{}")
    decode_json(start * (MAX_DEPTH - 1) + innermost + end * (MAX_DEPTH - 1))
    with pytest.raises(DecodeError):
        decode_json(start * MAX_DEPTH + innermost + end * MAX_DEPTH)


def test_json_over_its_limit_is_too_large() -> None:
    with pytest.raises(DecodeError) as caught:
        decode_json(b'"' + b"a" * MAX_JSON + b'"')
    assert caught.value.status == 413


def test_json_for_the_wire_has_no_nan_and_no_spaces() -> None:
    assert encode_json({"a": [1, "é"]}) == '{"a":[1,"é"]}'.encode()
    with pytest.raises(ValueError, match="not JSON compliant"):
        encode_json(float("nan"))


@quick
@given(st.binary(max_size=40) | st.text('[]{}",:0123456789.eE-+ atrufalsn\\', max_size=30).map(str.encode))
def test_any_bytes_are_json_or_a_decode_error(data: bytes) -> None:
    try:
        value: Any = decode_json(data)
    except DecodeError:
        return
    assert decode_json(encode_json(value)) == value
