"""Shards made from deltas by the parts of an edge node: from few bytes where that works, whole where it does not."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import zstandard

from edge_node.fill import Fill
from edge_node.reach import Reach
from edge_node.rebuild import AT_ONCE
from edge_node.shard_key import ShardKey, path_of, shard_key
from shared import parcel
from shared.deltas import REBUILDING
from shared.digest import Digest, digest_of
from shared.layout import Slice
from shared.link import LinkPolicy
from shared.manifest import Delta, Manifest
from shared.outcome import Outcome
from shared.parcel import Run
from tests import scripted
from tests.node import Node, node_over
from tests.scripted import Act, Asked, Script, source


def some(seed: int, size: int = 500_000) -> bytes:
    """Bytes that can be compressed to a quarter."""
    return bytes(random.Random(seed).choices(b"0123", k=size))


def changed(data: bytes, seed: int) -> bytes:
    """The same with some bytes changed."""
    changing, result = random.Random(seed), bytearray(data)
    for _ in range(100):
        result[changing.randrange(len(data))] = 0x41
    return bytes(result)


OLD = some(1)
NEW = changed(OLD, 2)
NEWER = changed(NEW, 3)


@dataclass
class Made:
    """Shards and the deltas between them, as a publisher would sign them."""

    script: Script
    shards: dict[Digest, int] = field(default_factory=dict)
    deltas: list[Delta] = field(default_factory=list)

    def shard(self, data: bytes) -> Digest:
        """A shard that the source has."""
        digest = self.script.add(data)
        self.shards[digest] = len(data)
        return digest

    def delta(self, target: bytes, base: bytes = b"", encoded: bytes | None = None) -> ShardKey:
        """A delta to a shard; ``encoded`` where its parcel is another one. The parcel."""
        run = Run(len(target), based=bool(base))
        encoded = parcel.encode(memoryview(target), memoryview(base), [run]) if encoded is None else encoded
        named, base_slices = self.shard(encoded), (Slice(self.shard(base), 0, len(base)),) if base else ()
        self.deltas.append(Delta(self.shard(target), named, base_slices))
        return shard_key(named)

    def manifest(self) -> Manifest:
        """What says all this."""
        return Manifest("acme/tiny", {}, {}, {}, deltas=tuple(self.deltas), others=self.shards)


def key(data: bytes) -> ShardKey:
    """What a shard is called."""
    return shard_key(digest_of(data))


def asked(script: Script) -> list[str]:
    """Paths of what was got, in order; each once however many ranges."""
    return list(dict.fromkeys(request.path for request in script.gets()))


def count(node: Node, result: str) -> float:
    """Of shards to be made from deltas, those that ended so."""
    return node.metrics.registry.get_sample_value("nearshard_deltas_total", {"result": result}) or 0.0


async def test_a_shard_is_made_from_its_delta_and_what_is_held_for_all_who_ask(tmp_path: Path) -> None:
    script = Script()
    made = Made(script)
    encoded = made.delta(NEW, OLD)
    async with source(script), node_over(tmp_path, script) as node:
        await node.read(key(OLD))
        await node.settled()
        node.recipes.learn(made.manifest(), "")
        before = node.upstreams.received.total()
        assert set(await asyncio.gather(*(node.read(key(NEW)) for _ in range(20)), node.read(key(NEW), 5, 100))) == {
            NEW, NEW[5:105],
        }  # fmt: skip
        assert asked(script) == [path_of(key(OLD)), path_of(encoded)]
        moved = node.upstreams.received.total() - before
        await node.settled()
        assert node.cache.peek(key(NEW)) is Outcome.HIT_DISK and node.cache.peek(encoded) is Outcome.HIT_DISK
        assert count(node, "made") == 1
        assert node.rebuilder.status() == {"made": 1, "failed": 0, "saved_bytes": len(NEW) - moved}
        assert node.cache.disk.ledger.statistics().pinned == 0


async def test_a_chain_is_decoded_to_its_end_and_what_is_on_the_way_is_not_kept(tmp_path: Path) -> None:
    script = Script()
    made = Made(script)
    encoded = [made.delta(NEWER, NEW), made.delta(NEW, OLD)]
    async with source(script), node_over(tmp_path, script) as node:
        await node.read(key(OLD))
        await node.settled()
        node.recipes.learn(made.manifest(), "")
        assert await node.read(key(NEWER)) == NEWER
        assert sorted(asked(script)[1:]) == sorted(path_of(one) for one in encoded)
        assert node.cache.known_size(key(NEW)) is None


def bomb() -> bytes:
    """A frame that says it has as many bytes as it should, and has more."""
    packer = zstandard.ZstdCompressor(write_content_size=False)
    return packer.compress(bytes(64 << 20))


@pytest.mark.parametrize(
    ("encoded", "result"),
    [
        (parcel.encode(memoryview(NEWER), memoryview(OLD), [Run(len(NEWER), based=True)]), "wrong"),
        (b"not a parcel", "damaged"),
        (bomb(), "damaged"),
    ],
    ids=["of another shard", "of nothing", "bomb"],
)
async def test_a_parcel_that_makes_something_else_costs_the_whole_shard_and_no_wrong_byte(
    tmp_path: Path, encoded: bytes, result: str
) -> None:
    script = Script()
    made = Made(script)
    made.delta(NEW, OLD, encoded)
    async with source(script), node_over(tmp_path, script) as node:
        await node.read(key(OLD))
        await node.settled()
        node.recipes.learn(made.manifest(), "")
        assert await node.read(key(NEW)) == NEW
        assert count(node, result) == 1 and count(node, "made") == 0
        assert asked(script)[-1] == path_of(key(NEW))


def lost(script: Script, encoded: ShardKey, node: Node) -> None:
    """The source has the parcel no more."""
    del script.blobs[path_of(encoded)]


def flipped(script: Script, encoded: ShardKey, node: Node) -> None:
    """The source has other bytes of it."""
    script.blobs[path_of(encoded)] = bytes(len(script.blobs[path_of(encoded)]))


def evicted(script: Script, encoded: ShardKey, node: Node) -> None:
    """The base is not held any more: its bytes would be more than the shard's."""
    node.cache.disk.drop(key(OLD))
    node.cache.memory.drop(key(OLD))


