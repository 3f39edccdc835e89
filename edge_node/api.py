"""What an edge node answers, described for its OpenAPI document. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from shared.openapi.federated import federated
from shared.openapi.form import BEARER, BYTES, JSON, SMALL_BODY, TOKEN, Answer, Body, Operation, Parameter, Schema
from shared.openapi.hub import hub
from shared.openapi.reads import OPERATE, SOURCES, announced, reads
from shared.openapi.schemas import COUNT, FLAG, LINK, NAME, OBJECT, TEXT, by_name, listed, record, ref
from shared.paths import ADMIN, BUNDLE
from shared.usage import COUNTS
from shared.usage import PATH as USAGE

_ERRORS = ("token_missing", "forbidden", *TOKEN, *SOURCES)
_FOUND = ("bad_id", "unknown_model", "unknown_revision", "unknown_task", "unknown_path")
_WHAT = Body(
    "`org/name[:TASK][@REF]`, or a shard's digest.",
    {JSON: record({"what": {**TEXT, "minLength": 1}}, closed=True)},
    {"what": "demo/minilm"},
)


def operations() -> list[Operation]:
    """All of a node."""
    held = ("not_cached", "no_room", "try_again", "disk")
    return [*reads((*SOURCES, *held)), announced(), *hub(), _usage(), *federated(SOURCES), *_admin()]


def _usage() -> Operation:
    """What the node served, for the report."""
    day = {"type": "string", "format": "date"}
    since = Parameter("since", "query", "The first day; 30 days by default.", day)
    numbers = record({**dict.fromkeys(COUNTS, COUNT), "ready": listed(COUNT)})
    told = record({"node": NAME, "region": NAME, "since": day, "today": day, "days": by_name(by_name(numbers))})
    return Operation(
        "GET", USAGE, "getUsage", "What was served, by day (UTC) and model; private ones are one.", OPERATE,
        (Answer(200, "The days that there are.", {JSON: told}),), (*TOKEN, *SOURCES), (since,),
    )  # fmt: skip


def _admin() -> Iterator[Operation]:
    """What is below ``/admin``, for access tokens; the same is on loopback, below nothing, for the node's own token."""

    def one(
        method: str, path: str, name: str, about: str, schema: Schema, errors: tuple[str, ...] = (),
        parameters: tuple[Parameter, ...] = (), body: Body | None = None,
    ) -> Operation:  # fmt: skip
        answers = (Answer(200, "As it is now.", {JSON: schema}),)
        small = SMALL_BODY if body and JSON in body.content else ()
        codes = (*_ERRORS, *errors, *small)
        return Operation(
            method, ADMIN + path, name, about, OPERATE, answers, codes, parameters, body, (BEARER,), True, head=False
        )

    yield one("GET", "/link", "getLink", "The link's policy.", ref("Link"))
    policy = Body("What is to change.", {JSON: record(LINK, optional=tuple(LINK), closed=True)}, {"rate": "5MB"})
    yield one("PUT", "/link", "setLink", "Change some of the link's policy.", ref("Link"), body=policy)
    draining = record({"draining": FLAG}, closed=True)
    drain = Body("Whether to.", {JSON: draining}, {"draining": False})
    yield one("PUT", "/drain", "drain", "Have routers send nobody here any more, or again.", draining, body=drain)
    yield one(
        "POST",
        "/preheat",
        "preheat",
        "Begin to fetch what this node owns of something.",
        ref("Job"),
        _FOUND,
        body=_WHAT,
    )
    number = Parameter("number", "path", "The job's.", {"type": "integer", "minimum": 1, "maximum": 10**9 - 1}, 1)
    yield one("GET", "/jobs/{number}", "getJob", "How far a preheat is.", ref("Job"), ("unknown_path",), (number,))
    yield one("GET", "/pins", "getPins", "What is kept whatever happens.", ref("Pins"))
    yield one("POST", "/pin", "pin", "Keep something, and fetch what is missing of it.", ref("Job"), _FOUND, body=_WHAT)
    yield one("POST", "/unpin", "unpin", "Keep it no longer.", ref("Pins"), _FOUND, body=_WHAT)
    gone = record({"shards": COUNT, "bytes": COUNT})
    yield one("POST", "/purge", "purge", "Drop something from memory and disk.", gone, _FOUND, body=_WHAT)
    bundle = Body("The bundle, as it is.", {BYTES: {}, "application/x-tar": {}})
    damaged = ("bad_bundle", "base_missing", "timed_out", "disk", "disk_full", "bad_id")
    yield one("POST", BUNDLE, "takeBundle", "Take in a bundle that was carried here.", OBJECT, damaged, body=bundle)
