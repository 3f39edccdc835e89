"""The plan: what a client needs to fetch a task by itself. Pure; built by every tier, read by the client.

A plan says where shards are, best source first. It is advice: a client takes the layout and the digests from
the manifest, whose digest is the revision, so a wrong plan can cost time but never bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any

from shared import codec
from shared.deltas import ways
from shared.digest import Digest, parse_digest
from shared.errors import BadId, DecodeError, RequestError, UpstreamError
from shared.ids import TaskId, parse_task_id
from shared.layout import Layout
from shared.manifest import Delta, Manifest, Task
from shared.paths import blob_path

MSGPACK = "application/vnd.nearshard.plan+msgpack"
JSON = "application/vnd.nearshard.plan+json"
MAX_PLAN = 64 << 20
MAX_HAVE = 4
"""Revisions that a client may say it has: each manifest is looked at."""

Sources = Callable[[Digest], Sequence[str]]
"""Base URLs of who can serve a shard, best first."""


@dataclass(frozen=True)
class Plan:
    """What a client keeps of a plan: the pinned task id, and URLs for each shard."""

    task_id: TaskId
    revision: Digest
    urls: dict[Digest, tuple[str, ...]]


def parse_have(values: Sequence[str]) -> tuple[Digest, ...]:
    """The revisions that a client says it has (``?have=``, again for more). Raises BadId."""
    if len(values) > MAX_HAVE:
        raise BadId(f"a query names at most {MAX_HAVE} revisions that are held")
    return tuple(dict.fromkeys(map(parse_digest, values)))


def build(
    manifest: Manifest, task: Task, sources: Sources, *, private: bool = False, have: Container[Digest] = frozenset()
) -> dict[str, Any]:
    """The plan of a task as plain values, for msgpack and JSON alike. ``private``: the model is not for all, so its
    shards are at paths of their own. ``have``: shards that the client has.

    ``deltas`` of a shard: what to fetch in its place and decode, in order, so that it is made last; none where it is
    best fetched whole."""
    model = manifest.model if private else ""
    layouts = {"": task.layout, **{path: manifest.files[path] for path in task.files}}
    digests = list(dict.fromkeys(digest for layout in layouts.values() for digest in layout.shards()))
    index = {digest: number for number, digest in enumerate(digests)}

    def layout(item: Layout) -> dict[str, Any]:
        slices = [[index[s.digest], s.offset, s.length] for s in item.slices]
        return {"size": item.size, "sha256": item.sha256, "slices": slices}

    def urls(digest: Digest) -> list[str]:
        return [base + blob_path(digest, model) for base in sources(digest)]

    def step(delta: Delta) -> dict[str, Any]:
        return {
            "target": delta.target,
            "digest": delta.parcel,
            "size": manifest.size_of(delta.parcel),
            "urls": urls(delta.parcel),
            "base": [[part.digest, part.offset, part.length] for part in delta.base],
        }

    steps = ways(manifest, digests, have.__contains__)
    return {
        "task_id": str(TaskId(manifest.model, task.name, manifest.revision)),
        "revision": manifest.revision,
        "filename": task.filename,
        "layout": layout(task.layout),
        "files": [{"path": path, "layout": layout(manifest.files[path])} for path in task.files],
        "shards": [
            {
                "digest": digest,
                "size": manifest.shards[digest],
                "urls": urls(digest),
                "deltas": [step(delta) for delta in steps[digest]],
            }
            for digest in digests
        ],
    }


def decode(data: bytes) -> Plan:
    """The plan in a msgpack body. Raises UpstreamError: a bad plan is the router's mistake, not ours."""
    try:
        wire = codec.decode(data, MAX_PLAN)
        task_id = parse_task_id(wire["task_id"])
        urls = {
            parse_digest(shard["digest"]): tuple(url for url in shard["urls"] if _usable(url))
            for shard in wire["shards"]
        }
        return Plan(task_id, parse_digest(wire["revision"]), urls)
    except (DecodeError, BadId, KeyError, TypeError, AttributeError) as error:
        raise UpstreamError(f"not a valid plan: {error}") from error


def _usable(url: object) -> bool:
    """A plan comes from the network: nothing but plain web URLs is ever opened."""
    return isinstance(url, str) and url.startswith(("http://", "https://")) and len(url) <= 2048


def negotiate(accept: str | None, offers: Sequence[str]) -> str:
    """The media type of ``offers`` (in our order of preference) that an Accept field likes best.

    RFC 9110 §12.5.1. ``offers[0]`` is also the answer to no Accept at all. Raises RequestError (406).
    """
    if not accept:
        return offers[0]
    best, best_rank = "", (0.0, -1)
    for offer in offers:
        rank = max((_rank(part, offer) for part in accept.split(",")), key=lambda r: r[1], default=(0.0, -1))
        if rank[0] > 0 and (rank[0] > best_rank[0] or (rank[0] == best_rank[0] and rank[1] > best_rank[1])):
            best, best_rank = offer, rank
    if not best:
        raise RequestError(code="not_acceptable", public={"available": list(offers)})
    return best


def _rank(part: str, offer: str) -> tuple[float, int]:
    """Quality and specificity that one media range gives to ``offer``; specificity -1 where it has none."""
    name, *parameters = (piece.strip() for piece in part.split(";"))
    specificity = {offer: 2, offer.partition("/")[0] + "/*": 1, "*/*": 0}.get(name.lower(), -1)
    quality = 1.0
    for parameter in parameters:
        if parameter.lower().startswith("q="):
            try:
                quality = min(1.0, max(0.0, float(parameter[2:])))
            except ValueError:
                quality = 0.0
    return (quality, specificity) if specificity >= 0 else (0.0, -1)
