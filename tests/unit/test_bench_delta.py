"""``make bench-delta``: that its figures mean what its table says, on a pair of versions made for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from loadtests import rivals
from loadtests.bench_delta import FILE, Moved, Row, measure
from shared.parcel import Effort

SIZE = 1 << 20


@pytest.fixture(scope="module")
def pair() -> tuple[bytes, bytes]:
    """A version and its base: of two tensors of random bytes, one is another by a few bytes in its middle."""
    rng = np.random.default_rng(5)
    same, changed = rng.integers(0, 256, SIZE, np.uint8), rng.integers(0, 256, SIZE, np.uint8)
    base = save({"changed": changed, "same": same})
    changed[SIZE // 2 :][:16] ^= 255
    return save({"changed": changed, "same": same}), base


def test_others_move_what_they_cannot_take_from_the_base(pair: tuple[bytes, bytes]) -> None:
    target, base = pair
    assert len(target) <= rivals.whole(target, base) < len(target) * 1.001  # random bytes do not compress
    assert SIZE <= rivals.tensors(target, base) < SIZE * 1.001
    assert 16 <= rivals.chunks(target, base) <= 2 * rivals.CHUNK_MAX
    assert rivals.chunks(target, target) == 0


def test_what_is_compressible_counts_compressed() -> None:
    zeros = save({"x": np.zeros(SIZE, np.uint8)})
    other = save({"x": np.ones(SIZE, np.uint8)})
    assert all(rival(zeros, other) < SIZE / 100 for rival in (rivals.whole, rivals.tensors, rivals.chunks))


@pytest.mark.skipif(not rivals.installed("xdelta3"), reason="xdelta3 is not installed")
def test_a_program_is_given_the_base_and_the_target(pair: tuple[bytes, bytes]) -> None:
    assert rivals.xdelta3(*pair) < 1000


async def test_ours_is_what_a_client_with_the_base_fetches(pair: tuple[bytes, bytes], tmp_path: Path) -> None:
    for name, data in zip(("version", "base"), pair, strict=True):
        (tmp_path / name).mkdir()
        (tmp_path / name / FILE).write_bytes(data)
    moved = await measure(tmp_path / "base", tmp_path / "version", tmp_path / "net", Effort.DEFAULT)
    assert moved.size == len(pair[0])
    assert moved.moved < moved.first < moved.size * 1.01
    again = await measure(tmp_path / "base", tmp_path / "base", tmp_path / "again", Effort.DEFAULT)
    assert again.moved < 2000  # but the manifest


def test_a_goal_is_met_within_half_a_point() -> None:
    def row(saved: float, kind: str = "all") -> Row:
        return Row(kind, kind, 1, Moved(1000, round(1000 - 10 * saved), 1000, 1.0, 1.0))

    assert [row(saved).met for saved in (62.0, 62.1, 70.0)] == [False, True, True]
    assert row(62.0, "no such kind").met is None
