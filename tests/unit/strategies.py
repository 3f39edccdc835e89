"""Hypothesis strategies that several tests share: names, digests, and layouts with the bytes behind them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hypothesis import settings
from hypothesis import strategies as st

from shared.digest import Digest, digest_of, from_hash
from shared.ids import TaskId
from shared.layout import Layout, Slice

quick = settings(max_examples=50, deadline=None)
"""For every property: enough cases, and no failure because the machine was busy."""
few = settings(quick, max_examples=25)
"""For properties whose every case is dear."""

Blobs = Mapping[Digest, bytes]

digests = st.binary(min_size=32, max_size=32).map(from_hash)
hashes = st.binary(min_size=32, max_size=32).map(bytes.hex)
names = st.tuples(st.text("amz059", min_size=1, max_size=1), st.text("amz059._-", max_size=8)).map("".join)
models = st.tuples(names, names).map("/".join)
refs: st.SearchStrategy[str] = names | digests
task_ids = st.builds(TaskId, models, names, refs)
texts = st.text(st.characters(codec="utf-8"), max_size=20)
"""Any text that UTF-8 can carry."""


places = st.lists(st.tuples(*[st.integers(0, 2**32 - 1)] * 3), max_size=6)
"""Where slices are, before it is known of which shards."""


def slices_at(where: Iterable[tuple[int, ...]], sizes: Mapping[Digest, int]) -> tuple[Slice, ...]:
    """A slice of one of these shards for each place."""
    found = []
    for number, first, last in where:
        digest = list(sizes)[number % len(sizes)]
        offset = first % sizes[digest]
        found.append(Slice(digest, offset, 1 + last % (sizes[digest] - offset)))
    return tuple(found)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Layout, Blobs]:
    """A layout, and the shards that it is of."""
    blobs = {digest_of(data): data for data in draw(st.lists(st.binary(min_size=1, max_size=12), min_size=1))}
    slices = slices_at(draw(places), {digest: len(data) for digest, data in blobs.items()})
    whole = read(slices, blobs)
    return Layout(len(whole), digest_of(whole).removeprefix("sha256:"), slices), blobs


def read(slices: Iterable[Slice], blobs: Blobs) -> bytes:
    """What a client gets that is sent these slices."""
    return b"".join(blobs[s.digest][s.offset : s.offset + s.length] for s in slices)
