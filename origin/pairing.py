"""What belongs to what between a revision and the one before: the base and the runs of each new shard, and which deltas
a manifest lists. Pure.

* A tensor belongs to that of the same file and name, else to the only one of the same name, where dtype and number of
  bytes are the same: whatever shards either is cut into. What is no tensor has no base.
* A shard of any other file belongs to about the same region of the parent's file of the same path: as far behind the
  last shard that both have.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from shared.deltas import MAX_CHAIN
from shared.digest import Digest
from shared.errors import ManifestTooLarge
from shared.layout import Layout, Slice, Span, join
from shared.manifest import MAX_SHARDS, Delta, Manifest, Tensor
from shared.parcel import Run
from shared.tensorfile import DTYPE_BITS, TensorEntry, TensorHeader


@dataclass(frozen=True, slots=True)
class Job:
    """A shard that parcels are to be made of: where its bytes are, what they are, and what they may be upon."""

    target: Digest
    file: str
    """Empty for the header of a task, which is in no file."""
    start: int
    size: int
    runs: tuple[Run, ...]
    base: tuple[Slice, ...] = ()
    """Of the parent's shards: the bytes of the runs that are based, joined."""


class ParentTensors:
    """The parent's tensors, by file and name."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._by_file: dict[tuple[str, str], Tensor] = {}
        self._by_name: dict[str, Tensor | None] = {}
        for tensor in tensors:
            self._by_file[tensor.file, tensor.name] = tensor
            self._by_name[tensor.name] = None if tensor.name in self._by_name else tensor

    def find(self, file: str, entry: TensorEntry) -> Tensor | None:
        """That which a tensor of a new file belongs to."""
        for found in (self._by_file.get((file, entry.name)), self._by_name.get(entry.name)):
            if found and found.dtype == entry.dtype and sum(part.length for part in found.slices) == entry.size:
                return found
        return None


def jobs(
    manifest: Manifest, headers: Mapping[str, TensorHeader], parent: Manifest | None, tensors: ParentTensors
) -> Iterator[Job]:
    """One for each shard of the files, in their order; what the parent has too has no base. ``headers``: of the
    safetensors files, by path."""
    nothing = ParentTensors(())
    held: Container[Digest] = parent.shards if parent else ()
    seen: set[Digest] = set()
    for path, layout in manifest.files.items():
        before = parent.files.get(path) if parent else None
        region = _Region(before) if before and path not in headers else None
        position = 0
        for piece in layout.slices:
            base = region.follow(piece) if region else ()
            if piece.digest not in seen:
                if header := headers.get(path):
                    yield _tensor_job(path, header, nothing if piece.digest in held else tensors, piece, position)
                else:
                    yield Job(piece.digest, path, position, piece.length, _byte_runs(piece, base), base)
            seen.add(piece.digest)
            position += piece.length


class _Region:
    """Where in the parent's file the shards of the new one belong, asked in order."""

    def __init__(self, before: Layout) -> None:
        self._before, self._next, position = before, 0, 0
        self._ends: dict[Digest, int] = {}
        for piece in before.slices:
            position += piece.length
            self._ends.setdefault(piece.digest, position)

    def follow(self, piece: Slice) -> tuple[Slice, ...]:
        """What the next shard belongs to; nothing for one that the parent's file has too."""
        if piece.digest in self._ends:
            self._next = self._ends[piece.digest]
            return ()
        start = min(self._next, self._before.size)
        self._next += piece.length
        return join(self._before.cut(Span(start, min(self._next, self._before.size))))


def _byte_runs(piece: Slice, base: Sequence[Slice]) -> tuple[Run, ...]:
    """The beginning belongs to what there is of the base, which may be shorter."""
    based = sum(part.length for part in base)
    parts = (Run(based, based=True), Run(piece.length - based))
    return tuple(run for run in parts if run.length)


