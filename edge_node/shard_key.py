"""What a node's cache calls a shard. Pure.

A public shard is called by its digest. One of a private model is called by the model and the digest, so bytes that are
held for one who may see them are never found by who asks another way: not under ``/blobs/``, not as another model's.
"""

from __future__ import annotations

from typing import NewType

from shared.digest import Digest
from shared.paths import blob_path

ShardKey = NewType("ShardKey", str)
"""``<digest>`` or ``<org>/<name>/<digest>``. Made by ``shard_key`` only."""


def shard_key(digest: Digest, model: str = "") -> ShardKey:
    """The key of a public shard, or of one of a private ``model``."""
    return ShardKey(f"{model}/{digest}" if model else digest)


def digest_in(key: ShardKey) -> Digest:
    """What its bytes must be."""
    return Digest(key.rpartition("/")[2])


def model_in(key: ShardKey) -> str:
    """The private model that it is of; empty for a public one."""
    return key.rpartition("/")[0]


def path_of(key: ShardKey) -> str:
    """Where every tier has it."""
    return blob_path(digest_in(key), model_in(key))
