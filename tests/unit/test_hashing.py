"""The hashes of a body do not depend on how its bytes come."""

from __future__ import annotations

import hashlib
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from origin.hashing import BodyHash
from tests.unit.strategies import quick


@quick
@given(st.binary(max_size=60), st.integers(1, 16), st.lists(st.integers(0, 60), max_size=5))
def test_the_whole_and_each_piece_are_hashed_however_the_bytes_are_cut(data: bytes, length: int, at: list[int]) -> None:
    body = BodyHash(len(data), length)
    cuts = sorted({0, len(data), *(n for n in at if n < len(data))})
    for start, stop in pairwise(cuts):
        body.update(data[start:stop])
    pieces = [data[start : start + length] for start in range(0, len(data), length)]
    assert body.sha256 == hashlib.sha256(data).hexdigest()
    assert body.pieces == b"".join(hashlib.sha256(piece).digest() for piece in pieces if len(pieces) > 1)


def test_the_two_kinds_of_hashes_can_be_fed_apart() -> None:
    together, apart = BodyHash(100, 30), BodyHash(100, 30)
    together.update(b"x" * 100)
    for update in reversed(apart.updates):
        for _ in range(4):
            update(b"x" * 25)
    assert (apart.sha256, apart.pieces) == (together.sha256, together.pieces)
    assert len(apart.pieces) == 4 * 32


def test_one_piece_costs_no_second_hash() -> None:
    assert len(BodyHash(30, 30).updates) == 1
    assert len(BodyHash(31, 30).updates) == 2
