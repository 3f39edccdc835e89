"""Passing a model on from the hub that is mirrored while it is still being fetched: to the hub's own clients.

They ask for single files by name and check nothing but sizes, so they can be given each file as it comes; all is as it
will be once the model is published, but for the commit, which is the hub's. What a hub gives no digest of (small files)
is shown once it is here. Nobody gets the last byte of what was asked for before all of the file was found to be right
(``origin.spool``).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from aiohttp import web

from origin.mirror import Fetch, Mirror
from shared import hub, plan
from shared.digest import Digest
from shared.errors import NotFound
from shared.ids import DEFAULT_REF
from shared.layout import Layout
from shared.manifest import Manifest
from shared.paths import BlobPath, FilePath, ModelPath, ModelsPath, TaskPath, TrustPath
from shared.representation import BINARY, REVALIDATE, TYPES, Representation
from shared.rollout import NOBODY, Subject
from shared.web.access import Gate, mark_private
from shared.web.reads import Listing, Resolved
from shared.web.send import Piece, decide, send


class PassingOn:
    """Answers the hub's clients from what is being fetched."""

    def __init__(self, mirror: Mirror, gate: Gate) -> None:
        self._mirror, self._gate = mirror, gate

    async def absent(
        self, request: web.Request, answer: Callable[[PassingTier], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse | None:
        """As of ``shared.web.hub.HubAbsent``. Raises Mirroring for what can only be answered once all is here, and what
        ``Mirror.seek`` raises."""
        name = f"{request.match_info['org']}/{request.match_info['name']}"
        model, revision = hub.model_named(name), hub.ref_named(request.match_info.get("rev", DEFAULT_REF))
        fetch = await self._mirror.seek(model, revision, partial(self._gate.sees, request, model), name)
        if fetch is None:
            return None
        if fetch.private:
            mark_private(request, model)
        try:
            return await answer(PassingTier(fetch))
        except NotFound as error:
            if error.error_code != "unknown_file":  # as of a list of refs: it has none yet
                raise self._mirror.under_way(fetch) from error
            raise


class PassingTier:
    """One model that is being fetched, as ``shared.web.reads.Tier``: it has files, and nothing else."""

    def __init__(self, fetch: Fetch) -> None:
        self._fetch, self._files = fetch, fetch.spool.files

    def who(self, request: web.Request) -> Subject:
        """Nobody: there is no rollout of what is not published yet."""
        return NOBODY

    async def resolve(self, model: str, ref: str, who: Subject) -> Resolved:
        """Its files, once the digest of each is known. Raises what the fetch fails with."""
        digests = await asyncio.gather(*(file.known() for file in self._files.values()))
        files = {
            path: Layout(spooled.file.size, digest, ())
            for (path, spooled), digest in zip(self._files.items(), digests, strict=True)
        }
        return Resolved(Manifest(model, {}, files, {}), known_as=self._fetch.found.commit, provisional=True)

    async def refs(self, model: str) -> Mapping[str, Digest]:
        """None: there is no revision yet."""
        return {}

    async def bytes(self, request: web.Request, path: TaskPath | BlobPath | FilePath) -> web.StreamResponse:
        """A file's bytes as they come. Raises NotFound, what the fetch fails with."""
        if not isinstance(path, FilePath):
            raise NotFound(code="unknown_path")
        spooled = self._fetch.spool.file(path.path)
        filename = PurePosixPath(path.path).name
        layout = Layout(spooled.file.size, await spooled.known(), ())
        kind = TYPES.get(PurePosixPath(filename).suffix, BINARY)
        shown = Representation(layout, kind, REVALIDATE, filename)
        decision, span = decide(request, shown)
        return await send(request, shown, decision, span, _pieces(spooled.read(span)), {})

    async def listing(self, path: ModelPath | ModelsPath) -> Listing:
        """None."""
        raise NotFound(code="unknown_model")

    async def trust(self, path: TrustPath) -> Listing:
        """None."""
        raise NotFound(code="unknown_metadata")

    def sources(self, request: web.Request, path: TaskPath) -> plan.Sources:
        """Nobody."""
        return lambda _: []

    def bases(self, request: web.Request, path: TaskPath | FilePath) -> Sequence[str]:
        """Nobody."""
        return []

    async def status(self) -> Mapping[str, Any]:
        """Nothing."""
        return {}

    def not_ready(self) -> str:
        """It is."""
        return ""


async def _pieces(parts: AsyncIterator[memoryview]) -> AsyncIterator[Piece]:
    async for part in parts:
        yield part
