"""Being a member: a heartbeat to every router, and a word when leaving, both signed with this node's key.

What is signed has a nonce of the router that it is for. A router gives its next one with each answer, and refuses an
old one with a new one (``stale_nonce``): then the same is told again at once.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import aiohttp
from structlog.typing import FilteringBoundLogger

from edge_node.peers import Peers
from shared import codec
from shared.clock import Clock
from shared.enrolment import HEARTBEAT, LEAVE, SIGNATURE_FIELD, sign
from shared.errors import RequestError, UpstreamError
from shared.keys import NodeKey
from shared.web.session import fetch, translated

EAGER = 0.1
"""Seconds until the second try to reach a router at start; doubled up to the interval."""
MAX_RING = 4 << 20
TIMEOUT = aiohttp.ClientTimeout(total=2.0)


class Membership:
    """Tells routers that this node is there. ``record`` gives what is told, anew each time."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        routers: Sequence[str],
        node: str,
        record: Callable[[], Mapping[str, Any]],
        interval: float,
        clock: Clock,
        rng: random.Random,
        log: FilteringBoundLogger,
        *,
        region: str,
        peers: Peers,
        key: NodeKey,
    ) -> None:
        self._key = key
        self._boot, self._sequence = secrets.token_hex(8), 0
        self._nonces: dict[str, str] = {}
        self._session, self._routers, self._node, self._record = session, list(routers), node, record
        self._region, self._peers = region, peers
        self._interval, self._clock, self._random, self._log = interval, clock, rng, log
        self._heard: dict[str, bool] = dict.fromkeys(routers, False)
        self._beating: asyncio.Task[None] | None = None
        self._epochs: dict[str, int] = {}

    def start(self) -> None:
        """Begin to send heartbeats."""
        if self._routers:
            self._beating = asyncio.create_task(self._beat(), name="heartbeats")

    async def _beat(self) -> None:
        """The jitter keeps the nodes of a site from beating together. A new node is eager to be known."""
        eager = EAGER
        while True:
            await asyncio.gather(*(self._tell("PUT", router) for router in self._routers))
            eager = self._interval if all(self._heard.values()) else min(2 * eager, self._interval)
            await self._clock.sleep(eager * (0.9 + 0.2 * self._random.random()))

    async def leave(self) -> None:
        """Stop, and ask the routers to send nobody here any more. Does nothing the second time."""
        beating, self._beating = self._beating, None
        if beating is None:
            return
        beating.cancel()
        await asyncio.wait([beating])
        await asyncio.gather(*(self._tell("DELETE", router) for router in self._routers))

    async def _tell(self, method: str, router: str) -> None:
        url = f"{router}/nodes/{self._node}"
        try:
            with translated(url):
                reply = await self._ask(method, router, url)
                if reply is None:
                    reply = await self._ask(method, router, url)
                if reply is None:
                    raise UpstreamError(f"{url} does not take the nonce that it gave")
                if method == "PUT":
                    await self._look_at(router, reply)
            if not self._heard[router]:
                self._log.info("a router knows this node", router=router)
            self._heard[router] = True
        except (UpstreamError, RequestError, KeyError, TypeError, AttributeError) as error:
            if self._heard[router]:  # once for each change: a router that is away is not news twice
                self._log.warning("a router does not hear this node", router=router, reason=str(error))
            self._heard[router] = False

    async def _ask(self, method: str, router: str, url: str) -> Mapping[str, Any] | None:
        """Tell a router, and give its answer; None where it wants another nonce, which is known then."""
        self._sequence += 1
        said = self._record() if method == "PUT" else {}
        order = {"boot": self._boot, "sequence": self._sequence, "nonce": self._nonces.get(router, "")}
        body, signature = sign(self._key, HEARTBEAT if method == "PUT" else LEAVE, {**said, "id": self._node, **order})
        fields = {SIGNATURE_FIELD: signature, "Content-Type": "application/json"}
        async with self._session.request(
            method, url, data=body, headers=fields, timeout=TIMEOUT, allow_redirects=False
        ) as answer:
            data = await answer.content.read(codec.MAX_JSON)
            document: dict[str, Any] = codec.decode_json(data) if answer.content_type.endswith("json") else {}
            nonce = document.get("nonce")
            if isinstance(nonce, str):
                self._nonces[router] = nonce
            if answer.status == 401 and document.get("code") == "stale_nonce":
                return None
            if answer.status >= 400:
                raise UpstreamError(f"{url} answered {answer.status}: {document.get('title', '')}")
            return document

    async def _look_at(self, router: str, reply: Mapping[str, Any]) -> None:
        """Take the ring where the membership has changed since this router's last reply."""
        epoch = reply["epoch"]
        self._peers.heard(epoch)
        if self._epochs.get(router) == epoch:
            return
        answer = await fetch(self._session, f"{router}/ring?region={self._region}", limit=MAX_RING)
        self._peers.update(
            {
                node["id"]: (node["url"], node["weight"])
                for node in codec.decode_json(answer.body, MAX_RING)["nodes"]
                if not node.get("draining")
            }
        )
        self._epochs[router] = epoch
