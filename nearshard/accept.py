"""``nearshard trust accept``: begin to trust a network, by the fingerprint of one of its roots."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from nearshard import networks
from nearshard.guide import parse_routers
from shared import trust
from shared.clock import SystemClock
from shared.digest import digest_of, hex_of
from shared.errors import MetadataTooLarge, NotFound, RequestError, TrustError
from shared.paths import trust_path
from shared.trust_names import ROOT
from shared.web.session import fetch, make_session
from shared.web.tls import tls_by

MAX_ROOTS = 256
"""Versions of a root that are looked through for a fingerprint."""


@dataclass(frozen=True)
class Accepted:
    """A network that is trusted from now on."""

    url: str
    fingerprint: str
    noted: str
    """The file that says so."""


async def accept(
    url: str, fingerprint: str | None, confirm: Callable[[str, str], bool], ca: Path | None = None
) -> Accepted:
    """Trust the network at ``url`` if a root of it has this fingerprint (SHA-256 of the file, 64 hex digits).

    Without one, ``confirm`` is asked, with the URL and the fingerprint of its first root. Raises TrustError where it
    is another network, RequestError where nobody confirms it, NotFound, UpstreamError, DiskError.
    """
    (base,) = parse_routers(url)
    async with make_session(tls=tls_by(ca)) as session:
        root = await _find(session, base, fingerprint and fingerprint.replace(":", "").lower())
    trust.begin(root, None, SystemClock().time())
    found = hex_of(digest_of(root))
    if fingerprint is None and not confirm(base, found):
        raise RequestError(f"{base} is not trusted: give --fingerprint, which whoever runs the network knows")
    return Accepted(base, found, str(networks.note([base], root)))


async def _find(session: aiohttp.ClientSession, base: str, fingerprint: str | None) -> bytes:
    async for root in _roots(session, base):
        if fingerprint in (None, hex_of(digest_of(root))):
            return root
    raise TrustError(f"no root of {base} has this fingerprint: it is another network, or somebody is in between")


async def _roots(session: aiohttp.ClientSession, base: str) -> AsyncIterator[bytes]:
    """Raises NotFound where there is none at all."""
    for version in range(1, MAX_ROOTS):
        try:
            url, limit = base + trust_path(ROOT, version), trust.LIMITS[ROOT]
            answer = await fetch(session, url, limit=limit, missing="unknown_metadata", too_long=MetadataTooLarge)
        except NotFound:
            if version == 1:
                raise
            return
        yield answer.body
