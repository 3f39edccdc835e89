"""What every tier answers to whoever reads models: ``shared.web.reads``, described. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from shared import metalink, plan, trust_chain
from shared.openapi.form import BYTES, JSON, OPEN, SMALL_BODY, TOKEN, Answer, Body, Operation, Schema
from shared.openapi.schemas import (
    FILE,
    HAVE,
    IF_NONE_MATCH,
    METADATA,
    MODEL,
    MODEL_NAME,
    ORG,
    RANGE,
    REF,
    REGION,
    REGION_FIELD,
    SHARD,
    TASK,
    record,
    ref,
)

READ, OPERATE, KEEP = "read", "operate", "keep"
MANIFEST = "application/vnd.nearshard.manifest+msgpack"
TYPES = (BYTES, JSON, "text/plain")
"""What files are sent as (``shared.representation``)."""

SOURCES = (
    "upstream_error", "upstream_timeout", "upstream_missing", "integrity_error", "bad_certificate", "signature_invalid",
    "threshold_not_met", "unknown_key", "key_revoked", "rollback_detected", "equivocation_detected", "mixed_metadata",
    "metadata_expired", "clock_skew", "metadata_invalid", "metadata_too_large", "invalid_manifest",
    "manifest_too_large", "wrong_model", "mirroring",
)  # fmt: skip
"""What may be wrong where an answer has to be got from elsewhere first."""
STORE = ("store_denied", "store_timeout", "store_failed", "disk", "no_metadata", "mirroring", "upstream_error")
"""The same of an origin's store, and of the hub that it mirrors."""
MODEL_ERRORS = ("bad_id", "bad_request", "unknown_model", *TOKEN)
SAME = Answer(304, "What If-None-Match names is still right.")
TAG = {"ETag": "Names these bytes."}
MOVED = Answer(307, "From this node; `Link` names the next ones (RFC 6249).", {}, {"Location": "The bytes' URL."})
_CHANGING = (IF_NONE_MATCH,)
_PLACED = (REGION, REGION_FIELD)


def _document(about: str, *media: str, schema: str = "") -> tuple[Answer, ...]:
    content = {kind: ref(schema) if schema and kind == JSON else {} for kind in media}
    return (Answer(200, about, content, TAG), SAME)


def _bytes(*, redirects: bool) -> tuple[Answer, ...]:
    if redirects:
        return (MOVED, SAME)
    content: dict[str, Schema] = {kind: {} for kind in TYPES}
    partial = Answer(206, "The range.", content, {**TAG, "Content-Range": "Which bytes, of how many."})
    return (Answer(200, "The bytes.", content, {**TAG, "Repr-Digest": "Their SHA-256."}), partial, SAME)


def _byte_errors(*, redirects: bool) -> tuple[str, ...]:
    # A router sends the client on whatever the range: it is the node that looks at it
    return ("no_nodes",) if redirects else ("precondition_failed", "range_not_satisfiable")


