"""The paths of the Hugging Face Hub and of ModelScope, on every tier, so that their clients work unchanged.

* HEAD of a file is answered by whoever is asked, with all that a client wants to know of it. GET is answered by the
  tier: with the bytes, or with a redirect to a node. So each GET, and each that resumes, is sent to one that is well.
* What a client is told of an error is in the fields: HEAD has no body. Trouble that passes is answered so that the
  client tries again: by 429, which those before 1.0 do not know; they get 503.
* Who may see what, the gate decides, by a token of ours in ``Authorization``.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import replace
from urllib.parse import parse_qs

from aiohttp import web

from shared import hub, representation
from shared.codec import encode_json
from shared.conditional import Whole
from shared.digest import Digest
from shared.errors import NearshardError, NotFound, RequestError
from shared.ids import DEFAULT_REF, is_commit
from shared.paths import HubPath, ModelPath
from shared.representation import IMMUTABLE, REVALIDATE
from shared.web.access import Gate, private_model
from shared.web.middleware import BODY_BEGUN, KIND, REQUEST_ID, Handler, read_body, refuse_expectation
from shared.web.reads import ABSENT, Tier, document, get
from shared.web.send import fields_of

MAX_PATHS = 10_000
"""Fields of a form that names paths."""
AGAIN = {"Retry-After": "1"}

Answer = Callable[["_Hub", web.Request], Awaitable[web.StreamResponse]]
HubAbsent = Callable[
    [web.Request, Callable[[Tier], Awaitable[web.StreamResponse]]], Awaitable[web.StreamResponse | None]
]
"""Given a request for a model or revision that a tier does not know, and what answers it from another tier, with no
gate before it: the answer, or None where there is none."""


def add_hub_routes(app: web.Application, tier: Tier, gate: Gate, *, absent: HubAbsent | None = None) -> None:
    """Answer the clients of other hubs from ``tier``, and let through whom ``gate`` lets through. ``absent``: who may
    have what this tier does not know of."""
    told = _told(_Hub(tier, gate), absent)
    model = "/api/models/{org}/{name}"
    reads = {
        "/{org}/{name}/resolve/{rev}/{path:.+}": _Hub.file,
        model: _Hub.info,
        model + "/revision/{rev}": _Hub.info,
        model + "/refs": _Hub.refs,
        model + "/tree/{rev}": _Hub.tree,
        model + "/tree/{rev}/{path:.+}": _Hub.tree,
        "/api/agent-harnesses": _harnesses,
        "/api/telemetry/{rest:.*}": _telemetry,
        "/api/v1/models/{org}/{name}/repo": _Hub.modelscope_file,
        "/api/v1/models/{org}/{name}/repo/files": _Hub.modelscope_files,
        "/api/v1/models/{org}/{name}/revisions": _Hub.modelscope_revisions,
        # A name without its organisation, and what is no model: none of them is here
        "/{name}/resolve/{rest:.+}": _no_such_repository,
        "/api/{kind:models|datasets|spaces}/{rest:.+}": _no_such_repository,
        "/{kind:datasets|spaces}/{rest:.+}": _no_such_repository,
    }
    for path, handler in reads.items():
        get(app, path, told(handler))
    app.router.add_post(model + "/paths-info/{rev}", told(_Hub.paths_info), expect_handler=refuse_expectation)


def _told(surface: _Hub, absent: HubAbsent | None) -> Callable[[Answer], Handler]:
    """Errors in the words that these clients know; and what is not here, from where it may be had."""

    def made(handler: Answer) -> Handler:
        async def answer(request: web.Request) -> web.StreamResponse:
            try:
                return await handler(surface, request)
            except NotFound as error:
                if absent is None or error.error_code not in ABSENT or "org" not in request.match_info:
                    raise
                found = await absent(request, lambda tier: handler(_Hub(tier, None), request))
                if found is None:
                    raise
                return found

        async def told(request: web.Request) -> web.StreamResponse:
            request[KIND] = "hub"
            try:
                return await answer(request)
            except NearshardError as error:
                if BODY_BEGUN in request:
                    raise
                raise _translated(error, request.headers.get("User-Agent", "")) from error

        return told

    return made


def _translated(error: NearshardError, agent: str) -> NearshardError:
    """The same error with the fields of the Hub; one that may pass, as the client that asks (``agent``) retries it."""
    if error.status >= 500:
        code = "not_ready" if "hf_hub/0." in agent else "try_again"
        return NearshardError(
            str(error), code=code, public={"reason": error.error_code}, headers={**AGAIN, **error.headers}
        )
    fields = {"X-Error-Message": error.meaning.title, **error.headers}
    if known := hub.ERROR_CODES.get(error.error_code):
        fields["X-Error-Code"] = known
    return NearshardError(str(error), code=error.error_code, public=error.public, headers=fields)


class _Hub:
    """The handlers. Each raises NotFound in the order in which these clients expect it: model, revision, file."""

    def __init__(self, tier: Tier, gate: Gate | None) -> None:
        """``gate``: None where whoever asks was let through before."""
        self._tier, self._gate = tier, gate

    # The Hugging Face Hub

    async def file(self, request: web.Request) -> web.StreamResponse:
        """``/<model>/resolve/<rev>/<path>``."""
        model = await self._enter(request)
        return await self._send(request, model, _ref(request), request.match_info["path"])

    async def info(self, request: web.Request) -> web.StreamResponse:
        """``/api/models/<model>``, or a revision of it."""
        ref, manifest = await self._found(request)
        blobs, private = _flag(request, "blobs"), bool(private_model(request))
        return await self._answer(
            request, ref, manifest, lambda: hub.model_info(manifest, blobs=blobs, private=private)
        )

    async def tree(self, request: web.Request) -> web.StreamResponse:
        """``/tree/<rev>/<folder>``."""
        ref, manifest = await self._found(request)
        folder, recursive = request.match_info.get("path", "").strip("/"), _flag(request, "recursive")
        return await self._answer(request, ref, manifest, lambda: hub.tree(manifest, folder, recursive=recursive))

    async def paths_info(self, request: web.Request) -> web.StreamResponse:
        """``/paths-info/<rev>``: a form names the paths."""
        ref, manifest = await self._found(request)
        try:
            form = parse_qs((await read_body(request)).decode(), max_num_fields=MAX_PATHS)
        except ValueError:
            raise RequestError("a form with paths was expected") from None
        paths = form.get("paths", [])
        return await self._answer(request, ref, manifest, lambda: hub.paths_info(manifest, paths))

    async def refs(self, request: web.Request) -> web.StreamResponse:
        """``/refs``."""
        refs = await self._refs(await self._enter(request))
        pull_requests = "include_prs" in request.query
        return _json(request, hub.refs_info(refs, pull_requests=pull_requests), REVALIDATE)

    # ModelScope

    async def modelscope_file(self, request: web.Request) -> web.StreamResponse:
        """``/repo?Revision=<rev>&FilePath=<path>``."""
        model = await self._enter(request)
        ref = await self._modelscope_ref(request, model)
        return await self._send(request, model, ref, request.query.get("FilePath", ""))

    async def modelscope_files(self, request: web.Request) -> web.StreamResponse:
        """``/repo/files?Revision=<rev>``, of one folder (``Root``) or all below it (``Recursive``)."""
        model = await self._enter(request)
        manifest = await self._shown(request, model, await self._modelscope_ref(request, model))
        folder = request.query.get("Root", "").strip("/")
        recursive = _flag(request, "Recursive")
        data = await asyncio.to_thread(hub.modelscope_files, manifest, folder, recursive=recursive)
        return _json(request, hub.modelscope(data, request[REQUEST_ID]), REVALIDATE)

    async def modelscope_revisions(self, request: web.Request) -> web.StreamResponse:
        """``/revisions``."""
        refs = await self._refs(await self._enter(request))
        return _json(request, hub.modelscope(hub.modelscope_revisions(refs), request[REQUEST_ID]), REVALIDATE)

    async def _modelscope_ref(self, request: web.Request, model: str) -> str:
        ref = request.query.get("Revision") or hub.MODELSCOPE_REF
        if ref == hub.MODELSCOPE_REF:
            ref = hub.modelscope_ref(ref, await self._refs(model))
        return hub.ref_named(ref)

    # Both

    async def _enter(self, request: web.Request) -> str:
        """The model that a request names, if whoever asks may see it. Raises as ``Gate.enter``."""
        model = hub.model_named(f"{request.match_info['org']}/{request.match_info['name']}")
        if self._gate:
            await self._gate.enter(request, ModelPath(model))
        return model

    async def _found(self, request: web.Request) -> tuple[str, hub.Listed]:
        """The ref, revision or commit that a request names, and what it is."""
        model, ref = await self._enter(request), _ref(request)
        return ref, await self._shown(request, model, ref)

    async def _shown(self, request: web.Request, model: str, ref: str) -> hub.Listed:
        found = await self._tier.resolve(model, ref, self._tier.who(request))
        return hub.Shown(model, found.commit, found.manifest.files)

    async def _refs(self, model: str) -> dict[str, Digest]:
        refs = dict(await self._tier.refs(model))
        if not refs:
            raise NotFound(f"there is no model {model}", code="unknown_model")
        return refs

    async def _send(self, request: web.Request, model: str, ref: str, path: str) -> web.StreamResponse:
        """A file: what is to be known of it, or its bytes as the tier gives them."""
        found = await self._tier.resolve(model, ref, self._tier.who(request))
        manifest = found.manifest
        wanted = HubPath(model, manifest.revision if is_commit(ref) and not found.provisional else ref, path)
        commit = {hub.COMMIT: found.commit}
        try:
            shown = representation.of_path(wanted, manifest)
        except NotFound as error:
            raise NotFound(str(error), code=error.error_code, headers=commit) from None
        if request.method == "GET":
            return await self._tier.bytes(request, wanted)
        if found.provisional:
            shown = replace(shown, revision=None)
        linked = {"X-Linked-Etag": f'"{shown.etag}"', "X-Linked-Size": str(shown.layout.size)}
        status, fields = fields_of(shown, Whole(), shown.layout.whole, {**commit, **linked})
        return web.Response(status=status, headers=fields)

    async def _answer(
        self, request: web.Request, ref: str, manifest: hub.Listed, make: Callable[[], object]
    ) -> web.StreamResponse:
        """A document of a revision. Raises what ``make`` raises; NotFound says of which commit."""
        commit = {hub.COMMIT: manifest.commit}
        try:
            body = await asyncio.to_thread(make)
        except NotFound as error:
            raise NotFound(str(error), code=error.error_code, headers=commit) from None
        return _json(request, body, IMMUTABLE if is_commit(ref) else REVALIDATE, commit)


def _ref(request: web.Request) -> str:
    return hub.ref_named(request.match_info.get("rev", DEFAULT_REF))


def _flag(request: web.Request, name: str) -> bool:
    """A flag of the query, as clients of all ages spell it."""
    return request.query.get(name, "").lower() in ("true", "1")


def _json(request: web.Request, body: object, lifetime: str, fields: dict[str, str] | None = None) -> web.Response:
    data = encode_json(body)
    return document(request, data, "application/json", hashlib.sha256(data).hexdigest(), lifetime, fields or {})


async def _harnesses(_: _Hub, request: web.Request) -> web.StreamResponse:
    """What programs to tell the Hub of: none. Clients ask before anything else, and keep the answer for a day."""
    return _json(request, {"standardEnvVars": [], "harnesses": {}}, REVALIDATE)


async def _telemetry(_: _Hub, request: web.Request) -> web.StreamResponse:
    """Thanks; nothing is kept."""
    return web.Response(status=204)


async def _no_such_repository(_: _Hub, request: web.Request) -> web.StreamResponse:
    raise NotFound("only models that are called 'org/name' are here", code="unknown_model")
