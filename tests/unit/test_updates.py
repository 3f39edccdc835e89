"""Updates: what each codec loses is what it says, feedback loses nothing, and whatever else is decoded is refused."""

from __future__ import annotations

import io
from collections.abc import Mapping
from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import NonFinite
from shared.updates.codec import SLACK, Codec, Floats, norm
from shared.updates.codecs import codec
from shared.updates.document import OVERHEAD, Written, check_schema, open_update, write_update
from shared.updates.segments import MAX_ELEMENTS, Segment, segments
from tests.unit.strategies import few, quick

NAMES = ["fp32", "bf16", "int8", "int4", "int4:clipped", "ternary", "sign"]


@quick
@given(st.lists(st.integers(0, 9) | st.sampled_from([1000, 3 << 19, 5 << 20]), max_size=4))
def test_segments_are_all_of_a_tensor_once_and_rows_are_whole(shape: list[int]) -> None:
    found = segments(shape)
    if len(found) > 10_000:
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
@few
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
