"""Updates: what each codec loses is what it says, feedback loses nothing, and whatever else is decoded is refused."""

from __future__ import annotations

import io
import struct
import tracemalloc
from collections.abc import Mapping
from math import prod

import numpy as np
import pytest
import zstandard
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shared import codec as plain
from shared.errors import DecodeError, NonFinite, RequestError, SchemaMismatch
from shared.updates import packing
from shared.updates.codec import SLACK, Codec, Floats, norm
from shared.updates.codecs import KNOWN, codec, codec_name, family, warm_up
from shared.updates.document import MAGIC, OVERHEAD, Written, check_schema, open_update, write_update
from shared.updates.feedback import Feedback
from shared.updates.segments import MAX_ELEMENTS, Segment, segments
from tests.unit.strategies import few, quick

fewest = settings(few, max_examples=15)

NAMES = [
    "fp32", "bf16", "int8", "int4", "int4:clipped", "ternary", "sign", "step:0.05", "step:0.5", "step:2",
    "top:0.1:sign", "top:0.01:int4", "top:1:int8", "lowrank:1", "lowrank:4", "ternary:lifted", "step:1.5:lifted",
    "top:0.1:sign:lifted",
]  # fmt: skip


@quick
@given(st.lists(st.integers(0, 9) | st.sampled_from([1000, 3 << 19, 5 << 20]), max_size=4))
def test_segments_are_all_of_a_tensor_once_and_rows_are_whole(shape: list[int]) -> None:
    assume(prod(shape) < 1 << 48)
    found = segments(shape)
    if len(found) > 1000:
        found = [found[0], found[1], found[-1]]
    else:
        assert sum(segment.count for segment in found) == prod(shape)
        assert [s.first for s in found] == list(np.cumsum([0, *(s.count for s in found)])[:-1])
    columns = shape[-1] if len(shape) > 1 else prod(shape)
    for segment in found:
        assert segment.count == segment.rows * segment.columns <= MAX_ELEMENTS
        assert segment.columns == columns or segment.rows == 1


