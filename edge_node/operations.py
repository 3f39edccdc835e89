"""What an operator does to a node while it runs: preheat, pin, purge, and the link's policy.

``what`` is a shard's digest, a task id (``org/name:task[@ref]``: the task and its small files), or a model
(``org/name[@ref]``: everything of it).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from structlog.typing import FilteringBoundLogger

from edge_node.cache import Cache
from edge_node.importing import take_bundle
from edge_node.recipes import Recipes
from edge_node.shard_key import ShardKey, shard_key
from edge_node.upstream import Upstreams
from shared.catalog import Catalog
from shared.clock import Clock
from shared.codec import decode_json, encode_json
from shared.digest import parse_digest
from shared.errors import DecodeError, NearshardError, NotFound
from shared.files import replace_file
from shared.ids import parse_task_id
from shared.link import LinkPolicy, parse_policy
from shared.tasks import end
from shared.tokens import EVERYTHING
from shared.web.trusted import Trusted

AT_ONCE = 4
"""Shards that one preheat fetches at a time; clients still go first."""
PAUSE = 1.0
"""Seconds between two looks whether a metered link is free again."""
KEEP_JOBS = 100


def model_of(what: str) -> str:
    """The model that ``what`` is of; a shard by itself may be of any (EVERYTHING). Raises BadId."""
    if what.startswith("sha256:"):
        parse_digest(what)
        return EVERYTHING
    return parse_task_id(what).model


@dataclass
class Job:
    """One preheat and how far it is. Bytes and shards are those that this node owns."""

    id: int
    what: str
    state: str = "running"
    shards: int = 0
    shards_done: int = 0
    bytes: int = 0
    bytes_done: int = 0
    reason: str = ""


class Operations:
    """The operator's hand on one node."""

    def __init__(
        self,
        cache: Cache,
        catalog: Catalog,
        trusted: Trusted,
        upstreams: Upstreams,
        recipes: Recipes,
        data: Path,
        clock: Clock,
        log: FilteringBoundLogger,
    ) -> None:
        self._cache, self._catalog, self._trusted, self._upstreams = cache, catalog, trusted, upstreams
        self._recipes = recipes
        self._pins_file = data / "pins.json"
        self._clock, self._log = clock, log
        self._jobs: dict[int, Job] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._pinned: dict[str, frozenset[ShardKey]] = {}
        self.draining = False
        """Whether this node is to get no new clients, and to own no shards: said in its heartbeats."""

    # The link

    @property
    def policy(self) -> LinkPolicy:
        """The link's policy now."""
        return self._upstreams.link.policy

    def change_policy(self, document: object) -> LinkPolicy:
        """Change some of it; takes effect with the next bytes. Raises RequestError."""
        self._upstreams.link.policy = parse_policy(document, self._upstreams.link.policy)
        self._log.info("link policy changed", **self._upstreams.link.policy.as_json())
        return self._upstreams.link.policy

    def drain(self, draining: bool) -> None:
        """Ask routers to send nobody here any more, or to begin again. Lasts until a restart."""
        if draining != self.draining:
            self._log.info("draining" if draining else "draining is over")
        self.draining = draining

    # Preheating

    async def preheat(self, what: str) -> Job:
        """Begin to fetch what this node owns of ``what``. Raises BadId, NotFound or UpstreamError."""
        return self.fetch(what, await self.owned(what))[0]

    async def owned(self, what: str) -> dict[ShardKey, int]:
        """The shards of ``what`` that this node owns, and their sizes. Raises as ``preheat``."""
        return {key: size for key, size in (await self._shards(what)).items() if self._upstreams.owned(key)}

    def fetch(self, what: str, shards: Mapping[ShardKey, int]) -> tuple[Job, asyncio.Task[None]]:
        """Begin to fetch these, which are of ``what``: a job, and its end."""
        number = max(self._jobs, default=0) + 1
        job = self._jobs[number] = Job(number, what, shards=len(shards), bytes=sum(shards.values()))
        for old in sorted(self._jobs)[:-KEEP_JOBS]:
            del self._jobs[old]
        return job, self._own(self._run(job, shards))

    def job(self, number: int) -> Job:
        """A preheat by its number. Raises NotFound."""
        if number not in self._jobs:
            raise NotFound("there is no such job", code="unknown_path")
        return self._jobs[number]

    async def _run(self, job: Job, shards: Mapping[ShardKey, int]) -> None:
        waiting = iter(shards.items())

        async def work() -> None:
            for key, size in waiting:
                while self._upstreams.link.policy.metered:
                    job.state = "paused: the link is metered"
                    await self._clock.sleep(PAUSE)
                job.state = "running"
                await self._cache.fetch(key, size)
                job.shards_done += 1
                job.bytes_done += size

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(AT_ONCE):
                    group.create_task(work())
            job.state = "done"
        except asyncio.CancelledError:
            job.state = "stopped"
            raise
        except BaseExceptionGroup as errors:
            job.state, job.reason = "failed", str(errors.exceptions[0])
        self._log.info("preheat ended", **asdict(job))

    # Pins

    async def pin(self, what: str) -> Job:
        """Keep ``what`` on this node's disk until ``unpin``, and fetch what is missing. Raises as ``preheat``."""
        await self.keep(what)
        return await self.preheat(what)

    async def keep(self, what: str) -> None:
        """Never evict what ``what`` means now, until ``unpin``. Raises as ``preheat``."""
        self._pinned[what] = frozenset(await self._shards(what))
        await self._apply_pins()

    async def unpin(self, what: str) -> None:
        """No longer keep it. Raises NotFound for what is not pinned."""
        if self._pinned.pop(what, None) is None:
            raise NotFound("that is not pinned", code="unknown_path")
        await self._apply_pins()

    def pins(self) -> list[str]:
        """What is pinned."""
        return sorted(self._pinned)

    def start(self) -> None:
        """Take up the pins of an earlier run."""
        self._own(self._restore_pins())

    async def _restore_pins(self) -> None:
        """What they name is looked up again; a ref may have moved."""
        names: list[str] = []
        with suppress(OSError, DecodeError):
            names = decode_json(await asyncio.to_thread(self._pins_file.read_bytes))
        for what in names:
            try:
                self._pinned[what] = frozenset(await self._shards(what))
            except NearshardError as error:
                self._pinned[what] = frozenset()
                self._log.warning("a pin cannot be looked up", what=what, reason=str(error))
        self._keep()

    async def _apply_pins(self) -> None:
        self._keep()
        data = encode_json(self.pins())
        await asyncio.to_thread(replace_file, self._pins_file, data)

    def _keep(self) -> None:
        self._cache.disk.ledger.kept = frozenset().union(*self._pinned.values())

    # Purging

    async def purge(self, what: str) -> dict[str, int]:
        """Drop ``what`` from memory and disk: shards and bytes that went. A later request fetches it again."""
        gone = {"shards": 0, "bytes": 0}
        for key in await self._shards(what):
            if (size := self._cache.known_size(key)) is not None:
                self._cache.memory.drop(key)
                self._cache.disk.drop(key)
                gone["shards"] += 1
                gone["bytes"] += size
        self._log.info("purged", what=what, **gone)
        return gone

    # What was carried here

    async def take_bundle(self, chunks: AsyncIterator[bytes], allowed: Callable[[str], None]) -> dict[str, object]:
        """Take a bundle in. ``allowed`` is told its model before anything is kept, and raises where it is not to be.
        Raises as ``edge_node.importing.take_bundle``."""
        return await take_bundle(chunks, self._cache, self._catalog, self._trusted, self._log, allowed)

    async def close(self) -> None:
        """End what is under way."""
        await end(self._tasks)

    async def _shards(self, what: str) -> dict[ShardKey, int]:
        """The shards of ``what`` and their sizes (0 for a digest by itself, which names a public shard)."""
        if what.startswith("sha256:"):
            key = shard_key(parse_digest(what))
            return {key: self._cache.known_size(key) or 0}
        task_id = parse_task_id(what)
        private = "" if await self._trusted.is_public(task_id.model) else task_id.model
        manifest = (await self._catalog.resolve(task_id.model, task_id.ref)).manifest
        self._recipes.learn(manifest, private)
        if ":" not in what.partition("@")[0]:
            return {shard_key(digest, private): size for digest, size in manifest.shards.items()}
        task = manifest.task(task_id.task)
        layouts = [task.layout, *(manifest.files[path] for path in task.files)]
        return {shard_key(digest, private): manifest.shards[digest] for layout in layouts for digest in layout.shards()}

    def _own(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
