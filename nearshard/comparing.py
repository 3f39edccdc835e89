"""What it costs to move from one revision to another, and why: tensor by tensor, then what is no tensor. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from shared.deltas import bytes_moved, ways
from shared.digest import Digest
from shared.manifest import Delta, Manifest, Tensor


@dataclass(frozen=True)
class Row:
    """A tensor, or what else of a file or a task has shards of its own."""

    name: str
    file: str
    """Empty for what is of a task only."""
    size: int
    """Bytes."""
    moved: int
    """Bytes to fetch for it; its share, by bytes, of what it has in one shard with others."""
    how: str
    """``unchanged``, ``delta``, ``compressed``, ``whole``, or several of them joined by ``+``."""
    why: str


@dataclass(frozen=True)
class Comparison:
    """The cost of a move, as a client pays it that holds all of the old revision and nothing else."""

    size: int
    """Bytes of all shards of the new revision."""
    unchanged: int
    """Bytes of those that the old one has too."""
    moved: int
    """Bytes to fetch."""
    alone: int
    """Bytes to fetch for who holds nothing."""
    rows: tuple[Row, ...]


def compare(old: Manifest, new: Manifest) -> Comparison:
    """What it costs to move from ``old`` to ``new``."""
    chosen = ways(new, new.shards, old.shards.__contains__)
    unchanged = {digest for digest in new.shards if digest in old.shards}
    return Comparison(
        sum(new.shards.values()),
        sum(new.shards[digest] for digest in unchanged),
        bytes_moved(new, {digest: steps for digest, steps in chosen.items() if digest not in unchanged}),
        bytes_moved(new, ways(new, new.shards, lambda _: False)),
        tuple(_rows(old, new, chosen, unchanged)),
    )


def _rows(
    old: Manifest, new: Manifest, chosen: Mapping[Digest, tuple[Delta, ...]], unchanged: set[Digest]
) -> Iterable[Row]:
    before = {(tensor.file, tensor.name): tensor for tensor in old.tensors}
    names: dict[str, Tensor | None] = {}
    for tensor in old.tensors:
        names[tensor.name] = None if tensor.name in names else tensor
    shown: set[Digest] = set()

    def row(name: str, file: str, parts: Mapping[Digest, int], absent: str) -> Row:
        shown.update(parts)
        kinds = {digest: _kind(digest, chosen[digest], unchanged) for digest in parts}
        moved = sum(
            0 if digest in unchanged else _cost(new, digest, chosen[digest]) * size / new.shards[digest]
            for digest, size in parts.items()
        )
        how = "+".join(dict.fromkeys(kinds.values())) or "unchanged"
        deepest = max((len(chosen[digest]) for digest in parts if digest not in unchanged), default=0)
        return Row(name, file, sum(parts.values()), round(moved), how, _why(how, deepest, absent))

    for tensor in new.tensors:
        found = before.get((tensor.file, tensor.name)) or names.get(tensor.name)
        parts: dict[Digest, int] = {}
        for piece in tensor.slices:
            parts[piece.digest] = parts.get(piece.digest, 0) + piece.length
        yield row(tensor.name, tensor.file, parts, _absent(tensor, found))
    kept = [("header" if path.endswith(".safetensors") else path, path, item) for path, item in new.files.items()]
    made = [(f"header of task {task.name}", "", task.layout) for task in new.tasks.values()]
    for name, file, layout in (*kept, *made):
        rest = {digest: new.shards[digest] for digest in layout.shards() if digest not in shown}
        if rest:
            yield row(name, file, rest, "" if file in old.files else "a new file" if file else "")


def _kind(digest: Digest, steps: tuple[Delta, ...], unchanged: set[Digest]) -> str:
    if digest in unchanged:
        return "unchanged"
    return ("delta" if steps[-1].base else "compressed") if steps else "whole"


def _cost(manifest: Manifest, digest: Digest, steps: tuple[Delta, ...]) -> int:
    return sum(manifest.size_of(step.parcel) for step in steps) or manifest.shards[digest]


def _absent(tensor: Tensor, before: Tensor | None) -> str:
    """Why there can be no delta to a tensor; empty where there can."""
    if before is None:
        return "a new tensor"
    if before.dtype != tensor.dtype:
        return f"was {before.dtype}, is {tensor.dtype}"
    if before.shape != tensor.shape:
        return f"was {_shape(before)}, is {_shape(tensor)}"
    return ""


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _why(how: str, deepest: int, absent: str) -> str:
    if how == "unchanged":
        return "the same shards"
    if "delta" in how:
        return f"{deepest} deltas, one upon the other" if deepest > 1 else "one delta"
    if absent:
        return absent
    return "no delta leads here for fewer bytes"
