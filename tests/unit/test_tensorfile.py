"""Safetensors headers: what others would read in two ways is refused, and what we make others can read."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load, save

from shared import tensorfile
from shared.errors import TensorFileError
from shared.tensorfile import (
    DTYPE_BITS,
    MAX_HEADER,
    MAX_NAME,
    MAX_TENSORS,
    PREFIX,
    TensorEntry,
    TensorHeader,
    header_length,
    make_header,
    parse_header,
)
from tests.unit.strategies import quick, texts

TWO = {
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "U8", "shape": [2, 2], "data_offsets": [8, 12]},
}


def parse(header: object, data_size: int) -> TensorHeader:
    """The header of a file that has this JSON and so many bytes of data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return parse_header(raw, PREFIX + len(raw) + data_size)


def read(file: bytes) -> TensorHeader:
    """The header of a whole file, as publishing reads it."""
    length = header_length(file[:PREFIX], len(file))
    return parse_header(file[PREFIX : PREFIX + length], len(file))


def only(**changes: object) -> dict[str, Any]:
    """A header of one tensor, with something changed."""
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


def named(name: str) -> dict[str, Any]:
    """A header of one tensor of this name."""
    return {name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def many(count: int, key: str = "data_offsets") -> bytes:
    """A header of so many tensors of no bytes."""
    entry = '{"dtype":"U8","shape":[0],"' + key + '":[0,0]}'
    return ("{" + ",".join(f'"{number:06}":{entry}' for number in range(count)) + "}").encode()


# The length


@pytest.mark.parametrize("prefix", [b"", bytes(7), b"\2"])
def test_a_file_without_a_whole_length_is_refused(prefix: bytes) -> None:
    with pytest.raises(TensorFileError):
        header_length(prefix, len(prefix))


@pytest.mark.parametrize("length", [MAX_HEADER + 1, 2**63, 2**64 - 1])
def test_a_header_over_its_limit_is_refused_before_it_is_read(length: int) -> None:
    with pytest.raises(TensorFileError):
        header_length(struct.pack("<Q", length), 2**64)


def test_a_header_longer_than_its_file_is_refused() -> None:
    assert header_length(struct.pack("<Q", 100), 108) == 100
    with pytest.raises(TensorFileError):
        header_length(struct.pack("<Q", 100), 107)


def test_the_largest_header_is_allowed() -> None:
    assert header_length(struct.pack("<Q", MAX_HEADER), 1 << 40) == MAX_HEADER


# The JSON


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"[]", b'"a"', b"5", b"null", b"{", b"{}x", b"{}{}", b" {}", b"\n{}", b"\xef\xbb\xbf{}", b"{'a': 1}",
        b'{"\xff": 1}', b'{"a": NaN}', b'{"a": Infinity}', b'{"a": ' + b"[" * 100_000, b'{"a": ' + b"1" * 5000 + b"}",
    ],
)  # fmt: skip
def test_a_header_that_is_not_one_json_object_is_refused(raw: bytes) -> None:
    with pytest.raises(TensorFileError):
        parse(raw, 0)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-32-le"])
def test_a_header_that_is_not_utf_8_is_refused(encoding: str) -> None:
    with pytest.raises(TensorFileError):
        parse(json.dumps(TWO).encode(encoding), 12)


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a": %b, "a": %b}', b'{"a": %b, "\\u0061": %b}', b'{"x": {"a": %b, "a": %b}}',
    ],
)  # fmt: skip
def test_a_key_twice_is_refused(raw: bytes) -> None:
    entry = json.dumps(only()["a"]).encode()
    with pytest.raises(TensorFileError):
        parse(raw % (entry, entry), 8)


@pytest.mark.parametrize(
    "metadata", [5, [], "text", None, {"a": 5}, {"a": None}, {"a": {"b": "c"}}, {"a": "\ud800"}, {"\ud800": "a"}]
)
def test_metadata_that_is_not_a_map_of_texts_is_refused(metadata: object) -> None:
    with pytest.raises(TensorFileError):
        parse({"__metadata__": metadata}, 0)


# The tensors


def test_a_header_is_read_in_the_order_of_its_data() -> None:
    header = parse({"__metadata__": {"format": "pt"}, **dict(reversed(TWO.items()))}, 12)
    assert header.tensors == (TensorEntry("a", "F32", (2,), 0, 8), TensorEntry("b", "U8", (2, 2), 8, 12))
    assert header.metadata == {"format": "pt"}


def test_a_file_of_no_tensors_is_fine() -> None:
    assert parse({}, 0).tensors == ()


