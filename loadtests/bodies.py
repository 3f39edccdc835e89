"""What benchmarks download: safetensors files of random tensors, a shard each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

from shared.tensorfile import TensorEntry, make_header

SHARD = 8 << 20
"""Bytes of each tensor, which is a shard."""


FILE = "model.safetensors"
WEIGHTS = 1 << 19
"""Numbers in a tensor of ``make_weights``, where nothing else is said."""


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


def make_weights(path: Path, layers: int, seed: int, *, tuned: Collection[int] = (), count: int = WEIGHTS) -> Body:
    """A safetensors file of a transformer's shape: an embedding and ``layers`` layers, a tensor of ``count`` numbers
    each, in bf16 (1 MiB if nothing else is said).

    The weights are normal, so they compress as trained ones do. Layers in ``tuned`` differ from those of the same
    ``seed`` without it as after some steps of fine-tuning: each weight by a thousandth of their spread.
    """
    import numpy as np  # takes long, and only this needs it

    rng, tuning = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    names = ["embeddings.weight", *(f"encoder.layer.{number}.weight" for number in range(layers))]
    entries = [(name, TensorEntry("", "BF16", (count // 1024, 1024), 0, 2 * count)) for name in names]
    with path.open("wb") as file:
        file.write(make_header(entries, {}))
        for number in range(-1, layers):
            weights = rng.standard_normal(count, dtype=np.float32) * np.float32(0.02)
            if number in tuned:
                weights += tuning.standard_normal(count, dtype=np.float32) * np.float32(0.02e-3)
            file.write((weights.view(np.uint32) >> 16).astype("<u2").tobytes())
    return Body(path.stat().st_size, sha256(path))


def make_model(folder: Path, tasks: Mapping[str, int], *, layers: int, seed: int, tuned: Collection[int] = ()) -> None:
    """A model's directory with ``FILE``, as ``make_weights`` makes it, and tasks: each the embedding and the first so
    many layers."""
    folder.mkdir()
    make_weights(folder / FILE, layers, seed, tuned=tuned)
    lines = []
    for task, first in tasks.items():
        names = ["embeddings.*", *(f"encoder.layer.{number}.*" for number in range(first))]
        lines.append(f"[tasks.{task}]\ntensors = {json.dumps(names)}\n")
    (folder / "nearshard.toml").write_text("".join(lines))


def sha256(path: Path) -> str:
    """64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
