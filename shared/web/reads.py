"""The read surface as routes: the same on every tier.

Documents (listings, manifests, plans) are answered here from what a tier knows; requests for bytes go to the
tier itself, which streams them (origin, edge) or sends the client on (router).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from aiohttp import web

from shared import codec, metalink, plan, representation, trust_chain
from shared.conditional import NotModified, evaluate
from shared.digest import Digest
from shared.errors import NotFound, RequestError, UpstreamError
from shared.ids import DEFAULT_REF, is_commit, is_revision, parse_name
from shared.manifest import Manifest
from shared.metrics import CONTENT_TYPE, Metrics
from shared.paths import (
    BlobPath,
    FilePath,
    ManifestPath,
    ModelPath,
    ModelsPath,
    ReadPath,
    TaskPath,
    TrustPath,
    parse_path,
)
from shared.representation import BINARY, IMMUTABLE, REVALIDATE, disposition
from shared.rollout import Subject
from shared.trust_names import ROOT, SNAPSHOT, TIMESTAMP, TIMESTAMP_FILE, file_name
from shared.web.access import Gate, keep_private, private_model, require_known
from shared.web.middleware import KIND, refuse_expectation
from shared.web.send import conditions

MANIFEST = "application/vnd.nearshard.manifest+msgpack"
_OFFERS = (BINARY, plan.MSGPACK, plan.JSON, metalink.METALINK)
KINDS: Mapping[type, str] = {
    TaskPath: "task", BlobPath: "blob", FilePath: "file",
    ManifestPath: "manifest", ModelPath: "model", ModelsPath: "models", TrustPath: "trust",
}  # fmt: skip


OfModel = ModelPath | ManifestPath | TaskPath | FilePath
ABSENT = ("unknown_model", "unknown_revision")
"""What an origin may still be able to get from the hub that it mirrors."""
Absent = Callable[[web.Request, str, str], Awaitable[bool]]
"""Asked for a model and ref that a tier does not know: whether it does now. Raises what is to be answered instead:
Mirroring while it is being fetched."""


@dataclass(frozen=True)
class Resolved:
    """A manifest that a ref or revision means right now. ``fields`` (Age, Cache-Status) go with answers."""

    manifest: Manifest
    fields: Mapping[str, str] = field(default_factory=dict)
    stale: bool = False
    """Whether the ref could not be revalidated: every upstream is away."""
    known_as: str = ""
    """The commit of the hub that it was taken from, where it was asked for by that or its ref has one."""
    provisional: bool = False
    """Whether it is passed on from a hub, and no revision yet: files have a size and a digest, and no shards."""

    @property
    def commit(self) -> str:
        """What other people's clients are to know it as."""
        return self.known_as or self.manifest.commit


@dataclass(frozen=True)
class Listing:
    """The JSON body of ``/models``, ``/models/<model>`` or a file of the signed metadata."""

    body: bytes
    fields: Mapping[str, str] = field(default_factory=dict)

    @property
    def etag(self) -> str:
        """Of these bytes."""
        return hashlib.sha256(self.body).hexdigest()


class Tier(Protocol):
    """What a tier answers the read surface from."""

    def who(self, request: web.Request) -> Subject:
        """Who asks, as far as a rollout is concerned. Raises RequestError (``bad_region``)."""
        ...

    async def resolve(self, model: str, ref: str, who: Subject) -> Resolved:
        """The manifest that a ref (to ``who``), revision or commit means. Raises NotFound or UpstreamError."""
        ...

    async def refs(self, model: str) -> Mapping[str, Digest]:
        """What the refs of a model mean; none for one that there is not. Raises UpstreamError."""
        ...

    async def listing(self, path: ModelPath | ModelsPath) -> Listing:
        """A listing. Raises NotFound or UpstreamError."""
        ...

    async def trust(self, path: TrustPath) -> Listing:
        """A file of the signed metadata. Raises NotFound or UpstreamError."""
        ...

    def sources(self, request: web.Request, path: TaskPath) -> plan.Sources:
        """Who can serve each shard, for a plan. Raises UpstreamError where nobody can."""
        ...

    def bases(self, request: web.Request, path: TaskPath | FilePath) -> Sequence[str]:
        """Base URLs to take a task or a file from, all at once, best first: for a metalink. Never empty."""
        ...

    async def bytes(self, request: web.Request, path: TaskPath | BlobPath | FilePath) -> web.StreamResponse:
        """Answer a request for bytes."""
        ...

    async def status(self) -> Mapping[str, Any]:
        """JSON for people and the dashboard."""
        ...

    def not_ready(self) -> str:
        """Why this cannot serve yet; empty when it can."""
        ...


