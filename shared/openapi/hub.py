"""What every tier answers to the clients of the Hugging Face Hub and of ModelScope, described. Pure.

Only as much as their clients use. Errors that pass are 429 here (503 to clients before 1.0).
"""

from __future__ import annotations

from collections.abc import Iterator

from shared.hub import COMMIT
from shared.openapi.form import JSON, OPEN, TOKEN, Answer, Body, Operation, Parameter, Schema
from shared.openapi.reads import MOVED, SAME, TAG, TYPES
from shared.openapi.schemas import (
    FILE,
    IF_NONE_MATCH,
    MODEL_NAME,
    ORG,
    RANGE,
    SWITCH,
    TEXT,
    ref,
)

HUB = "other hubs' clients"
_REV = Parameter("rev", "path", "A ref, a revision or a commit.", TEXT, "main")
_AT = (ORG, MODEL_NAME)
_FORM = "application/x-www-form-urlencoded"
_ERRORS = ("bad_request", "unknown_model", "unknown_revision", "bad_region", "try_again", "not_ready", *TOKEN)
_MODEL = "/api/models/{org}/{name}"
_SCOPE = "/api/v1/models/{org}/{name}"
_OF_COMMIT = {**TAG, COMMIT: "The commit that it is of."}
_NAMED = Parameter("Revision", "query", "A ref, a revision or a commit; `master` is our `main`.", TEXT)
_FLAGS = {name: Parameter(name, "query", about, SWITCH) for name, about in (
    ("blobs", "With sizes and hashes of the files."),
    ("recursive", "With what is in folders below."),
    ("Recursive", "With what is in folders below."),
)}  # fmt: skip


def hub(*, redirects: bool = False) -> Iterator[Operation]:
    """The paths of other hubs. ``redirects``: bytes are sent from elsewhere."""

    def read(
        path: str, name: str, about: str, schema: Schema, *parameters: Parameter, errors: tuple[str, ...] = _ERRORS,
        fields: dict[str, str] = TAG,
    ) -> Operation:  # fmt: skip
        answers = (Answer(200, "As their clients expect it.", {JSON: schema}, fields), SAME)
        return Operation("GET", path, name, about, HUB, answers, errors, (*parameters, IF_NONE_MATCH))

    def file(path: str, name: str, about: str, *parameters: Parameter) -> Operation:
        content: dict[str, Schema] = {kind: {} for kind in TYPES}
        partial = () if redirects else (Answer(206, "The range.", content),)
        # HEAD is answered by whoever is asked, so there is a 200 at a router too
        answers = (Answer(200, "The bytes; to HEAD, all that is to be known of them.", content, TAG), *partial, SAME)
        wrong = ("unknown_file", "bad_id", "precondition_failed", "range_not_satisfiable")
        return Operation(
            "GET", path, name, about, HUB, (*answers, MOVED) if redirects else answers, (*_ERRORS, *wrong),
            (*parameters, RANGE, IF_NONE_MATCH),
        )  # fmt: skip

    yield file("/{org}/{name}/resolve/{rev}/{path}", "hubFile", "A file, for Hugging Face's clients.", *_AT, _REV, FILE)
    info = ref("HubModel")
    for path, more, name in ((_MODEL, (), "hubModel"), (_MODEL + "/revision/{rev}", (_REV,), "hubRevision")):
        yield read(path, name, "What files a model has.", info, *_AT, *more, _FLAGS["blobs"], fields=_OF_COMMIT)
    with_prs = Parameter("include_prs", "query", "Names the pull requests too: there are none.", TEXT)
    yield read(_MODEL + "/refs", "hubRefs", "The refs, as branches.", ref("HubRefs"), *_AT, with_prs)
    folder = Parameter("path", "path", "A folder; its slashes are written as they are.", FILE.schema, "folder")
    files, missing = ref("HubFiles"), (*_ERRORS, "unknown_file")
    for path, deeper, name in (("", (), "hubTree"), ("/{path}", (folder,), "hubFolder")):
        yield read(
            f"{_MODEL}/tree/{{rev}}{path}", name, "What is in a folder.", files, *_AT, _REV, *deeper,
            _FLAGS["recursive"], errors=missing, fields=_OF_COMMIT,
        )  # fmt: skip
    yield Operation(
        "POST", _MODEL + "/paths-info/{rev}", "hubPaths", "What there is of some paths.", HUB,
        (Answer(200, "Those that there are.", {JSON: files}, _OF_COMMIT),),
        (*missing, "unsupported_type", "timed_out", "too_large"), (*_AT, _REV),
        Body("`paths`, once for each.", {_FORM: {"type": "object"}}, {"paths": ["config.json"]}, required=False),
    )  # fmt: skip
    yield read("/api/agent-harnesses", "hubHarnesses", "What programs to tell of: none.", {"type": "object"})
    rest = Parameter("rest", "path", "Anything.", TEXT, "huggingface_hub")
    yield Operation(
        "GET", "/api/telemetry/{rest}", "hubTelemetry", "Taken, and not kept.", HUB, (Answer(204, "Thanks."),),
        parameters=(rest,), security=OPEN,
    )  # fmt: skip
    wanted = Parameter("FilePath", "query", "The file's path in the model.", FILE.schema, "model.safetensors", True)
    yield file(_SCOPE + "/repo", "scopeFile", "A file, for ModelScope's clients.", *_AT, _NAMED, wanted)
    root = Parameter("Root", "query", "A folder.", TEXT)
    scope = ref("ModelScope")
    yield read(
        _SCOPE + "/repo/files", "scopeFiles", "What is in a folder.", scope, *_AT, _NAMED, root, _FLAGS["Recursive"],
        errors=missing,
    )  # fmt: skip
    yield read(_SCOPE + "/revisions", "scopeRevisions", "The refs.", scope, *_AT)
