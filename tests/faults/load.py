"""Clients that ask all the time, from one process, and what became of each of their requests.

A third are of the SDK and get the model whole, a third ask routers for it and follow them, as curl does, and the others
ask for shards, of which there are more than the nodes may keep: so there are fills under way all the time.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from nearshard import Client, NearshardError
from tests.faults.network import MODEL, Net, Refused, now

DEADLINE = 60.0
"""Seconds in which every request ends, well or with a typed error."""
PATIENCE = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=5)
"""Of plain clients before they try the next URL: generous, as the machine may be busy with other things."""


@dataclass(frozen=True)
class Broken:
    """An invariant that did not hold."""

    invariant: str
    text: str

    def __str__(self) -> str:
        return f"{self.invariant}: {self.text}"


class Load:
    """The clients of a network."""

    def __init__(self, net: Net, shards: Sequence[str], count: int, pause: float, seed: int) -> None:
        """``shards``: digests to ask for; ``pause``: seconds between two requests of a client."""
        net.patience = PATIENCE
        self._net, self.shards, self._count, self._pause, self._seed = net, shards, count, pause, seed
        self._running, self._idle = asyncio.Event(), asyncio.Condition()
        self._active = 0
        self.versions: dict[str, int] = {}
        """By the SHA-256 of the model's file: the number of each version that was or is being published."""
        self.served: Counter[str] = Counter()
        """By kind of client."""
        self.refused: list[str] = []
        self.broken: list[Broken] = []

    async def pause(self) -> None:
        """Nobody asks any more; done once the last answer is there."""
        self._running.clear()
        async with self._idle:
            await self._idle.wait_for(lambda: self._active == 0)

    def go_on(self) -> None:
        """They ask again."""
        self._running.set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The clients are there; they ask from ``go_on`` on."""
        async with AsyncExitStack() as stack:
            session = await stack.enter_async_context(aiohttp.ClientSession())
            tasks = []
            for number in range(self._count):
                client = await self._client(stack, number) if number % 3 == 0 else None
                tasks.append(asyncio.create_task(self._ask_on(number, session, client)))
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _client(self, stack: AsyncExitStack, number: int) -> Client:
        routers = [router.url for router in self._net.routers]
        first = number % len(routers)
        return await stack.enter_async_context(
            Client(routers[first:] + routers[:first], region=self._region(number), trust_root=self._net.lab.trust_root)
        )

    def _region(self, number: int) -> str:
        regions = sorted(set(self._net.regions.values()))
        return regions[number % len(regions)]

    async def _ask_on(self, number: int, session: aiohttp.ClientSession, client: Client | None) -> None:
        rng = random.Random(f"{self._seed} {number}")
        kind = "sdk" if client else ("task", "shard")[number % 2]
        out = self._net.lab.folder / f"client-{number}" / "model.safetensors"
        newest = 0
        await asyncio.sleep(rng.uniform(0, self._pause))
        while True:
            await self._running.wait()
            self._active += 1
            started = now()
            try:
                async with asyncio.timeout(DEADLINE):
                    if client:
                        newest = await self._by_sdk(client, out, newest)
                    else:
                        await self._by_router(kind, session, number, rng)
                self.served[kind] += 1
            except TimeoutError:
                self.broken.append(Broken("I3", f"a client ({kind}) had no end of its request in {DEADLINE:.0f} s"))
            except Refused as error:
                self.refused.append(f"{kind}, {now() - started:.1f} s: {error}")
            except AssertionError as error:
                self.broken.append(Broken(_invariant(error), f"{kind}: {error}"))
            except NearshardError as error:
                found = self.broken if error.code in ("internal", "digest_mismatch") else None
                if found is None:
                    self.refused.append(f"{kind}, {now() - started:.1f} s: {error.code}: {error}")
                else:
                    found.append(Broken("I3", f"{kind}: {error.code}: {error}"))
            except Exception as error:  # noqa: BLE001  what the SDK raises beside its own errors is what is looked for
                self.broken.append(Broken("I3", f"{kind}: {type(error).__name__}: {error}"))
            finally:
                self._active -= 1
            async with self._idle:
                self._idle.notify_all()
            await asyncio.sleep(self._pause * rng.uniform(0.5, 1.5))

    async def _by_sdk(self, client: Client, out: Path, newest: int) -> int:
        """One download; the version that it was. Raises NearshardError, AssertionError."""
        got = await client.get(MODEL, out, force=True)
        body = await asyncio.to_thread(got.paths[0].read_bytes)
        version = self.versions.get(hashlib.sha256(body).hexdigest())
        assert version is not None, "the SDK gave other bytes than were published"
        assert version >= newest, f"the SDK went back from version {newest} to {version}"
        return version

    async def _by_router(self, kind: str, session: aiohttp.ClientSession, number: int, rng: random.Random) -> None:
        region, first = self._region(number), rng.randrange(len(self._net.routers))
        if kind == "task":
            right = lambda body: hashlib.sha256(body).hexdigest() in self.versions  # noqa: E731
            await self._net.ask(session, region, first, right=right)
            return
        digest = rng.choice(self.shards)
        right = lambda body: f"sha256:{hashlib.sha256(body).hexdigest()}" == digest  # noqa: E731
        await self._net.ask(session, region, first, f"/blobs/{digest}", right)


def _invariant(error: AssertionError) -> str:
    """Which one it is about: bytes, versions, or answers."""
    text = str(error)
    if "other bytes" in text:
        return "I1"
    return "I2" if "went back" in text else "I7" if "answered 500" in text else "I3"