def add_routes(
    app: web.Application,
    tier: Tier,
    gate: Gate,
    metrics: Metrics,
    *,
    degraded: Callable[[], str] = lambda: "",
    absent: Absent | None = None,
) -> None:
    """The read paths and the paths for operators, answered by ``tier`` to whom ``gate`` lets through. ``degraded``:
    what it does without, while it serves. ``absent``: who may have what this tier does not know of."""

    from shared import log  # the client has this module too, and structlog takes long to import

    async def read(request: web.Request) -> web.StreamResponse:
        path = parse_path(request.rel_url.raw_path)
        request[KIND] = KINDS[type(path)]
        try:
            await gate.enter(request, path)
            return await _answer(tier, gate, request, path)
        except NotFound as error:
            if absent is None or error.error_code not in ABSENT or not isinstance(path, OfModel):
                raise
            ref = DEFAULT_REF if isinstance(path, ModelPath) else path.ref
            if is_revision(ref) or not await absent(request, path.model, ref):
                raise
        await gate.enter(request, path)
        return await _answer(tier, gate, request, path)

    async def healthz(_: web.Request) -> web.Response:
        return web.json_response({"status": "up"}, headers=_PRIVATE)

    async def readyz(_: web.Request) -> web.Response:
        reason = tier.not_ready()
        state = {"status": "not ready", "reason": reason} if reason else {"status": "ready"}
        if without := degraded():
            state["degraded"] = without
        return web.json_response(state, status=503 if reason else 200, headers=_PRIVATE)

    async def status(_: web.Request) -> web.Response:
        return web.json_response({**await tier.status(), "errors": log.recent()}, headers=_PRIVATE)

    async def render(_: web.Request) -> web.Response:
        return web.Response(body=metrics.render(), headers={"Content-Type": CONTENT_TYPE, **_PRIVATE})

    app.on_response_prepare.append(keep_private)
    for prefix in ("/shards/" + _ANY, "/blobs/" + _ANY, "/models", "/models/" + _ANY, "/trust/" + _ANY):
        get(app, prefix, read)
    for name, handler in (("healthz", healthz), ("readyz", readyz), ("status", status), ("metrics", render)):
        get(app, f"/{name}", handler)


_ANY = "{path:[\\s\\S]*}"
"""The rest of a path, line breaks and all: ``shared.paths`` says what is wrong with it."""
_PRIVATE = {"Cache-Control": "no-store"}


