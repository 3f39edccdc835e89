"""Clients that are slow on purpose, or too many: they are let go, cost little, and harm nobody else."""

from __future__ import annotations

import asyncio
import random
import resource
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults import invariants
from tests.faults.client import LONG, Answer, Crowd, blob, connection, get, request, start_edge, until
from tests.harness import Lab, Service
from tests.scripted import Script, source

LARGE = 24 << 20
"""Bytes of a shard that no socket buffer takes whole."""
MARGIN = 10.0
"""Seconds beside a bound, for machines that do other things too."""
READERS, READERS_MEMORY = 500, 100 << 20
OTHERS = 5.0
"""Seconds in which somebody else's small request is served, come what may."""


async def held(lab: Lab, script: Script, size: int, **flags: str) -> tuple[Service, str]:
    """An edge that holds one shard of ``size`` bytes, and nothing else to do."""
    digest = script.add(random.Random(24).randbytes(size))
    small = script.add(b"small")
    edge = await start_edge(lab, script, **flags)
    for name in (digest, small, digest, small, digest):
        assert (await blob(edge, name, LONG, keep=False)).gave(name)
    await invariants.settled(edge)
    return edge, digest


async def others_are_served(edge: Service, script: Script) -> None:
    """Somebody with an honest request gets an answer soon, on both paths."""
    name = next(path for path, data in script.blobs.items() if data == b"small")
    for fields in ((), (LONG,)):
        answer = await get(edge.port, name, *fields, deadline=OTHERS)
        assert answer.status == 200 and answer.body == b"small"


@pytest.mark.parametrize(
    ("path", "tier"),
    [
        ("short", "disk"),
        ("long", "memory"),
        pytest.param("short", "memory", marks=pytest.mark.long),
        pytest.param("long", "disk", marks=pytest.mark.long),
    ],
)
async def test_five_hundred_slow_readers_cost_little_memory(
    lab: Lab, path: str, tier: str, measured: Callable[[str], None]
) -> None:
    """F24: 500 readers of a large body at 10 B/s; when they leave, everything is given back."""
    async with source(Script()) as script:
        edge, digest = await held(lab, script, LARGE, **({} if tier == "memory" else {"memory": "0"}))
        before, at_first = invariants.usage(edge), invariants.forget_peak(edge)
        with await asyncio.to_thread(Crowd, edge.port, READERS, receive=4096) as crowd:
            crowd.send(request(f"/blobs/{digest}", *([LONG] if path == "long" else [])))
            await until(lambda: crowd.sip(10) > READERS * 20, "slow readers being served")
            await others_are_served(edge, script)
            assert invariants.open_files(edge) > READERS
            grown = invariants.peak(edge) - at_first
        measured(f"+{grown >> 20} MB for {READERS} readers")
        assert grown <= READERS_MEMORY, f"{grown >> 20} MB for {READERS} slow readers"
        await invariants.all_hold(edge, lab.folder / "edge", before)


@pytest.mark.long
@pytest.mark.parametrize("tier", ["memory", "disk"])
@pytest.mark.parametrize("path", ["short", "long"])
async def test_slow_readers_are_cut_off_in_half_a_minute(
    lab: Lab, path: str, tier: str, measured: Callable[[str], None]
) -> None:
    """F24: at 10 B/s nobody is served for longer than 30 s, and what they held is free."""
    async with source(Script()) as script:
        edge, digest = await held(lab, script, LARGE, **({} if tier == "memory" else {"memory": "0"}))
        before, at_first = invariants.usage(edge), invariants.forget_peak(edge)
        with await asyncio.to_thread(Crowd, edge.port, READERS, receive=4096) as crowd:
            crowd.send(request(f"/blobs/{digest}", *([LONG] if path == "long" else [])))
            await until(lambda: crowd.sip(10) > READERS * 20, "slow readers being served")

            def cut() -> bool:
                crowd.sip(10)
                return invariants.open_files(edge) <= before.files + invariants.SLACK_FILES

            await until(cut, "slow readers cut off", 30 + MARGIN)
            await others_are_served(edge, script)
        grown = invariants.peak(edge) - at_first
        measured(f"+{grown >> 20} MB for {READERS} readers")
        assert grown <= READERS_MEMORY
        await invariants.all_hold(edge, lab.folder / "edge", before)


