"""Publishing from afar: what a publisher and an origin say to each other. Pure.

All below ``/publish/<org>/<name>`` of an origin:

===========================  =========================================================================================
``GET nonce``                ``{"nonce"}``: to be signed
``POST session``             ``{"model", "nonce", "key", "private"}`` with a ``Nearshard-Signature`` of the body by that
                             key, which must be one of the organisation's publishers': ``{"session", "seconds"}``.
                             Where the origin wants it, with a token for ``publish`` too: ``Authorization: Bearer``
``POST missing``             ``{"shards": {digest: size}}``, at most ``BATCH``: ``{"missing": [digest]}``
``PUT blobs/<digest>``       a shard, kept where its digest is right: 201
``PUT manifests/<digest>``   a manifest, kept where all of its shards are there: 201
``GET trust/<file>``         the signed metadata, with what is private of the organisation
``PUT trust/<file>``         the next version of the organisation's role; from then on it is visible: 201
===========================  =========================================================================================

All but the first two carry ``Authorization: Nearshard-Session <session>``. A session lets its holder store what nobody
sees: shards and manifests of one model. What is seen is decided by the publisher's signature on the metadata alone.
A nonce is one origin's of this minute; who records a session's beginning on a link without TLS could do no more with it
than fill the origin's disk for as long.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shared.codec import decode_json, encode_json
from shared.digest import Digest, parse_digest
from shared.enrolment import parse_signature
from shared.errors import RequestError
from shared.ids import parse_model
from shared.keys import NodeKey, parse_public, verify
from shared.manifest import MAX_SHARD

PREFIX = "/publish"
SCHEME = "Nearshard-Session"
SESSION = b"nearshard publish session 1\0"
"""What a signature that begins a session is for."""
BATCH = 1024
"""Shards that are asked about at a time."""
SESSION_TIME = 3600.0
"""Seconds that a session lasts; its holder then begins another."""
LEAST_RATE = 64_000
"""Bytes a second that an upload must bring."""
UPLOAD_GRACE = 30.0
"""Seconds that any upload may take."""


@dataclass(frozen=True, slots=True)
class Opening:
    """Who wants to publish what."""

    model: str
    nonce: str
    key: bytes
    """The publisher's public key."""
    private: bool


def path_of(model: str, rest: str) -> str:
    """The path of one of the requests above."""
    return f"{PREFIX}/{model}/{rest}"


def make_opening(opening: Opening, key: NodeKey) -> tuple[bytes, str]:
    """The body that begins a session, and its signature for the field."""
    body = encode_json(
        {"key": opening.key.hex(), "model": opening.model, "nonce": opening.nonce, "private": opening.private}
    )
    return body, key.sign(SESSION + body).hex()


def parse_opening(model: str, body: bytes, signature: str) -> Opening:
    """Who began a session: proven to hold the key that it names, and nothing else yet. Raises RequestError."""
    document = decode_json(body)
    if not isinstance(document, dict) or document.keys() != {"key", "model", "nonce", "private"}:
        raise RequestError("the body names key, model, nonce and private", code="bad_json")
    nonce, private = document["nonce"], document["private"]
    if document["model"] != model or not isinstance(nonce, str) or type(private) is not bool:
        raise RequestError("the session is for another model, or malformed", code="bad_json")
    key = parse_public(str(document["key"]))
    if not verify(key, parse_signature(signature), SESSION + body):
        raise RequestError("not signed by the key that it names", code="bad_signature")
    return Opening(parse_model(model), nonce, key, private)


def parse_shards(body: bytes) -> Mapping[Digest, int]:
    """The shards that are asked about, with their sizes. Raises RequestError."""
    document: Any = decode_json(body)
    shards = document.get("shards") if isinstance(document, dict) else None
    if not isinstance(shards, dict) or not 0 < len(shards) <= BATCH:
        raise RequestError(f"the body names 1 to {BATCH} shards", code="bad_json")
    if not all(type(size) is int and 0 < size <= MAX_SHARD for size in shards.values()):
        raise RequestError("a shard's size is a number of bytes", code="bad_json")
    return {parse_digest(digest): size for digest, size in shards.items()}
