"""The dashboard: a page for browsers at ``/``, its files, and ``GET /network``, the JSON that it is drawn from.

The page has no script and no style in itself and asks for nothing but this router's files (Content-Security-Policy).
Its words are in one table (``words.json``, a column a language); the page comes with those of the reader's language
in it, and the script takes the same.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from importlib.resources import files
from typing import Any

from aiohttp import hdrs, web

from shared import codec
from shared.clock import Clock
from shared.errors import NotFound
from shared.representation import REVALIDATE
from shared.web.middleware import KIND
from shared.web.reads import document, get

LANGUAGES = ("en", "zh")
"""The first is for who asks for none of them."""
LANGUAGE_COOKIE = "nearshard_lang"
YEAR = 365 * 86_400
LATEST = 1.0
"""Seconds for which the same document is sent to all."""
POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
FIELDS: Mapping[str, str] = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
TYPES: Mapping[str, str] = {
    "style.css": "text/css; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
    "theme.js": "text/javascript; charset=utf-8",
    "words.json": "application/json",
    "icon.svg": "image/svg+xml",
}
_WORD = re.compile(r"\{\{([a-z_]+)\}\}")
_RANGE = re.compile(r"\s*([A-Za-z*-]+)(?:\s*;\s*q=([01](?:\.\d{0,3})?))?\s*")


def language(accepted: str) -> str:
    """The language of an Accept-Language field (RFC 9110 §12.5.4) that we have. Pure."""
    best, weight = LANGUAGES[0], 0.0
    for part in accepted[:1000].split(","):
        match = _RANGE.fullmatch(part)
        if match and (code := match[1].partition("-")[0].lower()) in LANGUAGES and float(match[2] or 1) > weight:
            best, weight = code, float(match[2] or 1)
    return best


def page(template: str, words: Mapping[str, Mapping[str, str]], code: str) -> str:
    """The page in a language. Pure; raises KeyError for a word that the table lacks."""
    other = LANGUAGES[1 - LANGUAGES.index(code)]
    known = {**{name: told[code] for name, told in words.items()}, "lang": code, "other_lang": other}
    return _WORD.sub(lambda match: html.escape(known[match[1]]), template)


def wants_page(accepted: str) -> bool:
    """Whether an Accept field asks for HTML by name, as browsers do and programs do not. Pure."""
    return any(part.partition(";")[0].strip().lower() == "text/html" for part in accepted.split(","))


def add_dashboard(app: web.Application, gather: Callable[[], Awaitable[Mapping[str, Any]]], clock: Clock) -> None:
    """``/`` for browsers, ``/dashboard/<file>``, and ``/network``: what ``gather`` gives."""
    folder = files(__package__)
    data = {name: folder.joinpath(name).read_bytes() for name in TYPES}
    words = json.loads(data["words.json"])
    template = folder.joinpath("index.html").read_text(encoding="utf-8")
    pages = {code: page(template, words, code).encode() for code in LANGUAGES}
    latest: list[tuple[float, bytes]] = []

    async def index(request: web.Request) -> web.Response:
        if not wants_page(",".join(request.headers.getall(hdrs.ACCEPT, ()))):
            raise NotFound("there is a page here, for browsers")
        request[KIND] = "dashboard"
        chosen = request.query.get("lang", "")
        code = next(
            (known for known in (chosen, request.cookies.get(LANGUAGE_COOKIE, "")) if known in LANGUAGES),
            None,
        ) or language(",".join(request.headers.getall(hdrs.ACCEPT_LANGUAGE, ())))
        answer = _file(request, pages[code], "text/html; charset=utf-8")
        answer.headers.update({"Content-Language": code, "Vary": "Accept, Accept-Language, Cookie"})
        if chosen in LANGUAGES:
            answer.set_cookie(LANGUAGE_COOKIE, chosen, max_age=YEAR, path="/", samesite="Lax", httponly=True)
        return answer

    async def file(request: web.Request) -> web.Response:
        request[KIND] = "dashboard"
        name = request.match_info["file"]
        if name not in data:
            raise NotFound
        return _file(request, data[name], TYPES[name])

    async def network(request: web.Request) -> web.Response:
        request[KIND] = "network"
        if not latest or clock.monotonic() - latest[0][0] >= LATEST:
            body = codec.encode_json(await gather())
            latest[:] = [(clock.monotonic(), body)]
        answer = web.Response(body=latest[0][1], content_type="application/json")
        answer.headers.update({"Cache-Control": "no-store", "Vary": "Accept-Encoding", **FIELDS})
        answer.enable_compression()
        return answer

    get(app, "/", index)
    get(app, "/dashboard/{file}", file)
    get(app, "/network", network)


def _file(request: web.Request, body: bytes, content_type: str) -> web.Response:
    return document(request, body, content_type, hashlib.sha256(body).hexdigest(), REVALIDATE, FIELDS)
