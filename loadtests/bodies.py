"""What benchmarks download: safetensors files of random tensors, a shard each."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from random import Random

from shared.tensorfile import TensorEntry, make_header

SHARD = 8 << 20
"""Bytes of each tensor, which is a shard."""


@dataclass(frozen=True)
class Body:
    """What is downloaded."""

    size: int
    sha256: str


def make_file(path: Path, size: int, seed: int) -> Body:
    """A file of ``size`` bytes, rounded down to whole shards, and its header. Another ``seed``, other bytes."""
    rng = Random(seed)
    tensors = [(f"{path.stem}.{i}", TensorEntry("", "U8", (SHARD,), 0, SHARD)) for i in range(size // SHARD)]
    with path.open("wb") as file:
        file.write(make_header(tensors, {}))
        for _ in tensors:
            file.write(rng.randbytes(SHARD))
    return Body(path.stat().st_size, sha256(path))


def sha256(path: Path) -> str:
    """64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
