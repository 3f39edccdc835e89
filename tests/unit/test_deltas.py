"""The choice of deltas, and which ones a manifest lists: never dearer than whole shards, never without an end."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from origin.pairing import ParentTensors, compose, jobs
from shared import manifest as manifests
from shared.deltas import MAX_CHAIN, bytes_moved, ways
from shared.digest import Digest, digest_of
from shared.layout import Layout, Slice
from shared.manifest import Delta, Manifest, Tensor, decode
from shared.parcel import Run
from shared.tensorfile import TensorEntry, TensorHeader
from tests.unit.strategies import quick

NAMES = [digest_of(bytes([n])) for n in range(24)]
SHARDS, PARCELS = NAMES[:12], NAMES[12:]
SHA = "ab" * 32


@st.composite
def webs(draw: st.DrawFn) -> Manifest:
    """Any deltas between a dozen shards, half of them of the revision: cycles, forks and dead ends."""
    sizes = dict(zip(NAMES, draw(st.lists(st.integers(2, 100), min_size=24, max_size=24)), strict=True))
    found = draw(
        st.lists(
            st.tuples(st.sampled_from(SHARDS), st.sampled_from(PARCELS), st.lists(st.sampled_from(SHARDS), max_size=2)),
            max_size=20,
        )
    )
    deltas = tuple(
        dict.fromkeys(
            Delta(target, parcel, tuple(Slice(base, 0, 1) for base in bases))
            for target, parcel, bases in found
            if sizes[parcel] < sizes[target]
        )
    )
    named = {d for delta in deltas for d in (delta.target, delta.parcel, *(part.digest for part in delta.base))}
    shards = {digest: sizes[digest] for digest in SHARDS[:6]}
    return Manifest("a/b", shards, {}, {}, deltas=deltas, others={d: sizes[d] for d in named if d not in shards})


@quick
@given(webs(), st.sets(st.sampled_from(SHARDS)))
def test_a_way_is_never_dearer_than_the_shard_and_each_step_has_what_it_is_upon(
    manifest: Manifest, held: set[Digest]
) -> None:
    chosen = ways(manifest, manifest.shards, held.__contains__)
    for digest, steps in chosen.items():
        if digest in held:
            assert steps == ()
        made = set(held)
        for step in steps:
            assert {part.digest for part in step.base} <= made
            made.add(step.target)
        assert not steps or (steps[-1].target == digest and digest in made)
        assert sum(manifest.size_of(step.parcel) for step in steps) < manifest.shards[digest] or not steps
        assert depth(steps, digest, held) <= MAX_CHAIN
    missing = {digest: steps for digest, steps in chosen.items() if digest not in held}
    assert bytes_moved(manifest, missing) <= sum(manifest.shards[digest] for digest in missing)


def depth(steps: tuple[Delta, ...], digest: Digest, held: set[Digest]) -> int:
    """Deltas one upon the other."""
    by_target = {step.target: step for step in steps}
    if digest in held or digest not in by_target:
        return 0
    return 1 + max((depth(steps, part.digest, held) for part in by_target[digest].base), default=0)


def test_the_cheaper_of_a_delta_and_the_compressed_shard_is_taken() -> None:
    new, old, small, large = NAMES[:4]
    compressed, delta = Delta(new, large), Delta(new, small, (Slice(old, 0, 10),))
    manifest = Manifest("a/b", {new: 100}, {}, {}, deltas=(compressed, delta), others={old: 10, small: 20, large: 90})
    assert ways(manifest, [new], lambda digest: digest == old) == {new: (delta,)}
    assert ways(manifest, [new], lambda _: False) == {new: (compressed,)}
    assert ways(manifest, [new], lambda _: False, compressed=False) == {new: ()}, "whole"
    assert ways(manifest, [new], lambda digest: digest == old, compressed=False) == {new: (delta,)}
    assert ways(manifest, [new], lambda _: True) == {new: ()}


# What is listed


@quick
@given(webs(), st.data())
def test_what_is_composed_upon_any_parent_is_a_valid_manifest_of_the_same_content(
    parent: Manifest, data: st.DataObject
) -> None:
    own = data.draw(st.sets(st.sampled_from(SHARDS), min_size=1))
    plain = Manifest("a/b", {digest: parent.shards.get(digest) or 101 for digest in sorted(own)}, {}, {})
    parcel, base = digest_of(b"parcel"), next(iter(parent.shards))
    made = {Delta(digest, parcel, (Slice(base, 0, 1),)): 1 for digest in plain.shards if digest not in parent.shards}
    composed = compose(plain, made, parent)
    assert decode(composed.encoded) == composed and composed.content == plain
    assert set(made) <= set(composed.deltas) <= set(made) | set(parent.deltas)
    assert compose(plain, made, parent, levels=0).deltas == tuple(made)


def test_the_oldest_deltas_are_left_out_where_the_manifest_would_be_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    new, old, older, first, second, third = NAMES[:6]
    plain = Manifest("a/b", {new: 100, third: 100}, {}, {})
    best, worse = Delta(new, first, (Slice(old, 0, 9),)), Delta(third, first, (Slice(old, 0, 9),))
    chain = Delta(old, second, (Slice(older, 0, 9),))
    parent = Manifest("a/b", {old: 100}, {}, {}, deltas=(chain,), others={older: 100, second: 30})
    made = {best: 20, worse: 20}
    assert compose(plain, made, parent).deltas == (best, worse, chain)
    monkeypatch.setattr(manifests, "MAX_MANIFEST", len(compose(plain, made, parent).encoded) - 1)
    assert compose(plain, made, parent).deltas == (best, worse)
    monkeypatch.setattr(manifests, "MAX_MANIFEST", len(plain.encoded))
    assert compose(plain, made, parent) == plain


# What belongs to what


def header(*tensors: tuple[str, str, tuple[int, ...], int]) -> TensorHeader:
    """A header of 100 bytes."""
    entries, position = [], 0
    for name, dtype, shape, size in tensors:
        entries.append(TensorEntry(name, dtype, shape, position, position + size))
        position += size
    return TensorHeader(100, {}, tuple(entries))


def parent(**tensors: tuple[str, int]) -> ParentTensors:
    """The tensors of an earlier file, each in a shard of its own."""
    return ParentTensors(
        Tensor(name, dtype, (size,), "m.safetensors", (Slice(digest_of(name.encode()), 0, size),))
        for name, (dtype, size) in tensors.items()
    )


def only(shards: Mapping[Digest, int], path: str = "m.safetensors") -> Manifest:
    """One file of whole shards."""
    layout = Layout(sum(shards.values()), SHA, tuple(Slice(digest, 0, size) for digest, size in shards.items()))
    return Manifest("a/b", shards, {path: layout}, {})


def test_a_shard_is_cut_into_runs_of_its_tensors_and_only_like_tensors_are_their_base() -> None:
    a, b, c = NAMES[:3]
    top = header(("w", "F32", (4, 6), 96), ("empty", "F32", (0,), 0), ("cast", "F16", (8,), 16), ("new", "I8", (4,), 4))
    found = list(
        jobs(only({a: 110, b: 90, c: 16}), {"m.safetensors": top}, None, parent(w=("F32", 96), cast=("F32", 16)))
    )
    w = digest_of(b"w")
    assert [job.runs for job in found] == [
        (Run(100), Run(10, based=True)),  # cut within an element: only its bytes
        (Run(86, based=True), Run(4, "F16", 8)),
        (Run(12, "F16", 8, 2), Run(4, "I8", 4)),
    ]
    assert [job.base for job in found] == [(Slice(w, 0, 10),), (Slice(w, 10, 86),), ()]


def test_elements_before_a_run_are_counted_and_names_are_looked_for_in_other_files() -> None:
    a, b = NAMES[:2]
    top = header(("w", "F32", (4, 6), 96))
    renamed = only({a: 140, b: 56}, "other.safetensors")
    found = list(jobs(renamed, {"other.safetensors": top}, None, parent(w=("F32", 96))))
    assert [job.runs for job in found] == [(Run(100), Run(40, "F32", 6, 0, True)), (Run(56, "F32", 6, 10, True),)]


def test_a_shard_of_another_file_belongs_where_the_shards_before_it_end() -> None:
    same, old, new, grown = NAMES[:4]
    before = only({old: 50, same: 30, NAMES[5]: 20}, "a.gguf")
    found = {job.target: job for job in jobs(only({new: 60, same: 30, grown: 25}, "a.gguf"), {}, before, parent())}
    assert found[new].base == (Slice(old, 0, 50), Slice(same, 0, 10)) and found[new].runs == (Run(60, based=True),)
    assert found[same].base == ()
    assert found[grown].base == (Slice(NAMES[5], 0, 20),) and found[grown].runs == (Run(20, based=True), Run(5))
