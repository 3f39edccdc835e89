"""Shards on their way: several at once, each from its owner or the next source that answers.

What breaks off, stalls, lies or is much slower than another source goes on at the next one, from the byte reached. How
many streams there are is found out on the way (``nearshard.pace``). Whoever is asked is believed nothing: a shard
counts when its digest is right.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Protocol

from nearshard.guide import Guide
from nearshard.landing import Landing
from nearshard.pace import WINDOW, Pace, Width
from shared.clock import Clock
from shared.deltas import WANTED_FOR
from shared.digest import Digest
from shared.errors import IntegrityError, NearshardError, NotFound, UpstreamError
from shared.link import Link
from shared.tasks import end
from shared.web.session import NotLetIn, Sessions, open_blob

Progress = Callable[[int, int], None]
"""Bytes had, of the total."""
Sources = Counter[tuple[str, str]]
"""Bytes by (base URL of who served them, how: an outcome, or ``origin``)."""
ROUNDS = 2
"""Times that every source of a shard is tried."""
_DETAIL = re.compile(r";\s*detail=([a-z-]+)")
_STUCK = ("integrity_error", "upstream_timeout")
"""What a source is blamed for although it has sent something."""


class Slow(UpstreamError):
    """A source that another one is much faster than; no fault that anybody needs to hear of."""

    code = "upstream_timeout"


class Meter:
    """Bytes had so far, told to whoever watches."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self.had, self._progress = total, 0, progress
        self.add(0)

    def add(self, size: int) -> None:
        """So many more; fewer where what came was wrong."""
        self.had += size
        self._tell()

    def expect(self, size: int) -> None:
        """So many more are to come than was thought."""
        self._total += size
        self._tell()

    def _tell(self) -> None:
        if self._progress:
            self._progress(self.had, self._total)


class Lands(Protocol):
    """Where shards land."""

    def landing(self, digest: Digest) -> Landing:
        """Of a shard that is needed."""
        ...

    def landed(self, digest: Digest) -> None:
        """It is all there, and right; in a thread. Raises DiskError."""
        ...

    def put(self, digest: Digest, data: memoryview) -> None:
        """These are all of its bytes, and right; in a thread. Raises DiskError."""
        ...


class Transfer:
    """One download of a client: the shards of one model."""

    def __init__(
        self,
        sessions: Sessions,
        guide: Guide,
        clock: Clock,
        link: Link | None = None,
        *,
        private: str = "",
        wanted_for: str = "",
        planned: Mapping[Digest, Sequence[str]] | None = None,
        sources: Sources | None = None,
        meter: Meter | None = None,
    ) -> None:
        """``private``: the model, where its shards are at paths of their own. ``wanted_for``: their revision, as
        ``model@revision``: nodes may know a delta from it. ``planned``: URLs of shards that a plan named; others are
        found by the view. ``link``: what all that is read counts on."""
        self._sessions, self._guide, self._clock = sessions, guide, clock
        self._link = link or Link(clock)
        self._private, self._planned = private, planned or {}
        self._about = {WANTED_FOR: wanted_for} if wanted_for else {}
        self.sources: Sources = Counter() if sources is None else sources
        self.meter = meter or Meter(0, None)
        self._pace = Pace()

    async def fetch_all(
        self, wanted: Sequence[Digest], land: Callable[[Digest], Coroutine[Any, Any, None]], streams: int | None = None
    ) -> None:
        """Have shards ``land`` in order, ``streams`` at once or as many as the links are worth. The first error ends
        them all and is raised, once what came is kept."""
        width, waiting = Width(streams), list(reversed(wanted))
        active: set[asyncio.Task[None]] = set()
        looked, had = self._clock.monotonic(), self.meter.had
        try:
            while waiting or active:
                while waiting and len(active) < width.streams:
                    active.add(asyncio.create_task(land(waiting.pop())))
                done, active = await asyncio.wait(active, timeout=WINDOW, return_when=asyncio.FIRST_COMPLETED)
                failures = [task.exception() for task in done]  # all are looked at: asyncio complains of others
                if failure := next(filter(None, failures), None):
                    raise failure
                now = self._clock.monotonic()
                if now - looked >= WINDOW and waiting:
                    width.look((self.meter.had - had) / (now - looked))
                    looked, had = now, self.meter.had
        finally:
            await end(active)

    async def land(self, digest: Digest, lands: Lands) -> None:
        """Fetch a shard to where it lands. Raises as ``fetch``."""
        landing = lands.landing(digest)
        try:
            await landing.begin()
            await self.fetch(landing)
        finally:
            try:
                await landing.settle()
            finally:
                landing.close()
        await asyncio.to_thread(lands.landed, digest)

    async def fetch(self, landing: Landing) -> None:
        """One shard, verified, from the URLs that were planned or by the view.

        Raises the last source's error when all have failed, DiskError. In a round nobody is asked twice.
        """
        failure: NearshardError = UpstreamError(f"nobody is named who has {landing.digest}")
        if landing.reached == landing.size and await landing.is_right():
            return
        for number in range(ROUNDS):
            if number:
                await self._guide.renew()
            for url in self._urls(landing.digest):
                begun = landing.reached
                try:
                    await self._take(url, landing)
                    had = landing.reached
                    if not await landing.is_right():
                        self.meter.add(-had)
                        raise IntegrityError(f"{url} sent bytes that do not match the digest")
                    return
                except Slow as error:
                    failure = error
                except (NotFound, UpstreamError) as error:
                    failure = error.refusal if isinstance(error, NotLetIn) else error
                    if landing.reached == begun or error.error_code in _STUCK:
                        self._guide.blame(base_of(url), error)
        raise failure

    def _urls(self, digest: Digest) -> list[str]:
        """Best first; those that are slow or failed lately after the others."""
        failed = self._guide.failed()
        urls = sorted(self._planned.get(digest, ()), key=lambda url: base_of(url) in failed)
        return sorted(urls or self._guide.urls(digest, self._private), key=lambda url: self._pace.slow(base_of(url)))

    async def _take(self, url: str, landing: Landing) -> None:
        """The rest of a shard from one source. Raises NotFound, UpstreamError, Slow, DiskError."""
        base, reached = base_of(url), landing.reached
        fields = {**self._about, **(self._guide.credentials(base) if self._private else {})}
        opened = open_blob(
            self._sessions.of(base), url, start=reached, size=landing.size, max_size=landing.size, headers=fields
        )
        async with opened as body:
            outcome = _DETAIL.search(body.cache_status)
            served = (base, outcome[1] if outcome else "origin")
            self._guide.hear(base, body.epoch)
            skip = reached - body.start
            stream = self._pace.begin(base, served[1].partition("-")[0], self._clock.monotonic())
            try:
                async for chunk in body.chunks:
                    await self._link.take(len(chunk))
                    self.sources[served] += len(chunk)
                    part, skip = chunk[skip:] if skip else chunk, max(0, skip - len(chunk))
                    await landing.write(part)
                    self.meter.add(len(part))
                    late = self._pace.add(stream, len(chunk), self._clock.monotonic())
                    if late and landing.reached < landing.size and self._others(landing.digest, base):
                        raise Slow(f"{base} sends far slower than others")
            finally:
                self._pace.end(stream, self._clock.monotonic())

    def _others(self, digest: Digest, base: str) -> bool:
        """Whether somebody else may have a shard who is well."""
        failed = self._guide.failed()
        return any(
            (other := base_of(url)) != base and other not in failed and not self._pace.slow(other)
            for url in self._urls(digest)
        )


def base_of(url: str) -> str:
    """Scheme, host and port of a URL."""
    return "/".join(url.split("/", 3)[:3])
