"""Parcels: what was encoded comes back, whatever it is; and whatever else is decoded is refused, at a small price."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zstandard
from hypothesis import assume, example, given
from hypothesis import strategies as st

from shared import codec
from shared.errors import DecodeError
from shared.parcel import Effort, Run, decode, encode
from shared.parcels import decay, lowrank, streams
from shared.parcels.container import Contents, Part, Piece, read, write
from shared.parcels.kinds import BYTES, KINDS, Kind, exponent_bias, exponents, floats, kind_of, ordered, unordered
from shared.parcels.methods import Method
from shared.tensorfile import DTYPE_BITS
from tests.unit.strategies import few, quick

Floats = npt.NDArray[np.float32]
DTYPES = ["", "?", *DTYPE_BITS]
MIB = 1 << 20


def there_and_back(target: bytes, base: bytes, runs: Sequence[Run], effort: Effort = Effort.DEFAULT) -> bytes:
    """The parcel, once it was decoded."""
    parcel = encode(memoryview(target), memoryview(base), runs, effort)
    assert decode(memoryview(parcel), memoryview(base), len(target)) == target
    return parcel


@st.composite
def shards(draw: st.DrawFn) -> tuple[bytes, bytes, list[Run]]:
    """Runs of any type and length, some upon a base that is like them, and their bytes."""
    target, base, runs = b"", b"", []
    for _ in range(draw(st.integers(0, 6))):
        length = draw(st.integers(0, 40) | st.sampled_from([4096, 9000, 70_001]))
        rng = np.random.default_rng(draw(st.integers(0, 2**32)))
        scale = draw(st.sampled_from([1, 3, 256]))
        old = rng.integers(0, 256, length, np.uint8)
        new = old + rng.integers(0, scale, length, np.uint8) * (rng.random(length) < draw(st.sampled_from([0.01, 1])))
        based = draw(st.booleans())
        columns, first = draw(st.sampled_from([1, 3, 64, 500, 1 << 40])), draw(st.sampled_from([0, 1, 333]))
        runs.append(Run(length, draw(st.sampled_from(DTYPES)), columns, first, based))
        target += new.astype(np.uint8).tobytes()
        base += old.tobytes() if based else b""
    return target, base, runs


@few
@given(shards(), st.sampled_from(Effort))
def test_what_was_encoded_comes_back_and_is_never_much_larger(
    shard: tuple[bytes, bytes, list[Run]], effort: Effort
) -> None:
    parcel = there_and_back(*shard, effort)
    assert len(parcel) <= len(shard[0]) + 64
    assert parcel == encode(memoryview(shard[0]), memoryview(shard[1]), shard[2], effort)


@few
@given(shards(), st.integers(0, 2**32))
def test_another_base_is_an_error_or_other_bytes(shard: tuple[bytes, bytes, list[Run]], seed: int) -> None:
    target, base, runs = shard
    parcel = memoryview(encode(memoryview(target), memoryview(base), runs))
    other = np.random.default_rng(seed).bytes(len(base))
    assert len(decode(parcel, memoryview(other), len(target))) == len(target)
    for wrong in (base + b"\0", base[1:]):
        if len(wrong) != len(base):
            with pytest.raises(DecodeError):
                decode(parcel, memoryview(wrong), len(target))


@pytest.mark.parametrize("kind", [kind for kind in KINDS.values() if kind.fraction is not None and kind.width < 4])
def test_all_numbers_become_integers_in_their_order(kind: Kind) -> None:
    """Every bit pattern, also the thousands of NaNs, and the two zeros."""
    data = np.arange(1 << 8 * kind.width, dtype=f"<u{kind.width}").view(np.uint8)
    integers = ordered(data, kind)
    assert np.array_equal(unordered(integers, kind), data)
    values = floats(data, kind)
    finite = np.isfinite(values)
    assert finite.sum() > len(values) * 0.8
    assert np.all(np.diff(values[finite][np.argsort(integers[finite])]) >= 0)
    pairs = np.flatnonzero(
        finite[:-1] & finite[1:] & (values[:-1] > 0) & (values[1:] > 0)
    )  # neighbours, as bits and as values
    units = np.ldexp(1.0, exponents(data, kind).astype(np.int32) - exponent_bias(kind))
    assert np.array_equal(values[pairs + 1].astype(np.float64) - values[pairs], units[pairs])


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I8", "I64", "BOOL"])
@pytest.mark.parametrize("effort", Effort)
def test_numbers_that_are_none_survive(dtype: str, effort: Effort) -> None:
    """NaNs with their payloads, infinities and negative zeros, in the base, the target and both."""
    kind, rng = kind_of(dtype, 0), np.random.default_rng(0)
    odd = np.array([0, -1, 1, np.iinfo(kind.integer).min, np.iinfo(kind.integer).max], kind.integer)
    if dtype in ("F32", "F64"):
        odd = np.concatenate([odd, np.array([np.nan, np.inf, -np.inf, -0.0], f"<f{kind.width}").view(kind.integer)])
    base, target = (rng.integers(-99, 99, 80 * 100).astype(kind.integer) for _ in range(2))
    base[::3], target[::5] = rng.choice(odd, len(base[::3])), rng.choice(odd, len(target[::5]))
    there_and_back(target.tobytes(), base.tobytes(), [Run(base.nbytes, dtype, 100, based=True)], effort)


def trained(rng: np.random.Generator, rows: int, columns: int) -> tuple[Floats, Floats]:
    """A matrix, and the same after some training: rows have changed by different amounts."""
    base = (rng.standard_normal((rows, columns)) * 0.05).astype(np.float32)
    step = np.exp(rng.standard_normal((rows, 1))) * 2e-5
    return base, (base + rng.standard_normal(base.shape) * step).astype(np.float32)


def merged(rng: np.random.Generator, rows: int, columns: int) -> tuple[Floats, Floats]:
    """A matrix, and the same with a LoRA of rank 8 merged into it, in float32 as is usual."""
    base = (rng.standard_normal((rows, columns)) * 0.05).astype(np.float32)
    up, down = (rng.standard_normal(shape).astype(np.float32) for shape in ((rows, 8), (8, columns)))
    return base, base + (up @ down) * np.float32(3e-4)


@pytest.mark.parametrize(("made", "most"), [(trained, 0.66), (merged, 0.07)])
def test_parts_of_matrices_take_few_bytes(
    made: Callable[..., tuple[Floats, Floats]],
    most: float,
) -> None:
    """Cut within a row at both ends, as shards are."""
    base, target = made(np.random.default_rng(1), 300, 384)
    first, last = 100, base.size - 200
    new, old = (part.reshape(-1)[first:last].tobytes() for part in (target, base))
    runs = [Run(len(new), "F32", 384, first, based=True)]
    sizes = [len(there_and_back(new, old, runs, effort)) for effort in Effort]
    assert sizes[1] < most * len(new) and sizes[2] <= sizes[1] < sizes[0]


def test_small_runs_do_not_cost_a_table_each() -> None:
    base, target = trained(np.random.default_rng(2), 64, 384)
    runs = [Run(384 * 4, "F32", 384, based=True) for _ in range(64)]
    small = len(there_and_back(target.tobytes(), base.tobytes(), runs))
    assert (
        small < len(there_and_back(target.tobytes(), base.tobytes(), [Run(base.nbytes, "F32", 384, based=True)])) + 999
    )


def test_weights_alone_take_fewer_bytes() -> None:
    base, _ = trained(np.random.default_rng(3), 700, 384)
    assert len(there_and_back(base.tobytes(), b"", [Run(base.nbytes, "F32", 384)])) < 0.9 * base.nbytes
    text = b"[UNK] [CLS] [SEP] the of and " * 999
    assert len(there_and_back(text, b"", [Run(len(text))])) < 200


def test_a_base_that_has_nothing_to_do_with_it_costs_nothing() -> None:
    rng = np.random.default_rng(4)
    (target, _), (base, _) = trained(rng, 700, 384), trained(rng, 700, 384)
    alone = there_and_back(target.tobytes(), b"", [Run(target.nbytes, "F32", 384)])
    assert (
        len(there_and_back(target.tobytes(), base.tobytes(), [Run(base.nbytes, "F32", 384, based=True)]))
        <= len(alone) + 9
    )


def test_more_runs_than_a_header_may_have_are_one() -> None:
    runs = [Run(1, "I8", 1, 0, bool(number % 2)) for number in range(40_000)]
    there_and_back(bytes(40_000), bytes(20_000), runs)


def bomb() -> bytes:
    """A stream of zstd of 64 MiB."""
    return zstandard.ZstdCompressor().compress(bytes(64 * MIB))


def one(method: Method, kind: Kind, found: Sequence[bytes], length: int, based: bool = False, **more: Any) -> bytes:
    """A parcel of one part and one piece."""
    base = length if based else 0
    return write(Contents(base, [Part(method, kind, based, found)], [Piece(0, length, **more)]))


F32, SIZE = KINDS["F32"], 4096
ZEROS = np.zeros(SIZE, np.int32)
HUGE = np.full(2 * 64, 2**31 - 1, np.int32)
BOMBS = {
    "more of zstd": one(Method.SQUEEZED, BYTES, [bomb()], SIZE),
    "zstd of unknown size": one(
        Method.SQUEEZED, BYTES, [zstandard.ZstdCompressor(write_content_size=False).compress(bytes(SIZE))], SIZE
    ),
    "zstd and more": one(Method.SQUEEZED, BYTES, [streams.squeeze(np.zeros(SIZE, np.uint8), 1) + b"x"], SIZE),
    "more integers": one(Method.PACKED, F32, [streams.pack(np.zeros(64 * MIB, np.int32))], SIZE),
    "fewer integers": one(Method.PACKED, F32, [streams.pack(ZEROS[:9])], SIZE),
    "integers of another width": one(Method.PACKED, F32, [streams.pack(ZEROS[: SIZE // 4].astype(np.int64))], SIZE),
    "integers of nothing": one(Method.PACKED, F32, [b""], SIZE),
    "no stream": one(Method.PACKED, F32, [], SIZE),
    "raw that is short": one(Method.RAW, BYTES, [b"x"], SIZE),
    "grouped without a base": one(Method.GROUPED, F32, [b"", b""], SIZE),
    "decay without a base": one(Method.PACKED, F32, [streams.pack(ZEROS[: SIZE // 4])], SIZE, decay=(decay.Run(3, 9),)),
    "decay of what is no float32": one(Method.PACKED, KINDS["F16"], [b""], SIZE, True, decay=(decay.Run(3, 9),)),
    "decay by more than a factor may be": one(Method.PACKED, F32, [b""], SIZE, True, decay=(decay.Run(256, 9),)),
    "decay by nothing": one(Method.PACKED, F32, [b""], SIZE, True, decay=(decay.Run(0, 9),)),
    "decay in steps without end": one(Method.PACKED, F32, [b""], SIZE, True, decay=(decay.Run(1, 1 << 40),)),
    "decay in runs without end": one(Method.PACKED, F32, [b""], SIZE, True, decay=(decay.Run(1, 1),) * 33),
    "grouped integers": one(Method.GROUPED, KINDS["I32"], [b"", b""], SIZE, True),
    "half an element": one(Method.PACKED, F32, [b""], SIZE - 1),
    "factors without a base": one(Method.PACKED, F32, [b"", b""], SIZE, rank=1),
    "factors larger than the matrix": one(Method.PACKED, F32, [b"", b""], SIZE, True, columns=2, rank=9),
    "factors of a row": one(Method.PACKED, F32, [b"", b""], SIZE, True, columns=32, first=1, rank=1),
    "factors that are not exact": one(
        Method.PACKED, F32, [streams.pack(ZEROS[: SIZE // 4]), streams.pack(HUGE[:128])], SIZE, True, columns=32, rank=2
    ),
    "a column for every atom": one(Method.PACKED, F32, [b"", b""], SIZE, True, columns=1 << 60, rank=1),
    "another version": b"\x1c\0\0\0" + codec.encode({"v": 1, "base": 0, "parts": [], "pieces": []}),
    "a header of 4 GiB": b"\xff\xff\xff\xff",
    "nothing": b"",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused(name: str) -> None:
    """And by nothing else than our own error, which a panic of the library is not."""
    with pytest.raises(DecodeError):
        decode(memoryview(BOMBS[name]), memoryview(bytes(SIZE if b"base" in BOMBS[name] else 0)), SIZE)


@quick
@given(st.integers(0, 2**32), st.integers(0, 30), st.integers(1, 3))
@example(0, 0, 1)
def test_damaged_parcels_are_refused_or_other_bytes(seed: int, at: int, bits: int) -> None:
    rng = np.random.default_rng(seed)
    base, target = trained(rng, 8, 384)
    runs = [Run(base.nbytes, "F32", 384, based=True)]
    parcel = bytearray(encode(memoryview(target.tobytes()), memoryview(base.tobytes()), runs))
    for place in (at, *rng.integers(0, len(parcel), bits)):
        parcel[place] ^= 1 << int(rng.integers(8))
    try:
        assert len(decode(memoryview(parcel), memoryview(base.tobytes()), target.nbytes)) == target.nbytes
    except DecodeError:
        return


@pytest.mark.parametrize("name", ["F64", "F32", "F16", "BF16"])
def test_a_moved_base_is_rounded_as_by_hand(name: str) -> None:
    """An element at a time, in Python's integers and floats; so it does not depend on how a machine multiplies."""
    kind, rng = KINDS[name], np.random.default_rng(5)
    base = rng.integers(-(2**15), 2**15, 6 * 5).astype(np.int64) << (8 * kind.width - 16)
    data = base.astype(kind.integer).view(np.uint8)
    left, right = (rng.integers(-(2**20), 2**20, (count, 3), np.int32) for count in (6, 5))
    moved = floats(lowrank.move(data, kind, lowrank.Factors(left, right, 40)).base, kind).reshape(6, 5)
    for (row, column), old in np.ndenumerate(floats(data, kind).reshape(6, 5).astype(np.float64)):
        exact = float(old) + sum(int(a) * int(b) for a, b in zip(left[row], right[column], strict=True)) / 2**40
        if np.isfinite(exact):
            assert abs(float(moved[row, column]) - exact) <= abs(exact) * 2.0 ** -(kind.fraction or 0) + 2.0**-22
        else:
            assert np.isnan(moved[row, column]) == np.isnan(exact)