@pytest.mark.long
@pytest.mark.parametrize("fields", [[], [LONG]], ids=["short", "long"])
async def test_a_reader_that_is_just_fast_enough_is_not_cut_off(lab: Lab, fields: list[str]) -> None:
    """F24, the other side: who takes some 80 KB/s gets the whole, however long it takes."""
    async with source(Script()) as script:
        edge, digest = await held(lab, script, 4 << 20, memory="0")
        with await asyncio.to_thread(Crowd, edge.port, 20, receive=1 << 16) as crowd:
            crowd.send(request(f"/blobs/{digest}", *fields))
            expected = 20 * (4 << 20)
            await until(lambda: crowd.sip(20_000, 0.25) >= expected, "steady readers served", 100)


SLOW_HEADERS = [
    pytest.param("nothing", 200, 1.0, id="quick"),
    pytest.param("a short answer", 200, 1.0, id="quick-after-a-short-answer"),
    pytest.param("a long answer", 200, 1.0, id="quick-after-a-long-answer"),
    pytest.param("nothing", 2000, 15.0, id="2000", marks=pytest.mark.long),
    pytest.param("a short answer", 2000, 15.0, id="2000-after-a-short-answer", marks=pytest.mark.long),
]


@pytest.mark.parametrize(("before_it", "count", "keepalive"), SLOW_HEADERS)
async def test_slow_headers_are_closed_while_others_are_served(
    lab: Lab, count: int, keepalive: float, before_it: str
) -> None:
    """F23: a header that comes byte by byte is not waited for, on a new connection or on one that was of use."""
    async with source(Script()) as script:
        edge, _ = await held(lab, script, 100_000, keepalive=str(keepalive))
        name = next(path for path, data in script.blobs.items() if data == b"small")
        before = invariants.usage(edge)
        with await asyncio.to_thread(Crowd, edge.port, count) as crowd:
            if before_it != "nothing":
                crowd.send(request(name, *([LONG] if before_it == "a long answer" else [])))
                await until(lambda: _answered(crowd), "the first request answered")
            crowd.send(b"GET /healthz HTTP/1.1\r\nHost: edge\r\nX-Slow: ")

            def all_closed() -> bool:
                crowd.drip([b"a"], 0.5)
                return crowd.closed() == count

            closing = asyncio.create_task(until(all_closed, "slow headers closed", keepalive + MARGIN))
            while not closing.done():
                await others_are_served(edge, script)
                await asyncio.wait([closing], timeout=0.25)
            await closing
        await invariants.all_hold(edge, lab.folder / "edge", before)


def _answered(crowd: Crowd) -> bool:
    return all(_something_came(sock) for sock in crowd.sockets)


def _something_came(sock: socket.socket) -> bool:
    try:
        return bool(sock.recv(4096, socket.MSG_PEEK))
    except BlockingIOError:
        return False


@pytest.mark.parametrize(
    ("count", "line"),
    [
        pytest.param(50, "GET /healthz", id="quick"),
        pytest.param(500, "GET /healthz", id="500", marks=pytest.mark.long),
        pytest.param(500, "POST /blobs/x", id="500-post", marks=pytest.mark.long),
    ],
)
async def test_slow_bodies_are_not_waited_for(lab: Lab, count: int, line: str) -> None:
    """F23: a body that comes byte by byte, or never, keeps no connection for longer than half a minute."""
    async with source(Script()) as script:
        edge, _ = await held(lab, script, 100_000)
        before = invariants.usage(edge)
        with await asyncio.to_thread(Crowd, edge.port, count) as crowd:
            crowd.send(f"{line} HTTP/1.1\r\nHost: edge\r\nContent-Length: 100000\r\n\r\n".encode())

            def all_closed() -> bool:
                crowd.drip([b"a"], 0.5)
                return crowd.closed() == count

            await until(all_closed, "slow bodies closed", 30 + MARGIN)
        await others_are_served(edge, script)
        await invariants.all_hold(edge, lab.folder / "edge", before)


