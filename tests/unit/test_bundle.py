"""A bundle's form: what it is made of comes back, and nothing else is one."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from shared.bundle import (
    END,
    BaseMissing,
    BundleInvalid,
    Entry,
    Index,
    Unpacker,
    entry_name,
    head,
    padding,
    pick,
    rebuilding,
    wanted,
)
from shared.digest import Digest, digest_of
from shared.layout import Layout, Slice
from shared.manifest import MAX_SHARD, Delta, Manifest, Task
from shared.trust import LIMITS

A, B, C, P, Q = (os.urandom(n) for n in (300, 512, 700, 40, 50))
METADATA = b'{"signed": 1}'
PARTS = [("trust", METADATA), ("manifests", b"manifest"), ("blobs", A), ("blobs", B)]
INDEX = Index(
    "acme/tiny", "main", digest_of(b"manifest"), {"timestamp.json": digest_of(METADATA)},
    tuple((entry_name(kind, digest_of(data)), len(data)) for kind, data in PARTS), ("embed",), digest_of(b"before"),
)  # fmt: skip


def written(index: Index = INDEX, parts: Sequence[tuple[str, bytes]] = PARTS) -> bytes:
    """A bundle of these."""
    files = (head(entry_name(kind, digest_of(data)), len(data)) + data + padding(len(data)) for kind, data in parts)
    return index.encode() + b"".join(files) + END


def read(data: bytes, step: int = 1 << 20) -> tuple[Index | None, list[Entry]]:
    """All of it, so many bytes at a time."""
    unpacker, found = Unpacker(), []
    for at in range(0, len(data), step):
        found += unpacker.feed(data[at : at + step])
    unpacker.end()
    return unpacker.index, found


@pytest.mark.parametrize("step", [1, 7, 512, 1 << 20])
def test_a_bundle_comes_back_however_it_is_cut(step: int) -> None:
    index, found = read(written() + bytes(10_240), step)
    assert index == INDEX and [(entry.kind, entry.data) for entry in found] == PARTS


def test_any_tar_reads_it() -> None:
    with tarfile.open(fileobj=io.BytesIO(written())) as opened:
        members = opened.getmembers()
        assert [member.name for member in members] == ["index.json", *(name for name, _ in INDEX.entries)]
        assert {(member.mtime, member.uid, member.uname) for member in members} == {(0, 0, "")}
        file = opened.extractfile(members[-1])
        assert file is not None and file.read() == B


def of_tar(change: Callable[[tarfile.TarInfo], object], form: int = tarfile.PAX_FORMAT) -> bytes:
    """The same content as somebody's tar writes it, its last entry changed."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=form) as opened:
        document = INDEX.encode()[512:].rstrip(b"\0")
        for name, data in [("index.json", document)] + [(entry_name(k, digest_of(d)), d) for k, d in PARTS]:
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o444
            if data is B:
                change(info)
            opened.addfile(info, io.BytesIO(data))
    return made.getvalue()


@pytest.mark.parametrize(
    "change",
    [
        lambda info: setattr(info, "name", "../../etc/passwd"),
        lambda info: setattr(info, "name", "/etc/passwd"),
        lambda info: setattr(info, "type", tarfile.SYMTYPE),
        lambda info: setattr(info, "type", tarfile.LNKTYPE),
        lambda info: setattr(info, "type", tarfile.DIRTYPE),
        lambda info: setattr(info, "type", tarfile.CHRTYPE),
        lambda info: setattr(info, "type", tarfile.GNUTYPE_SPARSE),
        lambda info: setattr(info, "mtime", 1),
        lambda info: setattr(info, "uid", 1),
        lambda info: setattr(info, "mode", 0o4755),
        lambda info: setattr(info, "pax_headers", {"comment": "x" * 5000}),
        lambda info: setattr(info, "name", "x" * 300),
    ],
)
def test_what_a_tar_can_be_beside_files_is_no_bundle(change: Callable[[tarfile.TarInfo], object]) -> None:
    with pytest.raises(BundleInvalid):
        read(of_tar(change))