@pytest.mark.parametrize(
    ("header", "data_size"),
    [
        pytest.param({**TWO, "c": {"dtype": "U8", "shape": [4], "data_offsets": [6, 10]}}, 12, id="overlap"),
        pytest.param({**TWO, "c": TWO["b"]}, 12, id="same bytes twice"),
        pytest.param({**TWO, "c": {"dtype": "U8", "shape": [0], "data_offsets": [4, 4]}}, 12, id="empty in another"),
        pytest.param({"a": TWO["a"], "b": {"dtype": "U8", "shape": [4], "data_offsets": [9, 13]}}, 13, id="hole"),
        pytest.param({"b": TWO["b"]}, 12, id="hole at the start"),
        pytest.param(TWO, 13, id="tail bytes"),
        pytest.param({}, 1, id="data of no tensor"),
        pytest.param(TWO, 11, id="short data"),
        pytest.param(TWO, 0, id="no data"),
        pytest.param(only(data_offsets=[-8, 0]), 8, id="negative begin"),
        pytest.param(only(data_offsets=[8, 0]), 8, id="end before begin"),
        pytest.param(only(data_offsets=[0, 2**64]), 8, id="end past 64 bits"),
        pytest.param(only(data_offsets=[0, 8, 8]), 8, id="three offsets"),
        pytest.param(only(data_offsets=[8]), 8, id="one offset"),
        pytest.param(only(data_offsets=[0.0, 8.0]), 8, id="float offsets"),
        pytest.param(only(data_offsets=[False, 8]), 8, id="offset that is a truth value"),
        pytest.param(only(data_offsets={"0": 8}), 8, id="offsets in a map"),
        pytest.param(only(data_offsets=None), 8, id="no offsets"),
        pytest.param(only(shape=[3]), 8, id="size over shape and dtype"),
        pytest.param(only(shape=[]), 8, id="size under shape and dtype"),
        pytest.param(only(dtype="F64"), 8, id="other dtype for the size"),
        pytest.param(only(dtype="F4", shape=[1], data_offsets=[0, 1]), 1, id="half a byte"),
        pytest.param(only(shape=[-2]), 8, id="negative shape"),
        pytest.param(only(shape=[-1, -2]), 8, id="negative shape with the right product"),
        pytest.param(only(shape=[2.0]), 8, id="float shape"),
        pytest.param(only(shape=[True, 2]), 8, id="shape with a truth value"),
        pytest.param(only(shape="2"), 8, id="shape as text"),
        pytest.param(only(shape=2), 8, id="shape as a number"),
        pytest.param(only(shape=[2**40, 2**40]), 8, id="shape overflow"),
        pytest.param(only(shape=[2**62, 4, 2]), 8, id="shape that wraps round to the size"),
        pytest.param(only(shape=[0, 2**62], data_offsets=[0, 0]), 0, id="overflow behind a zero"),
        pytest.param(only(shape=[2**62, 0], data_offsets=[0, 0]), 0, id="overflow before a zero"),
        pytest.param(only(shape=[0, 2**70], data_offsets=[0, 0]), 0, id="dimension past 64 bits"),
        pytest.param(only(shape=[2] + [1] * 64), 8, id="too many dimensions"),
        pytest.param(only(dtype="F33"), 8, id="unknown dtype"),
        pytest.param(only(dtype="f32"), 8, id="dtype in lower case"),
        pytest.param(only(dtype=32), 8, id="dtype as a number"),
        pytest.param(only(dtype=["F32"]), 8, id="dtype in a list"),
        pytest.param(only(extra=1), 8, id="key that nobody knows"),
        pytest.param({"a": {"dtype": "F32", "shape": [2]}}, 8, id="a key is missing"),
        pytest.param({"a": [0, 8]}, 8, id="tensor that is no map"),
        pytest.param({"a": None}, 8, id="tensor that is nothing"),
        pytest.param(named(""), 8, id="empty name"),
        pytest.param(named(" a"), 8, id="leading space"),
        pytest.param(named("a "), 8, id="trailing space"),
        pytest.param(named("../x"), 8, id="name that climbs"),
        pytest.param(named("a/../x"), 8, id="name that climbs inside"),
        pytest.param(named("a\0"), 8, id="NUL in a name"),
        pytest.param(named("a\nb"), 8, id="line end in a name"),
        pytest.param(named("\u202ea"), 8, id="invisible mark in a name"),
        pytest.param(named("\ud800"), 8, id="name that UTF-8 cannot carry"),
        pytest.param(named("a" * (MAX_NAME + 1)), 8, id="endless name"),
    ],
)  # fmt: skip
def test_a_header_that_could_be_read_in_two_ways_is_refused(header: object, data_size: int) -> None:
    with pytest.raises(TensorFileError):
        parse(header, data_size)


@pytest.mark.parametrize("key", ["data_offsets", "data\\u005foffsets"])
def test_a_bomb_of_tensors_is_refused(key: str) -> None:
    with pytest.raises(TensorFileError):
        parse(many(MAX_TENSORS + 1, key), 0)


def test_a_bomb_of_tensors_is_refused_before_it_is_parsed() -> None:
    raw = many(100_000)
    tracemalloc.start()
    with pytest.raises(TensorFileError):
        parse_header(raw, PREFIX + len(raw))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