STEPS = st.lists(st.tuples(st.integers(1, 255), st.integers(1, 400)), min_size=1, max_size=4)


@quick
@given(STEPS, st.integers(0, 2**32))
def test_decay_is_what_multiplying_makes(steps: list[tuple[int, int]], seed: int) -> None:
    """Bit for bit: also of weights just above a power of two, where a step takes half as much once it is crossed."""
    assume(sum(count * factor**2 for factor, count in steps) <= decay.MAX_WORK)
    rng = np.random.default_rng(seed)
    weights = np.ldexp(rng.uniform(1, 2, 3000), rng.integers(-60, 60, 3000)).astype(np.float32)
    weights[:1000].view(np.int32)[:] = (rng.integers(64, 200, 1000) << 23) + rng.integers(0, 200, 1000)
    weights[::2] *= -1
    wanted = weights.copy()
    for factor, count in steps:
        for _ in range(count):
            wanted *= np.float32(1 - factor * 2.0**-24)
    runs = [decay.Run(*run) for run in steps]
    assert np.array_equal(decay.decayed(weights.view(np.uint8), F32, runs).view(np.float32), wanted)
    odd = np.array([0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 1e-36], np.float32)
    assert np.array_equal(decay.decayed(odd.view(np.uint8), F32, runs), odd.view(np.uint8))