def rotten(script: Script, encoded: ShardKey, node: Node) -> None:
    """The base has other bytes than it had."""
    node.cache.memory.drop(key(OLD))
    file = next(path for path in node.folder.rglob(key(OLD).removeprefix("sha256:")))
    file.write_bytes(bytes(len(OLD)))


def short(script: Script, encoded: ShardKey, node: Node) -> None:
    """The base has fewer bytes than it had."""
    node.cache.memory.drop(key(OLD))
    file = next(path for path in node.folder.rglob(key(OLD).removeprefix("sha256:")))
    file.write_bytes(OLD[:1000])


@pytest.mark.parametrize("fault", [lost, flipped, evicted, rotten, short])
async def test_whatever_is_missing_of_a_delta_the_shard_comes_whole(
    tmp_path: Path, fault: Callable[[Script, ShardKey, Node], None]
) -> None:
    script = Script()
    made = Made(script)
    encoded = made.delta(NEW, OLD)
    async with source(script), node_over(tmp_path, script) as node:
        await node.read(key(OLD))
        await node.settled()
        node.recipes.learn(made.manifest(), "")
        fault(script, encoded, node)
        assert set(await asyncio.gather(*(node.read(key(NEW)) for _ in range(3)))) == {NEW}
        assert path_of(key(OLD)) not in asked(script)[1:], "a base is not fetched for a delta"


async def test_a_compressed_shard_is_taken_where_it_saves_enough(tmp_path: Path) -> None:
    """A tenth where nothing says that bytes are dear, anything where something does."""
    little = bytes(random.Random(1).randbytes(480_000)) + bytes(20_000)
    for number, (data, metered, taken) in enumerate([(NEW, False, True), (little, False, False), (little, True, True)]):
        script = Script()
        made = Made(script)
        encoded = made.delta(data)
        async with source(script), node_over(tmp_path / str(number), script) as node:
            node.recipes.learn(made.manifest(), "")
            node.upstreams.link.policy = LinkPolicy(metered=metered)
            assert await node.read(key(data)) == data
            assert asked(script) == [path_of(encoded if taken else key(data))]


async def test_what_waits_for_a_parcel_gets_no_byte_and_a_stranger_may_read_the_parcel_itself(tmp_path: Path) -> None:
    script = Script()
    made = Made(script)
    encoded = made.delta(NEW, OLD)
    async with source(script), node_over(tmp_path, script) as node:
        await node.read(key(OLD))
        await node.settled()
        node.recipes.learn(made.manifest(), "")
        script.acts = [scripted.held_after(100)]
        reader = node.cache.open(key(NEW), None)
        first = asyncio.ensure_future(anext(aiter(reader.read(0, len(NEW)))))
        await script.holding.wait()
        other = asyncio.create_task(node.read(encoded))
        assert await reader.size() == len(NEW), "the manifest says it"
        assert not first.done()
        script.release.set()
        await first
        assert await other == script.blobs[path_of(encoded)]
        reader.close()
    assert len(asked(script)) == 2