def test_a_file_may_have_20000_tensors_and_no_more() -> None:
    assert len(parse(many(20_000), 0).tensors) == MAX_TENSORS
    with pytest.raises(TensorFileError):
        parse(many(20_001), 0)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["F32", "U8"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "dtype", "shape", "data_offsets", "__metadata__"]), inner)
    ),
    max_leaves=12,
)


@quick
@given(
    st.binary(max_size=60) | st.binary(max_size=30).map(b"{".__add__) | values.map(lambda v: json.dumps(v).encode()),
    st.integers(0, 20),
)
def test_any_bytes_are_a_header_or_a_tensor_file_error(raw: bytes, data_size: int) -> None:
    try:
        header = parse(raw, data_size)
    except TensorFileError:
        return
    assert make_header([(tensor.name, tensor) for tensor in header.tensors], header.metadata)


@quick
@given(st.binary(max_size=20))
def test_any_bytes_are_a_file_or_a_tensor_file_error(file: bytes) -> None:
    with pytest.raises(TensorFileError):
        read(file)


# Headers that we make

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
tensor_names = texts.filter(
    lambda name: (
        bool(name) and name.isprintable() and name == name.strip() and ".." not in name and name != "__metadata__"
    )
)


@st.composite
def tensors(draw: st.DrawFn) -> list[tuple[str, TensorEntry]]:
    """Tensors from anywhere in some files, under the names that a task gives them."""
    chosen = []
    for name in draw(st.lists(tensor_names, unique=True, max_size=5)):
        dtype, shape = draw(st.sampled_from(sorted(DTYPE_BITS))), draw(shapes)
        bits = int(np.prod(shape, dtype=np.int64)) * DTYPE_BITS[dtype]
        if bits % 8 == 0:
            begin = draw(st.integers(0, 1000))
            chosen.append((name, TensorEntry("as in its file", dtype, shape, begin, begin + bits // 8)))
    return chosen


@quick
@given(tensors(), st.dictionaries(texts, texts, max_size=3))
def test_a_header_that_we_make_is_read_back(chosen: list[tuple[str, TensorEntry]], metadata: Mapping[str, str]) -> None:
    made = make_header(chosen, metadata)
    header = read(made + bytes(sum(tensor.size for _, tensor in chosen)))
    assert [(t.name, t.dtype, t.shape, t.size) for t in header.tensors if t.size] == [
        (name, tensor.dtype, tensor.shape, tensor.size) for name, tensor in chosen if tensor.size
    ]
    assert {t.name for t in header.tensors} == {name for name, _ in chosen}
    assert header.metadata == metadata
    assert header.data_start == len(made)
    assert len(made) % 8 == 0


@quick
@given(tensors(), st.dictionaries(texts, texts, max_size=3), st.data())
def test_the_published_library_reads_a_file_that_we_make(
    chosen: list[tuple[str, TensorEntry]], metadata: Mapping[str, str], data: st.DataObject
) -> None:
    parts = {name: data.draw(st.binary(min_size=tensor.size, max_size=tensor.size)) for name, tensor in chosen}
    file = make_header(chosen, metadata) + b"".join(parts.values())
    specs = safetensors.deserialize(file)  # type: ignore[no-untyped-call]
    found = {name: (spec["dtype"], tuple(spec["shape"]), bytes(spec["data"])) for name, spec in specs}
    assert found == {name: (tensor.dtype, tensor.shape, parts[name]) for name, tensor in chosen}


def test_numpy_gets_the_arrays_that_we_put_in() -> None:
    arrays: dict[str, NDArray[Any]] = {
        "é.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "ids": np.array([-1, 2**40], dtype=np.int64),
    }
    entries = [
        ("é.weight", TensorEntry("x", "F32", (2, 3), 100, 124)),
        ("ids", TensorEntry("y", "I64", (2,), 0, 16)),
    ]
    found = load(make_header(entries, {"format": "np"}) + b"".join(array.tobytes() for array in arrays.values()))
    assert found.keys() == arrays.keys()
    assert all(np.array_equal(found[name], array) for name, array in arrays.items())


def test_a_file_of_the_published_library_is_read() -> None:
    file = save({"w": np.ones((3, 2), dtype=np.float16), "b": np.zeros(5, dtype=np.uint8)}, {"format": "np"})
    header = read(file)
    assert {(t.name, t.dtype, t.shape) for t in header.tensors} == {("w", "F16", (3, 2)), ("b", "U8", (5,))}
    assert header.metadata == {"format": "np"}


def test_the_order_of_metadata_changes_no_byte() -> None:
    assert make_header([], {"a": "1", "b": "2"}) == make_header([], {"b": "2", "a": "1"})


def test_a_header_over_its_limit_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorfile, "MAX_MADE", 1000)
    with pytest.raises(TensorFileError):
        make_header([], {"a": "b" * 1000})
