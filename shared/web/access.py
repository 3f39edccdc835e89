"""Who may see what: the one place where a request for something private is let through or not.

* A token that is shown is looked at first, whatever is asked for: one that is not good is answered 401.
* What is of a public model is for all. Anything of another model needs a token to read it; without one the answer is
  that of a model that does not exist, decided by the path and the signed metadata alone: nothing is looked up before.
* A tier that only sends clients on may let a request for bytes through of which it cannot know who may see them, as no
  upstream answers (``sends_on``): where they are sent there is a gate as well. It may then say nothing of its own.
* What is let through of a private model is marked on the request (``private_model``), and its answer is kept out of
  other people's caches.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Protocol

from aiohttp import web

from shared.clock import Clock
from shared.errors import NotFound, RequestError, TrustError, UpstreamError
from shared.paths import BlobPath, FilePath, ModelsPath, ReadPath, TaskPath, TrustPath
from shared.tokens import AccessList, Forbidden, Right, Token, TokenMissing, TokenRevoked
from shared.trust_names import private_org

QUERY = "token"
"""The parameter that a signed URL carries its token in (RFC 6750 §2.3)."""
PRIVATE_FIELDS: Mapping[str, str] = {"Cache-Control": "private, no-store", "Referrer-Policy": "no-referrer"}
_BEARER = re.compile(r"bearer +([^ ]+)", re.IGNORECASE)

_TOKEN = web.RequestKey("token", Token)
_PRIVATE = web.RequestKey("private_model", str)
_UNKNOWN = web.RequestKey("unknown_visibility", UpstreamError)


class Visibility(Protocol):
    """What the signed metadata says of who may see what."""

    async def is_public(self, model: str) -> bool:
        """Whether a model is for all. False for one that is not there. Raises UpstreamError where that is not known."""
        ...

    def known_public(self, model: str) -> bool:
        """Whether it is known at once to be for all: for those that answer without waiting."""
        ...

    async def access_list(self) -> AccessList:
        """Which tokens are good. Raises UpstreamError where that is not known."""
        ...


class Gate:
    """Lets requests through, or not."""

    def __init__(self, visibility: Visibility, clock: Clock, *, sends_on: bool = False) -> None:
        self._visibility, self._clock, self._sends_on = visibility, clock, sends_on

    async def token(self, request: web.Request) -> Token | None:
        """The good token that a request shows, or None where it shows none. Raises TokenError, RequestError."""
        known = request.get(_TOKEN)
        text = token_text(request)
        if known is not None or not text:
            return known
        found = request[_TOKEN] = (await self._visibility.access_list()).verify(text, self._clock.time())
        return found

    async def enter(self, request: web.Request, path: ReadPath) -> None:
        """Let a request for ``path`` through. Raises TokenError; NotFound as for a model that does not exist;
        UpstreamError where it is not known who may see it."""
        try:
            await self._enter(request, path)
        except UpstreamError as error:
            if not (self._sends_on and isinstance(path, TaskPath | FilePath | BlobPath)) or isinstance(
                error, TrustError
            ):
                raise
            request[_UNKNOWN] = error
            if token_text(request):
                request[_PRIVATE] = path.model

    async def _enter(self, request: web.Request, path: ReadPath) -> None:
        token = await self.token(request)
        if isinstance(path, ModelsPath):
            return  # its names are let through one by one
        if isinstance(path, TrustPath):
            if org := private_org(path.role):  # that there is such a role, all may know: so this says what is missing
                await self.require_in(request, Right.READ, org)
        elif isinstance(path, BlobPath):
            await self._enter_blob(request, path, token)
        elif not await self._visibility.is_public(path.model):
            self._enter_private(request, path.model, token)

    async def sees(self, request: web.Request, model: str) -> bool:
        """Whether who asks may know of a model. Raises TokenError."""
        token = await self.token(request)
        may = token is not None and token.may(Right.READ, model)
        return may or await self._visibility.is_public(model)

    async def shown(self, request: web.Request) -> Token:
        """The token that a request has to show. Raises TokenMissing, or what else is wrong with it."""
        token = await self.token(request)
        if token is None:
            raise TokenMissing
        return token

    async def require(self, request: web.Request, right: Right, model: str) -> Token:
        """The token that gives a right to a model, or to EVERYTHING. Raises TokenMissing, Forbidden, or what else is
        wrong with it."""
        token = await self.shown(request)
        token.require(right, model)
        return token

    async def require_in(self, request: web.Request, right: Right, org: str) -> Token:
        """The same for anything of an organisation."""
        token = await self.shown(request)
        if not token.may_in(right, org):
            raise Forbidden
        request[_PRIVATE] = org
        return token

    async def check_not_revoked(self, token: Token) -> None:
        """For what a token began and goes on. Raises TokenRevoked; UpstreamError where that is not known."""
        if token.id in (await self._visibility.access_list()).revoked:
            raise TokenRevoked

    async def _enter_blob(self, request: web.Request, path: BlobPath, token: Token | None) -> None:
        if not path.model:
            return  # only public shards are there
        if await self._visibility.is_public(path.model):
            raise NotFound("a public model has its shards in common with others", code="unknown_blob")
        self._enter_private(request, path.model, token)

    def _enter_private(self, request: web.Request, model: str, token: Token | None) -> None:
        if token is None or not token.may(Right.READ, model):
            raise NotFound(f"there is no model {model}", code="unknown_model")
        request[_PRIVATE] = model


def private_model(request: web.Request) -> str:
    """The private model that a request was let through to; empty where what it asks for is public."""
    return str(request.get(_PRIVATE, ""))


def require_known(request: web.Request) -> None:
    """Raises the UpstreamError that a request was let through in spite of: nothing is to be said of what it names."""
    if error := request.get(_UNKNOWN):
        raise error


def token_text(request: web.Request) -> str:
    """The token that a request shows, not looked at yet; may be empty. Raises RequestError where it shows two."""
    fields = request.headers.getall("Authorization", [])
    shown = {match[1] for field in fields if (match := _BEARER.fullmatch(field.strip()))}
    shown.update(request.query.getall(QUERY, []))
    # RFC 6750 §2: one way at a time. Some clients send their field along where a redirect has the token in its URL
    if len(shown) > 1 or len(fields) > 1:
        raise RequestError("two tokens, or two Authorization fields")
    return next(iter(shown), "")


def is_private(fields: Mapping[str, str]) -> bool:
    """Whether an answer with these fields was for who may see something private."""
    return fields.get("Cache-Control") == PRIVATE_FIELDS["Cache-Control"]


async def keep_private(request: web.Request, response: web.StreamResponse) -> None:
    """Keep an answer out of other people's caches where it is not for all; called before its head is sent."""
    if _PRIVATE in request:
        response.headers.update(PRIVATE_FIELDS)
        vary = response.headers.get("Vary")
        response.headers["Vary"] = f"{vary}, Authorization" if vary else "Authorization"
    elif QUERY in request.query:
        response.headers["Referrer-Policy"] = PRIVATE_FIELDS["Referrer-Policy"]  # its URL is a secret
