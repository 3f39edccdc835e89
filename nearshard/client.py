"""The SDK: tasks and models, fetched shard by shard from the nodes that own them, verified.

1. Have a view of the network (``nearshard.guide``), and ask a router what the ref means: a revision.
2. Get that revision's manifest from whoever has it. Its digest is the revision, so the layout and the digests in it are
   right whoever sent them.
3. Fetch the shards that are needed, several at once, each from its owner or the next source that answers; go on from
   the byte reached with the next one. A shard counts when its digest is right.
4. Put the files together beside their targets, and rename them there.

Where the client is given an edge or an origin in place of a router, it asks that one for a plan in 1.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp

from nearshard.assembly import Assembly
from nearshard.guide import Guide, parse_routers
from nearshard.kept import Kept
from shared import codec, plan
from shared import manifest as manifests
from shared.clock import SystemClock
from shared.digest import Digest, digest_of, hex_of, parse_digest
from shared.errors import (
    BadId,
    DecodeError,
    IntegrityError,
    LocalError,
    NearshardError,
    NotFound,
    UpstreamError,
    WrongModel,
    first_error,
)
from shared.ids import DEFAULT_REF, TaskId, is_revision, parse_model, parse_name, parse_ref_or_revision, parse_task_id
from shared.layout import Layout
from shared.manifest import MAX_MANIFEST, Manifest
from shared.paths import manifest_path, task_path
from shared.web.session import Fetched, make_session, open_blob
from shared.web.tls import tls_by

DEFAULT_ROUTER = "http://127.0.0.1:8700"
CONCURRENCY = 4
"""Shards fetched at once; each may be held in memory (at most 32 MiB) until it is verified."""
ROUNDS = 2
"""Times that every source of a shard is tried."""
_DETAIL = re.compile(r";\s*detail=([a-z-]+)")
_STUCK = ("integrity_error", "upstream_timeout")
"""What a source is blamed for although it has sent something."""

Progress = Callable[[int, int], None]
"""Bytes had, of the total."""


@dataclass(frozen=True)
class Got:
    """What a ``get`` or ``pull`` did."""

    model: str
    revision: Digest
    paths: tuple[Path, ...]
    """What is on disk now, the body of a task first."""
    size: int
    """Bytes of those files."""
    moved: int
    """Bytes of shards that were fetched; 0 where everything was there."""
    seconds: float
    sources: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """Bytes by (base URL of who served them, how: an outcome, or ``origin``)."""


class Client:
    """An asynchronous client of one network, by its routers (or of an edge or origin: they answer the same paths).

    Use as ``async with Client(url) as client``.
    """

    def __init__(
        self,
        router: str | Sequence[str] = DEFAULT_ROUTER,
        *,
        region: str | None = None,
        concurrency: int = CONCURRENCY,
        kept: Kept | None = None,
        ca: Path | None = None,
    ) -> None:
        """``router``: a URL, or several of routers that know the same nodes (also in one text, between commas).
        ``kept``: where the last view of the network is; in memory by default. ``ca``: file of the deployment's CA, that
        servers are checked by, beside the system's. Raises RequestError, BadId, ConfigError."""
        self._tls = tls_by(ca)
        self.routers = parse_routers(router)
        self._region = parse_name(region, "a region") if region else None
        self._concurrency = concurrency
        self._kept = kept or Kept()
        self._session: aiohttp.ClientSession | None = None
        self._guided: Guide | None = None

    async def __aenter__(self) -> Self:
        self._session = make_session(tls=self._tls)
        self._guided = Guide(self._session, self.routers, self._region, self._kept, SystemClock())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._guided:
            await self._guided.close()
            self._guided = None
        if self._session:
            await self._session.close()
            self._session = None

    @property
    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise LocalError("use the client as 'async with Client(...) as client'")
        return self._session

    @property
    def _guide(self) -> Guide:
        if self._guided is None:
            raise LocalError("use the client as 'async with Client(...) as client'")
        return self._guided

    async def get(
        self,
        task_id: str | TaskId,
        output: str | Path | None = None,
        *,
        force: bool = False,
        progress: Progress | None = None,
    ) -> Got:
        """Fetch a task. ``output`` with a suffix is the body's file name, and small files are left out;
        otherwise it is a directory for body and small files, ``./<name>-<task>`` by default.

        Raises NotFound (with the names that exist), UpstreamError, IntegrityError, DiskError, TargetExists.
        """
        asked = parse_task_id(task_id) if isinstance(task_id, str) else task_id
        urls: Mapping[Digest, Sequence[str]] = {}
        if await self._guide.ready():
            manifest = await self.manifest(asked.model, asked.ref)
        else:
            found = await self.plan(asked)
            manifest, urls = await self.manifest(asked.model, found.revision), found.urls
        task = manifest.task(asked.task)
        target = Path(output) if output is not None else Path(f"{asked.model.partition('/')[2]}-{task.name}")
        if target.suffix and not target.is_dir():
            targets = {target: task.layout}
        else:
            targets = {target / task.filename: task.layout}
            targets |= {target / path: manifest.files[path] for path in task.files}
        return await self._assemble(manifest, targets, urls, force=force, progress=progress)

    async def pull(
        self,
        model: str,
        ref: str = DEFAULT_REF,
        output: str | Path | None = None,
        *,
        force: bool = False,
        progress: Progress | None = None,
    ) -> Got:
        """Fetch every file of a model into ``output`` (``./<name>`` by default). Raises as ``get``."""
        manifest = await self.manifest(parse_model(model), parse_ref_or_revision(ref))
        target = Path(output) if output is not None else Path(model.partition("/")[2])
        targets = {target / path: layout for path, layout in manifest.files.items()}
        return await self._assemble(manifest, targets, {}, force=force, progress=progress)

    async def plan(self, task_id: TaskId) -> plan.Plan:
        """The plan of a task. Raises NotFound or UpstreamError."""

        async def take(_: str, answer: Fetched) -> plan.Plan:
            found = plan.decode(answer.body)
            if (found.task_id.model, found.task_id.task) != (task_id.model, task_id.task):
                raise WrongModel(f"the plan is for {found.task_id}, not {task_id}")
            if is_revision(task_id.ref) and found.revision != task_id.ref:
                raise IntegrityError("the plan is for another revision than was asked for")
            return found

        await self._guide.ready()
        return await self._guide.ask(
            task_path(task_id),
            take,
            key=task_id.ring_key,
            limit=plan.MAX_PLAN,
            headers={"Accept": plan.MSGPACK},
            missing="unknown_task",
        )

    async def revision(self, model: str, ref: str) -> Digest:
        """What a ref means now: as a router says, or while none answers, as the nearest node does.

        Raises NotFound, UpstreamError.
        """

        async def take(url: str, answer: Fetched) -> Digest:
            try:
                return parse_digest(answer.headers.get("Nearshard-Revision", ""))
            except BadId as error:
                raise UpstreamError(f"{url} does not say which revision it has") from error

        await self._guide.ready()
        # RFC 9110 §13.1.2: nothing has none of all tags, so what the ref means comes without the manifest
        return await self._guide.ask(
            manifest_path(model, ref),
            take,
            key=model,
            limit=MAX_MANIFEST,
            headers={"If-None-Match": "*"},
            missing="unknown_revision",
        )

    async def manifest(self, model: str, ref: str) -> Manifest:
        """The manifest of a ref or revision; by revision its bytes are checked against it.

        Raises NotFound, UpstreamError, IntegrityError, ManifestInvalid or WrongModel.
        """
        if await self._guide.ready() and not is_revision(ref):
            ref = await self.revision(model, ref)
            await self._guide.ready()  # the answer may have told that nodes came or went

        async def take(url: str, answer: Fetched) -> Manifest:
            if is_revision(ref) and digest_of(answer.body) != ref:
                raise IntegrityError(f"{url} sent a manifest that does not match its digest")
            manifest = await asyncio.to_thread(manifests.decode, answer.body)
            if manifest.model != model:
                raise WrongModel(f"a manifest of {manifest.model} came where {model} was asked for")
            return manifest

        return await self._guide.ask(
            manifest_path(model, ref),
            take,
            key=model,
            limit=MAX_MANIFEST,
            missing="unknown_revision",
            immutable=is_revision(ref),
        )

    async def models(self) -> list[str]:
        """The names of all models. Raises UpstreamError."""

        async def take(url: str, answer: Fetched) -> list[str]:
            try:
                return [parse_model(name) for name in _document(url, answer)["models"]]
            except (BadId, KeyError, TypeError) as error:
                raise UpstreamError(f"{url} is no list of models") from error

        await self._guide.ready()
        return await self._guide.ask("/models", take, key="", limit=MAX_MANIFEST)

    async def describe(self, model: str) -> dict[str, Any]:
        """A model's refs, revisions, tasks and files, as ``/models/<model>`` gives them. Raises NotFound."""

        async def take(url: str, answer: Fetched) -> dict[str, Any]:
            return _document(url, answer)

        await self._guide.ready()
        path = f"/models/{parse_model(model)}"
        return await self._guide.ask(path, take, key=model, limit=MAX_MANIFEST, missing="unknown_model")

    # Fetching

    async def _assemble(
        self,
        manifest: Manifest,
        targets: Mapping[Path, Layout],
        urls: Mapping[Digest, Sequence[str]],
        *,
        force: bool,
        progress: Progress | None,
    ) -> Got:
        started = time.perf_counter()
        sources: Counter[tuple[str, str]] = Counter()
        assembly = await asyncio.to_thread(Assembly, targets, force=force)
        with assembly:
            needed = assembly.needed()
            total = sum(manifest.shards[digest] for digest in needed)
            meter = _Meter(total, progress)
            await self._fetch_all(assembly, manifest, needed, urls, sources, meter)
            await asyncio.to_thread(assembly.finish)
        return Got(
            manifest.model,
            manifest.revision,
            tuple(targets),
            sum(layout.size for layout in targets.values()),
            sources.total(),
            time.perf_counter() - started,
            dict(sources),
        )

    async def _fetch_all(
        self,
        assembly: Assembly,
        manifest: Manifest,
        needed: Sequence[Digest],
        urls: Mapping[Digest, Sequence[str]],
        sources: Counter[tuple[str, str]],
        meter: _Meter,
    ) -> None:
        """Fetch shards in order, several at once; the first error ends them all and is raised as it is."""
        waiting = iter(needed)

        async def work() -> None:
            for digest in waiting:
                data = await self._fetch(digest, manifest.shards[digest], urls.get(digest, ()), sources, meter)
                await asyncio.to_thread(assembly.put, digest, data)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._concurrency, len(needed))):
                    group.create_task(work())
        except BaseExceptionGroup as errors:
            raise first_error(errors) from None

    async def _fetch(
        self,
        digest: Digest,
        size: int,
        planned: Sequence[str],
        sources: Counter[tuple[str, str]],
        meter: _Meter,
    ) -> memoryview:
        """One shard, verified, from ``planned`` URLs or by the view. Raises the last source's error when all have
        failed. In a round nobody is asked twice."""
        failure: NearshardError = UpstreamError(f"nobody is named who has {digest}")
        data = memoryview(bytearray(size))
        reached, hashed = 0, hashlib.sha256()
        for number in range(ROUNDS):
            if number:
                await self._guide.renew()
            failed = self._guide.failed()
            for url in sorted(planned, key=lambda url: _base(url) in failed) or self._guide.urls(digest):
                begun = reached
                try:
                    async with open_blob(self._http, url, start=reached, size=size, max_size=size) as body:
                        outcome = _DETAIL.search(body.cache_status)
                        served = (_base(url), outcome[1] if outcome else "origin")
                        self._guide.hear(_base(url), body.epoch)
                        skip = reached - body.start
                        async for chunk in body.chunks:
                            sources[served] += len(chunk)
                            part, skip = chunk[skip:], max(0, skip - len(chunk))
                            hashed.update(part)
                            data[reached : reached + len(part)] = part
                            reached += len(part)
                            meter.add(len(part))
                    if hashed.hexdigest() != hex_of(digest):
                        meter.add(-reached)
                        reached, hashed = 0, hashlib.sha256()
                        raise IntegrityError(f"{url} sent bytes that do not match the digest")
                    return data
                except (NotFound, UpstreamError) as error:
                    failure = error
                    if reached == begun or error.error_code in _STUCK:
                        self._guide.blame(_base(url), error)
        raise failure


