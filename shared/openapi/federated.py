"""What sites say to an origin in federated rounds, at it or through a node, described. Pure; ``shared.federated`` says
what it is for."""

from __future__ import annotations

from collections.abc import Iterator

from shared.enrolment import SIGNATURE_FIELD
from shared.federated import LENGTH_FIELD, OFFSET_FIELD, PART_TYPE, PREFIX, STATEMENT_TYPE
from shared.openapi.form import BYTES, JSON, TOKEN, UPLOAD, Answer, Body, Operation, Parameter
from shared.openapi.schemas import COUNT, DIGEST, FLAG, HEX_64, MODEL_NAME, ORG, TEXT, listed, record

FEDERATED = "federated"
_AT = (ORG, MODEL_NAME)
_SIGNED = Parameter(SIGNATURE_FIELD, "header", "Of the body, by the site's key.", TEXT)
_UPLOAD = Parameter("digest", "path", "The SHA-256 of the update, in hex.", HEX_64, 64 * "0")
_OFFSET = Parameter(OFFSET_FIELD, "header", "Bytes that are there already.", COUNT, 0, required=True)
_OPENED = record({
    "number": COUNT, "base": DIGEST, "state": TEXT, "tensors": listed(TEXT), "deadline": TEXT, "codecs": listed(TEXT),
    "min_sites": COUNT, "sites": COUNT, "counted": COUNT, "max_bytes": COUNT, "late": {"type": "number"}, "rule": TEXT,
})  # fmt: skip
_PAST = record({
    "number": COUNT, "base": DIGEST, "state": TEXT, "counted": COUNT,
    "revision": {"anyOf": [DIGEST, {"type": "null"}]}, "ended": TEXT,
})  # fmt: skip
_ROUNDS = record({"model": TEXT, "open": {"anyOf": [_OPENED, {"type": "null"}]}, "last": listed(_PAST)})
_DUPLICATE = record({"state": {"const": "duplicate"}})
_OFFER = record({"upload": TEXT, "token": TEXT, "offset": COUNT})
_COUNTED = record({"state": {"enum": ["counted", "duplicate"]}, "clipped": FLAG})
_STATED = (
    "unsupported_type", "timed_out", "too_large", "bad_body", "bad_update", "unknown_site", "bad_signature",
    "slow_down", "quarantined", "clock_skew", "not_in_round", "stale_round", "other_update", "disk_full",
)  # fmt: skip
_SENT = (
    "unsupported_type", "wrong_offset", "too_large", "timed_out", "stale_round", "other_update", "digest_mismatch",
    "bad_update", "unknown_codec", "schema_mismatch", "non_finite", "norm_exceeded", "disk_full",
)  # fmt: skip


def federated(sources: tuple[str, ...]) -> Iterator[Operation]:
    """All of it, at a tier that gets its answers from ``sources``."""
    base = PREFIX + "/{org}/{name}"
    upload = base + "/updates/{digest}"
    wrong = ("bad_id", "unknown_path", *sources)
    yield Operation(
        "GET", base, "getRounds", "The round that is open, and the last ones.", FEDERATED,
        (Answer(200, "The rounds.", {JSON: _ROUNDS}),), ("unknown_model", *TOKEN, *wrong), _AT,
    )  # fmt: skip
    yield Operation(
        "POST", base + "/updates", "stateUpdate", "State an update, signed; it may be sent then.", FEDERATED,
        (Answer(200, "It is counted already.", {JSON: _DUPLICATE}),
         Answer(201, "Where to send it, and from which byte on.", {JSON: _OFFER})),
        ("unknown_model", *TOKEN, *_STATED, *wrong), (*_AT, _SIGNED),
        Body("What the site says of it.", {STATEMENT_TYPE: {}, BYTES: {}}), statuses={"clock_skew": 401},
    )  # fmt: skip
    named = ("unauthorized", "unknown_upload", *wrong)
    told = {OFFSET_FIELD: "Bytes that are there.", LENGTH_FIELD: "Bytes that it has."}
    yield Operation(
        "HEAD", upload, "getUpload", "How much of an update is there.", FEDERATED,
        (Answer(200, "So much.", {}, told),), named, (*_AT, _UPLOAD), security=(UPLOAD,), needed=True,
    )  # fmt: skip
    yield Operation(
        "PATCH", upload, "sendUpdate", "Send an update, or a part of it.", FEDERATED,
        (Answer(200, "All of it is there, and counts.", {JSON: _COUNTED}),
         Answer(204, "The part is there.", {}, {OFFSET_FIELD: told[OFFSET_FIELD]})),
        (*_SENT, *named), (*_AT, _UPLOAD, _OFFSET), Body("The bytes from there on.", {PART_TYPE: {}}),
        security=(UPLOAD,), needed=True,
    )  # fmt: skip
