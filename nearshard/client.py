"""The SDK: tasks and models, fetched shard by shard from the nodes that own them, verified.

1. Have a view of the network (``nearshard.guide``), and the signed metadata, which is checked here against the root
   that this network is known by: it says what the ref means, a revision. Who names a revision needs none.
2. Get that revision's manifest from whoever has it. Its digest is the revision, so the layout and the digests in it are
   right whoever sent them.
3. Fetch the shards that are needed, several at once, each from its owner or the next source that answers; go on from
   the byte reached with the next one. A shard counts when its digest is right.
4. Put the files together beside their targets, and rename them there.

Where the client is given an edge or an origin in place of a router, it asks that one for a plan as well. Plans and
views are advice: they can cost time, but no byte.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp

from nearshard.assembly import Assembly
from nearshard.guide import Guide, parse_routers
from nearshard.kept import Kept
from nearshard.manners import Manners
from nearshard.mirrored import Waiting, await_mirror
from nearshard.networks import find_root, state_file
from shared import codec, plan
from shared import manifest as manifests
from shared.clock import Clock, SystemClock
from shared.digest import Digest, digest_of, hex_of
from shared.errors import (
    BadId,
    DecodeError,
    IntegrityError,
    LocalError,
    NearshardError,
    NotFound,
    RequestError,
    UpstreamError,
    WrongModel,
    first_error,
)
from shared.ids import (
    DEFAULT_REF,
    TaskId,
    as_revision,
    is_revision,
    parse_model,
    parse_name,
    parse_ref_or_revision,
    parse_task_id,
)
from shared.layout import Layout
from shared.link import Link
from shared.manifest import MAX_MANIFEST, Manifest
from shared.paths import manifest_path, task_path
from shared.tokens import Right, read_claims
from shared.trust import Target
from shared.trust_file import TrustFile, read_root
from shared.trust_names import TIMESTAMP
from shared.view import EPOCH
from shared.web.access import is_private
from shared.web.session import CLIENT_IDLE, Fetched, NotLetIn, Sessions, open_blob
from shared.web.tls import tls_by
from shared.web.trusted import Trusted

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
        trust_root: Path | None = None,
        token: str = "",
        ca: Path | None = None,
        waiting: Waiting = lambda _: None,
        manners: Manners | None = None,
        clock: Clock | None = None,
    ) -> None:
        """``router``: a URL, or several of routers that know the same nodes (also in one text, between commas).
        ``kept``: where the last view of the network is; in memory by default. ``trust_root``: a root.json of the
        network; by default the one that ``nearshard up`` or ``nearshard trust accept`` has noted for its routers.
        ``token``: for private models; told to nobody but the routers, nodes and origins of this network. ``ca``: file
        of the deployment's CA, that servers are checked by, beside the system's. ``waiting``: told how far it is while
        an origin gets a model from the hub that it mirrors. ``manners``: rates, windows, metered, proxy
        (``parse_manners``).
        Raises RequestError, BadId, ConfigError."""
        self._waiting = waiting
        self._tls = tls_by(ca)
        self.routers = parse_routers(router)
        self._region = parse_name(region, "a region") if region else None
        self._clock = clock or SystemClock()
        self._manners = manners or Manners()
        self._concurrency = self._manners.connections(concurrency)
        self._link = Link(self._clock, self._manners.policy)
        self._kept = kept or Kept()
        self._token = token
        self._private: set[str] = set()
        """Models whose shards are at paths of their own, as whoever sent the manifest says: no matter of trust."""
        self._opened: Sessions | None = None
        self._guided: Guide | None = None
        self._trust_root = trust_root
        self._trusted: Trusted | None = None

    async def __aenter__(self) -> Self:
        self._opened = Sessions(self._manners.proxy_of, tls=self._tls, idle=CLIENT_IDLE)
        self._guided = Guide(self._opened, self.routers, self._region, self._kept, self._clock, self._token, self._link)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._trusted:
            await self._trusted.close()
            self._trusted = None
        if self._guided:
            await self._guided.close()
            self._guided = None
        if self._opened:
            await self._opened.close()
            self._opened = None

    @property
    def _sessions(self) -> Sessions:
        if self._opened is None:
            raise LocalError("use the client as 'async with Client(...) as client'")
        return self._opened

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

        Raises NotFound (with the names that exist), UpstreamError, TrustError, IntegrityError, DiskError, TargetExists,
        ConfigError (no root of trust).
        """
        asked = parse_task_id(task_id) if isinstance(task_id, str) else task_id
        urls: Mapping[Digest, Sequence[str]] = {}
        manifest = await self.manifest(asked.model, asked.ref)
        if not await self._guide.ready():
            with suppress(NotFound, UpstreamError):  # it would only name more sources
                urls = (await self.plan(replace(asked, ref=manifest.revision))).urls
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
        """What a ref means now, by the signed metadata. Raises NotFound, UpstreamError, TrustError, ConfigError."""
        return (await self._target(model, ref)).revision

    async def _target(self, model: str, ref: str) -> Target:
        await self._guide.ready()
        if self._trusted is None:
            self._trusted = await asyncio.to_thread(self._make_trusted)
        try:
            return await self._meant(self._trusted, model, ref)
        except NotFound:
            if not await await_mirror(self._guide, model, ref, SystemClock(), self._waiting):
                raise
        return await self._meant(self._trusted, model, ref)

    async def _meant(self, trusted: Trusted, model: str, ref: str) -> Target:
        """What the signed metadata says now. Raises NotFound also where what says more is not for this client."""
        try:
            return await trusted.target(model, ref)
        except NotLetIn as error:
            if error.refusal.error_code in ("token_missing", "forbidden"):  # of the role that private models are in
                raise NotFound(f"there is no public model {model}", code="unknown_model") from error
            raise error.refusal from error

    def _make_trusted(self) -> Trusted:
        """What is known of the metadata from before, in the user's data directory."""
        file, clock = self._trust_root or find_root(self.routers), self._clock
        root = read_root(file, clock.time(), "trust root")
        kept = TrustFile(state_file(root))
        return Trusted(
            root,
            _Sources(self._sessions, self._guide),
            clock,
            lifetime=0,
            name="client",
            file=kept,
            eager=(),
            asker=True,
        )

    async def manifest(self, model: str, ref: str) -> Manifest:
        """The manifest of a ref or revision: its bytes are checked against what was signed, or what was asked for.

        Raises NotFound, UpstreamError, TrustError, IntegrityError, ManifestInvalid, WrongModel or ConfigError.
        """
        with self._explained(model):
            return await self._manifest(model, ref)

    @contextmanager
    def _explained(self, model: str) -> Iterator[None]:
        """Services tell nobody who may not see a model whether there is one; the token tells why that may be."""
        try:
            yield
        except NotFound as error:
            if error.error_code != "unknown_model":
                raise
            if not self._token:
                raise NotFound(
                    f"there is no public model {model}; for a private one give your token: --token-file",
                    code="unknown_model",
                ) from error
            token = read_claims(self._token)
            if not token.may(Right.READ, model):
                scopes = ", ".join(map(str, token.scopes))
                raise RequestError(
                    f"there is no public model {model}, and your token is not for it but for {scopes}", code="forbidden"
                ) from error
            raise

    async def _manifest(self, model: str, ref: str) -> Manifest:
        length: int | None = None
        if is_revision(ref):
            revision = as_revision(ref)
        else:
            target = await self._target(model, ref)
            revision, length = target.revision, target.length
        await self._guide.ready()  # an answer may have told that nodes came or went

        async def take(url: str, answer: Fetched) -> Manifest:
            if digest_of(answer.body) != revision or length not in (None, len(answer.body)):
                raise IntegrityError(f"{url} sent a manifest that does not match its digest")
            manifest = await asyncio.to_thread(manifests.decode, answer.body)
            if manifest.model != model:
                raise WrongModel(f"a manifest of {manifest.model} came where {model} was asked for")
            if is_private(answer.headers):
                self._private.add(model)
            return manifest

        return await self._guide.ask(
            manifest_path(model, revision),
            take,
            key=model,
            limit=length or MAX_MANIFEST,
            missing="unknown_revision",
            immutable=True,
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
        with self._explained(model):
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
            self._sessions.resolve_ahead({_base(url) for named in urls.values() for url in named})
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
        private = manifest.model if manifest.model in self._private else ""

        async def work() -> None:
            for digest in waiting:
                data = await self._fetch(digest, manifest.shards[digest], urls.get(digest, ()), sources, meter, private)
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
        private: str = "",
    ) -> memoryview:
        """One shard (of the ``private`` model, if any), verified, from ``planned`` URLs or by the view.

        Raises the last source's error when all have failed. In a round nobody is asked twice.
        """
        failure: NearshardError = UpstreamError(f"nobody is named who has {digest}")
        data = memoryview(bytearray(size))
        reached, hashed = 0, hashlib.sha256()
        for number in range(ROUNDS):
            if number:
                await self._guide.renew()
            failed = self._guide.failed()
            for url in sorted(planned, key=lambda url: _base(url) in failed) or self._guide.urls(digest, private):
                begun = reached
                fields = self._guide.credentials(_base(url)) if private else {}
                try:
                    async with open_blob(
                        self._sessions.of(_base(url)), url, start=reached, size=size, max_size=size, headers=fields
                    ) as body:
                        outcome = _DETAIL.search(body.cache_status)
                        served = (_base(url), outcome[1] if outcome else "origin")
                        self._guide.hear(_base(url), body.epoch)
                        skip = reached - body.start
                        async for chunk in body.chunks:
                            await self._link.take(len(chunk))
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
                    failure = error.refusal if isinstance(error, NotLetIn) else error
                    if reached == begun or error.error_code in _STUCK:
                        self._guide.blame(_base(url), error)
        raise failure