@st.composite
def updates(draw: st.DrawFn) -> Floats:
    """Values as they come: of all sizes, some rows unchanged, some elements far from the others, some tiny or huge."""
    rows, columns = draw(st.sampled_from([(1, 1), (1, 700), (3, 5), (40, 64), (7, 300), (130, 3), (64, 64)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    values = rng.standard_normal((rows, columns)) * np.exp(rng.standard_normal((rows, 1)))
    values[rng.random(rows) < draw(st.sampled_from([0, 0, 0.5, 1]))] = 0
    values[rng.random(values.shape) < draw(st.sampled_from([0, 0, 0.9]))] = 0
    values[rng.random(values.shape) < draw(st.sampled_from([0, 0.02]))] *= 1000
    scale = draw(st.sampled_from([1e-3, 1e-3, 1, 1e-44, 1e-38, 1e-30, 1e30, 3e38]))
    return np.clip(values * scale, -np.finfo(np.float32).max, np.finfo(np.float32).max).astype(np.float32)


@pytest.mark.parametrize("name", NAMES)
@fewest
@given(values=updates())
def test_a_codec_loses_no_more_than_its_bound(name: str, values: Floats) -> None:
    made = codec(name)
    data = made.encode(values)
    decoded = made.decode(data, *values.shape)
    lost = norm(values.astype(np.float64) - decoded)
    assert decoded.dtype == np.float32 and decoded.shape == values.shape
    assert lost <= made.bound * norm(values) * 1.00001 + SLACK * values.size**0.5
    assert len(data) <= 4 * values.size + OVERHEAD
    assert len(data) <= len(codec("fp32").encode(values)) + OVERHEAD
    assert data == made.encode(values)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_is_not_sent(name: str) -> None:
    for wrong in (np.nan, np.inf, -np.inf):
        values = np.ones((3, 70), np.float32)
        values[1, 2] = wrong
        with pytest.raises(NonFinite):
            codec(name).encode(values)
        with pytest.raises(NonFinite, match="layer"):
            written({"layer": values}, codec(name))


def written(
    tensors: Mapping[str, Floats], codecs: Codec | Mapping[str, Codec], file: io.BytesIO | None = None
) -> Written:
    """These tensors as a document."""

    def read(name: str, segment: Segment) -> Floats:
        return tensors[name].reshape(-1)[segment.first : segment.first + segment.count]

    shapes = {name: values.shape for name, values in tensors.items()}
    return write_update(file or io.BytesIO(), shapes, read, codecs)


TENSORS = {
    "matrix": np.random.default_rng(0).standard_normal((30, 100)).astype(np.float32),
    "bias": np.random.default_rng(1).standard_normal(100).astype(np.float32),
    "scalar": np.array(3, np.float32),
    "empty": np.zeros((0, 5), np.float32),
    "long": np.zeros(MAX_ELEMENTS + 5, np.float32),
}


def test_a_document_says_what_is_in_it() -> None:
    file = io.BytesIO()
    made = written(TENSORS, {"b*": codec("fp32"), "*": codec("int4")}, file)
    update = open_update(file, made.size)
    check_schema(update, {name: values.shape for name, values in TENSORS.items()})
    assert made.size == len(file.getvalue())
    for name, head in update.tensors.items():
        flat = TENSORS[name].reshape(-1)
        for number, placed in enumerate(head.segments):
            values = flat[placed.segment.first : placed.segment.first + placed.segment.count]
            lost = norm(update.read(name, number).reshape(-1) - values)
            assert lost <= placed.error * norm(values) and (head.codec == "fp32") <= (lost == 0)
        assert made.tensors[name].codec == head.codec


def test_an_update_of_other_tensors_is_named() -> None:
    file = io.BytesIO()
    update = open_update(file, written({"a": np.zeros((2, 3), np.float32)}, codec("int8"), file).size)
    for expected in ({"a": (3, 2)}, {"b": (2, 3)}, {}, {"a": (2, 3), "b": ()}):
        with pytest.raises(SchemaMismatch):
            check_schema(update, expected)


def test_what_no_glob_fits_is_refused() -> None:
    with pytest.raises(RequestError, match="bias"):
        written({"bias": np.zeros(3, np.float32)}, {"w*": codec("int8")})


@pytest.mark.parametrize("name", ["int4", "top:0.1:sign", "lowrank:2", "step:1:lifted"])
def test_damage_is_refused_or_other_numbers(name: str) -> None:
    """Any byte that is another, missing or more."""
    file = io.BytesIO()
    written({"w": TENSORS["matrix"], "b": TENSORS["bias"]}, codec(name), file)
    rng, refused, whole = np.random.default_rng(0), 0, file.getvalue()
    for _ in range(300):
        data = bytearray(whole)
        at = int(rng.integers(len(data)))
        match rng.integers(3):
            case 0:
                data[at] ^= 1 << int(rng.integers(8))
            case 1:
                del data[at : at + int(rng.integers(1, 50))]
            case _:
                data[at:at] = rng.bytes(int(rng.integers(1, 9)))
        try:
            read_all(bytes(data))
        except (DecodeError, NonFinite):
            refused += 1
    assert refused > 150


def read_all(data: bytes) -> None:
    """Every segment of a document: finite, and of its shape."""
    update = open_update(io.BytesIO(data), len(data))
    for name, head in update.tensors.items():
        for number, placed in enumerate(head.segments):
            values = update.read(name, number)
            assert values.shape == (placed.segment.rows, placed.segment.columns) and np.isfinite(values).all()


ZEROS = codec("int8").encode(np.zeros((4, 64), np.float32))


def document(segment: bytes = ZEROS, **changes: object) -> bytes:
    """A document of one tensor with one segment, its header changed."""
    header = {"codecs": ["int8"], "names": ["w"], "shapes": [[4, 64]], "codec": [0]}
    header |= {"lengths": [len(segment)], "errors": [0], **changes}
    packed = zstandard.ZstdCompressor().compress(plain.encode(header))
    return MAGIC + segment + packed + struct.pack("<I", len(packed)) + MAGIC


def top(count: int, *gaps: int) -> bytes:
    """A segment of a few elements, at these distances."""
    values = codec("sign").encode(np.ones((1, len(gaps)), np.float32))
    return struct.pack("<I", count) + packing.join(packing.pack(np.array(gaps)), values)


def squeezed(size: int) -> bytes:
    """So many zeros, by zstd."""
    return b"\x01" + zstandard.ZstdCompressor().compress(bytes(size))


ZERO_BYTES = np.zeros(256, np.uint8)
BAD = {
    "too short": b"NSU",
    "not one": b"x" * 100,
    "of another version": document()[:-1] + b"\x02",
    "a header as long as the file": document()[:-8] + struct.pack("<I", len(document())) + MAGIC,
    "codecs that are no list": document(codecs=None),
    "a header with more keys": document(more=1),
    "a codec that is not known": document(codecs=["zip"]),
    "a codec in another spelling": document(codecs=["step:0.50"]),
    "no codecs": document(codecs=[]),
    "names that are none": document(names=[""]),
    "a tensor twice": document(
        names=["w", "w"], shapes=[[4, 64], []], codec=[0, 0], lengths=[1, 1], errors=[0, 0]
    ),
    "more tensors than shapes": document(names=["w", "v"]),
    "a negative shape": document(shapes=[[-4, 64]]),
    "a shape that is no number": document(shapes=[[4.0, 64]]),
    "more segments than shapes": document(lengths=[1, 1], errors=[0, 0]),
    "lengths that leave bytes over": document(lengths=[3]),
    "an error that cannot be": document(errors=[-1]),
    "no error": document(errors=[]),
    "a scale that is no number": document(packing.join(packing.pack(np.array([4095])), packing.squeeze(ZERO_BYTES))),
    "an element outside": document(top(1, 256), codecs=["top:0.1:sign"]),
    "elements not in order": document(top(2, 9, -2), codecs=["top:0.1:sign"]),
    "an element of none": document(top(0, 9), codecs=["top:0.1:sign"]),
}  # fmt: skip
BOMBS = {
    "a shape of more than memory": document(shapes=[[1 << 40, 1 << 40]]),
    "a shape of more segments than are there": document(shapes=[[1 << 40, 64]]),
    "a shape with zeros": document(shapes=[[0, 1 << 40, 1 << 40]]),
    "a header of 20 MiB": MAGIC + (big := squeezed(20 << 20)[1:]) + struct.pack("<I", len(big)) + MAGIC,
    "a stream of 10 MiB": document(squeezed(10 << 20), codecs=["fp32"]),
    "more elements than there are": document(top(1 << 31, 1), codecs=["top:0.1:sign"]),
}


@pytest.mark.parametrize("name", [*BAD, *BOMBS])
def test_bad_documents_and_bombs_are_refused_before_they_take_memory(name: str) -> None:
    data = {**BAD, **BOMBS}[name]
    read_all(document())
    tracemalloc.start()
    try:
        with pytest.raises(DecodeError) as refused:
            read_all(data)
        assert tracemalloc.get_traced_memory()[1] < 5 << 20
    finally:
        tracemalloc.stop()
    assert (refused.value.status == 413) == (name in BOMBS)


def test_numbers_that_are_not_finite_once_decoded_are_refused() -> None:
    infinite = np.repeat(np.array([0, 0, 0x80, 0x7F], np.uint8), 256)
    steps = packing.join(packing.pack(np.zeros(0, np.int16)), packing.squeeze(np.full(128, 0x22, np.uint8)))
    for name, data in (("fp32", packing.squeeze(infinite)), ("step:1", struct.pack("<f", np.nan) + b"\x04" + steps)):
        with pytest.raises(NonFinite):
            read_all(document(data, codecs=[name]))


def test_a_document_that_ends_early_is_named() -> None:
    file = io.BytesIO()
    update = open_update(file, written({"w": TENSORS["matrix"]}, codec("int8"), file).size)
    file.truncate(100)
    with pytest.raises(DecodeError):
        update.read("w", 0)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("name", ["sign", "top:0.1:sign", "top:0.01:int4", "lowrank:4", "int4"])
def test_feedback_keeps_the_running_sum(name: str, momentum: float) -> None:
    """What was decoded and what is left are all that there was (with momentum: all velocities); and less is left of it
    than without, where what is left out is always the same."""
    rng, made, segment = np.random.default_rng(0), codec(name), Segment(0, 64 * 64, 64, 64)
    feedback, always = Feedback(momentum=momentum), rng.standard_normal((64, 64)) * np.arange(1, 65)
    arrived, wanted, velocity = np.zeros((3, 64, 64))
    for _ in range(12):
        update = (always + rng.standard_normal((64, 64))).astype(np.float32)
        values = feedback.compensate("w", segment, update)
        decoded = made.decode(made.encode(values), 64, 64)
        feedback.kept("w", segment, values, decoded)
        feedback.commit()
        velocity = momentum * velocity + update
        wanted += velocity
        velocity[decoded != 0] = 0
        arrived += decoded
        assert norm(arrived + feedback.left["w"].reshape(64, 64) - wanted) < 1e-5 * norm(wanted)
    assert norm(feedback.left["w"]) < norm(wanted)


def test_a_round_that_was_not_counted_leaves_what_was_before() -> None:
    segment, feedback = Segment(0, 4, 1, 4), Feedback()
    values = np.array([[1, 2, 3, 4]], np.float32)
    for settle in (feedback.discard, feedback.commit):
        sent = feedback.compensate("w", segment, values)
        assert np.array_equal(sent, values)
        feedback.kept("w", segment, sent, sent * np.float32(0.5))
        settle()
    again = Feedback(feedback.left)
    assert np.array_equal(again.compensate("w", segment, values), values * 1.5)
    with pytest.raises(ValueError, match="momentum"):
        Feedback(momentum=1)


def test_a_share_warms_up_to_its_last() -> None:
    names = [warm_up("top:0.01:int4", number, 4) for number in range(1, 7)]
    shares = [float(name.split(":")[1]) for name in names]
    assert shares[0] == 0.25 and shares[4:] == [0.01, 0.01]
    assert np.allclose(np.array(shares[1:5]) / shares[:4], (0.01 / 0.25) ** 0.25, rtol=1e-3)
    assert warm_up("sign", 1, 4) == "sign" and warm_up("top:0.5:sign", 1, 4) == "top:0.5:sign"


@pytest.mark.parametrize(
    "text",
    [
        "", "zip", "int4:", "int8:clipped", "step", "step:0", "step:nan", "step:9", "step:1e0", "top:0:sign",
        "top:2:sign", "top:0.1", "top:0.1:fp32", "lowrank:1.5", "lowrank:0", "lowrank:4:lifted",
        "sign:lifted:lifted", "x" * 999,
    ],
)  # fmt: skip
def test_names_of_no_codec_are_refused_with_those_that_there_are(text: str) -> None:
    with pytest.raises(RequestError) as refused:
        codec_name(text)
    assert refused.value.error_code == "unknown_codec" and KNOWN in str(refused.value)


def test_a_codec_has_one_name() -> None:
    for text, name in [
        ("step:0.50", "step:0.5"),
        ("top:01.0:sign:lifted", "top:1:sign:lifted"),
        ("lowrank:04", "lowrank:4"),
    ]:
        assert codec(text).name == codec_name(text) == name == codec_name(name)
    assert family("top:0.1:sign") == "top"
