"""Manifests: they come back as they were, or they are refused whole."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import codec
from shared.digest import digest_of
from shared.errors import ManifestInvalid, ManifestTooLarge, NotFound
from shared.layout import Layout, Slice, piece_count
from shared.manifest import (
    MAX_MANIFEST,
    MAX_PATH,
    MAX_PIECES,
    MAX_SHARD,
    MAX_SHARDS,
    MIN_PIECE,
    Delta,
    Manifest,
    Provenance,
    Task,
    Tensor,
    check_path,
    check_paths,
    decode,
)
from tests.unit.strategies import digests, few, hashes, models, names, places, quick, slices_at, texts

A, B = digest_of(b"a"), digest_of(b"b")
SHA = "ab" * 32
SAMPLE = Manifest(
    "acme/minilm",
    {A: 100, B: 50},
    {
        "config.json": Layout(30, SHA, (Slice(A, 10, 30),)),
        "weights/model.safetensors": Layout(150, SHA, (Slice(A, 0, 100), Slice(B, 0, 50))),
    },
    {"embed": Task("embed", Layout(50, SHA, (Slice(B, 0, 50),)), "model.safetensors", ("config.json",), "vectors")},
    (Tensor("w", "F32", (2, 5), "weights/model.safetensors", (Slice(A, 60, 40),)),),
)

file_paths = st.tuples(st.sampled_from(["x", "d/x"]), st.text("xyé_-", max_size=6), st.sampled_from(["", ".json"])).map(
    "".join
)


shard_tables = st.dictionaries(digests, st.integers(1, MAX_SHARD), min_size=1, max_size=3)
file_tables = st.dictionaries(file_paths, st.tuples(hashes, places), min_size=1, max_size=3)
task_tables = st.dictionaries(
    names, st.tuples(hashes, places, file_paths, st.sets(st.integers(0, 2)), texts), max_size=3
)
shapes = st.lists(st.integers(0, 2**53 - 1), max_size=3).map(tuple)
tensor_tables = st.lists(
    st.tuples(texts, st.sampled_from(["F32", "BF16"]), shapes, st.integers(0, 2), places), max_size=3
)
other_tables = st.dictionaries(digests, st.integers(1, MAX_SHARD), max_size=3)
delta_tables = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), places), max_size=3)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """A small manifest that keeps every rule."""
    shards = draw(shard_tables)
    length = draw(st.sampled_from([MIN_PIECE, 8 * MIN_PIECE, 1 << 40]))

    def layout(sha256: str, where: list[tuple[int, ...]]) -> Layout:
        slices = slices_at(where, shards)
        size = sum(piece.length for piece in slices)
        return Layout(size, sha256, slices, bytes.fromhex(sha256) * piece_count(size, length))

    files = {path: layout(*table) for path, table in draw(file_tables).items()}
    paths = list(files)
    tasks = {
        name: Task(name, layout(sha256, where), filename, tuple(paths[n] for n in some if n < len(paths)), description)
        for name, (sha256, where, filename, some, description) in draw(task_tables).items()
    }
    tensors = tuple(
        Tensor(name, dtype, shape, paths[number % len(paths)], slices_at(where, shards))
        for name, dtype, shape, number, where in draw(tensor_tables)
    )
    deltas = draw(delta_tables)
    others = {digest: size for digest, size in draw(other_tables).items() if digest not in shards}
    everything = {**shards, **others}
    made = []
    for number, parcel, where in deltas:
        target = list(everything)[number % len(everything)]
        smaller = [digest for digest, size in others.items() if size < everything[target]]
        base = slices_at(where, everything)
        if smaller and sum(part.length for part in base) <= MAX_SHARD:
            made.append(Delta(target, smaller[parcel % len(smaller)], base))
    named = {digest for d in made for digest in (d.target, d.parcel, *(part.digest for part in d.base))}
    others = {digest: size for digest, size in others.items() if digest in named}
    parent = draw(st.none() | digests) if made else None
    return Manifest(draw(models), shards, files, tasks, tensors, length, parent, tuple(made), others)


# There and back


@few
@given(manifests())
def test_a_manifest_comes_back_as_it_was(manifest: Manifest) -> None:
    decoded = decode(manifest.encoded)
    assert decoded == manifest
    assert decoded.revision == manifest.revision == digest_of(manifest.encoded)
    assert [list(decoded.shards), list(decoded.files), list(decoded.tasks)] == [
        list(manifest.shards), list(manifest.files), list(manifest.tasks),
    ]  # fmt: skip
    assert decoded.content == manifest.content and not decoded.content.deltas
    assert decoded.stored.keys() == manifest.shards.keys() | {delta.parcel for delta in manifest.deltas}


@few
@given(manifests())
def test_publishing_the_same_again_gives_the_same_revision(manifest: Manifest) -> None:
    assert dataclasses.replace(decode(manifest.encoded)).encoded == manifest.encoded


def test_a_manifest_of_many_files_comes_back_as_it_was() -> None:
    files = {f"part-{n}.json": Layout(1, SHA, (Slice(A, n, 1),)) for n in range(codec.MAX_ARRAY + 10)}
    manifest = Manifest("acme/many", {A: 5000}, files, {"t": Task("t", Layout(0, SHA, ()), "t", tuple(files))})
    assert decode(manifest.encoded) == manifest


def test_the_revision_is_of_the_bytes_that_came() -> None:
    wire = list(codec.decode(SAMPLE.encoded, MAX_MANIFEST).items())
    reordered = codec.encode(dict(reversed(wire)))
    assert decode(reordered) == SAMPLE
    assert decode(reordered).revision == digest_of(reordered) != SAMPLE.revision


def test_the_commit_is_the_beginning_of_the_revision() -> None:
    assert len(SAMPLE.commit) == 40
    assert SAMPLE.revision.startswith(f"sha256:{SAMPLE.commit}")


def test_what_is_not_in_a_manifest_is_not_found_and_the_answer_names_the_tasks() -> None:
    assert SAMPLE.task("embed").filename == "model.safetensors"
    assert SAMPLE.file("config.json").size == 30
    with pytest.raises(NotFound) as caught:
        SAMPLE.task("other")
    assert (caught.value.error_code, caught.value.public) == ("unknown_task", {"tasks": ["embed"]})
    with pytest.raises(NotFound) as caught:
        SAMPLE.file("other")
    assert caught.value.error_code == "unknown_file"


# Damage


@few
@given(manifests(), st.data())
def test_a_damaged_byte_is_refused_or_names_another_revision(manifest: Manifest, data: st.DataObject) -> None:
    damaged = bytearray(manifest.encoded)
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        decoded = decode(bytes(damaged))
    except ManifestInvalid:
        return
    assert decoded.revision != manifest.revision


def test_no_single_damaged_byte_gets_by_or_escapes_as_another_error() -> None:
    for position in range(len(SAMPLE.encoded)):
        for flip in (0x01, 0x10, 0x80, 0xFF):
            damaged = bytearray(SAMPLE.encoded)
            damaged[position] ^= flip
            with suppress(ManifestInvalid):
                assert decode(bytes(damaged)).revision != SAMPLE.revision


def test_a_manifest_that_is_cut_short_or_goes_on_is_refused() -> None:
    for data in (*(SAMPLE.encoded[:length] for length in range(len(SAMPLE.encoded))), SAMPLE.encoded + b"\xc0"):
        with pytest.raises(ManifestInvalid):
            decode(data)


@quick
@given(st.binary(max_size=80))
def test_any_bytes_are_refused_as_a_manifest(data: bytes) -> None:
    with pytest.raises(ManifestInvalid):
        decode(data)


# Limits


def test_a_manifest_over_its_size_is_too_large_to_decode() -> None:
    with pytest.raises(ManifestTooLarge):
        decode(bytes(MAX_MANIFEST + 1))


def test_a_manifest_over_its_size_is_too_large_to_encode() -> None:
    tasks = {f"t{n}": Task(f"t{n}", Layout(0, SHA, ()), "x", (), "a" * 4000) for n in range(MAX_MANIFEST // 4000)}
    with pytest.raises(ManifestTooLarge):
        _ = Manifest("acme/large", {}, {}, tasks).encoded


def test_a_manifest_of_too_many_shards_is_too_large() -> None:
    with pytest.raises(ManifestTooLarge):
        decode(changed(lambda wire: wire.update(shards=bytes(36 * (MAX_SHARDS + 1)))))


def with_pieces(size: int, pieces: int, length: int = MIN_PIECE) -> Manifest:
    """One file of ``size`` bytes, with so many hashes of pieces."""
    shard = digest_of(b"large")
    slices = tuple(Slice(shard, 0, min(MAX_SHARD, size - at)) for at in range(0, size, MAX_SHARD))
    file = Layout(size, SHA, slices, bytes(32 * pieces))
    return Manifest("acme/large", {shard: MAX_SHARD}, {"x": file}, {}, (), length)


@pytest.mark.parametrize(
    ("size", "length", "pieces"),
    [
        (1, MIN_PIECE, 0),
        (MIN_PIECE, MIN_PIECE, 0),
        (MIN_PIECE + 1, MIN_PIECE, 2),
        (2 * MIN_PIECE, MIN_PIECE, 2),
        (2 * MIN_PIECE, 2 * MIN_PIECE, 0),
        (5 * MIN_PIECE, 2 * MIN_PIECE, 3),
        (MAX_PIECES * MIN_PIECE, MIN_PIECE, MAX_PIECES),
    ],
)
def test_a_layout_has_one_hash_for_each_piece_and_none_for_a_single_one(size: int, length: int, pieces: int) -> None:
    manifest = with_pieces(size, pieces, length)
    assert decode(manifest.encoded) == manifest
    for wrong in {pieces + 1, max(0, pieces - 1), 0, 1} - {pieces}:
        with pytest.raises(ManifestInvalid):
            decode(with_pieces(size, wrong, length).encoded)


def test_a_manifest_of_too_many_pieces_is_too_large() -> None:
    with pytest.raises(ManifestTooLarge):
        decode(with_pieces((MAX_PIECES + 1) * MIN_PIECE, MAX_PIECES + 1).encoded)


# Rules


def changed(change: Callable[[Any], object]) -> bytes:
    """The sample with something changed on the wire."""
    wire = copy.deepcopy(codec.decode(SAMPLE.encoded, MAX_MANIFEST))
    change(wire)
    return codec.encode(wire)


def test_the_sample_itself_is_valid() -> None:
    assert decode(changed(lambda wire: None)) == SAMPLE


BAD_PATHS = [
    "", "../x", "a/../x", "..", ".", "a/.", "./a", "/etc/passwd", "a//b", "a/", "/",  # they climb, or are empty
    "a\0b", "a\nb", "a\x7fb", "a\u202eb", "\ud800",  # they cannot be printed
    "C:\\x", "C:x", "C:/x", "a\\b", "\\\\host\\x", "a:b", "a*", "a?", 'a"b', "a<b", "a>b", "a|b",  # Windows
    "a.", "a ", "a /b", "a./b", "con", "CON", "nul.txt", "a/PRN", "aux.tar.gz", "com1", "LPT9.x/y",
    "a" * (MAX_PATH + 1), "é" * (MAX_PATH // 2 + 1),
]  # fmt: skip


@pytest.mark.parametrize("path", BAD_PATHS)
def test_a_path_that_is_not_safe_everywhere_is_refused(path: str) -> None:
    with pytest.raises(ManifestInvalid):
        check_path(path)


@pytest.mark.parametrize("path", [path for path in BAD_PATHS if path != "\ud800"])
def test_a_manifest_with_an_unsafe_path_is_refused(path: str) -> None:
    with pytest.raises(ManifestInvalid):
        decode(changed(lambda wire: wire["files"][0].update(path=path)))
    with pytest.raises(ManifestInvalid):
        decode(changed(lambda wire: wire["tasks"][0].update(filename=path)))


@pytest.mark.parametrize(
    "path",
    [
        "a",
        "a/b/c.json",
        ".gitattributes",
        "a b",
        "é/字",
        "console",
        "com10",
        "...a",
        "a" * MAX_PATH,
        "~",
        "-rf",
        "a%2f",
    ],
)
def test_an_ordinary_path_is_accepted(path: str) -> None:
    assert check_path(path) == path


@pytest.mark.parametrize(
    "paths",
    [
        ["a", "A"],
        ["x/readme.md", "x/README.md"],
        ["X/a", "x/A"],
        ["a", "a/b"],
        ["A/b", "a"],
        ["a/b/c", "a/B"],
        ["a", "a"],
        ["ß", "SS"],
    ],
)
def test_two_paths_that_cannot_live_side_by_side_are_refused(paths: list[str]) -> None:
    for order in (paths, paths[::-1]):
        with pytest.raises(ManifestInvalid):
            check_paths(order)


def test_paths_in_one_folder_live_side_by_side() -> None:
    check_paths(["a/b", "a/c", "ab", "d/b"])


def put(key: str, index: int, **fields: object) -> Callable[[Any], object]:
    """Change the fields of one item of a list."""
    return lambda wire: wire[key][index].update(fields)


def tensor(position: int, value: object) -> Callable[[Any], object]:
    """Change one field of the tensor: name, dtype, shape, file, slices."""
    return lambda wire: wire["tensors"][0].__setitem__(position, value)


def again(key: str) -> Callable[[Any], object]:
    """List the first item twice."""
    return lambda wire: wire[key].append(wire[key][0])


def top(**fields: object) -> Callable[[Any], object]:
    """Change fields of the manifest itself."""
    return lambda wire: wire.update(fields)


def u32(*numbers: int) -> bytes:
    """Numbers as the packed tables hold them."""
    return b"".join(number.to_bytes(4, "big") for number in numbers)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(put("files", 0, size=-30), id="negative size"),
        pytest.param(put("files", 0, size=2**53), id="size past 53 bits"),
        pytest.param(put("files", 0, size=2**64 - 1), id="size of 64 bits"),
        pytest.param(put("files", 0, size=30.0), id="size that is not whole"),
        pytest.param(put("files", 0, size=True, slices=u32(0, 0, 1)), id="size that is a truth value"),
        pytest.param(put("files", 0, size="30"), id="size as text"),
        pytest.param(put("files", 0, size=29), id="slices longer than the size"),
        pytest.param(put("files", 1, size=151), id="slices shorter than the size"),
        pytest.param(put("tasks", 0, size=49), id="slices of a task longer than its size"),
        pytest.param(put("files", 0, slices=b""), id="no slices for a size"),
        pytest.param(put("files", 0, slices=u32(0, 71, 30)), id="slice past the end of its shard"),
        pytest.param(put("files", 0, slices=u32(0, 2**32 - 1, 30)), id="slice that overflows"),
        pytest.param(put("files", 0, slices=u32(2, 0, 30)), id="slice of a shard that is not listed"),
        pytest.param(put("files", 0, slices=u32(0, 0, 30, 0, 0, 0)), id="empty slice"),
        pytest.param(put("files", 0, slices=u32(0, 10, 30)[:-1]), id="slices cut short"),
        pytest.param(put("files", 0, slices="text"), id="slices as text"),
        pytest.param(put("files", 0, slices=[0, 10, 30]), id="slices as a list"),
        pytest.param(put("files", 0, sha256=bytes(16)), id="an MD5"),
        pytest.param(put("files", 0, sha256=SHA), id="SHA-256 as text"),
        pytest.param(put("files", 0, pieces=bytes(32)), id="piece of a file that is one piece"),
        pytest.param(put("files", 0, pieces=[]), id="pieces as a list"),
        pytest.param(put("tasks", 0, pieces=""), id="pieces as text"),
        pytest.param(lambda wire: wire["tasks"][0].pop("pieces"), id="no pieces"),
        pytest.param(top(piece_length=MIN_PIECE // 2), id="pieces too short"),
        pytest.param(top(piece_length=MIN_PIECE + 1), id="piece length that is no power of two"),
        pytest.param(top(piece_length=0), id="pieces of nothing"),
        pytest.param(top(piece_length=-MIN_PIECE), id="negative piece length"),
        pytest.param(top(piece_length=2**60), id="piece length past 53 bits"),
        pytest.param(top(piece_length=float(MIN_PIECE)), id="piece length that is not whole"),
        pytest.param(top(piece_length=None), id="no piece length"),
        pytest.param(put("files", 0, hash="md5"), id="key that nobody knows"),
        pytest.param(lambda wire: wire["files"][0].pop("sha256"), id="no SHA-256"),
        pytest.param(again("files"), id="file listed twice"),
        pytest.param(put("files", 0, path="Weights/model.safetensors"), id="letter case collision"),
        pytest.param(put("files", 0, path="weights"), id="file and folder"),
        pytest.param(put("files", 0, path=b"config.json"), id="path as bytes"),
        pytest.param(top(files=[1]), id="file that is no map"),
        pytest.param(top(files=None), id="no files at all"),
        pytest.param(top(shards=bytes(32) + u32(0)), id="shard of no bytes"),
        pytest.param(top(shards=bytes(32) + u32(MAX_SHARD + 1)), id="shard over the limit"),
        pytest.param(lambda wire: wire.update(shards=wire["shards"] * 2), id="shard listed twice"),
        pytest.param(lambda wire: wire.update(shards=wire["shards"][:-1]), id="shard table cut short"),
        pytest.param(lambda wire: wire.update(shards=wire["shards"][:36]), id="shard table without a used shard"),
        pytest.param(top(shards="text" * 9), id="shard table as text"),
        pytest.param(top(shards=[]), id="shard table as a list"),
        pytest.param(again("tasks"), id="task listed twice"),
        pytest.param(put("tasks", 0, name="Embed"), id="task name in upper case"),
        pytest.param(put("tasks", 0, name=""), id="task without a name"),
        pytest.param(put("tasks", 0, name=5), id="task name that is a number"),
        pytest.param(put("tasks", 0, files=[2]), id="task with a file that is not listed"),
        pytest.param(put("tasks", 0, files=[-1]), id="task with a negative file"),
        pytest.param(put("tasks", 0, files=["config.json"]), id="task with a file by name"),
        pytest.param(put("tasks", 0, filename="a/../../x"), id="task body outside its folder"),
        pytest.param(put("tasks", 0, description="a" * 5000), id="endless description"),
        pytest.param(put("tasks", 0, extra=1), id="task key that nobody knows"),
        pytest.param(tensor(0, 5), id="tensor name that is a number"),
        pytest.param(tensor(1, "F" * 17), id="endless dtype"),
        pytest.param(tensor(2, [-1]), id="negative shape"),
        pytest.param(tensor(2, [1.5]), id="shape that is not whole"),
        pytest.param(tensor(2, 5), id="shape that is no list"),
        pytest.param(tensor(3, 2), id="tensor of a file that is not listed"),
        pytest.param(tensor(4, u32(0, 90, 20)), id="tensor past the end of its shard"),
        pytest.param(tensor(4, None), id="tensor without slices"),
        pytest.param(lambda wire: wire["tensors"][0].append(1), id="tensor with a field too many"),
        pytest.param(lambda wire: wire["tensors"].append([]), id="tensor without fields"),
        pytest.param(top(model="minilm"), id="model without an org"),
        pytest.param(top(model="../minilm"), id="model that climbs"),
        pytest.param(top(model=None), id="no model"),
        pytest.param(top(format=2), id="format of the future"),
        pytest.param(top(format=None), id="no format"),
        pytest.param(top(deltas=[{}]), id="deltas that nobody knows"),
        pytest.param(top(signature=b""), id="key of the manifest that nobody knows"),
        pytest.param(lambda wire: wire.pop("tensors"), id="a key is missing"),
    ],
)  # fmt: skip
def test_a_manifest_that_breaks_a_rule_is_refused(change: Callable[[Any], object]) -> None:
    with pytest.raises(ManifestInvalid):
        decode(changed(change))


# Deltas

OLD, PARCEL = digest_of(b"old"), digest_of(b"parcel")
WITH_DELTAS = dataclasses.replace(
    SAMPLE,
    parent=digest_of(b"parent"),
    deltas=(Delta(A, PARCEL, (Slice(OLD, 5, 60), Slice(B, 0, 40))), Delta(A, B)),
    others={PARCEL: 30, OLD: 65},
)


def changed_deltas(change: Callable[[Any], object]) -> bytes:
    """The sample with deltas, and something changed of these on the wire."""
    wire = copy.deepcopy(codec.decode(WITH_DELTAS.encoded, MAX_MANIFEST))
    change(wire["deltas"])
    return codec.encode(wire)


def test_the_sample_with_deltas_is_valid_and_has_the_content_of_the_one_without() -> None:
    assert decode(changed_deltas(lambda deltas: None)) == WITH_DELTAS
    assert WITH_DELTAS.content == SAMPLE and WITH_DELTAS.revision != SAMPLE.revision
    assert WITH_DELTAS.stored == {A: 100, B: 50, PARCEL: 30}, "not what deltas are upon"
    assert (WITH_DELTAS.size_of(A), WITH_DELTAS.size_of(OLD)) == (100, 65)


# Provenance

MADE = Provenance(3, digest_of(b"base"), 7, "trimmed", {"non_finite": 1, "norm_exceeded": 2}, 1.5, 1e-5)


def changed_provenance(**changes: object) -> bytes:
    """The sample with its provenance, and something changed of that; None takes it out."""
    wire = copy.deepcopy(codec.decode(dataclasses.replace(SAMPLE, provenance=MADE).encoded, MAX_MANIFEST))
    wire["provenance"] = {k: v for k, v in {**wire["provenance"], **changes}.items() if v is not None}
    return codec.encode(wire)


def test_provenance_comes_back_and_is_signed_with_the_rest() -> None:
    for made in (MADE, dataclasses.replace(MADE, epsilon=None, delta=None, rejected={})):
        manifest = dataclasses.replace(SAMPLE, provenance=made)
        assert decode(manifest.encoded) == manifest
        assert manifest.content == SAMPLE and manifest.revision != SAMPLE.revision


def test_a_manifest_without_provenance_has_the_bytes_that_it_always_had() -> None:
    assert "provenance" not in codec.decode(SAMPLE.encoded, MAX_MANIFEST)


@pytest.mark.parametrize(
    "changes",
    [
        {"round": -1},
        {"round": None},
        {"base": "main"},
        {"sites": 1.5},
        {"rule": 5},
        {"rule": "x" * 65},
        {"rejected": []},
        {"rejected": {"NaN here": 1}},
        {"rejected": {"non_finite": -1}},
        {"epsilon": None},
        {"delta": "small"},
        {"epsilon": -1.0},
        {"more": 1},
    ],
)
def test_provenance_that_breaks_a_rule_is_refused(changes: dict[str, object]) -> None:
    assert decode(changed_provenance()).provenance == MADE
    with pytest.raises(ManifestInvalid):
        decode(changed_provenance(**changes))


def entry(position: int, value: object) -> Callable[[Any], object]:
    """Change one field of the first delta: target, parcel, base."""
    return lambda deltas: deltas["entries"][0].__setitem__(position, value)


def set_delta(**fields: object) -> Callable[[Any], object]:
    """Change what is said of all deltas."""
    return lambda deltas: deltas.update(fields)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(entry(0, 4), id="target that is not listed"),
        pytest.param(entry(0, -1), id="target before the first"),
        pytest.param(entry(0, True), id="target that is a truth value"),
        pytest.param(entry(1, 4), id="parcel that is not listed"),
        pytest.param(entry(1, 0), id="parcel that is its target"),
        pytest.param(entry(1, 3.0), id="parcel that is no number"),
        pytest.param(entry(0, 2), id="parcel as large as its target"),
        pytest.param(entry(2, u32(4, 0, 1)), id="base that is not listed"),
        pytest.param(entry(2, u32(3, 6, 60)), id="base past the end of its shard"),
        pytest.param(entry(2, u32(3, 0, 0)), id="empty part of a base"),
        pytest.param(entry(2, u32(3, 0, 1)[:-1]), id="base cut short"),
        pytest.param(entry(2, "base"), id="base as text"),
        pytest.param(entry(2, u32(0, 0, 100) * (MAX_SHARD // 100 + 1)), id="base over the limit of a shard"),
        pytest.param(entry(2, b""), id="shard that nothing uses"),
        pytest.param(lambda deltas: deltas["entries"][0].append(0), id="delta with something more"),
        pytest.param(lambda deltas: deltas["entries"][0].pop(), id="delta without a base"),
        pytest.param(set_delta(entries=[]), id="no deltas where there are some"),
        pytest.param(set_delta(entries=None), id="deltas that are none"),
        pytest.param(set_delta(entries=[1]), id="delta that is a number"),
        pytest.param(set_delta(entries=[[0, 2, b""]] * (MAX_SHARDS + 1)), id="too many deltas"),
        pytest.param(set_delta(parent=b"x"), id="parent that is no digest"),
        pytest.param(set_delta(parent=None), id="parent of another type"),
        pytest.param(set_delta(others=b"x"), id="table cut short"),
        pytest.param(set_delta(others=bytes(32) + u32(0)), id="other shard of no bytes"),
        pytest.param(lambda deltas: deltas.update(others=deltas["others"] * 2), id="other shard listed twice"),
        pytest.param(lambda deltas: deltas.update(more=1), id="key that nobody knows"),
        pytest.param(lambda deltas: deltas.pop("parent"), id="no parent at all"),
    ],
)
def test_deltas_that_break_a_rule_are_refused(change: Callable[[Any], object]) -> None:
    with pytest.raises(ManifestInvalid):
        decode(changed_deltas(change))


def test_a_shard_of_the_revision_is_not_listed_among_the_others_too() -> None:
    with pytest.raises(ManifestInvalid):
        decode(dataclasses.replace(WITH_DELTAS, others={**WITH_DELTAS.others, A: 100}).encoded)


@pytest.mark.parametrize("wire", [None, 1, "text", [], {}, [SAMPLE.encoded]])
def test_anything_but_a_map_of_the_right_keys_is_refused(wire: object) -> None:
    with pytest.raises(ManifestInvalid):
        decode(codec.encode(wire))
