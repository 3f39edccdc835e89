"""A rollout: a signed rule by which a ref means another revision to some of those who ask. Pure.

The publisher signs it beside what the ref means. Whoever resolves the ref (clients, edges, routers, origins) applies it
with ``meant_for``, so all come to the same answer for the same subject: the sites that are named (all where none are),
and of the subjects there those whose place is below the percentage. The place is a hash, so who is in at 10 % is in at
50 %, at every tier, after every restart; another revision has other places, so that it is not always the same ones who
go first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv6Address, IPv6Network, ip_address
from typing import Any

from shared.digest import Digest, parse_digest
from shared.ids import parse_name
from shared.manifest import MAX_MANIFEST

MAX_SITES = 1000
STEPS = (1, 5, 10, 25, 50, 100)
"""Percentages that a rollout goes through where none is named."""
_PLACES = 10_000
"""Places on the scale of 100 %."""
_NETWORK = 64
"""Bits of an IPv6 address that stay while a machine changes the rest of it for privacy (RFC 8981)."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """The rule of one ref: ``revision``, whose manifest has ``size`` bytes, for so many percent of these sites."""

    revision: Digest
    size: int
    percent: int
    """1 to 100."""
    sites: tuple[str, ...] = ()
    """Regions; all where none is named."""

    def record(self) -> dict[str, Any]:
        """As it is signed."""
        return {
            "revision": self.revision,
            "size": self.size,
            "percent": self.percent,
            **({"sites": list(self.sites)} if self.sites else {}),
        }

    @classmethod
    def parse(cls, fields: object) -> Rollout:
        """What ``record`` gave. Raises ValueError, BadId, KeyError, TypeError; other fields are left for later."""
        if not isinstance(fields, Mapping):
            raise TypeError("a rollout is an object")
        size, percent, sites = fields["size"], fields["percent"], fields.get("sites", [])
        if type(size) is not int or not 0 < size <= MAX_MANIFEST or type(percent) is not int or not 1 <= percent <= 100:
            raise ValueError("a rollout has the size of a manifest, and a percentage")
        if not isinstance(sites, list) or len(sites) > MAX_SITES:
            raise ValueError(f"a rollout names up to {MAX_SITES} sites")
        return cls(parse_digest(fields["revision"]), size, percent, tuple(parse_name(site, "a site") for site in sites))


@dataclass(frozen=True, slots=True)
class Subject:
    """Who asks what a ref means. ``key``: what stays the same of it; empty where nothing does, and then it is among the
    last. ``site``: its region, empty where it is not known."""

    key: str
    site: str


NOBODY = Subject("", "")


def at_address(address: str | None, site: str) -> Subject:
    """Who is known by an address only. IPv6 is by its network: the rest of it changes all the time."""
    try:
        parsed = ip_address(address or "")
    except ValueError:
        return Subject("", site)
    if isinstance(parsed, IPv6Address):
        parsed = parsed.ipv4_mapped or IPv6Network((int(parsed), _NETWORK), strict=False).network_address
    return Subject(str(parsed), site)


def meant_for(rule: Rollout, model: str, ref: str, who: Subject) -> bool:
    """Whether to ``who`` the ref means the rule's revision."""
    if rule.sites and who.site not in rule.sites:
        return False
    return rule.percent == 100 or (bool(who.key) and place(rule.revision, model, ref, who.key) < rule.percent)


def place(revision: Digest, model: str, ref: str, key: str) -> float:
    """Of a subject, from 0 to below 100."""
    hashed = hashlib.sha256(f"{model}@{ref} {revision} {key}".encode()).digest()
    return int.from_bytes(hashed[:8], "big") % _PLACES * 100 / _PLACES


def next_step(percent: int) -> int:
    """The percentage after this one; 100 after the last."""
    return next((step for step in STEPS if step > percent), 100)
