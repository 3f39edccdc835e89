"""Schemas of what goes over the wire, and the parameters that several operations have. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared.ids import MAX_MODEL, MAX_NAME
from shared.node import MAX_WEIGHT
from shared.openapi.form import Parameter, Schema
from shared.view import MAX_NEAR

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
FLAG: Schema = {"type": "boolean"}
OBJECT: Schema = {"type": "object"}
WORD = "[a-z0-9][a-z0-9._-]*"
NAME: Schema = {"type": "string", "pattern": f"^{WORD}$", "maxLength": MAX_NAME}
DIGEST: Schema = {"type": "string", "pattern": "^sha256:[0-9a-f]{64}$"}
HEX_64: Schema = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
MODEL: Schema = {"type": "string", "pattern": f"^{WORD}/{WORD}$"}
NOWHERE = "sha256:" + 64 * "0"
"""A digest of nothing, as an example."""


def listed(items: Schema) -> Schema:
    """A list."""
    return {"type": "array", "items": items}


def by_name(values: Schema) -> Schema:
    """A map."""
    return {"type": "object", "additionalProperties": values}


def record(properties: Mapping[str, Schema], *, optional: tuple[str, ...] = (), closed: bool = False) -> Schema:
    """An object that has these, beside those that are ``optional``; nothing else where it is ``closed``."""
    required = [name for name in properties if name not in optional]
    made: dict[str, Any] = {"type": "object", "properties": dict(properties)}
    return {
        **made, **({"required": required} if required else {}), **({"additionalProperties": False} if closed else {})
    }  # fmt: skip


def ref(name: str) -> Schema:
    """What ``SCHEMAS`` has by this name."""
    return {"$ref": f"#/components/schemas/{name}"}


_LAYOUT = record({"size": COUNT, "sha256": HEX_64})
_PLANNED_LAYOUT = record({"size": COUNT, "sha256": HEX_64, "slices": listed(listed(COUNT))})
_BASE: Schema = {"type": "array", "prefixItems": [DIGEST, COUNT, COUNT]}
_STEP = record({"target": DIGEST, "digest": DIGEST, "size": COUNT, "urls": listed(TEXT), "base": listed(_BASE)})
_SHARD = record({"digest": DIGEST, "size": COUNT, "urls": listed(TEXT), "deltas": listed(_STEP)})
_SOURCE = record({"url": TEXT, "repository": TEXT, "commit": TEXT}, optional=("url", "repository", "commit"))
_REF = record({"revision": DIGEST, "published": TEXT, "source": _SOURCE}, optional=("source",))
_TASK = record({"size": COUNT, "sha256": HEX_64, "description": TEXT, "files": listed(TEXT)})
_HUB_REF = record({"name": TEXT, "ref": TEXT, "targetCommit": TEXT})
_HUB_TYPE: Schema = {"enum": ["file", "directory"]}
NODE_FIELDS: Mapping[str, Schema] = {
    "url": {"type": "string", "format": "uri"},
    "region": NAME,
    "weight": {"type": "integer", "minimum": 1, "maximum": MAX_WEIGHT},
}
_MEMBER = {"id": NAME, **NODE_FIELDS, "draining": FLAG}
_RATE: Schema = {
    "anyOf": [COUNT, {"type": "string", "pattern": "^[0-9]{1,9}(|kB|MB|GB|KiB|MiB|GiB)$"}],
    "description": "Bytes a second, as a number or like 5MB; 0 is no cap.",
}
_WINDOWS: Schema = {
    **by_name(_RATE),
    "description": "Rates by time of day.",
    "propertyNames": {"pattern": "^([01][0-9]|2[0-3]):[0-5][0-9]-([01][0-9]|2[0-3]):[0-5][0-9]$"},
}
LINK = {"rate": _RATE, "windows": _WINDOWS, "upstreams": by_name(_RATE), "metered": FLAG}

SCHEMAS: Mapping[str, Schema] = {
    "Models": record({"models": listed(MODEL)}),
    "Model": record(
        {
            "model": MODEL,
            "refs": by_name(_REF),
            "revisions": listed(DIGEST),
            "ref": TEXT,
            "tasks": by_name(_TASK),
            "files": by_name(_LAYOUT),
        }
    ),
    "Plan": record(
        {
            "task_id": TEXT,
            "revision": DIGEST,
            "filename": TEXT,
            "layout": _PLANNED_LAYOUT,
            "files": listed(record({"path": TEXT, "layout": _PLANNED_LAYOUT})),
            "shards": listed(_SHARD),
        }
    ),
    "SignedMetadata": record({"signed": OBJECT, "signatures": listed(OBJECT)}),
    "Health": record({"status": TEXT, "reason": TEXT, "degraded": TEXT}, optional=("reason", "degraded")),
    "Status": record({"service": {"enum": ["origin", "edge", "router"]}}),
    "HubModel": record(
        {
            "id": MODEL,
            "modelId": MODEL,
            "sha": TEXT,
            "private": FLAG,
            "gated": FLAG,
            "disabled": FLAG,
            "siblings": listed(record({"rfilename": TEXT})),
        }
    ),
    "HubFiles": listed(
        record({"type": _HUB_TYPE, "path": TEXT, "oid": TEXT, "size": COUNT, "lfs": OBJECT}, optional=("lfs",))
    ),
    "HubRefs": record({"branches": listed(_HUB_REF), "tags": listed(OBJECT), "converts": listed(OBJECT)}),
    "ModelScope": record({"Code": {"const": 200}, "Success": FLAG, "Message": TEXT, "RequestId": TEXT, "Data": OBJECT}),
    "Ring": record({"epoch": COUNT, "region": {"type": ["string", "null"]}, "nodes": listed(record(_MEMBER))}),
    "View": record(
        {
            "epoch": COUNT,
            "region": NAME,
            "regions": listed(NAME),
            "nodes": listed(record({**_MEMBER, "ejected": FLAG})),
            "origins": listed(TEXT),
            "left_off": COUNT,
        }
    ),
    "Job": record(
        {
            "id": COUNT,
            "what": TEXT,
            "state": TEXT,
            "shards": COUNT,
            "shards_done": COUNT,
            "bytes": COUNT,
            "bytes_done": COUNT,
            "reason": TEXT,
        }
    ),
    "Link": record(LINK),
    "Pins": record({"pins": listed(TEXT)}),
}
"""By the names that ``ref`` takes."""


_HALF: Schema = {"type": "string", "pattern": f"^{WORD}$", "maxLength": MAX_MODEL - 2}
ORG = Parameter(
    "org", "path", f"The organisation that publishes the model; both at most {MAX_MODEL - 1} characters.", _HALF, "demo"
)
MODEL_NAME = Parameter("name", "path", "The model's name in it.", _HALF, "minilm")
TASK = Parameter(
    "task",
    "path",
    "`NAME[:TASK][@REF]`: the model's name, one of its tasks (else `all`), and a ref or revision (else `main`).",
    {"type": "string", "pattern": f"^{WORD}(:{WORD})?(@({WORD}|sha256:[0-9a-f]{{64}}))?$"},
    "minilm:embed@main",
)
REF = Parameter(
    "ref",
    "path",
    "A ref, or a revision.",
    {"anyOf": [NAME, DIGEST]},
    "main",
)
FILE = Parameter(
    "path",
    "path",
    "The file's path in the model; its slashes are written as they are.",
    {"type": "string", "minLength": 1},
    "model.safetensors",
)
SHARD = Parameter("digest", "path", "The shard's digest.", DIGEST, NOWHERE)
NODE = Parameter("node", "path", "The node's name.", NAME, "berlin-1")
METADATA = Parameter(
    "file",
    "path",
    "`timestamp.json`, or `VERSION.ROLE.json`.",
    {
        "type": "string",
        "pattern": "^(timestamp|[1-9][0-9]{0,8}\\.[a-z0-9][a-z0-9._-]{0,127}(~public|~private)?)\\.json$",
    },
    "timestamp.json",
)
REGION = Parameter("region", "query", "The client's region, where its address does not say it.", TEXT)
REGION_FIELD = Parameter("Nearshard-Region", "header", "The same in a field; the query goes first.", TEXT)
IF_NONE_MATCH = Parameter("If-None-Match", "header", "Entity tags: 304 where one is right.", TEXT)
RANGE = Parameter("Range", "header", "One range of bytes; several are answered whole (RFC 9110, 14.2).", TEXT)
HAVE = Parameter("have", "query", "Of a plan: a revision (`sha256:…`) that is held; again for more.", TEXT)
NEAR = Parameter(
    "near",
    "query",
    "About so many nodes near the client, with what it takes to choose as the router does.",
    {"type": "integer", "minimum": 1, "maximum": MAX_NEAR},
)
SWITCH: Schema = {"type": "string", "description": "On where it is 1 or true."}