def test_a_tar_that_somebody_else_made_just_so_is_one() -> None:
    assert read(of_tar(lambda info: None))[0] == INDEX


def test_every_beginning_of_a_bundle_and_every_damaged_block_is_refused() -> None:
    data = written()
    for end in range(0, len(data), 100):
        with pytest.raises(BundleInvalid):
            read(data[:end])
    behind = data.index(b"\0", 512)  # what it says of itself is signed elsewhere
    for at in [*range(0, 512, 61), *range(behind, len(data), 61)]:
        with pytest.raises(BundleInvalid):
            read(data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :])


def blob(data: bytes) -> tuple[str, int]:
    """Its entry."""
    return entry_name("blobs", digest_of(data)), len(data)


@pytest.mark.parametrize(
    "entries",
    [
        (*INDEX.entries, INDEX.entries[-1]),
        INDEX.entries[::-1],
        INDEX.entries[:1] + INDEX.entries[2:],
        (*INDEX.entries, ("blobs/../../x", 5)),
        (*INDEX.entries, ("index.json", 5)),
        (*INDEX.entries, (blob(C)[0], MAX_SHARD + 1)),
        (*INDEX.entries, (blob(C)[0], 0)),
        (*INDEX.entries, (blob(C)[0], -5)),
        (*INDEX.entries, (blob(C)[0], 2**70)),
        ((INDEX.entries[0][0], max(LIMITS.values()) + 1), *INDEX.entries[1:]),
        tuple((f"trust/{n:064x}", 5 << 20) for n in range(14)) + INDEX.entries,
    ],
)
def test_an_index_of_what_no_bundle_has_is_refused_before_anything_is_read(
    entries: tuple[tuple[str, int], ...],
) -> None:
    unpacker = Unpacker()
    with pytest.raises(BundleInvalid):
        unpacker.feed(replace(INDEX, entries=entries).encode())


# What is in it


def model(*shards: bytes, deltas: Sequence[Delta] = (), others: Sequence[bytes] = ()) -> Manifest:
    """Of one file of these shards; task ``first`` is the first of them."""
    layout = Layout(sum(map(len, shards)), "ab" * 32, tuple(Slice(digest_of(d), 0, len(d)) for d in shards))
    first = Layout(len(shards[0]), "cd" * 32, layout.slices[:1])
    return Manifest(
        "acme/tiny", {digest_of(d): len(d) for d in shards}, {"weights.bin": layout},
        {"first": Task("first", first, "weights.bin")}, deltas=tuple(deltas),
        others={digest_of(d): len(d) for d in others},
    )  # fmt: skip


def upon(target: bytes, parcel: bytes, *base: bytes) -> Delta:
    """A delta."""
    return Delta(digest_of(target), digest_of(parcel), tuple(Slice(digest_of(b), 0, len(b)) for b in base))


def test_what_is_fewer_bytes_is_in_it_and_can_be_had_from_it() -> None:
    manifest = model(A, C, deltas=[upon(C, P, B), upon(A, bytes(400))], others=[P, B, bytes(400)])
    everything = wanted(manifest, ())
    assert pick(manifest, everything, {}) == [digest_of(A), digest_of(C)], "nobody has what it is upon"
    held: set[Digest] = {digest_of(A), digest_of(B)}
    assert pick(manifest, everything, held) == [digest_of(P)]
    assert wanted(manifest, ["first"]) == [digest_of(A)]
    steps = rebuilding(manifest, [digest_of(C)], {digest_of(P)}, held.__contains__)
    assert steps == {digest_of(C): (manifest.deltas[0],)}
    with pytest.raises(BaseMissing):
        rebuilding(manifest, [digest_of(C)], set(), held.__contains__)