def _tensor_job(path: str, header: TensorHeader, tensors: ParentTensors, piece: Slice, position: int) -> Job:
    runs: list[Run] = []
    base: list[Slice] = []
    start, stop = position - header.data_start, position + piece.length - header.data_start
    if start < 0:
        runs.append(Run(min(stop, 0) - start))
        start = min(stop, 0)
    number = bisect_right(header.tensors, start, key=lambda entry: entry.end)  # those before end there, or are empty
    while start < stop:
        entry = header.tensors[number]
        number += 1
        if entry.end <= start:
            continue
        span = Span(start - entry.begin, min(stop, entry.end) - entry.begin)
        found = tensors.find(path, entry)
        if found:
            base += Layout(entry.size, "", found.slices).cut(span)
        runs.append(_run(entry, span, based=found is not None))
        start += span.length
    return Job(piece.digest, path, position, piece.length, tuple(runs), join(base))


def _run(entry: TensorEntry, span: Span, *, based: bool) -> Run:
    """A part of a tensor; its bytes only, where it was cut within an element."""
    bits = DTYPE_BITS[entry.dtype]
    if span.start * 8 % bits or span.length * 8 % bits:
        return Run(span.length, based=based)
    columns = entry.shape[-1] if entry.shape else 1
    return Run(span.length, entry.dtype, columns, span.start * 8 // bits, based)


def compose(
    manifest: Manifest,
    made: Mapping[Delta, int],
    parent: Manifest | None,
    *,
    levels: int = MAX_CHAIN,
) -> Manifest:
    """A manifest with the deltas that were ``made`` (with the size of each parcel) and those of the parent that lead on
    from there, ``levels`` deep: to shards that did not change, then to what deltas are upon. Where a manifest would be
    too large, the oldest are left out, then those that save least."""
    chosen = dict.fromkeys(made, 0)
    sizes = {delta.parcel: size for delta, size in made.items()}
    if parent:
        _inherit(chosen, manifest, parent, levels)
        sizes = {**parent.others, **parent.shards, **sizes}

    def saved(delta: Delta) -> int:
        return (manifest.shards.get(delta.target) or sizes[delta.target]) - sizes[delta.parcel]

    order = sorted(chosen, key=lambda delta: (chosen[delta], -saved(delta)))
    made_first = {delta: number for number, delta in enumerate(chosen)}

    def listed(count: int) -> Manifest:
        deltas = sorted(order[:count], key=lambda delta: (chosen[delta], made_first[delta]))
        named = (digest for d in deltas for digest in (d.target, d.parcel, *(part.digest for part in d.base)))
        others = {digest: sizes[digest] for digest in named if digest not in manifest.shards}
        based = parent and any(delta.base for delta in deltas)
        return replace(
            manifest, parent=parent.revision if parent and based else None, deltas=tuple(deltas), others=others
        )

    full = listed(min(len(order), MAX_SHARDS))
    if _fits(full):
        return full
    low, high = 0, len(full.deltas) - 1  # so many fit; more than so many do not
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _fits(listed(middle)) else (low, middle - 1)
    return listed(low)


def _inherit(chosen: dict[Delta, int], manifest: Manifest, parent: Manifest, levels: int) -> None:
    """Add the parent's deltas that lead to what is wanted, level by level. What is but compressed is taken for shards
    of the new revision alone: nobody fetches an old shard so as to decode upon it."""
    by_target: dict[Digest, list[Delta]] = {}
    for delta in parent.deltas:
        by_target.setdefault(delta.target, []).append(delta)
    wanted = dict.fromkeys(manifest.shards)
    for level in range(levels):
        found = (delta for target in wanted for delta in by_target.get(target, ()) if delta.base or not level)
        for delta in found:
            chosen.setdefault(delta, level)
        ends = (delta for delta, depth in chosen.items() if depth == level)
        wanted = dict.fromkeys(part.digest for delta in ends for part in delta.base)


def _fits(manifest: Manifest) -> bool:
    if len(manifest.others) > MAX_SHARDS:
        return False
    try:
        return bool(manifest.encoded)
    except ManifestTooLarge:
        return False
