"""The SDK: tasks and models, fetched shard by shard from the nodes that own them, verified.

1. Have a view of the network (``nearshard.guide``), and the signed metadata, which is checked here against the root
   that this network is known by: it says what the ref means, a revision. Who names a revision needs none.
2. Get that revision's manifest from whoever has it. Its digest is the revision, so the layout and the digests in it are
   right whoever sent them.
3. Fetch the shards that are needed, several at once, each from its owner or the next source that answers; go on from
   the byte reached with the next one. Where that is fewer bytes, parcels are fetched in place of a shard, and decoded
   upon what is here (``nearshard.rebuilding``). A shard counts when its digest is right.
4. Put the files together beside their targets, and rename them there.

Where the client is given an edge or an origin in place of a router, it asks that one for a plan as well. Plans and
views are advice: they can cost time, but no byte.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import aiohttp

from nearshard.activation import Activation
from nearshard.assembly import Assembly, Places, read_shard
from nearshard.beside import Beside, absent, earlier
from nearshard.client_id import client_id
from nearshard.guide import Guide, parse_routers
from nearshard.kept import Kept
from nearshard.manners import Manners
from nearshard.mirrored import Waiting, await_mirror
from nearshard.networks import DEFAULT_ROUTER, find_root, state_file
from nearshard.opened import AHEAD, BlockingFile, OpenFile, running
from nearshard.rebuilding import Find, Rebuilding, Tally, choose
from nearshard.repository import Found, Links, Repository
from nearshard.room import check_room
from nearshard.switches import Switches
from nearshard.tensors import Framework, load
from nearshard.transfer import Meter, Progress, Transfer, base_of
from shared import codec, plan
from shared import manifest as manifests
from shared.acceptance import Acceptance, accept
from shared.clock import Clock, SystemClock
from shared.digest import Digest, digest_of
from shared.errors import (
    BadId,
    ConfigError,
    DecodeError,
    IntegrityError,
    LocalError,
    NearshardError,
    NotFound,
    RequestError,
    UpstreamError,
    WrongModel,
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
from shared.pins import parse_pins, pinned
from shared.rollout import Subject
from shared.tokens import Right, read_claims
from shared.trust import Target
from shared.trust_file import TrustFile, read_root
from shared.trust_names import TIMESTAMP
from shared.view import EPOCH
from shared.web.access import is_private
from shared.web.session import CLIENT_IDLE, Fetched, NotLetIn, Sessions
from shared.web.tls import tls_by
from shared.web.trusted import Trusted

if TYPE_CHECKING:  # they are imported by who takes part in rounds, which most clients never do
    from nearshard.federated.sending import Sender
    from nearshard.federated.submitting import Submitted
    from nearshard.federated.values import Values
    from shared.federated import OpenRound, Rounds

T = TypeVar("T")


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
    """Bytes of shards, and of parcels in their place, that were fetched; 0 where everything was there."""
    seconds: float
    sources: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """Bytes by (base URL of who served them, how: an outcome, or ``origin``)."""
    saved: int = 0
    """Bytes of shards that did not have to be moved: they were here, or came as deltas or compressed."""
    refused: int = 0
    """Shards that came whole because a delta was wrong, or could not be had or used."""
    active: Path | None = None
    """Where programs find this revision, if it is what the ref's path in the repository leads to."""