def _rank(fill: Fill) -> int:
    return fill.rank()


async def test_parcels_of_what_no_client_waits_for_come_after_clients(tmp_path: Path) -> None:
    script = Script(acts=[scripted.held_after(100)])
    made = Made(script)
    encoded = made.delta(NEW)
    async with source(script), node_over(tmp_path, script) as node:
        node.recipes.learn(made.manifest(), "")
        preheating = asyncio.create_task(node.cache.fetch(key(NEW), len(NEW)))
        await script.holding.wait()
        part = node.cache.fills.get(encoded, Reach.PART)
        assert part is not None and _rank(part) == 2
        reading = asyncio.create_task(node.read(key(NEW)))
        await asyncio.sleep(0)
        assert node.cache.fills.get(encoded, Reach.PART) is part
        assert _rank(part) < 2, "now a client waits for it"
        script.release.set()
        assert await reading == NEW
        await preheating


async def test_few_shards_are_decoded_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script()
    made = Made(script)
    shards = [some(seed, 50_000) for seed in range(10, 20)]
    for data in shards:
        made.delta(data)
    running, most = 0, 0
    decode = parcel.decode

    def watched(encoded: memoryview, base: memoryview, size: int) -> bytes:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            return decode(encoded, base, size)
        finally:
            running -= 1

    monkeypatch.setattr(parcel, "decode", watched)
    async with source(script), node_over(tmp_path, script) as node:
        node.recipes.learn(made.manifest(), "")
        assert await asyncio.gather(*(node.read(key(data)) for data in shards)) == shards
        assert count(node, "made") == len(shards)
    assert 0 < most <= AT_ONCE


async def test_a_cache_with_no_room_for_parts_takes_the_shard_whole(tmp_path: Path) -> None:
    script = Script()
    made = Made(script)
    made.delta(NEW)
    async with source(script), node_over(tmp_path, script, memory=1000, disk=1000) as node:
        node.recipes.learn(made.manifest(), "")
        assert await node.read(key(NEW)) == NEW
    assert asked(script) == [path_of(key(NEW))]


async def test_a_source_that_does_not_answer_is_not_asked_for_the_whole_shard_as_well(tmp_path: Path) -> None:
    """Readers have waited long enough."""

    async def no_answer(script: Script, asked: Asked, writer: asyncio.StreamWriter) -> None:
        await script.release.wait()

    script = Script(acts=[no_answer])
    made = Made(script)
    encoded = made.delta(NEW)
    async with source(script), node_over(tmp_path, script) as node:
        node.recipes.learn(made.manifest(), "")
        with pytest.raises(Exception, match="in time"), pytest.MonkeyPatch.context() as patch:
            patch.setattr("shared.web.session.FIRST_BYTE", 0.2)
            await node.read(key(NEW))
    assert asked(script) == [path_of(encoded)]


def making(there: list[bool]) -> Act:
    """A node that makes the shard before it sends any of it, until it was asked as often whether it is still ``there``:
    it answers that, or does not."""

    async def act(script: Script, asked: Asked, writer: asyncio.StreamWriter) -> None:
        if asked.path == "/healthz":
            if not there.pop(0):
                await script.holding.wait()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            if not there:
                script.release.set()
            return
        writer.write(f"HTTP/1.1 200 OK\r\n{REBUILDING}: 1\r\nContent-Length: {len(NEW)}\r\n\r\n".encode())
        await writer.drain()
        await script.release.wait()
        writer.write(NEW)

    return act


@pytest.mark.parametrize("there", [True, False])
async def test_a_node_that_makes_a_shard_may_take_its_time_while_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    """Else whoever asked it would fetch the whole shard from above, beside its delta. A frozen one is left as ever."""
    monkeypatch.setattr("shared.web.session.ALIVE", 0.3)
    first, second = Script(acts=[making([True] * 3 + [there])]), Script()
    first.add(NEW), second.add(NEW)
    async with source(first), source(second), node_over(tmp_path, first, second, idle=0.5) as node:
        assert await node.read(key(NEW)) == NEW
        assert asked(first) == [path_of(key(NEW)), "/healthz"] and len(first.asked) == 5
        assert asked(second) == ([] if there else [path_of(key(NEW))])