def adamw(rng: np.random.Generator, dtype: type[np.floating[Any]], rates: Sequence[float]) -> tuple[bytes, bytes]:
    """Embeddings of 1,000 words of which 100 occur, before and after some steps of AdamW at these rates of learning, as
    PyTorch takes them; the gradients have a few directions, and noise."""
    base = (rng.standard_normal((1000, 128)) * 0.05).astype(np.float32)
    weights, seen = base.copy(), rng.permutation(1000)[:100]
    mean, square = np.zeros((100, 128), np.float32), np.zeros((100, 128), np.float32)
    ways = rng.standard_normal((4, 128))
    for step, rate in enumerate(rates, 1):
        weights *= np.float32(1 - rate * 0.01)
        gradient = rng.standard_normal((100, 4)) @ ways + rng.standard_normal((100, 128))
        mean += np.float32(0.1) * (gradient.astype(np.float32) - mean)
        square += np.float32(0.001) * (np.square(gradient).astype(np.float32) - square)
        weights[seen] -= np.float32(rate) * (mean / (1 - 0.9**step)) / np.sqrt(square / (1 - 0.999**step))
    return weights.astype(dtype).tobytes(), base.astype(dtype).tobytes()


STEADY, WARMED = [2e-5] * 60, [2e-5 * min(step / 20, (101 - step) / 80) for step in range(1, 81)]
RATES = [("F32", STEADY, 94.1), ("F32", WARMED, 94.2), ("F16", STEADY, 95.0)]