class Client:
    """An asynchronous client of one network, by its routers (or of an edge or origin: they answer the same paths).

    Use as ``async with Client(url) as client``.
    """

    def __init__(
        self,
        router: str | Sequence[str] = DEFAULT_ROUTER,
        *,
        region: str | None = None,
        concurrency: int | None = None,
        kept: Kept | None = None,
        trust_root: Path | None = None,
        token: str = "",
        ca: Path | None = None,
        waiting: Waiting = lambda _: None,
        repository: Path | None = None,
        manners: Manners | None = None,
        clock: Clock | None = None,
        pins: Sequence[str] = (),
        accept_expired: Sequence[str] = (),
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        """``router``: a URL, or several of routers that know the same nodes (also in one text, between commas).
        ``kept``: where the last view of the network is; in memory by default. ``trust_root``: a root.json of the
        network; by default the one that ``nearshard up`` or ``nearshard trust accept`` has noted for its routers.
        ``token``: for private models; told to nobody but the routers, nodes and origins of this network. ``ca``: file
        of the deployment's CA, that servers are checked by, beside the system's. ``concurrency``: shards fetched at
        once; as many as the links are worth by default. ``waiting``: told how far it is while an origin gets a model
        from the hub that it mirrors. ``repository``: directory of a local repository that all is kept in; by default
        what is fetched to an output is there only, and all else in the user's repository. ``manners``: rates, windows,
        metered, proxy (``parse_manners``). ``pins``: refs that mean one revision here, whatever is signed, each
        ``MODEL@REF=sha256:…``. ``accept_expired``: what is answered by metadata that has expired, each like
        ``org/name@ref until 2027-01-31``; ``warn`` is told a line each time. Raises RequestError, BadId, ConfigError.
        """
        self._waiting = waiting
        self._pins = parse_pins(pins)
        self._tls = tls_by(ca)
        self.routers = parse_routers(router)
        self._region = parse_name(region, "a region") if region else None
        self._clock = clock or SystemClock()
        self._accepted, self._warn = accept(accept_expired, self._clock.time(), "accept_expired"), warn
        self._manners = manners or Manners()
        self._concurrency = self._manners.connections(concurrency)
        self._link = Link(self._clock, self._manners.policy)
        self._repository = Repository(repository, self._clock) if repository else None
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
        otherwise it is a directory for body and small files. Without one the task is in the local repository.

        Only shards that this disk does not have are fetched, and a later call goes on where this one was ended.
        Raises NotFound (with the names that exist), UpstreamError, TrustError, IntegrityError, DiskError, TargetExists,
        ConfigError (no root of trust).
        """
        asked = parse_task_id(task_id) if isinstance(task_id, str) else task_id
        urls: Mapping[Digest, Sequence[str]] = {}
        manifest = await self.manifest(asked.model, asked.ref)
        if not await self._is_guided(manifest):
            with suppress(NotFound, UpstreamError):  # it would only name more sources
                have = await asyncio.to_thread(self._held, asked.model) if self._repository or output is None else ()
                urls = (await self.plan(replace(asked, ref=manifest.revision), have)).urls
        links, targets = self.repository.task(manifest, asked.task), None
        if output is not None:
            target, task = Path(output), manifest.task(asked.task)
            if target.suffix and not target.is_dir():
                targets = {target: task.layout}
            else:
                targets = {target / task.filename: task.layout}
                targets |= {target / path: manifest.files[path] for path in task.files}
        return await self._deliver(manifest, asked.ref, links, targets, urls, force=force, progress=progress)

    async def pull(
        self,
        model: str,
        ref: str = DEFAULT_REF,
        output: str | Path | None = None,
        *,
        force: bool = False,
        progress: Progress | None = None,
    ) -> Got:
        """Fetch every file of a model into the directory ``output``; without one, into the local repository. Raises
        as ``get``."""
        manifest = await self.manifest(parse_model(model), parse_ref_or_revision(ref))
        links, targets = self.repository.files(manifest), None
        if output is not None:
            targets = {Path(output) / path: layout for path, layout in manifest.files.items()}
        return await self._deliver(manifest, ref, links, targets, {}, force=force, progress=progress)

    @asynccontextmanager
    async def open(
        self, task_id: str | TaskId, path: str | None = None, *, ahead: int = AHEAD
    ) -> AsyncIterator[OpenFile]:
        """A task, or the model's file at ``path``, to be read anywhere without having it.

        What the local repository has is read there; other shards come from the network, ``ahead`` of them ahead of who
        reads from front to back. Raises as ``get``; reading does, too.
        """
        asked = parse_task_id(task_id) if isinstance(task_id, str) else task_id
        manifest = await self.manifest(asked.model, asked.ref)
        layout = manifest.task(asked.task).layout if path is None else manifest.file(path)
        opened = OpenFile(
            layout, await self.reader(manifest, layout.shards()), ahead=0 if self._manners.policy.metered else ahead
        )
        try:
            yield opened
        finally:
            await opened.close()

    async def reader(
        self, manifest: Manifest, likely: Iterable[Digest] = ()
    ) -> Callable[[Digest], Awaitable[memoryview]]:
        """What gives a shard of a revision (or a parcel), checked: of the local repository, else of the network.
        ``likely``: shards that come as deltas where that is fewer bytes. It raises as ``get``."""
        await self._is_guided(manifest)
        places = await asyncio.to_thread(self.repository.find, manifest)
        find, tally = _find_in(places), Tally()
        wanted = {digest: manifest.shards[digest] for digest in likely if digest not in places}
        chosen, _ = await asyncio.to_thread(partial(choose, manifest, wanted, find, compressed=self._compressed))
        rebuilding = Rebuilding(self._transfer(manifest, {}, tally, Meter(0, None)), manifest, chosen, find, tally)

        async def read(digest: Digest) -> memoryview:
            size = manifest.size_of(digest)
            for place in find(digest):
                data = await asyncio.to_thread(read_shard, place, digest, size)
                if data is not None:
                    return memoryview(data)
            return await rebuilding.fetch(digest)

        return read

    async def load_task(
        self, task_id: str | TaskId, *, framework: Framework = "numpy", progress: Progress | None = None
    ) -> dict[str, Any]:
        """The tensors of a task by name, mapped from the local repository: ``numpy.ndarray`` or ``torch.Tensor``.

        Nothing is read before it is used, nothing is copied; what is written to an array stays in this process. Raises
        as ``get``; TensorFileError for a task that is no safetensors file, MissingPackage, UnknownDtype.
        """
        got = await self.get(task_id, progress=progress)
        return await asyncio.to_thread(load, got.paths[0], framework)

    async def repair(self, model: str, revision: Digest, *, progress: Progress | None = None) -> Got:
        """Read all that the repository holds of a revision, and fetch the shards that are not right. Raises as
        ``get``."""
        started, tally = time.perf_counter(), Tally()
        manifest = await self.manifest(model, revision)
        tasks_and_files = await asyncio.to_thread(self.repository.held, manifest)
        links = self.repository.links(manifest, tasks_and_files.tasks, tasks_and_files.files)
        await self._is_guided(manifest)
        await self._keep(manifest, revision, links, {}, tally, progress, check=True)
        return _got(manifest, links, tally, started)

    async def plan(self, task_id: TaskId, have: Sequence[Digest] = ()) -> plan.Plan:
        """The plan of a task, for who has these revisions of the model (plan.MAX_HAVE at most). Raises NotFound or
        UpstreamError."""

        async def take(_: str, answer: Fetched) -> plan.Plan:
            found = plan.decode(answer.body)
            if (found.task_id.model, found.task_id.task) != (task_id.model, task_id.task):
                raise WrongModel(f"the plan is for {found.task_id}, not {task_id}")
            if is_revision(task_id.ref) and found.revision != task_id.ref:
                raise IntegrityError("the plan is for another revision than was asked for")
            return found

        await self._guide.ready()
        query = "&".join(f"have={revision}" for revision in have)
        return await self._guide.ask(
            f"{task_path(task_id)}?{query}" if query else task_path(task_id),
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
        """What the ref means to this client, by its id and its region where a rollout is under way."""
        target = await self._signed_target(model, ref)
        if target.rollout is None:
            return target
        key = await asyncio.to_thread(client_id)
        return target.meant_for(model, ref, Subject(key, self._region or self._guide.region))

    async def _signed_target(self, model: str, ref: str) -> Target:
        away: UpstreamError | None = None
        try:
            await self._guide.ready()
        except UpstreamError as error:  # what is known of the metadata may do
            away = error
        try:
            trusted = await self.trusted()
        except ConfigError as error:  # by the URLs of who is there its root may be known
            raise away or error from None
        try:
            return await self._meant(trusted, model, ref)
        except NotFound:
            if not await await_mirror(self._guide, model, ref, SystemClock(), self._waiting):
                raise
        return await self._meant(trusted, model, ref)

    async def trusted(self) -> Trusted:
        """The signed metadata as it is believed here. Raises ConfigError where no root of the network is trusted."""
        if self._trusted is None:
            self._trusted = await asyncio.to_thread(self._make_trusted)
        return self._trusted

    @property
    def unconfirmed(self) -> UpstreamError | None:
        """Why nobody could say whether refs still mean what they did; None where somebody did, or was not asked."""
        return self._trusted.unconfirmed if self._trusted else None

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
        sources = _Sources(self._sessions, self._guide)
        return Trusted(
            root,
            sources,
            clock,
            lifetime=0,
            name="client",
            file=kept,
            eager=(),
            asker=True,
            accepted=self._accepted,
            accepting=self._say_accepted,
        )

    def _say_accepted(self, accepted: Acceptance) -> None:
        """Not once without a word."""
        age = (self._trusted.age() if self._trusted else None) or 0.0
        self._warn(
            f"the metadata of {accepted.model} has expired: it was signed {age / 86_400:.1f} days ago, and nobody could"
            f" be asked for newer; accepted as you said: {accepted.text}"
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
        elif stays_at := await asyncio.to_thread(self._stays_at, model, ref):
            revision = stays_at
        else:
            target = await self._target(model, ref)
            revision, length = target.revision, target.length
        with suppress(NotFound, IntegrityError):
            return await asyncio.to_thread(self._kept_manifest, model, revision)
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

    def _stays_at(self, model: str, ref: str) -> Digest | None:
        """The revision that somebody has this client or its repository stay at, whatever the ref means."""
        now = Switches(self.repository.root, model).now(ref)
        return pinned(self._pins, model, ref, "") or (now.active if now and now.stays else None)

    def _kept_manifest(self, model: str, revision: Digest) -> Manifest:
        """From the repository. Raises NotFound, IntegrityError."""
        manifest = self.repository.manifest(model, revision)
        if self.repository.record(model, revision).private:
            self._private.add(model)
        return manifest

    async def _is_guided(self, manifest: Manifest) -> bool:
        """Whether the sources of shards are known by a view; also where nobody answers, since all may be here."""
        try:
            return await self._guide.ready()
        except UpstreamError:
            return True

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

    # Federated rounds

    async def rounds(self, model: str, *, url: str = "") -> Rounds:
        """The open round of a model, and the last ones. ``url``: an edge or an origin to ask; by default the nodes
        nearby, then the origins. Raises NotFound, RequestError, UpstreamError."""
        sender = await self._sender(parse_model(model), url, None)
        with self._explained(model):
            return await sender.rounds(model)

    async def submit(
        self,
        model: str,
        trained: str | Path | Mapping[str, Any],
        base: str,
        *,
        site: str | None = None,
        sites: Path | None = None,
        examples: int = 1,
        codec: str = "",
        feedback: bool = True,
        momentum: float = 0.0,
        warm_up: int = 0,
        url: str = "",
        progress: Progress | None = None,
    ) -> Submitted:
        """Send what was ``trained`` upon the revision (or ref) ``base`` to the open round, as a signed, compressed
        difference; nothing else leaves this machine.

        ``trained``: a directory or a file of safetensors, or a state dict of numpy arrays or torch tensors; of its
        tensors those count that the round takes. ``site``: which one of this machine's, below ``sites``; may be left
        out where there is one. ``examples``: how many were trained on. ``codec``: by default the one that suits the
        tensors. ``feedback``: whether what it leaves out is kept here, and added to the next update, with ``momentum``
        (0 to below 1). ``warm_up``: updates of this site in which a ``top`` codec sends a larger share. ``url``: as of
        ``rounds``. ``progress``: told bytes sent and bytes in all.

        An update that an earlier call left on its way is settled first. Raises RequestError (Rejected: by the origin),
        UpstreamError where it could not be sent to the end (the next call goes on), and as ``get``; NonFinite,
        TensorFileError, ConfigError, DiskError.
        """
        from nearshard.federated.making import Manner
        from nearshard.federated.site import find_site
        from nearshard.federated.submitting import Submitting  # takes long to import, and most need none of it

        manner = Manner(codec, feedback, momentum, warm_up)
        of = await asyncio.to_thread(find_site, site, sites)
        submitting = Submitting(of, parse_model(model), await self._sender(model, url, progress), self._clock)
        revision = as_revision(base) if is_revision(base) else await self.revision(model, parse_ref_or_revision(base))

        async def read_base(revision: Digest, opened: OpenRound) -> tuple[Manifest, Mapping[str, Values]]:
            return await self._base_of(model, revision, opened.tensors)

        given = trained if isinstance(trained, Mapping) else Path(trained)
        return await submitting.submit(given, revision, read_base, examples=examples, manner=manner)

    async def _base_of(
        self, model: str, revision: Digest, globs: Sequence[str]
    ) -> tuple[Manifest, Mapping[str, Values]]:
        """A revision, and the tensors of it that a round takes, from the local repository; what is missing there is
        fetched."""
        from nearshard.federated.values import joined
        from shared.federated import taken

        manifest = await self.manifest(model, revision)
        wanted = taken(manifest.tensors, globs)
        if not wanted:
            raise RequestError(f"the round takes no tensor that {model} {revision} has", code="schema_mismatch")
        paths = {tensor.file for tensor in manifest.tensors if tensor.name in wanted}
        links = self.repository.files(manifest, sorted(paths))
        await self._is_guided(manifest)
        await self._keep(manifest, revision, links, {}, Tally(), None)
        values = await asyncio.to_thread(joined, links)
        return manifest, {name: values[name] for name in wanted}

    async def _sender(self, model: str, url: str, progress: Progress | None) -> Sender:
        """What asks about rounds: of ``url``, or of whom the view names, nodes nearby first."""
        from nearshard.federated.sending import Sender

        if url:
            (given,) = parse_routers(url)
        else:
            await self._guide.ready()

        def bases() -> Sequence[str]:
            return [given] if url else self._guide.bases(model, immutable=True)

        return Sender(self._sessions, bases, self._guide.credentials, self._clock, self._link, progress)

    # Fetching

    def _transfer(
        self, manifest: Manifest, urls: Mapping[Digest, Sequence[str]], tally: Tally, meter: Meter
    ) -> Transfer:
        return Transfer(
            self._sessions,
            self._guide,
            self._clock,
            self._link,
            private=manifest.model if manifest.model in self._private else "",
            wanted_for=f"{manifest.model}@{manifest.revision}",
            planned=urls,
            sources=tally.sources,
            meter=meter,
        )

    @property
    def _compressed(self) -> bool:
        """Whether shards are asked for compressed: not of nodes nearby. The way to these is short, and a node may have
        to fetch what is compressed, over the link that it spares, where it could make the shard of what it holds."""
        return not self._guide.near or self._manners.policy.metered or bool(self._manners.policy.rate)

    async def _fetch_all(
        self,
        manifest: Manifest,
        assembly: Assembly,
        places: Places,
        urls: Mapping[Digest, Sequence[str]],
        tally: Tally,
        progress: Progress | None,
    ) -> None:
        """Have what an assembly needs, and ``places`` do not have. Raises the first error, once what came is kept."""
        await asyncio.to_thread(assembly.prepare, places)
        self._sessions.resolve_ahead({base_of(url) for named in urls.values() for url in named})
        find = _find_in(places, assembly)
        wanted = {digest: assembly.left(digest) for digest in assembly.needed()}
        chosen, left = await asyncio.to_thread(partial(choose, manifest, wanted, find, compressed=self._compressed))
        transfer = self._transfer(manifest, urls, tally, Meter(left, progress))
        rebuilding = Rebuilding(transfer, manifest, chosen, find, tally)
        await transfer.fetch_all(tuple(wanted), lambda digest: rebuilding.land(digest, assembly), self._concurrency)

    async def _keep(
        self,
        manifest: Manifest,
        ref: str,
        links: Links,
        urls: Mapping[Digest, Sequence[str]],
        tally: Tally,
        progress: Progress | None,
        *,
        check: bool = False,
    ) -> Repository:
        """Have all of ``links`` in the repository, checked; only what is missing or wrong is fetched.

        ``check``: read also what has not changed since it was last checked.
        """
        repository, model = self.repository, manifest.model
        if not check and await asyncio.to_thread(repository.has, model, links):
            return repository
        layouts = {layout.sha256: layout for layout in links.values()}
        async with repository.locked(model):
            await asyncio.to_thread(repository.note, manifest, self._found_by(manifest, ref))
            missing = await asyncio.to_thread(repository.missing, manifest, list(layouts.values()), check=check)
            if missing:
                assembly = repository.assembly(manifest, missing)
                places = await asyncio.to_thread(repository.find, manifest)
                await self._fetch_all(manifest, assembly, places, urls, tally, progress)
                await asyncio.to_thread(repository.finish, manifest, assembly, missing)
            await asyncio.to_thread(repository.hold, manifest, links)
        return repository

    async def _deliver(
        self,
        manifest: Manifest,
        ref: str,
        links: Links,
        targets: Mapping[Path, Layout] | None,
        urls: Mapping[Digest, Sequence[str]],
        *,
        force: bool,
        progress: Progress | None,
    ) -> Got:
        """Files at ``targets`` (by default where the repository shows them), from the repository where there is one."""
        started, tally = time.perf_counter(), Tally()
        wanted, active = links if targets is None else targets, None
        missing = {} if targets is None else await asyncio.to_thread(absent, targets, force=force)
        if missing and self._repository:
            await asyncio.to_thread(
                check_room, {path: layout.size for path, layout in missing.items()}, self._repository.root
            )
        if targets is None or (missing and self._repository):
            repository = await self._keep(manifest, ref, links, urls, tally, progress)
            active = await asyncio.to_thread(self._activate, manifest, ref)
            await asyncio.to_thread(repository.deliver, manifest.model, missing)
        elif missing:
            assembly = await asyncio.to_thread(Beside, missing, manifest.shards)
            with assembly:
                places = await self._earlier(manifest, missing)
                await self._fetch_all(manifest, assembly, places, urls, tally, progress)
                await asyncio.to_thread(assembly.finish, missing)
        return replace(_got(manifest, wanted, tally, started), active=active)

    async def _earlier(self, manifest: Manifest, targets: Mapping[Path, Layout]) -> Places:
        """What files of the revision before have of this one, where they are about to be replaced by it."""
        if manifest.parent is None or not any(target.exists() for target in targets):
            return {}
        try:
            before = await self.manifest(manifest.model, manifest.parent)
        except NearshardError:  # its manifest may be gone: then what these files have is not known
            return {}
        return await asyncio.to_thread(earlier, targets, before)

    def _activate(self, manifest: Manifest, ref: str) -> Path | None:
        """All is here that was asked for: have the path of the ref lead there; None where it does not. Raises
        DiskError."""
        if is_revision(ref) or not Activation(self.repository, manifest.model, self._clock).follow(manifest, ref):
            return None
        return Switches(self.repository.root, manifest.model).path(ref)

    def _found_by(self, manifest: Manifest, ref: str) -> Found:
        """How a revision was found."""
        name = "" if is_revision(ref) else ref
        evidence = self._trusted.evidence(manifest.model) if self._trusted and name else b""
        return Found(name, manifest.model in self._private, evidence)

    def _held(self, model: str) -> list[Digest]:
        """The revisions that the repository holds of a model, newest first: as many as one tells of."""
        try:
            return self.repository.revisions(model)[: plan.MAX_HAVE]
        except NotFound:
            return []

    @property
    def repository(self) -> Repository:
        """The repository of this client, or the user's."""
        return self._repository or Repository(clock=self._clock)


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
        concurrency: int | None = None,
        kept: Kept | None = None,
        trust_root: Path | None = None,
        token: str = "",
        ca: Path | None = None,
        waiting: Waiting = lambda _: None,
        repository: Path | None = None,
        manners: Manners | None = None,
        pins: Sequence[str] = (),
        accept_expired: Sequence[str] = (),
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        """See ``Client``."""
        self._make = partial(
            Client,
            router,
            region=region,
            concurrency=concurrency,
            kept=kept or Kept(),
            trust_root=trust_root,
            token=token,
            ca=ca,
            waiting=waiting,
            repository=repository,
            manners=manners,
            pins=pins,
            accept_expired=accept_expired,
            warn=warn,
        )

    def _run(self, call: Callable[[Client], Awaitable[T]]) -> T:
        async def run() -> T:
            async with self._make() as client:
                return await call(client)

        return asyncio.run(run())

    def get(
        self,
        task_id: str | TaskId,
        output: str | Path | None = None,
        *,
        force: bool = False,
        progress: Progress | None = None,
    ) -> Got:
        """See ``Client.get``."""
        return self._run(lambda client: client.get(task_id, output, force=force, progress=progress))

    def rounds(self, model: str, *, url: str = "") -> Rounds:
        """See ``Client.rounds``."""
        return self._run(lambda client: client.rounds(model, url=url))

    def submit(
        self,
        model: str,
        trained: str | Path | Mapping[str, Any],
        base: str,
        *,
        site: str | None = None,
        sites: Path | None = None,
        examples: int = 1,
        codec: str = "",
        feedback: bool = True,
        momentum: float = 0.0,
        warm_up: int = 0,
        url: str = "",
        progress: Progress | None = None,
    ) -> Submitted:
        """See ``Client.submit``."""
        return self._run(
            lambda client: client.submit(
                model,
                trained,
                base,
                site=site,
                sites=sites,
                examples=examples,
                codec=codec,
                feedback=feedback,
                momentum=momentum,
                warm_up=warm_up,
                url=url,
                progress=progress,
            )
        )

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
        return self._run(lambda client: client.pull(model, ref, output, force=force, progress=progress))

    def load_task(
        self, task_id: str | TaskId, *, framework: Framework = "numpy", progress: Progress | None = None
    ) -> dict[str, Any]:
        """See ``Client.load_task``."""
        return self._run(lambda client: client.load_task(task_id, framework=framework, progress=progress))

    @contextmanager
    def open(self, task_id: str | TaskId, path: str | None = None, *, ahead: int = AHEAD) -> Iterator[BlockingFile]:
        """See ``Client.open``; a file of ``io`` that others' libraries read from. Its loop is in a thread."""
        with running() as run:
            client = self._make()
            run(client.__aenter__())
            try:
                opening = client.open(task_id, path, ahead=ahead)
                opened = run(opening.__aenter__())
                try:
                    yield BlockingFile(opened, run)
                finally:
                    run(opening.__aexit__(None, None, None))
            finally:
                run(client.__aexit__(None, None, None))

    def models(self) -> list[str]:
        """See ``Client.models``."""
        return self._run(lambda client: client.models())

    def describe(self, model: str) -> dict[str, Any]:
        """See ``Client.describe``."""
        return self._run(lambda client: client.describe(model))


def _find_in(places: Places, assembly: Assembly | None = None) -> Find:
    """Where shards are on this disk: in what is being put together, too."""
    return lambda digest: [*(assembly.places(digest) if assembly else ()), *places.get(digest, ())]


def _got(manifest: Manifest, wanted: Mapping[Path, Layout], tally: Tally, started: float) -> Got:
    moved = tally.sources.total()
    shards = {digest for layout in wanted.values() for digest in layout.shards()}
    return Got(
        manifest.model,
        manifest.revision,
        tuple(wanted),
        sum(layout.size for layout in wanted.values()),
        moved,
        time.perf_counter() - started,
        dict(tally.sources),
        saved=max(0, sum(manifest.shards[digest] for digest in shards) - moved),
        refused=tally.refused,
    )


def _document(url: str, answer: Fetched) -> dict[str, Any]:
    """A JSON object. Raises UpstreamError."""
    try:
        document = codec.decode_json(answer.body, MAX_MANIFEST)
    except DecodeError as error:
        raise UpstreamError(f"{url} sent no JSON") from error
    if not isinstance(document, dict):
        raise UpstreamError(f"{url} sent no JSON object")
    return document