def get(app: web.Application, path: str, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> None:
    """Route GET and HEAD; Expect is answered in our words."""
    for method in ("GET", "HEAD"):
        app.router.add_route(method, path, handler, expect_handler=refuse_expectation)


async def _answer(tier: Tier, gate: Gate, request: web.Request, path: ReadPath) -> web.StreamResponse:
    match path:
        case ModelsPath():
            listing = await _seen(await tier.listing(path), gate, request)
            lifetime = "private, no-cache" if await gate.token(request) else REVALIDATE
            return document(request, listing.body, "application/json", listing.etag, lifetime, listing.fields)
        case ModelPath():
            listing = await tier.listing(path)
            return document(request, listing.body, "application/json", listing.etag, REVALIDATE, listing.fields)
        case ManifestPath():
            found = await tier.resolve(path.model, path.ref, tier.who(request))
            revision = found.manifest.revision
            if is_commit(path.ref) and path.ref != found.manifest.commit:  # its name is how it is checked
                raise NotFound("a commit of another hub", code="unknown_revision")
            lifetime = IMMUTABLE if is_revision(path.ref) or is_commit(path.ref) else REVALIDATE
            fields = {**found.fields, "Nearshard-Revision": revision}
            etag = revision.removeprefix("sha256:")
            return document(request, found.manifest.encoded, MANIFEST, etag, lifetime, fields)
        case TrustPath():
            found_file = await tier.trust(path)
            if path.role == TIMESTAMP and _accepts(request, trust_chain.MEDIA_TYPE):
                chain = Listing(await _chain(tier, found_file.body, *_chain_terms(request)), found_file.fields)
                fields = {**chain.fields, "Vary": "Accept"}
                return document(request, chain.body, trust_chain.MEDIA_TYPE, chain.etag, REVALIDATE, fields)
            lifetime = IMMUTABLE if path.version else REVALIDATE
            return document(request, found_file.body, "application/json", found_file.etag, lifetime, found_file.fields)
        case BlobPath():
            return await tier.bytes(request, path)
        case TaskPath() | FilePath():
            form = _form(request, path)
            if form == BINARY:
                return await tier.bytes(request, path)
            try:
                require_known(request)
                found = await tier.resolve(path.model, path.ref, tier.who(request))
            except UpstreamError:
                if form == metalink.METALINK:  # a router sends the client on: a node may know, and has a metalink too
                    return await tier.bytes(request, path)
                raise
            have = await _held(tier, request, path) if form in (plan.MSGPACK, plan.JSON) else frozenset()
            return _described(tier, request, path, form, found, have)


async def _held(tier: Tier, request: web.Request, path: TaskPath | FilePath) -> frozenset[Digest]:
    """The shards of the revisions that the client says it has. Raises BadId."""
    held: set[Digest] = set()
    for revision in plan.parse_have(request.query.getall("have", ())):
        with suppress(NotFound, UpstreamError):  # unknown here by now: a plan without deltas from it is right too
            held.update((await tier.resolve(path.model, revision, tier.who(request))).manifest.shards)
    return frozenset(held)


def _accepts(request: web.Request, media_type: str) -> bool:
    """Whether a field asks for this by name: who sends none, or takes anything, gets what everybody gets."""
    return media_type in (part.partition(";")[0].strip().lower() for part in ",".join(_accept(request)).split(","))


def _chain_terms(request: web.Request) -> tuple[int, str]:
    """``?root=``: the version of the root that whoever asks has; ``?org=``: whose public models it is to tell of.
    Raises RequestError, BadId."""
    root, org = request.query.get("root", "0"), request.query.get("org", "")
    if not (root.isascii() and root.isdecimal() and len(root) <= 9):
        raise RequestError("root is the version of the root.json that you have")
    return int(root), parse_name(org, "an organisation") if org else ""


async def _chain(tier: Tier, timestamp: bytes, root: int, org: str) -> bytes:
    """The timestamp, the roots after ``root`` (where that is known), and the files that these lead to."""
    files: dict[str, bytes | None] = {TIMESTAMP_FILE: timestamp}

    async def add(role: str, version: int) -> bytes | None:
        name = file_name(role, version)
        try:
            files[name] = (await tier.trust(TrustPath(role, version))).body
        except NotFound:
            files[name] = None
        return files[name]

    for version in range(root + 1, root + 1 + trust_chain.MAX_ROOTS) if root else ():
        if await add(ROOT, version) is None:
            break
    known = trust_chain.leads_to(timestamp)
    for role in trust_chain.roles(org):
        with suppress(UpstreamError):  # whoever needs it asks for it, and hears why
            if role in known and (data := await add(role, known[role])) and role == SNAPSHOT:
                known |= trust_chain.leads_to(data)
    while sum(len(data or b"") for data in files.values()) > trust_chain.MAX_CHAIN:
        files.popitem()
    return trust_chain.encode(files)


def _accept(request: web.Request) -> Sequence[str]:
    return request.headers.getall("Accept", ())


async def _seen(listing: Listing, gate: Gate, request: web.Request) -> Listing:
    """The names in a listing that whoever asks may know of."""
    names = json.loads(listing.body)["models"]
    shown = [name for name in names if await gate.sees(request, name)]
    return Listing(codec.encode_json({"models": shown}), {**listing.fields, "Vary": "Authorization"})


def _form(request: web.Request, path: TaskPath | FilePath) -> str:
    """The media type to answer in. Raises RequestError (406) for a task."""
    accept = ",".join(_accept(request))
    if isinstance(path, TaskPath):
        return plan.negotiate(accept, _OFFERS)
    try:
        return plan.negotiate(accept, (BINARY, metalink.METALINK))
    except RequestError:
        return BINARY  # a file is of any type: RFC 9110 §12.5.1 lets us send it all the same


def _described(
    tier: Tier,
    request: web.Request,
    path: TaskPath | FilePath,
    form: str,
    found: Resolved,
    have: frozenset[Digest],
) -> web.StreamResponse:
    """What is said of a task or a file in place of its bytes: a plan or a metalink."""
    revision = found.manifest.revision
    fields = {**found.fields, "Vary": "Accept, Nearshard-Region", "Nearshard-Revision": revision}
    if form == metalink.METALINK:
        shown = representation.of_path(path, found.manifest)
        urls = [base + path.at(revision) for base in tier.bases(request, path)]
        body = metalink.build(shown.filename, shown.layout, found.manifest.piece_length, urls)
        fields["Content-Disposition"] = disposition(shown.filename + metalink.SUFFIX)
    else:
        assert isinstance(path, TaskPath)
        built = plan.build(
            found.manifest,
            found.manifest.task(path.task_id.task),
            tier.sources(request, path),
            private=bool(private_model(request)),
            have=have,
        )
        body = codec.encode(built) if form == plan.MSGPACK else codec.encode_json(built)
    return document(request, body, form, hashlib.sha256(body).hexdigest(), "private, no-cache", fields)


def document(
    request: web.Request, body: bytes, content_type: str, etag: str, lifetime: str, fields: Mapping[str, str]
) -> web.Response:
    """A small document with its validator: 200 or 304. Ranges of documents are not served (RFC 9110 §14.2)."""
    headers = {"ETag": f'"{etag}"', "Cache-Control": lifetime, "Accept-Ranges": "none", **fields}
    if isinstance(evaluate(conditions(request), etag, None), NotModified):
        return web.Response(status=304, headers=headers)
    headers["Content-Type"] = content_type
    if request.method == "HEAD":
        return web.Response(headers={**headers, "Content-Length": str(len(body))})
    return web.Response(body=body, headers=headers)
