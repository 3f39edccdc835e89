"""Sources that lie, break off, dawdle or are away: the edge leaves them, and never passes on what is not right."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager

import pytest

from tests import scripted
from tests.faults import acts, invariants
from tests.faults.client import blob, get, start_edge
from tests.harness import Lab, Service, get_json, make_model
from tests.scripted import Act, Script, source

SIZE = 600_000
ANSWER = 10.0
"""Seconds in which a request for what cannot be had is answered."""
MARGIN = 5.0
"""Seconds beside a bound, for machines that do other things too."""


@asynccontextmanager
async def edge_over(lab: Lab, *scripts: Script, **flags: str) -> AsyncIterator[Service]:
    """An edge with these sources; afterwards everything holds that must."""
    async with AsyncExitStack() as stack:
        for script in scripts:
            await stack.enter_async_context(source(script))
        edge = await start_edge(lab, *scripts, **flags)
        yield edge
        for script in scripts:
            script.release.set()
        await invariants.all_hold(edge, lab.folder / "edge")


def shard(seed: int, size: int = SIZE) -> bytes:
    """Bytes of a shard."""
    return random.Random(seed).randbytes(size)


LIES = {
    "short of its Content-Length": scripted.broken_off(SIZE // 3),
    "no byte of its body": scripted.broken_off(0),
    "chunked without the last chunk": acts.chunked_without_end,
    "close-delimited and short": scripted.close_delimited,
    "one bit wrong early": scripted.flipped_at(0),
    "one bit wrong late": scripted.flipped_at(SIZE - 1),
    "longer than the shard": scripted.too_long,
    "another Content-Range": scripted.wrong_content_range,
    "206 to a plain GET": acts.partial_unasked,
    "gzip": scripted.gzip_encoded,
}


FOLLOWED = ("one bit wrong early", "one bit wrong late", "longer than the shard")
"""Lies that show only after whoever follows the fill has been given some of them: that request ends short."""


@pytest.fixture(params=[1, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(2, 22))])
def liar(request: pytest.FixtureRequest) -> Script:
    """A source with one shard for each lie."""
    script, told = Script(), {}
    for n, lie in enumerate(LIES.values()):
        told[f"/blobs/{script.add(shard(100 * request.param + n))}"] = lie
    script.acts = [acts.by_path(told)]
    return script


def _digest(path: str) -> str:
    return path.removeprefix("/blobs/")


async def test_no_client_gets_wrong_bytes_as_whole_and_nothing_of_them_is_kept(lab: Lab, liar: Script) -> None:
    """F15, F16, F17, F18: with that source alone an error or a short body, whole or in part; once it is mended, all."""
    async with edge_over(lab, liar) as edge:
        for _ in range(2):
            answers = await asyncio.gather(*(blob(edge, _digest(path)) for path in liar.blobs))
            for answer, path in zip(answers, liar.blobs, strict=True):
                assert not answer.gave(_digest(path))
                invariants.nothing_wrong_came(answer, _digest(path))
        for path, data in liar.blobs.items():
            part = await get(edge.port, path, "Range: bytes=0-99999")
            assert part.status != 206 or not part.whole or part.body == data[:100_000]
        await invariants.settled(edge)
        assert invariants.nothing_wrong_is_kept(lab.folder / "edge") == 0
        liar.acts = [scripted.serve_whole]
        for path in liar.blobs:
            await invariants.serves(edge, _digest(path))
        await invariants.settled(edge)
        assert invariants.nothing_wrong_is_kept(lab.folder / "edge") == len(LIES)


async def test_the_second_source_is_used_within_a_second(lab: Lab, liar: Script) -> None:
    """F15 to F18: whoever has not been given wrong bytes gets right ones in the same request, from the next source."""
    good = Script(blobs=liar.blobs)
    async with edge_over(lab, liar, good) as edge:
        answers = await asyncio.gather(*(blob(edge, _digest(path)) for path in liar.blobs))
        for answer, path, lie in zip(answers, liar.blobs, LIES, strict=True):
            invariants.nothing_wrong_came(answer, _digest(path))
            assert answer.gave(_digest(path)) or lie in FOLLOWED, lie
            assert answer.seconds < 1 + MARGIN
        for path in liar.blobs:
            await invariants.serves(edge, _digest(path))
        assert len(liar.gets()) >= 4, "the first source was asked, as often as its slots let it"
        await invariants.settled(edge)
        assert invariants.nothing_wrong_is_kept(lab.folder / "edge") == len(LIES)


async def test_a_source_of_wrong_bytes_is_asked_last(lab: Lab) -> None:
    """F16: after one wrong shard, the others come from elsewhere."""
    bad, good = Script(acts=[scripted.flipped_at(5)]), Script()
    digests = [bad.add(shard(n)) for n in range(10)]
    for n in range(10):
        good.add(shard(n))
    async with edge_over(lab, bad, good) as edge:
        invariants.nothing_wrong_came(await blob(edge, digests[0]), digests[0])
        for digest in digests[1:]:
            assert (await blob(edge, digest)).gave(digest)
        assert len(bad.gets()) == 1


async def test_a_source_that_does_not_answer_is_left_after_five_seconds(lab: Lab) -> None:
    """F19: no head in time; the request is served by the next source, and the one after that at once."""
    slow, good = Script(acts=[acts.silent]), Script()
    digests = [slow.add(shard(n)) for n in range(2)]
    good.blobs = slow.blobs
    async with edge_over(lab, slow, good) as edge:
        answer = await blob(edge, digests[0])
        assert answer.gave(digests[0]) and answer.seconds < 5 + MARGIN
        answer = await blob(edge, digests[1])
        assert answer.gave(digests[1]) and answer.seconds < 1 + MARGIN
        assert len(slow.gets()) == 1


@pytest.mark.long
@pytest.mark.parametrize(
    "slow",
    [
        pytest.param(acts.stalled_after_head, id="stall-after-head"),
        pytest.param(scripted.held_after(100_000), id="stall-in-body"),
        pytest.param(acts.dripping(1), id="1-byte-a-second"),
        pytest.param(acts.dripping(2000, 0.5), id="4-KB-a-second"),
    ],
)
async def test_a_source_that_dawdles_is_left_after_ten_seconds(lab: Lab, slow: Act) -> None:
    """F19: stalls and drips; the bytes that it gave are kept, and the next source goes on from there."""
    dawdling, good = Script(acts=[slow]), Script()
    digest = dawdling.add(shard(1))
    good.blobs = dawdling.blobs
    async with edge_over(lab, dawdling, good) as edge:
        answer = await blob(edge, digest, deadline=60)
        assert answer.gave(digest) and answer.seconds < 10 + MARGIN
        assert len(good.gets()) == len(dawdling.gets()) == 1
        if slow is not acts.stalled_after_head:
            assert good.gets()[0].start > 0
        await invariants.settled(edge)
        assert invariants.nothing_wrong_is_kept(lab.folder / "edge") == 1


@pytest.mark.long
@pytest.mark.parametrize("slow", [acts.silent, acts.stalled_after_head, acts.dripping(1)])
async def test_with_dawdling_sources_only_a_request_still_ends(lab: Lab, slow: Act) -> None:
    """F19: two rounds of the one source there is, then an error or a short body; never a request that hangs."""
    dawdling = Script(acts=[slow])
    digest = dawdling.add(shard(1))
    async with edge_over(lab, dawdling) as edge:
        answer = await blob(edge, digest, deadline=60)
        assert not answer.gave(digest)
        invariants.nothing_wrong_came(answer, digest)
        assert answer.seconds < 20 + MARGIN


async def test_a_storm_of_503_costs_a_few_requests(lab: Lab) -> None:
    """F20: one source refuses everything, the other serves; nobody notices, and the first is hardly asked."""
    storm, good = Script(acts=[scripted.unavailable]), Script()
    digests = [storm.add(shard(n, 50_000)) for n in range(60)]
    good.blobs = storm.blobs
    async with edge_over(lab, storm, good) as edge:
        for digest in digests:
            assert (await blob(edge, digest)).gave(digest)
        assert len(storm.gets()) <= len(digests) * 0.2


async def test_with_503_only_requests_end_with_a_code_and_service_comes_back(lab: Lab) -> None:
    """F20: the only source refuses everything, then nothing."""
    storm = Script(acts=[scripted.unavailable])
    digests = [storm.add(shard(n, 50_000)) for n in range(40)]
    async with edge_over(lab, storm) as edge:
        for answer, digest in zip(
            await asyncio.gather(*(blob(edge, digest) for digest in digests)), digests, strict=True
        ):
            assert not answer.gave(digest) and answer.is_refusal()
        storm.acts[:] = [scripted.serve_whole]
        for digest in digests:
            await invariants.serves(edge, digest)


@pytest.mark.parametrize(
    ("seed", "count"),
    [(1, 80), *(pytest.param(seed, 400, marks=pytest.mark.long) for seed in range(2, 22))],
)
async def test_flapping_sources_give_right_answers_or_refusals(lab: Lab, seed: int, count: int) -> None:
    """F20: each of three sources refuses half of what it is asked, at random; most requests do not notice."""
    rng = random.Random(seed)
    scripts = [Script(acts=[acts.flapping(rng)]) for _ in range(3)]
    digests = [scripts[0].add(shard(n, 20_000)) for n in range(count)]
    for script in scripts[1:]:
        script.blobs = scripts[0].blobs
    async with edge_over(lab, *scripts) as edge:
        served = 0
        for start in range(0, count, 20):
            some = digests[start : start + 20]
            for answer, digest in zip(await asyncio.gather(*(blob(edge, d) for d in some)), some, strict=True):
                invariants.nothing_wrong_came(answer, digest)
                served += answer.gave(digest)
        assert served >= count * 0.9
        assert sum(len(script.gets()) for script in scripts) <= 4 * count


@contextmanager
def frozen(service: Service) -> Iterator[None]:
    """A service stands still."""
    os.kill(service.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(service.pid, signal.SIGCONT)


def _shards(origin: Service, task: str) -> list[str]:
    plan = get_json(f"{origin.url}/shards/acme/tiny:{task}", Accept="application/vnd.nearshard.plan+json")
    return [str(shard["digest"]) for shard in plan["shards"]]


@pytest.mark.parametrize("how", ["frozen", "killed"])
async def test_without_its_origin_an_edge_serves_what_it_holds_and_refuses_the_rest(
    lab: Lab, how: str, measured: Callable[[str], None]
) -> None:
    """F6: what is held is served in full; what is not is refused within 10 s, however many ask; then all is well."""
    await asyncio.to_thread(make_model, lab.folder / "model")
    words = ("acme/tiny", "--shard-target", "64KiB", "--shard-limit", "64KiB")
    revision = await asyncio.to_thread(lab.publish, lab.folder / "model", *words)
    origin = await asyncio.to_thread(lab.origin)
    edge = await asyncio.to_thread(lambda: lab.edge(origin, ref_lifetime="0"))
    task = f"/shards/acme/tiny:embed@{revision}"
    before = await get(edge.port, task)
    assert (await get(edge.port, "/shards/acme/tiny:embed")).sha256 == before.sha256
    held = await asyncio.to_thread(_shards, origin, "embed")
    for digest in held:
        assert (await blob(edge, digest)).gave(digest)
    missing = [digest for digest in await asyncio.to_thread(_shards, origin, "all") if digest not in held][:30]
    assert before.whole and len(missing) >= 20
    await invariants.settled(edge)
    fault = frozen if how == "frozen" else _killed
    with fault(origin):
        asking = [asyncio.create_task(blob(edge, digest, deadline=60)) for digest in missing]
        stale = asyncio.create_task(get(edge.port, "/shards/acme/tiny:embed", deadline=60))
        for _ in range(3):
            for digest in held:
                assert (await blob(edge, digest, deadline=ANSWER)).gave(digest)
            assert (await get(edge.port, task)).sha256 == before.sha256
        answers = await asyncio.gather(*asking)
        assert (await stale).sha256 == before.sha256, "a ref that cannot be looked up means what it meant last"
        longest = max(answer.seconds for answer in answers)
        measured(f"{len(missing)} misses refused within {longest:.1f} s")
        assert all(answer.is_refusal() for answer in answers)
        assert longest < ANSWER + MARGIN
    for digest in (*missing, *held):
        await invariants.serves(edge, digest)
    await invariants.all_hold(edge, lab.folder / "edge")


@contextmanager
def _killed(service: Service) -> Iterator[None]:
    service.kill()
    yield
    service.start()
