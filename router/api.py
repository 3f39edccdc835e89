"""What a router answers, described for its OpenAPI document. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from shared.enrolment import SIGNATURE_FIELD
from shared.openapi.form import BEARER, JSON, OPEN, SMALL_BODY, TOKEN, Answer, Body, Operation, Parameter, Schema
from shared.openapi.hub import hub
from shared.openapi.reads import KEEP, OPERATE, READ, SAME, SOURCES, TAG, announced, reads
from shared.openapi.schemas import (
    COUNT,
    FLAG,
    HEX_64,
    IF_NONE_MATCH,
    NAME,
    NEAR,
    NODE,
    NODE_FIELDS,
    OBJECT,
    ORG,
    REGION,
    REGION_FIELD,
    SHARD,
    TASK,
    TEXT,
    listed,
    record,
    ref,
)
from shared.paths import ENROLMENTS

FILES = ("text/css", "text/javascript", JSON, "image/svg+xml")
"""What the files of the dashboard are."""
_LOCATED = Answer(200, "URLs, best first; with `explain=1`, all that the choice came from.", {
    JSON: record(
        {"urls": listed(TEXT), "key": TEXT, "client": OBJECT, "regions": listed(OBJECT), "nodes": listed(OBJECT)},
        optional=("key", "client", "regions", "nodes"),
    )
})  # fmt: skip
_WORD = {"type": "string", "pattern": "^[0-9a-f]{0,32}$"}
_ORDER = {"boot": _WORD, "sequence": COUNT, "nonce": _WORD}
_STATE = {"in_flight": COUNT, "draining": FLAG, "rtt": OBJECT, "trials": listed(OBJECT)}
_TOLD = record({**NODE_FIELDS, **_STATE, **_ORDER}, optional=("weight", *_STATE, *_ORDER))
_SIGNED = Parameter(
    SIGNATURE_FIELD,
    "header",
    "The node's signature of the body: needed where there is an enrolment file.",
    TEXT,
)
_UNPROVEN = (
    "bad_id", "bad_node", "bad_signature", "stale_nonce", "not_enrolled", "not_as_enrolled", "stale_heartbeat",
    "certificate_needed",
)  # fmt: skip


def operations(*, enrolling: bool = True) -> list[Operation]:
    """All of a router. ``enrolling``: whether it has an enrolment file."""
    return [
        *reads(("no_nodes", *SOURCES), redirects=True),
        *_placing(),
        *_membership(),
        *(_enrolments() if enrolling else ()),
        announced(),
        *_shown(),
        *hub(redirects=True),
    ]


def _shown() -> Iterator[Operation]:
    """The dashboard."""
    html: Schema = {"text/html": {}}
    language = Parameter("lang", "query", "en or zh; it is kept in a cookie.", TEXT)
    browsers = Parameter("Accept", "header", "With text/html.", TEXT, "text/html")
    yield Operation(
        "GET", "/", "getDashboard", "The network as it is now, as a page for browsers.", OPERATE,
        (Answer(200, "To who asks for HTML.", html, TAG), SAME), ("unknown_path",),
        (language, browsers, IF_NONE_MATCH), security=OPEN,
    )  # fmt: skip
    name = Parameter("file", "path", "Its name.", {"type": "string", "pattern": "^[a-z]+[.][a-z]+$"}, "app.js")
    yield Operation(
        "GET", "/dashboard/{file}", "getDashboardFile", "A file of that page.", OPERATE,
        (Answer(200, "The file.", {kind: {} for kind in FILES}, TAG), SAME), ("unknown_path",), (name, IF_NONE_MATCH),
        security=OPEN,
    )  # fmt: skip
    look = record({
        "service": {"const": "router"}, "time": {"type": "number"}, "age": {"type": "number"}, "day": TEXT,
        "degraded": TEXT, "total": OBJECT, "regions": listed(OBJECT), "nodes": listed(OBJECT), "left_off": COUNT,
        "models": listed(OBJECT), "rollouts": listed(OBJECT), "errors": listed(OBJECT),
    })  # fmt: skip
    yield Operation(
        "GET", "/network", "getNetwork", "The same as JSON: regions, nodes, models, rollouts, errors.", OPERATE,
        (Answer(200, "As it is now.", {JSON: look}),), security=OPEN,
    )  # fmt: skip


def _placing() -> Iterator[Operation]:
    explain = Parameter("explain", "query", "1: with the reasons.", {"type": "string", "enum": ["0", "1"]})
    errors = ("bad_id", "bad_region", "unknown_model", *TOKEN, "no_nodes", *SOURCES)
    yield Operation(
        "GET", "/locate/{org}/{task}", "locateTask", "Where a client would be sent for a task.", READ, (_LOCATED,),
        (*errors, "unknown_revision", "unknown_task"), (ORG, TASK, REGION, REGION_FIELD, explain),
    )  # fmt: skip
    yield Operation(
        "GET", "/locate/{digest}", "locateBlob", "Where a client would be sent for a shard.", READ, (_LOCATED,),
        (*errors, "unknown_blob", "unknown_path"), (SHARD, REGION, REGION_FIELD, explain),
    )  # fmt: skip
    how = record({"node": NAME, "ok": FLAG}, closed=True)
    yield Operation(
        "POST", "/reports", "report", "How a node did for a client.", KEEP, (Answer(204, "Heard."),),
        ("bad_id", "bad_region", "unknown_node", *SMALL_BODY), (REGION, REGION_FIELD),
        Body("The node, and whether it did well.", {JSON: how}, {"node": "berlin-1", "ok": True}), OPEN,
    )  # fmt: skip


def _membership() -> Iterator[Operation]:
    yield Operation(
        "GET", "/ring", "getRing", "The members, all or of a region; with `near`, a client's view of them.", READ,
        (Answer(200, "The ring, or the view.", {JSON: {"anyOf": [ref("View"), ref("Ring")]}}, TAG), SAME),
        ("bad_id", "bad_region", "no_nodes"), (REGION, NEAR, REGION_FIELD, IF_NONE_MATCH), security=OPEN,
    )  # fmt: skip
    told = {"url": "http://127.0.0.1:8720", "region": "berlin", "weight": 1}
    yield Operation(
        "PUT", "/nodes/{node}", "heartbeat", "A node is there, and how it is.", KEEP,
        (Answer(200, "Heard.", {JSON: record({"epoch": COUNT, "ttl": {"type": "number"}, "nonce": TEXT})}),),
        (*_UNPROVEN, *SMALL_BODY), (NODE, _SIGNED), Body("What it tells.", {JSON: _TOLD}, told), OPEN,
    )  # fmt: skip
    leaving = Body("What orders it.", {JSON: record(_ORDER, optional=tuple(_ORDER))}, {}, required=False)
    yield Operation(
        "DELETE", "/nodes/{node}", "leave", "A node goes.", KEEP, (Answer(204, "It is out."),),
        (*_UNPROVEN, "unknown_node", *SMALL_BODY), (NODE, _SIGNED), leaving, OPEN,
    )  # fmt: skip


def _enrolments() -> Iterator[Operation]:
    enrolled = record({**NODE_FIELDS, "key": HEX_64}, optional=("weight",), closed=True)
    example = {"url": "http://127.0.0.1:8720", "region": "berlin", "weight": 1, "key": 64 * "0"}
    errors = ("bad_id", "token_missing", "forbidden", *TOKEN, *SOURCES)
    path = ENROLMENTS + "/{node}"
    yield Operation(
        "PUT", path, "enroll", "Let a node be a member; for a token with `*/*:enroll`.", OPERATE,
        (Answer(204, "It may be."),), (*errors, "bad_node", "bad_key", *SMALL_BODY), (NODE,),
        Body("Where it is, and its public key.", {JSON: enrolled}, example), (BEARER,), needed=True,
    )  # fmt: skip
    yield Operation(
        "DELETE", path, "throwOut", "Let a node be one no longer.", OPERATE, (Answer(204, "It is out."),),
        (*errors, "bad_node"), (NODE,), security=(BEARER,), needed=True,
    )  # fmt: skip