class SyncClient:
    """The same, blocking: each call runs its own event loop. Not for use inside one."""

    def __init__(
        self,
        router: str | Sequence[str] = DEFAULT_ROUTER,
        *,
        region: str | None = None,
        concurrency: int = CONCURRENCY,
        kept: Kept | None = None,
        ca: Path | None = None,
    ) -> None:
        """See ``Client``."""
        self._router, self._region, self._concurrency = router, region, concurrency
        self._kept, self._ca = kept or Kept(), ca

    def _make(self) -> Client:
        return Client(self._router, region=self._region, concurrency=self._concurrency, kept=self._kept, ca=self._ca)

    def get(
        self,
        task_id: str | TaskId,
        output: str | Path | None = None,
        *,
        force: bool = False,
        progress: Progress | None = None,
    ) -> Got:
        """See ``Client.get``."""

        async def call() -> Got:
            async with self._make() as client:
                return await client.get(task_id, output, force=force, progress=progress)

        return asyncio.run(call())

    def pull(
        self,
        model: str,
        ref: str = DEFAULT_REF,
        output: str | Path | None = None,
        *,
        force: bool = False,
        progress: Progress | None = None,
    ) -> Got:
        """See ``Client.pull``."""

        async def call() -> Got:
            async with self._make() as client:
                return await client.pull(model, ref, output, force=force, progress=progress)

        return asyncio.run(call())

    def models(self) -> list[str]:
        """See ``Client.models``."""

        async def call() -> list[str]:
            async with self._make() as client:
                return await client.models()

        return asyncio.run(call())

    def describe(self, model: str) -> dict[str, Any]:
        """See ``Client.describe``."""

        async def call() -> dict[str, Any]:
            async with self._make() as client:
                return await client.describe(model)

        return asyncio.run(call())


class _Meter:
    """Bytes had so far, told to whoever watches."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._had, self._progress = total, 0, progress

    def add(self, size: int) -> None:
        self._had += size
        if self._progress:
            self._progress(self._had, self._total)


def _document(url: str, answer: Fetched) -> dict[str, Any]:
    """A JSON object. Raises UpstreamError."""
    try:
        document = codec.decode_json(answer.body, MAX_MANIFEST)
    except DecodeError as error:
        raise UpstreamError(f"{url} sent no JSON") from error
    if not isinstance(document, dict):
        raise UpstreamError(f"{url} sent no JSON object")
    return document


def _base(url: str) -> str:
    """Scheme, host and port of a URL."""
    return "/".join(url.split("/", 3)[:3])
