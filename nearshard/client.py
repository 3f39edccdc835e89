"""The SDK: tasks and models, fetched shard by shard from the nearest nodes, verified.

1. Ask the router for the plan of a task: the revision, and for each shard its URLs, best first.
2. Get that revision's manifest. Its digest is the revision, so the layout and the digests in it are right
   whoever sent them; nothing else in the plan is believed.
3. Fetch the shards that are needed, several at once, each from its best source that answers; go on from the byte
   reached with the next one. A shard counts when its digest is right.
4. Put the files together beside their targets, and rename them there.
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
from shared import codec, plan
from shared import manifest as manifests
from shared.digest import Digest, digest_of, hex_of
from shared.errors import (
    IntegrityError,
    LocalError,
    NearshardError,
    NotFound,
    UpstreamError,
    WrongModel,
    first_error,
)
from shared.ids import DEFAULT_REF, TaskId, parse_model, parse_ref_or_revision, parse_task_id
from shared.layout import Layout
from shared.manifest import MAX_MANIFEST, Manifest
from shared.paths import blob_path, manifest_path
from shared.web.session import fetch, make_session, open_blob, translated

DEFAULT_ROUTER = "http://127.0.0.1:8700"
CONCURRENCY = 4
"""Shards fetched at once; each may be held in memory (at most 32 MiB) until it is verified."""
ROUNDS = 2
"""Times that every source of a shard is tried."""
MAX_REDIRECT = 2048
_DETAIL = re.compile(r";\s*detail=([a-z-]+)")
_LINK = re.compile(r"<([^<>]{1,2048})>\s*;\s*rel=\"?duplicate\"?")

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
    """An asynchronous client of one router (or of an edge or origin: they answer the same paths).

    Use as ``async with Client(url) as client``.
    """

    def __init__(
        self, router: str = DEFAULT_ROUTER, *, region: str | None = None, concurrency: int = CONCURRENCY
    ) -> None:
        self.router = router.rstrip("/")
        self._headers = {"Nearshard-Region": region} if region else {}
        self._concurrency = concurrency
        self._session: aiohttp.ClientSession | None = None
        self._failed: Counter[str] = Counter()
        """Failures by base URL: those that failed are tried after those that did not."""

    async def __aenter__(self) -> Self:
        self._session = make_session()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session:
            await self._session.close()
            self._session = None

    @property
    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise LocalError("use the client as 'async with Client(...) as client'")
        return self._session

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
        found = await self.plan(asked)
        manifest = await self.manifest(asked.model, found.revision)
        task = manifest.task(asked.task)
        target = Path(output) if output is not None else Path(f"{asked.model.partition('/')[2]}-{task.name}")
        if target.suffix and not target.is_dir():
            targets = {target: task.layout}
        else:
            targets = {target / task.filename: task.layout}
            targets |= {target / path: manifest.files[path] for path in task.files}
        return await self._assemble(manifest, targets, found.urls, force=force, progress=progress)

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
        answer = await fetch(
            self._http,
            f"{self.router}/shards/{task_id}",
            limit=plan.MAX_PLAN,
            headers={**self._headers, "Accept": plan.MSGPACK},
            missing="unknown_task",
        )
        found = plan.decode(answer.body)
        if (found.task_id.model, found.task_id.task) != (task_id.model, task_id.task):
            raise WrongModel(f"the plan is for {found.task_id}, not {task_id}")
        if task_id.ref.startswith("sha256:") and found.revision != task_id.ref:
            raise IntegrityError("the plan is for another revision than was asked for")
        return found

    async def manifest(self, model: str, ref: str) -> Manifest:
        """The manifest of a ref or revision; by revision its bytes are checked against it.

        Raises NotFound, UpstreamError, IntegrityError, ManifestInvalid or WrongModel.
        """
        url = self.router + manifest_path(model, ref)
        answer = await fetch(self._http, url, limit=MAX_MANIFEST, missing="unknown_revision")
        if ref.startswith("sha256:") and digest_of(answer.body) != ref:
            raise IntegrityError(f"{url} sent a manifest that does not match its digest")
        manifest = await asyncio.to_thread(manifests.decode, answer.body)
        if manifest.model != model:
            raise WrongModel(f"a manifest of {manifest.model} came where {model} was asked for")
        return manifest

    async def models(self) -> list[str]:
        """The names of all models."""
        answer = await fetch(self._http, f"{self.router}/models", limit=MAX_MANIFEST)
        return [parse_model(name) for name in codec.decode_json(answer.body, MAX_MANIFEST)["models"]]

    async def describe(self, model: str) -> dict[str, Any]:
        """A model's refs, revisions, tasks and files, as ``/models/<model>`` gives them. Raises NotFound."""
        url = f"{self.router}/models/{parse_model(model)}"
        answer = await fetch(self._http, url, limit=MAX_MANIFEST, missing="unknown_model")
        document: dict[str, Any] = codec.decode_json(answer.body, MAX_MANIFEST)
        return document

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
                known = urls.get(digest) or await self._locate(digest)
                data = await self._fetch(digest, manifest.shards[digest], known, sources, meter)
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
        urls: Sequence[str],
        sources: Counter[tuple[str, str]],
        meter: _Meter,
    ) -> memoryview:
        """One shard, verified. Raises the last source's error when all have failed."""
        failure: NearshardError = UpstreamError(f"nobody is named who has {digest}")
        data = memoryview(bytearray(size))
        reached, hashed = 0, hashlib.sha256()
        for _ in range(ROUNDS):
            for url in sorted(urls, key=lambda url: self._failed[_base(url)]):
                begun = reached
                try:
                    async with open_blob(self._http, url, start=reached, size=size, max_size=size) as body:
                        outcome = _DETAIL.search(body.cache_status)
                        served = (_base(url), outcome[1] if outcome else "origin")
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
                    if reached == begun or isinstance(error, IntegrityError):
                        self._failed[_base(url)] += 1
        raise failure

    async def _locate(self, digest: Digest) -> list[str]:
        """URLs of a shard that no plan named: where the router sends us, or the router's own."""
        url = self.router + blob_path(digest)
        with translated(url):
            async with self._http.head(url, headers=self._headers, allow_redirects=False) as answer:
                if answer.status == 404:
                    raise NotFound("no such shard", code="unknown_blob")
                if answer.status != 307:
                    return [url]
                named = [answer.headers.get("Location", "")]
                for field_value in answer.headers.getall("Link", []):
                    named += _LINK.findall(field_value)
        return [name for name in named if name.startswith(("http://", "https://")) and len(name) <= MAX_REDIRECT]


class SyncClient:
    """The same, blocking: each call runs its own event loop. Not for use inside one."""

    def __init__(
        self, router: str = DEFAULT_ROUTER, *, region: str | None = None, concurrency: int = CONCURRENCY
    ) -> None:
        self._router, self._region, self._concurrency = router, region, concurrency

    def _make(self) -> Client:
        return Client(self._router, region=self._region, concurrency=self._concurrency)

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


def _base(url: str) -> str:
    """Scheme, host and port of a URL."""
    return "/".join(url.split("/", 3)[:3])