@pytest.mark.parametrize(("name", "rates", "least"), RATES)
def test_training_costs_what_it_changed(name: str, rates: Sequence[float], least: float) -> None:
    """Nine of ten rows only decay; a floor on what is saved of all, in %."""
    dtype = np.float32 if name == "F32" else np.float16
    target, base = adamw(np.random.default_rng(8), dtype, rates)
    parcel = there_and_back(target, base, [Run(len(target), name, 128, based=True)])
    assert 100 * (1 - len(parcel) / len(target)) > least


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "I8"])
def test_the_low_rank_of_a_part_of_a_change_is_used(name: str) -> None:
    """Half of the change is noise: no factors make all of it, yet some of the bits."""
    rng = np.random.default_rng(9)
    change = rng.standard_normal((512, 4)) @ rng.standard_normal((4, 512)) / 2 + rng.standard_normal((512, 512)) / 2
    base = rng.standard_normal((512, 512)) * 0.05
    shuffled = rng.permuted(change, axis=1)  # as much, and no rank
    sizes = []
    for moved in (change, shuffled):
        target, old = (_stored(name, values) for values in (base + moved * 4e-4, base))
        sizes.append(len(there_and_back(target, old, [Run(len(target), name, 512, based=True)])))
    assert sizes[0] < sizes[1] * 0.97


def _stored(name: str, values: npt.NDArray[np.float64]) -> bytes:
    if name == "BF16":
        return ((values.astype(np.float32).view(np.uint32) + 0x8000) >> 16).astype(np.uint16).tobytes()
    if name == "I8":
        return np.rint(values / 6e-4).clip(-128, 127).astype(np.int8).tobytes()
    return values.astype({"F32": np.float32, "F16": np.float16}[name]).tobytes()


def test_the_base_s_size_is_in_the_parcel() -> None:
    parcel = memoryview(encode(memoryview(b"abcd"), memoryview(b"abce"), [Run(4, based=True)]))
    assert read(parcel, 4, 4).base == 4
    with pytest.raises(DecodeError, match="another size"):
        decode(parcel, memoryview(b"abc"), 4)