class _Sources:
    """Who may have the metadata: routers, then nodes, then origins."""

    def __init__(self, sessions: Sessions, guide: Guide) -> None:
        self._sessions, self._guide = sessions, guide

    def bases(self) -> Sequence[str]:
        return self._guide.bases(TIMESTAMP, immutable=False)

    def session(self, base: str) -> aiohttp.ClientSession:
        return self._sessions.of(base)

    def answered(self, base: str, answer: Fetched) -> None:
        self._guide.hear(base, answer.headers.get(EPOCH, ""))

    def failed(self, base: str, error: UpstreamError) -> None:
        if not isinstance(error, NotLetIn):  # that is no fault of theirs
            self._guide.blame(base, error)

    def credentials(self, base: str) -> Mapping[str, str]:
        return self._guide.credentials(base)


class SyncClient:
    """The same, blocking: each call runs its own event loop. Not for use inside one."""

    def __init__(
        self,
        router: str | Sequence[str] = DEFAULT_ROUTER,
        *,
        region: str | None = None,
        concurrency: int = CONCURRENCY,
        kept: Kept | None = None,
        trust_root: Path | None = None,
        token: str = "",
        ca: Path | None = None,
        waiting: Waiting = lambda _: None,
        manners: Manners | None = None,
    ) -> None:
        """See ``Client``."""
        self._waiting = waiting
        self._router, self._region, self._concurrency = router, region, concurrency
        self._kept, self._trust_root, self._token, self._ca = kept or Kept(), trust_root, token, ca
        self._manners = manners

    def _make(self) -> Client:
        return Client(
            self._router,
            region=self._region,
            concurrency=self._concurrency,
            kept=self._kept,
            token=self._token,
            trust_root=self._trust_root,
            ca=self._ca,
            waiting=self._waiting,
            manners=self._manners,
        )

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
        self.add(0)

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