async def test_one_connection_more_than_is_allowed_is_told_to_come_back(lab: Lab) -> None:
    """The limit of connections: the 21st gets 503 with Retry-After; room that is given back is there again."""
    async with source(Script()) as script:
        edge, digest = await held(lab, script, 100_000, connections="20")
        await until(lambda: invariants.open_files(edge) < 25, "connections of the preparation closed")
        with await asyncio.to_thread(Crowd, edge.port, 20) as crowd:
            crowd.send(request("/healthz"))
            await until(lambda: _answered(crowd), "twenty connections in use")
            refused = await blob(edge, digest)
            assert refused.status == 503 and refused.is_refusal() and refused.whole
            assert invariants.code_of(refused) == "busy"
        await invariants.serves(edge, digest)
        await invariants.all_hold(edge, lab.folder / "edge")


@pytest.mark.parametrize("when", ["from the start", "while it runs"])
async def test_short_of_descriptors_an_edge_refuses_and_recovers(lab: Lab, when: str) -> None:
    """F29: 256 descriptors and 400 clients: no crash, every answer right or a refusal, no shard lost, then well."""
    async with source(Script()) as script:
        digests = [script.add(random.Random(n).randbytes(200_000)) for n in range(8)]

        if when == "from the start":
            words = ["256", f"--origin={script.url}", "--data", str(lab.folder / "edge"), "--memory=0"]
            words += ["--trust-root", str(lab.trust_root)]
            edge = await asyncio.to_thread(lambda: lab.service("tests.faults.limited", *words))
        else:
            edge = await start_edge(lab, script, memory="0")
            resource.prlimit(edge.pid, resource.RLIMIT_NOFILE, (256, 256))
        for digest in digests[:4]:
            assert (await blob(edge, digest)).gave(digest)
        await invariants.settled(edge)
        before, data = invariants.usage(edge), lab.folder / "edge"
        kept = _kept(data)
        with await asyncio.to_thread(Crowd, edge.port, 400) as crowd:
            for fields in ((), (LONG,)):
                crowd.send(request(f"/blobs/{digests[0]}", *fields))
            answers = await asyncio.gather(*(_try(edge, digests[n % 8]) for n in range(50)))
            for n, answer in enumerate(answers):
                if answer is not None:
                    invariants.nothing_wrong_came(answer, digests[n % 8])
        for digest in digests:
            await invariants.serves(edge, digest)
        assert kept <= _kept(data), "shards that were held were dropped for want of a descriptor"
        await invariants.all_hold(edge, data, before)


async def _try(edge: Service, digest: str) -> Answer | None:
    """An answer; None where none came in time: the kernel's queue is full and nobody accepts."""
    try:
        return await blob(edge, digest, deadline=2)
    except (TimeoutError, ConnectionError):
        return None


def _kept(data: Path) -> set[str]:
    return {path.name for path in (data / "blobs").rglob("*") if path.is_file()}


async def test_clients_that_reset_in_the_middle_leave_nothing_behind(lab: Lab) -> None:
    """F22, F24: whoever asks and goes, in whatever moment, costs the node nothing."""
    rng = random.Random(5)
    async with source(Script()) as script:
        edge, digest = await held(lab, script, 4 << 20)
        before = invariants.usage(edge)
        for n in range(60):
            async with connection(edge.port) as (reader, writer):
                writer.write(request(f"/blobs/{digest}", *([LONG] if n % 2 else [])))
                if size := rng.choice([0, 1, 10_000, 1 << 20]):
                    await reader.readexactly(size)
        await others_are_served(edge, script)
        await invariants.all_hold(edge, lab.folder / "edge", before)
