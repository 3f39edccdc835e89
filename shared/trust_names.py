"""Names in the signed metadata (The Update Framework, 1.0): roles, their files, and what a target is called.

Who signs and who checks must agree on these, and on nothing else.

* ``root``, ``targets``: the operator's, offline. ``snapshot``, ``timestamp``: the origin's, online.
* ``<org>~public`` and ``<org>~private``: the publishers' of an organisation. A ref is a target of one of them: its
  path is ``<org>/<name>/<ref>``, its hash and length are the manifest's. What is in the private one is told only to
  who has a token for it.
* ``access``: the origin's; whose tokens are good, and which are not any more.
"""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Final

ROOT: Final = "root"
TARGETS: Final = "targets"
SNAPSHOT: Final = "snapshot"
TIMESTAMP: Final = "timestamp"
ACCESS: Final = "access"
TIMESTAMP_FILE: Final = "timestamp.json"
"""The one file that changes; all others have a version in their name and never do."""

LIFETIMES: Final = {
    ROOT: timedelta(days=365),
    TARGETS: timedelta(days=365),
    "publisher": timedelta(days=365),
    ACCESS: timedelta(days=7),
    SNAPSHOT: timedelta(days=7),
    TIMESTAMP: timedelta(days=3),
}
"""How long a role's metadata is good for. A timestamp outlives a long weekend without a link, and no longer: until it
expires, whoever sits on the link can hold back what is new."""

_FILE = re.compile(r"([1-9][0-9]{0,8})\.([a-z0-9][a-z0-9._-]{0,127}(?:~public|~private)?)\.json")


def public_role(org: str) -> str:
    """The role of an organisation's public models."""
    return f"{org}~public"


def private_role(org: str) -> str:
    """The role of an organisation's private models."""
    return f"{org}~private"


def private_org(role: str) -> str:
    """The organisation whose private models a role is for; empty for any other role."""
    org = role.partition("~")[0]
    return org if role == private_role(org) else ""


def target_path(model: str, ref: str) -> str:
    """What a ref is called as a target."""
    return f"{model}/{ref}"


def org_of(model: str) -> str:
    """The organisation that a model is of."""
    return model.partition("/")[0]


def file_name(role: str, version: int) -> str:
    """The file that has a version of a role's metadata."""
    return TIMESTAMP_FILE if role == TIMESTAMP else f"{version}.{role}.json"


def parse_file_name(name: str) -> tuple[str, int] | None:
    """Role and version (0 of the timestamp) of a file; None where it is none of these."""
    if name == TIMESTAMP_FILE:
        return TIMESTAMP, 0
    match = _FILE.fullmatch(name)
    return (match[2], int(match[1])) if match and match[2] != TIMESTAMP else None  # which has one name only
