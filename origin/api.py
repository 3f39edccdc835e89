"""What an origin answers, described for its OpenAPI document. Pure; ``shared.publishing`` says what it is for."""

from __future__ import annotations

from collections.abc import Iterator

from shared.enrolment import SIGNATURE_FIELD
from shared.manifest import MAX_SHARD
from shared.openapi.federated import federated
from shared.openapi.form import (
    BEARER,
    BYTES,
    JSON,
    OPEN,
    SESSION,
    SMALL_BODY,
    TOKEN,
    Answer,
    Body,
    Operation,
    Parameter,
)
from shared.openapi.hub import hub
from shared.openapi.reads import MANIFEST, STORE, reads
from shared.openapi.schemas import (
    DIGEST,
    FLAG,
    HEX_64,
    METADATA,
    MODEL,
    MODEL_NAME,
    NOWHERE,
    ORG,
    SHARD,
    TEXT,
    listed,
    record,
    ref,
)
from shared.publishing import BATCH, PREFIX

PUBLISH = "publish"
_AT = (ORG, MODEL_NAME)
_STORED = (Answer(201, "Stored."),)
_LARGE = ("unsupported_type", "timed_out", "too_large", "digest_mismatch")
_SIZE = {"type": "integer", "minimum": 1, "maximum": MAX_SHARD}


def operations() -> list[Operation]:
    """All of an origin."""
    return [*reads(STORE), *hub(), *_publishing(), *federated(STORE)]


def _publishing() -> Iterator[Operation]:
    base = PREFIX + "/{org}/{name}"
    yield Operation(
        "GET", base + "/nonce", "publishingNonce", "What is to be signed to begin.", PUBLISH,
        (Answer(200, "The nonce of this minute.", {JSON: record({"nonce": TEXT})}),), ("bad_id",), _AT,
        security=OPEN, head=False,
    )  # fmt: skip
    signed = Parameter(
        SIGNATURE_FIELD,
        "header",
        "Of the body, by the key.",
        {"type": "string", "pattern": "^[0-9a-f]{128}$"},
        128 * "0",
        True,
    )
    begun = record({"session": TEXT, "seconds": {"type": "number"}})
    opening = record({"model": MODEL, "nonce": TEXT, "key": HEX_64, "private": FLAG}, closed=True)
    example = {"model": "demo/minilm", "nonce": 32 * "0", "key": 64 * "0", "private": False}
    yield Operation(
        "POST", base + "/session", "beginPublishing", "Begin, as a publisher of the organisation.", PUBLISH,
        (Answer(200, "The session, and how long it lasts.", {JSON: begun}),),
        ("bad_id", "bad_key", "bad_signature", "stale_nonce", "not_publisher", "other_visibility", "token_missing",
         "forbidden", "unknown_role", *TOKEN, *SMALL_BODY, *STORE),
        (*_AT, signed), Body("Who wants to publish what.", {JSON: opening}, example), (BEARER,),
    )  # fmt: skip
    asked = {
        "type": "object",
        "additionalProperties": _SIZE,
        "propertyNames": DIGEST,
        "minProperties": 1,
        "maxProperties": BATCH,
    }
    lacking = Answer(200, "Those that are to be uploaded.", {JSON: record({"missing": listed(DIGEST)})})
    yield _in_session(
        "POST",
        base + "/missing",
        "missingShards",
        "Which of some shards are not here.",
        (lacking,),
        SMALL_BODY,
        _AT,
        Body("Shards, with their sizes.", {JSON: record({"shards": asked})}, {"shards": {NOWHERE: 1}}),
    )
    yield _in_session(
        "PUT",
        base + "/blobs/{digest}",
        "putBlob",
        "Upload a shard.",
        _STORED,
        _LARGE,
        (*_AT, SHARD),
        Body("Its bytes.", {BYTES: {}}),
    )
    yield _in_session(
        "PUT",
        base + "/manifests/{digest}",
        "putManifest",
        "Upload a manifest, after all of its shards.",
        _STORED,
        (*_LARGE, "bad_manifest", "incomplete"),
        (*_AT, SHARD),
        Body("The manifest, as msgpack.", {MANIFEST: {}, BYTES: {}}),
    )
    unknown = ("unknown_metadata", "unknown_role")
    yield _in_session(
        "GET",
        base + "/trust/{file}",
        "publishersTrust",
        "The signed metadata, with what is private of the organisation.",
        (Answer(200, "The file.", {JSON: ref("SignedMetadata")}),),
        unknown,
        (*_AT, METADATA),
        None,
    )
    refused = (
        "bad_metadata",
        "ref_conflict",
        "stale_metadata",
        "other_visibility",
        "incomplete",
        "no_online_key",
        *unknown,
    )
    yield _in_session(
        "PUT",
        base + "/trust/{file}",
        "putTrust",
        "Make it visible: the next version of the organisation's role.",
        _STORED,
        (*_LARGE, *refused),
        (*_AT, METADATA),
        Body("The signed role.", {JSON: ref("SignedMetadata"), BYTES: {}}),
    )


def _in_session(
    method: str, path: str, name: str, about: str, answers: tuple[Answer, ...], errors: tuple[str, ...],
    parameters: tuple[Parameter, ...], body: Body | None,
) -> Operation:  # fmt: skip
    codes = ("bad_id", "no_session", "not_publisher", "token_revoked", *errors, *STORE)
    return Operation(
        method, path, name, about, PUBLISH, answers, codes, parameters, body, (SESSION,), needed=True, head=False
    )
