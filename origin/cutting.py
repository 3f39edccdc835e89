"""Where to cut: the shards of safetensors files along tensor boundaries, the tensors of tasks, pieces. Pure.

Rules, in order:

* A task pulls in no byte that it does not use: neighbours share a shard only when the same tasks use them.
* An unchanged tensor keeps its digest: only small tensors (under an eighth of the target) share a shard.
* No shard is over the limit: a larger tensor is cut into pieces of the target size.
* The header shares its shard with no tensor: it changes when anything does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from shared.layout import piece_count
from shared.manifest import MAX_PIECES, MIN_PIECE
from shared.tensorfile import TensorEntry, TensorHeader, names_apart

TARGET = 8 << 20
LIMIT = 32 << 20
SMALL = 8
"""A tensor is small when it is under the target divided by this."""

Members = frozenset[str]
"""The tasks that use a tensor."""


@dataclass(frozen=True, slots=True)
class Cut:
    """One shard to make: ``start`` and ``stop`` in the file, and the tasks that use all of it."""

    start: int
    stop: int
    tasks: Members


def cut_tensors(
    header: TensorHeader, tasks: Mapping[str, Members], target: int = TARGET, limit: int = LIMIT
) -> Iterator[Cut]:
    """The shards of one safetensors file, in order, without holes. ``tasks``: tensor name to its tasks."""
    nobody: Members = frozenset()
    for position in range(0, header.data_start, limit):
        yield Cut(position, min(position + limit, header.data_start), nobody)
    start = stop = header.data_start
    shared: Members = nobody
    packing = False
    for tensor in header.tensors:
        if not tensor.size:
            continue
        users = tasks.get(tensor.name, nobody)
        small = tensor.size < target // SMALL
        fits = packing and small and users == shared and stop - start + tensor.size <= target
        if not fits and stop > start:
            yield Cut(start, stop, shared)
            start = stop
        stop += tensor.size
        packing, shared = small, users
        if tensor.size > limit:
            while stop - start > target:
                yield Cut(start, start + target, users)
                start += target
    if stop > start:
        yield Cut(start, stop, shared)


def public_names(headers: Mapping[str, TensorHeader]) -> dict[tuple[str, str], str]:
    """What each (file, tensor) is called in tasks (``shared.tensorfile.names_apart``). Raises TensorFileError."""
    return names_apart((file, tensor.name) for file, header in headers.items() for tensor in header.tensors)


def task_tensors(
    task: str,
    headers: Mapping[str, TensorHeader],
    names: Mapping[tuple[str, str], str],
    members: Mapping[str, Members],
) -> Sequence[tuple[str, str, TensorEntry]]:
    """(file, public name, tensor) of a task, in the order of files and of data: one pass reads them all."""
    return [
        (file, names[file, tensor.name], tensor)
        for file, header in sorted(headers.items())
        for tensor in header.tensors
        if task in members.get(names[file, tensor.name], frozenset())
    ]


def piece_length(sizes: Collection[int], limit: int = MAX_PIECES) -> int:
    """Bytes of a piece of every layout of a revision, whose ``sizes`` in bytes these are.

    The least power of two that makes at most ``limit`` pieces. With what a manifest has room for: 4 MiB for a model of
    14 GB, 32 MiB for one of 100 GB.
    """
    length = MIN_PIECE
    while sum(piece_count(size, length) for size in sizes) > limit:
        length *= 2
    return length