def reads(sources: tuple[str, ...], *, redirects: bool = False) -> Iterator[Operation]:
    """The read surface of a tier that gets its answers from ``sources``. ``redirects``: bytes are had elsewhere."""
    whole, wrong = _bytes(redirects=redirects), _byte_errors(redirects=redirects)
    at_model = ("/models/{org}/{name}", (ORG, MODEL_NAME))
    described = Answer(
        200, "A plan or a metalink, by Accept.", {plan.JSON: ref("Plan"), plan.MSGPACK: {}, metalink.METALINK: {}}
    )
    kinds = {answer.status: answer for answer in (*whole, SAME)}
    if 200 in kinds:
        content = {**kinds[200].content, **described.content}
        kinds[200] = Answer(200, "The bytes; a plan or a metalink, by Accept.", content, TAG)
    else:
        kinds[200] = described
    file_kinds = {**kinds, 200: _without_plan(kinds[200])}
    yield Operation(
        "GET", "/models", "listModels", "Names of the models that who asks may see.", READ,
        _document("The names.", JSON, schema="Models"), (*TOKEN, "bad_request", *sources), _CHANGING,
    )  # fmt: skip
    yield Operation(
        "GET", at_model[0], "getModel", "A model's refs, revisions, tasks and files.", READ,
        _document("What there is of it.", JSON, schema="Model"), (*MODEL_ERRORS, "unknown_revision", *sources),
        (*at_model[1], *_CHANGING),
    )  # fmt: skip
    yield Operation(
        "GET", at_model[0] + "/manifests/{ref}", "getManifest", "The manifest of a ref, a revision or a commit.", READ,
        (Answer(200, "The manifest, as msgpack.", {MANIFEST: {}}, {**TAG, "Nearshard-Revision": "Its digest."}), SAME),
        (*MODEL_ERRORS, "unknown_revision", "bad_region", *sources), (*at_model[1], REF, *_PLACED, *_CHANGING),
    )  # fmt: skip
    yield Operation(
        "GET", at_model[0] + "/files/{ref}/{path}", "getFile", "A file of a model; by Accept, its metalink.", READ,
        tuple(file_kinds.values()),
        (*MODEL_ERRORS, "unknown_revision", "unknown_file", "bad_region", *wrong, *sources),
        (*at_model[1], REF, FILE, *_PLACED, RANGE, *_CHANGING),
    )  # fmt: skip
    yield Operation(
        "GET", at_model[0] + "/blobs/{digest}", "getPrivateBlob", "A shard of a private model.", READ, whole,
        (*MODEL_ERRORS, "unknown_blob", "bad_region", *wrong, *sources),
        (*at_model[1], SHARD, *_PLACED, RANGE, *_CHANGING),
    )  # fmt: skip
    yield Operation(
        "GET", "/blobs/{digest}", "getBlob", "A shard of a public model.", READ, whole,
        ("bad_id", "bad_request", *TOKEN, "unknown_blob", "bad_region", *wrong, *sources),
        (SHARD, *_PLACED, RANGE, *_CHANGING),
    )  # fmt: skip
    yield Operation(
        "GET", "/shards/{org}/{task}", "getTask", "A task's bytes; by Accept, its plan or its metalink.", READ,
        tuple(kinds.values()),
        (*MODEL_ERRORS, "unknown_revision", "unknown_task", "not_acceptable", "bad_region", *wrong, *sources),
        (ORG, TASK, HAVE, *_PLACED, RANGE, *_CHANGING),
    )  # fmt: skip
    yield Operation(
        "GET", "/trust/{file}", "getTrust", "A file of the signed metadata (The Update Framework).", READ,
        _document(
            "The file; asked for by its media type, the timestamp with all that it leads to.", JSON,
            trust_chain.MEDIA_TYPE, schema="SignedMetadata",
        ),
        ("bad_id", "bad_request", *TOKEN, "token_missing", "forbidden", "unknown_metadata", "unknown_path",
         "unknown_role", *sources),
        (METADATA, *_CHANGING),
    )  # fmt: skip
    yield from _for_operators()


def _without_plan(answer: Answer) -> Answer:
    content = {kind: schema for kind, schema in answer.content.items() if kind not in (plan.JSON, plan.MSGPACK)}
    return Answer(200, "The bytes; a metalink, by Accept.", content, answer.fields)


def _for_operators() -> Iterator[Operation]:
    health = {JSON: ref("Health")}
    yield Operation(
        "GET", "/healthz", "getHealth", "Whether the process answers.", OPERATE, (Answer(200, "It does.", health),),
        security=OPEN,
    )  # fmt: skip
    yield Operation(
        "GET", "/readyz", "getReadiness", "Whether it can serve.", OPERATE,
        (Answer(200, "It can.", health), Answer(503, "It cannot yet; the reason.", health)), security=OPEN,
    )  # fmt: skip
    yield Operation(
        "GET", "/status", "getStatus", "What it has and does, for people.", OPERATE,
        (Answer(200, "Beside `service`, what there is depends on the tier.", {JSON: ref("Status")}),), security=OPEN,
    )  # fmt: skip
    yield Operation(
        "GET", "/metrics", "getMetrics", "For Prometheus.", OPERATE,
        (Answer(200, "The text format, 0.0.4.", {"text/plain": {}}),), security=OPEN,
    )  # fmt: skip
    yield Operation(
        "GET", "/openapi.json", "getDescription", "What this service answers: this document.", OPERATE,
        (Answer(200, "OpenAPI 3.1.", {JSON: {"type": "object"}}, TAG), SAME), parameters=_CHANGING, security=OPEN,
    )  # fmt: skip


def announced() -> Operation:
    """That something was published: what a router and a node are told."""
    body = Body("The model.", {JSON: record({"model": MODEL}, closed=True)}, {"model": "demo/minilm"})
    return Operation(
        "POST", "/announce", "announce", "Something of a model was published: ask for it anew.", KEEP,
        (Answer(204, "It will be."),), ("bad_id", *SMALL_BODY), body=body, security=OPEN,
    )  # fmt: skip
