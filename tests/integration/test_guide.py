"""How a client keeps its view: what it asks of whom, when it asks again, and whom it reports."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from aiohttp import web

from nearshard import Client, NearshardError
from nearshard.guide import FORGET, FRESH, PAUSE, Guide, parse_routers
from nearshard.kept import Kept, Stored
from nearshard.landing import MemoryLanding
from nearshard.transfer import Transfer
from shared.clock import SystemClock
from shared.codec import encode_json
from shared.digest import Digest, digest_of
from shared.errors import IntegrityError, NotFound, RequestError, UpstreamError
from shared.link import Link, LinkPolicy
from shared.node import Node
from shared.view import EPOCH, View
from shared.web.reads import document
from shared.web.session import Answered, Fetched, Sessions
from tests.clock import HandClock
from tests.scripted import Script, source

DIGEST = digest_of(b"")
NOBODY = "http://127.0.0.1:9"
NODES = (Node("a", "http://127.0.0.1:1", "north", 1), Node("b", "http://127.0.0.1:2", "north", 1))
VIEW = View(5, "north", ("north",), NODES, origins=("http://127.0.0.1:3",))


@dataclass
class Router:
    """A router that says what a test has it say, over real HTTP."""

    view: View = VIEW
    status: int = 200
    asked: list[str] = field(default_factory=list)
    reports: list[object] = field(default_factory=list)
    reported: asyncio.Event = field(default_factory=asyncio.Event)
    url: str = ""

    async def ring(self, request: web.Request) -> web.Response:
        """``/ring?near=N``."""
        if self.status != 200:
            self.asked.append(str(self.status))
            return web.Response(status=self.status, body=b"{}")
        body = encode_json(self.view.record())
        answer = document(request, body, "application/json", digest_of(body)[7:], "no-cache", {})
        self.asked.append(str(answer.status))
        return answer

    async def report(self, request: web.Request) -> web.Response:
        """``/reports``."""
        self.reports.append(await request.json())
        self.reported.set()
        return web.Response(status=204)

    async def models(self, _: web.Request) -> web.Response:
        """``/models``."""
        return web.json_response({"models": ["acme/tiny"]}, headers={EPOCH: str(self.view.epoch)})


async def fetch(client: Client, digest: Digest) -> bytes:
    """A shard of five bytes."""
    landing = MemoryLanding(digest, 5)
    await Transfer(client._sessions, client._guide, SystemClock()).fetch(landing)
    return bytes(landing.data)


@asynccontextmanager
async def serving(router: Router) -> AsyncIterator[Router]:
    """``router`` on a free port."""
    app = web.Application()
    app.router.add_get("/ring", router.ring)
    app.router.add_get("/models", router.models)
    app.router.add_post("/reports", router.report)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    router.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield router
    finally:
        await runner.cleanup()


@pytest.fixture
async def router() -> AsyncIterator[Router]:
    """One that is there."""
    async with serving(Router()) as made:
        yield made


Make = Callable[..., Awaitable[Guide]]


@pytest.fixture
async def clock() -> HandClock:
    """Of the guides."""
    return HandClock(1000.0)


@pytest.fixture
async def make(clock: HandClock) -> AsyncIterator[Make]:
    """Makes guides."""
    made: list[tuple[Guide, Sessions]] = []

    async def one(*routers: str, kept: Kept | None = None, region: str | None = None) -> Guide:
        sessions = Sessions()
        made.append((Guide(sessions, routers, region, kept or Kept(), clock), sessions))
        return made[-1][0]

    yield one
    for guide, sessions in made:
        await guide.close()
        await sessions.close()


async def until(check: Callable[[], object]) -> None:
    """Let what runs beside go on until this holds."""
    async with asyncio.timeout(10):
        while not check():
            await asyncio.sleep(0)


def bases(guide: Guide) -> list[str]:
    """Of the URLs of a shard."""
    return [url.removesuffix(f"/blobs/{DIGEST}") for url in guide.urls(DIGEST)]


async def test_a_view_is_asked_for_once_and_then_confirmed_when_it_is_old(
    router: Router, clock: HandClock, make: Make
) -> None:
    guide = await make(router.url)
    for _ in range(3):
        assert await guide.ready()
        assert sorted(bases(guide)) == ["http://127.0.0.1:1", "http://127.0.0.1:2", "http://127.0.0.1:3"]
    assert router.asked == ["200"]
    clock.now += FRESH - 1
    await guide.ready()
    assert router.asked == ["200"]
    clock.now += 1
    await asyncio.gather(*(guide.ready() for _ in range(5)))
    assert router.asked == ["200", "304"]


async def test_beside_a_download_an_old_view_is_renewed_and_nobody_waits_for_it(
    router: Router, clock: HandClock, make: Make
) -> None:
    guide = await make(router.url)
    await guide.ready()
    router.view = View(6, "north", ("north",), NODES[:1])
    clock.now += FRESH
    assert len(bases(guide)) == 3, "the old one, for now"
    await until(lambda: len(guide.urls(DIGEST)) == 1)
    assert router.asked == ["200", "200"]


@pytest.mark.parametrize(
    ("base", "epoch", "asks"),
    [
        ("router", "6", True), ("router", "4", True), ("router", "5", False), ("node", "6", True),
        ("node", "4", False), ("node", "5", False), ("node", "", False), ("node", "9" * 17, False),
        ("node", "-6", False), ("node", "٦", False), ("node", "6x", False),
    ],
)  # fmt: skip
async def test_another_epoch_is_a_reason_to_ask(router: Router, make: Make, base: str, epoch: str, asks: bool) -> None:
    guide = await make(router.url)
    await guide.ready()
    guide.hear(router.url if base == "router" else NODES[0].url, epoch)
    await guide.ready()
    assert len(router.asked) == 1 + asks


async def test_routers_that_count_by_themselves_and_nodes_that_lie_cause_no_storm(
    router: Router, clock: HandClock, make: Make
) -> None:
    guide = await make(router.url)
    await guide.ready()
    for _ in range(10):
        guide.hear(NODES[0].url, "9")
        await guide.ready()
    assert len(router.asked) == 2, "once is enough to know that this router does not count so far"
    clock.now += PAUSE
    for epoch in range(10, 200):
        guide.hear(NODES[0].url, str(epoch))
        guide.urls(DIGEST)
        await asyncio.sleep(0)
    await until(lambda: guide._asking is not None and guide._asking.done())
    assert len(router.asked) == 3
    guide.hear(NODES[0].url, "500")
    guide.urls(DIGEST)
    assert guide._asking is not None and guide._asking.done(), "not yet"
    clock.now += PAUSE
    guide.urls(DIGEST)
    assert not guide._asking.done()


async def test_the_region_is_told(make: Make) -> None:
    seen = []

    class Asked(Router):
        async def ring(self, request: web.Request) -> web.Response:
            seen.append((request.headers.get("Nearshard-Region"), request.query["near"]))
            return await super().ring(request)

    async with serving(Asked()) as router:
        await (await make(router.url, region="south")).ready()
        await (await make(router.url)).ready()
    assert seen == [("south", "256"), (None, "256")]


async def test_a_router_that_is_away_is_passed_over_and_remembered(router: Router, make: Make) -> None:
    guide = await make(NOBODY, router.url)
    assert await guide.ready()
    assert guide.failed() == {NOBODY}
    tried = []

    async def take(url: str, _: Fetched) -> str:
        tried.append(url)
        return url

    assert await guide.ask("/models", take, key="", limit=100) == f"{router.url}/models"
    assert tried == [f"{router.url}/models"]


async def test_with_all_routers_away_the_last_view_is_used_and_with_none_it_is_an_error(
    clock: HandClock, make: Make, tmp_path: Path
) -> None:
    file = tmp_path / "x.json"
    async with serving(Router()) as router:
        guide = await make(router.url, kept=Kept(file))
        await guide.ready()
    clock.now += 10 * FRESH
    assert await guide.ready() and len(guide.urls(DIGEST)) == 3
    other = await make(router.url, kept=Kept(file))
    assert await other.ready() and other.urls(DIGEST) == guide.urls(DIGEST)
    with pytest.raises(UpstreamError):
        await (await make(router.url)).ready()


async def test_what_was_kept_is_used_unasked_while_it_is_fresh(router: Router, clock: HandClock, make: Make) -> None:
    kept = Kept()
    kept.save(Stored(router.view, "", router.url, clock.now - FRESH + 1))
    guide = await make(router.url, kept=kept)
    assert await guide.ready() and router.asked == []
    clock.now += 1
    assert await guide.ready() and router.asked == ["200"]
    kept.save(Stored(router.view, "", router.url, clock.now + 1000))
    assert await (await make(router.url, kept=kept)).ready() and len(router.asked) == 2, "of the future: not fresh"


async def test_what_is_no_router_is_asked_for_everything(router: Router, make: Make) -> None:
    router.status = 404
    kept = Kept()
    kept.save(Stored(router.view, "", router.url, 0.0))
    guide = await make(NOBODY, router.url, kept=kept)
    for _ in range(3):
        assert not await guide.ready()
        assert bases(guide) == [router.url]
    assert router.asked == ["404"]


@pytest.mark.parametrize("status", [500, 503, 400, 302])
async def test_a_router_in_trouble_is_not_taken_for_something_else(router: Router, make: Make, status: int) -> None:
    router.status = status
    with pytest.raises(UpstreamError):
        await (await make(router.url)).ready()


async def test_a_view_that_makes_no_sense_replaces_none(router: Router, clock: HandClock, make: Make) -> None:
    guide = await make(router.url)
    await guide.ready()
    clock.now += FRESH
    router.view = View(6, "north", ("south",), NODES)
    assert await guide.ready() and len(guide.urls(DIGEST)) == 3


# Failures


async def test_who_failed_is_tried_last_for_a_while(router: Router, clock: HandClock, make: Make) -> None:
    guide = await make(router.url)
    await guide.ready()
    first = bases(guide)[0]
    guide.blame(first, UpstreamError())
    assert bases(guide)[-1] == first and len(bases(guide)) == 3
    clock.now += FORGET
    assert bases(guide)[0] == first


async def test_a_node_that_fails_is_reported_once_in_a_while(router: Router, clock: HandClock, make: Make) -> None:
    guide = await make(router.url)
    await guide.ready()
    for _ in range(5):
        guide.blame(NODES[0].url, IntegrityError())
    await router.reported.wait()
    assert router.reports == [{"node": "a", "ok": False}]
    for error in (Answered(), NotFound(), UpstreamError(code="busy")):
        guide.blame(NODES[1].url, error)
    guide.blame("http://127.0.0.1:3", UpstreamError())
    guide.blame(router.url, UpstreamError())
    await guide.close()
    assert len(router.reports) == 1, "only what is the node's own fault"
    assert "http://127.0.0.1:3" in guide.failed()
    clock.now += FORGET
    router.reported.clear()
    guide.blame(NODES[0].url, UpstreamError())
    await router.reported.wait()
    assert len(router.reports) == 2


async def test_a_metered_link_carries_no_reports_and_no_questions_beside_what_is_fetched(
    router: Router, clock: HandClock
) -> None:
    sessions, link = Sessions(), Link(clock, LinkPolicy(metered=True))
    guide = Guide(sessions, [router.url], None, Kept(), clock, link=link)
    try:
        await guide.ready()
        clock.now += FRESH
        guide.blame(NODES[0].url, UpstreamError("gone"))
        assert len(guide.urls(DIGEST)) == 3
        assert await guide.ask("/models", _take, key="", limit=1000) == router.url + "/models"
        assert (router.asked, router.reports) == (["200"], [])
        await guide.renew()
        assert router.asked == ["200", "304"], "where all have failed it is needed"
    finally:
        await guide.close()
        await sessions.close()


async def test_documents_count_on_the_link(router: Router, clock: HandClock) -> None:
    before = clock.now
    sessions = Sessions()
    guide = Guide(sessions, [router.url], None, Kept(), clock, link=Link(clock, LinkPolicy(rate=10)))
    try:
        await guide.ready()
        await guide.ask("/models", _take, key="", limit=1000)
        assert clock.now - before >= 2.0
    finally:
        await guide.close()
        await sessions.close()


async def _take(url: str, _: Fetched) -> str:
    return url


async def test_the_hosts_of_a_view_are_looked_up_before_anybody_asks_them(
    router: Router, clock: HandClock, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = tuple(replace(node, url=f"http://{node.id}.invalid:8720") for node in NODES[:2])
    router.view = View(5, "north", ("north",), nodes, origins=("http://origin.invalid:8710",))
    asked: set[str] = set()

    def look_up(host: str, *_: object, **__: object) -> None:
        asked.add(host)
        raise OSError("nobody is there")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    guide = await make(router.url)
    await guide.ready()
    await until(lambda: asked == {f"{node.id}.invalid" for node in nodes} | {"origin.invalid"})


async def test_a_report_that_nobody_hears_is_no_error(make: Make, clock: HandClock) -> None:
    async with serving(Router()) as router:
        guide = await make(router.url)
        await guide.ready()
    guide.blame(NODES[0].url, UpstreamError())
    await guide.close()


async def test_in_a_round_nobody_is_asked_twice(tmp_path: Path) -> None:
    """Two nodes, and two origins that are the same."""
    asked: list[str] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError):
            asked.append((await reader.readuntil(b"\r\n\r\n")).decode().split("Host: ")[1].split("\r\n")[0])
        writer.write(b"HTTP/1.1 500 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.close()

    servers = [await asyncio.start_server(handle, "127.0.0.1", 0) for _ in range(3)]
    urls = [f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}" for server in servers]
    nodes = tuple(Node(f"n{number}", url, "north", 1) for number, url in enumerate(urls[:2]))
    view = View(1, "north", ("north",), nodes, origins=(urls[2], urls[2]))
    async with serving(Router(view)) as router, Client(router.url) as client:
        await client._guide.ready()
        with pytest.raises(NearshardError):
            await fetch(client, DIGEST)
    for server in servers:
        server.close()
    assert len(asked) == 6
    assert {f"http://{host}" for host in asked[:3]} == {f"http://{host}" for host in asked[3:]} == set(urls)


async def test_where_all_that_are_known_failed_the_view_is_asked_for_before_the_next_round() -> None:
    """A network that was set up anew at the same address, moments after somebody else kept a view of it."""
    async with source(Script()) as node, serving(Router()) as router:
        digest = node.add(b"shard")
        router.view = View(9, "north", ("north",), (Node("new", node.url, "north", 1),))
        kept = Kept()
        kept.save(Stored(View(5, "north", ("north",), NODES), "", router.url, SystemClock().time()))
        async with Client(router.url, kept=kept) as client:
            await client._guide.ready()
            assert router.asked == []
            assert await fetch(client, digest) == b"shard"
        assert router.asked == ["200"]


# Names of routers


@pytest.mark.parametrize(
    ("said", "urls"),
    [
        ("http://a:1/", ("http://a:1",)), ("http://a, https://b/,http://a", ("http://a", "https://b")),
        (["http://a", "http://b,http://c"], ("http://a", "http://b", "http://c")),
    ],
)  # fmt: skip
def test_routers_are_named_in_one_text_or_several(said: str | list[str], urls: tuple[str, ...]) -> None:
    assert parse_routers(said) == urls


@pytest.mark.parametrize("said", ["", ",", [], "router:8700", "ftp://a", "http://a,b", ["http://a"] * 2 + ["x"]])
def test_what_is_no_url_is_no_router(said: str | list[str]) -> None:
    with pytest.raises(RequestError):
        parse_routers(said)
