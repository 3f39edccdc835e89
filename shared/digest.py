"""Digests: the names of shards and revisions, ``sha256:`` and 64 lower-case hex digits, one spelling only."""

from __future__ import annotations

import base64
import hashlib
import re
from typing import NewType

from shared.errors import BadId

Digest = NewType("Digest", str)
"""``sha256:<64 hex>``, checked. Made by ``parse_digest``, ``from_hash`` or ``digest_of`` only."""

PREFIX = "sha256:"
SIZE = 32
"""Bytes of a raw digest."""

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def parse_digest(text: str) -> Digest:
    """The digest that ``text`` spells. Raises BadId for any other spelling."""
    if not _DIGEST.fullmatch(text):
        raise BadId("a digest is 'sha256:' and 64 lower-case hex digits")
    return Digest(text)


def from_hash(raw: bytes) -> Digest:
    """The digest of 32 raw hash bytes."""
    if len(raw) != SIZE:
        raise BadId("a SHA-256 has 32 bytes")
    return Digest(PREFIX + raw.hex())


def digest_of(data: bytes | bytearray | memoryview) -> Digest:
    """The digest of these bytes."""
    return Digest(PREFIX + hashlib.sha256(data).hexdigest())


def hex_of(digest: Digest) -> str:
    """The 64 hex digits; also the ETag of a shard."""
    return digest[len(PREFIX) :]


def raw_of(digest: Digest) -> bytes:
    """The 32 raw bytes."""
    return bytes.fromhex(hex_of(digest))


def digest_fields(sha256_hex: str) -> dict[str, str]:
    """The fields that say the digest of a representation, whole.

    ``Repr-Digest`` (RFC 9530 §3), and the ``Digest`` that it replaced (RFC 3230 §4.3.2): aria2 checks that one.
    """
    encoded = base64.b64encode(bytes.fromhex(sha256_hex)).decode()
    return {"Repr-Digest": f"sha-256=:{encoded}:", "Digest": f"SHA-256={encoded}"}
