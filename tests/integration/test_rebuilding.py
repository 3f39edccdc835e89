"""Shards made of parcels: whatever is held, sent and damaged, the files are right, or there is a typed error."""

from __future__ import annotations

import asyncio
import hashlib
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearshard.assembly import Assembly, Place
from nearshard.guide import Guide
from nearshard.kept import Kept
from nearshard.rebuilding import PARCELS, Rebuilding, Tally, choose
from nearshard.transfer import Meter, Transfer
from shared import parcel
from shared.digest import Digest, digest_of
from shared.errors import NearshardError
from shared.layout import Layout, Slice
from shared.manifest import Delta, Manifest
from shared.web.session import Sessions
from tests.clock import HandClock
from tests.scripted import Script, source
from tests.unit.strategies import quick


def data_of(seed: int, size: int = 4000) -> bytes:
    """Bytes that can be compressed to a tenth or so."""
    return (random.Random(seed).randbytes(size // 10) * 11)[:size]


def changed(data: bytes, seed: int) -> bytes:
    """The same with a few other bytes in it."""
    rng, new = random.Random(seed), bytearray(data)
    for _ in range(3):
        new[rng.randrange(len(new))] ^= 0x55
    return bytes(new)


def encoded(target: bytes, base: bytes) -> bytes:
    """The parcel of ``target`` upon ``base``, which is no longer."""
    runs = [parcel.Run(len(base), based=True), parcel.Run(len(target) - len(base))]
    return parcel.encode(memoryview(target), memoryview(base), [run for run in runs if run.length])


@dataclass
class Case:
    """A revision of one file, what there is of it at a source, and what is on this disk."""

    shards: dict[Digest, bytes] = field(default_factory=dict)
    """Of the file, in order."""
    others: dict[Digest, bytes] = field(default_factory=dict)
    deltas: list[Delta] = field(default_factory=list)
    sent: dict[Digest, bytes] = field(default_factory=dict)
    """What the source has."""
    held: dict[Digest, bytes] = field(default_factory=dict)
    """What is on this disk, by the name that it should have."""

    def shard(self, data: bytes) -> None:
        """A shard of the file."""
        self.shards[digest_of(data)] = self.sent[digest_of(data)] = data

    def other(self, data: bytes) -> Digest:
        """A parcel or a base."""
        self.others[digest_of(data)] = self.sent[digest_of(data)] = data
        return digest_of(data)

    def delta(self, target: bytes, base: Sequence[bytes] = (), data: bytes | None = None) -> Digest:
        """A way to ``target``; ``data``: the parcel's, which may be wrong."""
        made = self.other(encoded(target, b"".join(base)) if data is None else data)
        upon = tuple(Slice(digest_of(part), 0, len(part)) for part in base)
        self.deltas.append(Delta(digest_of(target), made, upon))
        for part in base:
            self.others.setdefault(digest_of(part), part)
        return made

    @property
    def whole(self) -> bytes:
        """The file."""
        return b"".join(self.shards.values())

    def manifest(self) -> Manifest:
        """The revision."""
        slices = tuple(Slice(digest, 0, len(data)) for digest, data in self.shards.items())
        layout = Layout(len(self.whole), hashlib.sha256(self.whole).hexdigest(), slices)
        others = {digest: len(data) for digest, data in self.others.items() if digest not in self.shards}
        shards = {digest: len(data) for digest, data in self.shards.items()}
        return Manifest("acme/m", shards, {"model.bin": layout}, {}, deltas=tuple(self.deltas), others=others)

    async def get(self, folder: Path) -> tuple[Tally, list[tuple[int, int]]]:
        """Put the file together in ``folder``; what was moved, and the progress that was told. It is right after."""
        manifest, seen = self.manifest(), list[tuple[int, int]]()
        layout = manifest.files["model.bin"]
        (folder / "held").write_bytes(b"".join(self.held.values()))
        places, position = dict[Digest, list[Place]](), 0
        for digest, data in self.held.items():
            places[digest] = [Place(folder / "held", position)]
            position += len(data)
        assembly, tally = Assembly(folder / "parts", [layout], manifest.shards), Tally()

        def find(digest: Digest) -> list[Place]:
            return [*assembly.places(digest), *places.get(digest, ())]

        assembly.prepare(places)
        wanted = {digest: assembly.left(digest) for digest in assembly.needed()}
        chosen, left = choose(manifest, wanted, find)
        async with source(Script(blobs={f"/blobs/{d}": data for d, data in self.sent.items()})) as origin:
            sessions, clock = Sessions(), HandClock()
            guide = Guide(sessions, [origin.url], None, Kept(), clock)
            planned = {d: [f"{origin.url}/blobs/{d}"] for d in (*manifest.shards, *manifest.others)}
            meter = Meter(left, lambda *told: seen.append(told))
            transfer = Transfer(sessions, guide, clock, planned=planned, sources=tally.sources, meter=meter)
            rebuilding = Rebuilding(transfer, manifest, chosen, find, tally)
            try:
                await transfer.fetch_all(tuple(wanted), lambda digest: rebuilding.land(digest, assembly), 3)
            finally:
                await guide.close()
                await sessions.close()
        assembly.finish({folder / "file": layout})
        assert (folder / "file").read_bytes() == self.whole
        return tally, seen


OLD, NEW = data_of(1), changed(data_of(1), 1)


async def test_a_delta_is_fetched_in_place_of_the_shard_that_it_makes(tmp_path: Path) -> None:
    case = Case(held={digest_of(OLD): OLD})
    case.shard(NEW)
    made = case.delta(NEW, [OLD])
    del case.sent[digest_of(NEW)]
    tally, seen = await case.get(tmp_path)
    size = len(case.others[made])
    assert tally.sources.total() == size < len(NEW) and tally.refused == 0
    assert seen[0] == (0, size) and seen[-1] == (size, size), "progress is of what is moved"


async def test_a_chain_is_decoded_in_memory_and_its_other_shards_are_nowhere(tmp_path: Path) -> None:
    versions = [data_of(2)]
    for step in range(3):
        versions.append(changed(versions[-1], step))
    case = Case(held={digest_of(versions[0]): versions[0]})
    case.shard(versions[-1])
    parcels = [case.delta(new, [old]) for old, new in pairwise(versions)]
    case.sent = {made: case.others[made] for made in parcels}
    case.deltas.reverse()
    tally, _ = await case.get(tmp_path)
    assert tally.sources.total() == sum(len(case.others[made]) for made in parcels) and tally.refused == 0


async def test_a_parcel_larger_than_the_memory_for_parcels_is_fetched_alone(tmp_path: Path) -> None:
    assert PARCELS < 1 << 27
    case = Case()
    for number in range(12):
        case.shard(data := data_of(number, 60_000))
        case.delta(data)
    tally, _ = await case.get(tmp_path)
    assert 0 < tally.sources.total() < len(case.whole) // 2


@pytest.mark.parametrize("what", ["missing", "cut short", "wrong", "other base", "bomb", "short", "damaged", "gone"])
async def test_whatever_is_wrong_with_a_delta_that_shard_comes_whole(tmp_path: Path, what: str) -> None:
    """And only that one: the others come as they should."""
    fine, other = data_of(3), changed(OLD, 9)
    case = Case(held={digest_of(OLD): OLD})
    case.shard(fine)
    case.shard(NEW)
    case.delta(fine)
    right = encoded(NEW, OLD)
    wrong = {
        "cut short": right[:-4],
        "wrong": encoded(other, OLD),
        "other base": encoded(NEW, other),
        "bomb": encoded(bytes(8 << 20), b""),
        "short": encoded(NEW[:-1], OLD[:-1]),
    }
    made = case.delta(NEW, [OLD], wrong.get(what))
    if what == "missing":
        del case.sent[made]
    elif what == "damaged":
        case.held[digest_of(OLD)] = other
    elif what == "gone":
        case.held[digest_of(OLD)] = b""
    tally, seen = await case.get(tmp_path)
    base = case.held[digest_of(OLD)]
    used = what != "missing" and len(base) == len(OLD) and _makes(case.others[made], base)
    assert tally.refused == (0 if used else 1)
    assert seen[-1][0] == seen[-1][1] == tally.sources.total(), "what is moved besides is told"


def _makes(data: bytes, base: bytes) -> bool:
    """Whether a parcel is right after all: one on its own needs no base."""
    try:
        return parcel.decode(memoryview(data), memoryview(base), len(NEW)) == NEW
    except NearshardError:
        return False


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A revision, deltas of all sorts to its shards, and whatever is held, sent and damaged of it."""
    numbers, case = st.integers(0, 5), Case()
    pool = {n: data_of(n, 200 + 40 * n) for n in range(6)}
    for number in draw(st.lists(numbers, min_size=1, max_size=5)):
        case.shard(changed(pool[number], draw(numbers)))
    ends = [*case.shards.values(), *pool.values()]
    for _ in range(draw(st.integers(0, 8))):
        target = draw(st.sampled_from(ends))
        upon, base = list[Slice](), b""
        for part in draw(st.lists(st.sampled_from(ends), max_size=2)):
            if length := min(len(part), len(target) - len(base)):
                upon.append(Slice(digest_of(part), len(part) - length, length))
                base += part[len(part) - length :]
                case.others.setdefault(digest_of(part), part)
        right = draw(st.sampled_from([True, True, True, False]))
        made = encoded(target if right else bytes(len(target)), base)
        if len(made) < len(target):
            case.deltas.append(Delta(digest_of(target), case.other(made), tuple(upon)))
            case.others.setdefault(digest_of(target), target)
    case.deltas = draw(st.permutations(case.deltas))
    case.held = {digest_of(data): data for data in draw(st.lists(st.sampled_from(ends)))}
    for digest in draw(st.lists(st.sampled_from([*case.held, *case.sent]), max_size=3)):
        if digest in case.held:
            case.held[digest] = bytes(len(case.held[digest]))
        elif digest in case.others:
            case.sent.pop(digest, None)
    if draw(st.booleans()):
        case.sent.pop(draw(st.sampled_from(list(case.shards))), None)
    return case


@quick
@given(cases())
def test_any_revision_from_any_base_is_right_or_a_typed_error(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            tally, seen = asyncio.run(case.get(Path(folder)))
        except NearshardError:
            assert not case.shards.keys() <= case.sent.keys(), "a whole shard was not to be had"
        else:
            assert seen[-1][0] == seen[-1][1] == tally.sources.total()
            assert tally.refused or tally.sources.total() <= len(case.whole)
