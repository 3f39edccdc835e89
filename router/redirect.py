"""What a redirect says: where to go, and what will come. Pure; both paths of a router make theirs of this."""

from __future__ import annotations

from collections.abc import Sequence

from shared.digest import digest_fields


def fields_of(etag: str) -> dict[str, str]:
    """The fields that a 307 and a 304 carry alike. ``etag`` is empty where it is not known."""
    fields = {"Cache-Control": "private, no-cache", "Vary": "Accept, Nearshard-Region"}
    return fields | {"ETag": f'"{etag}"', **digest_fields(etag)} if etag else fields


def links_to(urls: Sequence[str]) -> list[tuple[str, str]]:
    """The fields that name the places to go to, best first, at least one: Location, and a Link for each of the others
    (RFC 6249 §3)."""
    links = [("Link", f"<{url}>; rel=duplicate; pri={number}") for number, url in enumerate(urls[1:], 2)]
    return [("Location", urls[0]), *links]
