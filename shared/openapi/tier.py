"""The OpenAPI document of a tier, or of several. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

from shared.openapi.form import Operation, document
from shared.openapi.schemas import SCHEMAS

_ABOUT = """\
What {who} over HTTP. Errors are problem documents (RFC 9457) with a code; `docs/reference.md` has all of them.

A GET has its HEAD; ranges and validators are as RFC 9110 has them. Paths have one spelling: any other is `bad_id`. A \
token is shown in `Authorization` or, in a signed URL, as `token`; what is private does not exist without one."""


def describe(tier: str, operations: Iterable[Operation]) -> dict[str, Any]:
    """The document of ``tier``: ``origin``, ``router`` or ``edge``; of all of them where it is empty."""
    who = f"a nearshard {tier} answers" if tier else "origins, routers and edge nodes of nearshard answer"
    title = f"nearshard {tier}" if tier else "nearshard"
    return document(title, _ABOUT.format(who=who), version("nearshard"), operations, SCHEMAS)
