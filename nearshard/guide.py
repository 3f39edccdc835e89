"""Where a client finds things: routers while they are there, and nodes by the view of the network that it keeps.

- A router is asked for the view, and what a ref means. Who owns a shard is reckoned here (``nearshard.owners``), so
  that a download costs routers a few requests however many shards it has.
- The view is asked for again (If-None-Match) after ``FRESH`` seconds of use, or when an answer tells of another epoch.
  That is done beside the download, never in front of a shard.
- Who fails is tried last for a while, routers too. With all routers down the last view goes on being used, and nodes
  are asked what refs mean.
- The client's token goes to these and to nobody else: the routers that it was given, the nodes and origins of the view.
- What is no router (an edge, an origin: they answer the same paths) has no view; then everything is asked of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

import aiohttp

from nearshard.kept import Kept, Stored
from nearshard.owners import Owners, in_order
from shared.clock import Clock
from shared.digest import Digest
from shared.errors import Mirroring, NearshardError, NotFound, RequestError, UpstreamError
from shared.link import Link
from shared.paths import blob_path
from shared.tasks import end
from shared.token_file import bearer
from shared.view import EPOCH, MAX_VIEW, NEAR, decode
from shared.web.session import Answered, Fetched, NotLetIn, Sessions, fetch, translated

T = TypeVar("T")

FRESH = 30.0
"""Seconds that a view is used before it is asked for again."""
PAUSE = 10.0
"""Seconds between two tries to have a newer view while shards are fetched, whatever is heard of epochs: in a large
network somebody always comes or goes, and all who download hear of it at once."""
FORGET = 60.0
"""Seconds that who failed is tried last, and until the same node is reported again."""
REPORT = aiohttp.ClientTimeout(total=2.0)
LAST_WORDS = 0.5
"""Seconds that reports may still take when everything else is done."""
MAX_ROUTERS = 16


class Guide:
    """Of one client. ``region``: what it says of where it is; ``token``: what it may see."""

    def __init__(
        self,
        sessions: Sessions,
        routers: Sequence[str],
        region: str | None,
        kept: Kept,
        clock: Clock,
        token: str = "",
        link: Link | None = None,
    ) -> None:
        """``link``: what documents are counted on; where it is metered, nothing is asked beside what is needed."""
        self._token = token
        self._link = link or Link(clock)
        self._sessions, self._routers, self._kept, self._clock = sessions, list(routers), kept, clock
        self.headers: Mapping[str, str] = {"Nearshard-Region": region} if region else {}
        self._owners: Owners | None = None
        self._stored: Stored | None = None
        self._begun = False
        self._asked_at = float("-inf")
        """When routers were last asked for a view, or the one that was kept had been."""
        self._direct: list[str] = []
        """Of the routers those that answered, and are none."""
        self._news = False
        self._told = 0
        """The highest epoch that was heard of."""
        self._failed: dict[str, float] = {}
        """Until when a base URL is tried last."""
        self._reported: dict[str, float] = {}
        """Until when a node is not reported again."""
        self._asking: asyncio.Task[None] | None = None
        self._reports: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<Guide by {self._owners or self._routers}>"

    async def close(self) -> None:
        """Stop; reports that are under way have a moment."""
        if self._reports:
            await asyncio.wait(self._reports, timeout=LAST_WORDS)
        await end([*self._reports, *([self._asking] if self._asking else [])])

    # The view

    async def ready(self) -> bool:
        """Have a view that is not old. False where what is asked is no router.

        Raises UpstreamError where nobody answers and nothing is known from before.
        """
        if not self._begun:
            self._begun = True
            stored = await asyncio.to_thread(self._kept.load, self._clock.time())
            if stored is not None:
                age = self._clock.time() - stored.at
                self._asked_at = self._clock.monotonic() - (age if age >= 0 else FRESH)
                await self._take(stored)
        if self._stale() or not (self._owners or self._direct):
            await asyncio.shield(self._ask_anew())
        return self._owners is not None

    @property
    def region(self) -> str:
        """Where a router has found this client to be; empty where none was asked."""
        return self._owners.view.region if self._owners else ""

    async def renew(self) -> None:
        """Have a newer view if there is one: everybody whom this one names has failed."""
        self._news = self._owners is not None
        await self.ready()

    def _stale(self) -> bool:
        return self._news or self._clock.monotonic() - self._asked_at >= FRESH

    def _ask_anew(self) -> asyncio.Task[None]:
        """One question at a time, however many want to know."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._refresh(), name="view")
            self._asking.add_done_callback(_seen)
        return self._asking

    async def _refresh(self) -> None:
        """The view as a router has it now. Raises UpstreamError where there is none at all."""
        failure: NearshardError = UpstreamError("no router is named")
        direct: list[str] = []
        self._news, self._asked_at = False, self._clock.monotonic()
        for router in in_order(self._routers, self.failed()):
            try:
                await self._ask_router(router)
                return
            except NotFound:
                direct.append(router)
            except UpstreamError as error:
                if isinstance(error, _NoRouter) and self._owners is None:
                    direct.append(router)
                    continue
                self.blame(router, error)
                failure = error
        if direct:  # they are there, so what is known from before is of something else
            self._direct, self._owners, self._stored = direct, None, None
        elif self._owners is None:
            raise failure

    async def _ask_router(self, router: str) -> None:
        """Raises _NoRouter, NotFound, UpstreamError."""
        url, stored = f"{router}/ring?near={NEAR}", self._stored
        headers = {**self.headers, **({"If-None-Match": stored.etag} if stored and stored.etag else {})}
        answer = await fetch(self._sessions.of(router), url, limit=MAX_VIEW, headers=headers)
        now, etag = self._clock.time(), answer.headers.get("ETag", "")
        if answer.status == 304 and stored:
            new = Stored(stored.view, stored.etag, router, now)
        else:
            try:
                new = Stored(decode(answer.body), etag, router, now)
            except UpstreamError as error:
                raise _NoRouter(f"{router} is no router") from error
        self._failed.pop(router, None)
        await self._take(new)
        await asyncio.to_thread(self._kept.save, new)

    async def _take(self, stored: Stored) -> None:
        if self._owners is None or self._owners.view != stored.view:
            self._owners = await asyncio.to_thread(Owners, stored.view)
            if not self._link.policy.metered:
                self._sessions.resolve_ahead([*(node.url for node in stored.view.nodes), *stored.view.origins])
        self._stored = stored

    def hear(self, base: str, epoch: str) -> None:
        """What an answer of ``base`` says of the epoch; nothing is believed but that it may be worth asking.

        Routers that share no Redis count by themselves, so another's epoch is news only where it is the highest yet.
        """
        if self._stored is None or not (epoch.isascii() and epoch.isdigit() and len(epoch) <= 16):
            return
        number, mine = int(epoch), self._stored.view.epoch
        if number != mine and (base == self._stored.source or number > max(mine, self._told)):
            self._news = True
        self._told = max(self._told, number)

    # Whom to ask

    def failed(self) -> set[str]:
        """Base URLs of those that failed lately."""
        now = self._clock.monotonic()
        return {base for base, until in self._failed.items() if until > now}

    def urls(self, digest: Digest, model: str = "") -> list[str]:
        """URLs of a shard (of a private ``model``), best first, each once. Asks for a newer view, beside, where it is
        time."""
        path = blob_path(digest, model)
        if self._owners is None:
            return [base + path for base in in_order(self._direct, self.failed())]
        if not self._link.policy.metered and self._stale() and self._clock.monotonic() - self._asked_at >= PAUSE:
            self._ask_anew()
        return [base + path for base in self._owners.sources(digest, self.failed())]

    @property
    def near(self) -> bool:
        """Whether there are nodes in this client's own region."""
        return self._owners is not None and any(
            node.region == self._owners.view.region for node in self._owners.view.nodes
        )

    def knows(self, base: str) -> bool:
        """Whether a base URL is of the network that this client was told of."""
        if base in self._routers:
            return True
        return self._owners is not None and (
            self._owners.node_at(base) is not None or base in self._owners.view.origins
        )

    def credentials(self, base: str) -> Mapping[str, str]:
        """The field with the token, for who is of this network."""
        return bearer(self._token) if self.knows(base) else {}

    async def ask(
        self,
        path: str,
        take: Callable[[str, Fetched], Awaitable[T]],
        *,
        key: str,
        limit: int,
        headers: Mapping[str, str] | None = None,
        missing: str = "unknown_path",
        immutable: bool = False,
    ) -> T:
        """What ``take`` makes of the document at ``path``, of the first source from which it makes something.

        Routers are asked first, then nodes by ``key``; for what is ``immutable`` nodes first. ``take`` is given the
        source's URL, and raises UpstreamError where the next one is to be asked. Raises NotFound, RequestError for a
        token that is refused, Mirroring, or the last UpstreamError.
        """
        failure: NearshardError = UpstreamError(code="no_nodes")
        for base in self.bases(key, immutable=immutable):
            url = base + path
            try:
                fields = {**self.headers, **self.credentials(base), **(headers or {})}
                answer = await fetch(self._sessions.of(base), url, limit=limit, headers=fields, missing=missing)
                await self._link.take(len(answer.body))
                taken = await take(url, answer)
            except Mirroring:
                raise  # there is nothing wrong with who says so, and nobody else has it
            except NotFound as error:
                if self._owners is None or self._owners.node_at(base) is None:
                    raise
                failure = error  # a node may not know yet
            except UpstreamError as error:
                self.blame(base, error)
                failure = error.refusal if isinstance(error, NotLetIn) else error
            else:
                self.hear(base, answer.headers.get(EPOCH, ""))
                return taken
        raise failure

    def bases(self, key: str, *, immutable: bool) -> list[str]:
        """Base URLs of those to ask for a document, best first."""
        failed = self.failed()
        if self._owners is None:
            return in_order(self._direct or self._routers, failed)
        nodes = self._owners.nodes(key, failed)
        first = [*nodes, *self._routers] if immutable else [*self._routers, *nodes]
        return in_order([*first, *self._owners.view.origins], failed)

    # Who failed

    def blame(self, base: str, error: NearshardError) -> None:
        """``base`` failed: it is tried last for a while; a node that is to blame for it is reported to a router."""
        if error.error_code == "busy":
            return  # this machine has too little of something
        now = self._clock.monotonic()
        self._failed = {other: until for other, until in self._failed.items() if until > now} | {base: now + FORGET}
        node = self._owners.node_at(base) if self._owners else None
        if node is None or self._link.policy.metered or isinstance(error, Answered | RequestError):
            return
        if self._reported.get(node, now) > now:
            return
        self._reported[node] = now + FORGET
        task = asyncio.create_task(self._report(node), name="report")
        self._reports.add(task)
        task.add_done_callback(self._reports.discard)

    async def _report(self, node: str) -> None:
        """Tell a router, once; whether it hears is its own loss."""
        router = in_order(self._routers, self.failed())[0]
        body = {"node": node, "ok": False}
        try:
            with translated(router):
                async with self._sessions.of(router).post(
                    f"{router}/reports", json=body, headers=self.headers, timeout=REPORT, allow_redirects=False
                ):
                    pass
        except UpstreamError:
            pass


class _NoRouter(UpstreamError):
    """It answered, with something else than a view."""


def _seen(task: asyncio.Task[None]) -> None:
    """An error that nobody waits for any more is none."""
    if not task.cancelled():
        task.exception()


def parse_routers(routers: str | Sequence[str]) -> tuple[str, ...]:
    """Base URLs of routers, each once; several may be in one text, between commas. Raises RequestError."""
    texts = [routers] if isinstance(routers, str) else routers
    found = dict.fromkeys(url.strip().rstrip("/") for text in texts for url in text.split(",") if url.strip())
    if not 1 <= len(found) <= MAX_ROUTERS or not all(url.startswith(("http://", "https://")) for url in found):
        raise RequestError(f"a router is http://host:port; 1 to {MAX_ROUTERS} of them, between commas")
    return tuple(found)
