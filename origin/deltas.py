"""The parcels of a revision: each new shard as a difference from the parent's, and compressed, where that saves bytes.

A shard is read again from its file, and the parent's shards that it is upon from the sink. Encoding runs in threads, a
few shards at a time: memory is a few times these (32 MiB at most each). What saves too little is not kept, and a sample
says so of most such shards before they are encoded as a whole.
"""

from __future__ import annotations

import asyncio
import os
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from origin.model_dir import SourceFile
from origin.pairing import Job, ParentTensors, compose, jobs
from shared.deltas import MAX_CHAIN
from shared.digest import Digest, digest_of
from shared.errors import IntegrityError, NotFound, PublishError, TensorFileError, first_error
from shared.layout import Layout, Slice, Span
from shared.manifest import Delta, Manifest, Tensor
from shared.parcel import Effort, Run, encode
from shared.tensorfile import DTYPE_BITS, PREFIX, TensorHeader, header_length, parse_header

AT_ONCE = 4
"""Shards that are encoded at a time, on as many cores."""
BASES = 64 << 20
"""Bytes of the parent's shards that are kept for the next ones: small tensors have one between them."""
LEAST_GAIN = 0.05
"""Share of a shard's bytes that a parcel must save."""
LEAST_SAVED = 256
"""Bytes that it must save: its line in the manifest takes about a hundred."""
SAMPLES, SAMPLE = 4, 64 << 10
"""Parts of a shard that are encoded to see whether the whole is worth it, and bytes of each."""


@dataclass(frozen=True)
class Making:
    """Which parcels are made."""

    deltas: bool = True
    compress: bool = True
    effort: Effort = Effort.DEFAULT
    least_gain: float = LEAST_GAIN


DEFAULT = Making()


@dataclass
class Made:
    """What was made."""

    parcels: int = 0
    stored: int = 0
    """Parcels that were not in the store before."""
    stored_bytes: int = 0
    unread: int = 0
    """Shards whose base could not be read, so that they have no delta."""


class Shards(Protocol):
    """Where shards are stored, and the parent's are read."""

    async def ensure_blob(self, digest: Digest, data: memoryview) -> bool:
        """Store a shard that the caller has hashed, unless it is there. Gives whether it was stored."""
        ...

    async def read_blob(self, digest: Digest) -> bytes:
        """A shard that is stored, checked. Raises NotFound, IntegrityError."""
        ...


async def add_deltas(
    sink: Shards,
    manifest: Manifest,
    sources: Sequence[SourceFile],
    heads: Mapping[Digest, bytes],
    parent: Manifest | None,
    making: Making,
    *,
    inherit: bool = True,
    progress: Callable[[int, int], None] = lambda size, left: None,
) -> tuple[Manifest, Made]:
    """The same revision with deltas; their parcels are stored. ``heads``: shards that are in no file.

    ``progress`` is told the bytes of each shard that is done, and those that are left. Raises PublishError where a file
    changed meanwhile, and as ``sink`` does.
    """
    bases, done = _Bases(sink), Made()
    upon = parent if making.deltas else None
    held: Container[Digest] = parent.shards if parent and inherit else ()
    headers = {source.path: source.tensors for source in sources if source.tensors}
    tensors = await _tensors_of(upon, bases) if upon else ()
    places = {source.path: source.location for source in sources}
    todo = [*jobs(manifest, headers, upon, ParentTensors(tensors))]
    todo += [Job(digest, "", 0, len(data), (Run(len(data)),)) for digest, data in heads.items()]
    made: dict[Delta, int] = {}

    async def work(left: list[Job]) -> None:
        while left:
            job = left.pop()
            data = heads[job.target] if not job.file else await asyncio.to_thread(_read, places[job.file], job)
            base = await bases.join(job.base)
            if base is None:
                done.unread += 1
                job = replace(job, runs=_unbased(job.runs), base=())
            for upon_base, parcel, digest in await asyncio.to_thread(_parcels, job, data, base or b"", making):
                made[Delta(job.target, digest, job.base if upon_base else ())] = len(parcel)
                done.parcels += 1
                if await sink.ensure_blob(digest, memoryview(parcel)):
                    done.stored += 1
                    done.stored_bytes += len(parcel)
            progress(job.size, sum(other.size for other in left))

    if making.compress or upon:
        left = [job for job in reversed(todo) if job.target not in held]
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(AT_ONCE, os.cpu_count() or 1)):
                    group.create_task(work(left))
        except BaseExceptionGroup as errors:
            raise first_error(errors) from None
    place = {digest: number for number, digest in enumerate(manifest.shards)}
    ordered = sorted(made, key=lambda delta: (place[delta.target], bool(delta.base)))  # whichever was done first
    levels = 0 if not inherit else MAX_CHAIN if making.deltas else 1
    return compose(manifest, {delta: made[delta] for delta in ordered}, parent, levels=levels), done


async def _tensors_of(parent: Manifest, bases: _Bases) -> Sequence[Tensor]:
    """The parent's tensors; from its files' headers where its manifest has too many to list."""
    if parent.tensors:
        return parent.tensors
    found: list[Tensor] = []
    for path, layout in parent.files.items():
        if path.endswith(".safetensors") and (header := await _header_of(layout, bases)):
            data = header.data_start
            found += [
                Tensor(t.name, t.dtype, t.shape, path, tuple(layout.cut(Span(data + t.begin, data + t.end))))
                for t in header.tensors
            ]
    return found


async def _header_of(layout: Layout, bases: _Bases) -> TensorHeader | None:
    try:
        prefix = await bases.join(layout.cut(Span(0, min(PREFIX, layout.size))))
        length = header_length(prefix or b"", layout.size)
        raw = await bases.join(layout.cut(Span(PREFIX, PREFIX + length)))
        return parse_header(raw or b"", layout.size)
    except TensorFileError:
        return None  # it cannot be read, or was published when it could be


class _Bases:
    """Reads the parent's shards; the last ones are kept."""

    def __init__(self, sink: Shards) -> None:
        self._sink = sink
        self._kept: OrderedDict[Digest, bytes] = OrderedDict()

    async def join(self, slices: Iterable[Slice]) -> bytes | None:
        """The bytes of slices, joined; None where a shard is not there, or is damaged."""
        try:
            return b"".join([await self._cut(part) for part in slices])
        except (NotFound, IntegrityError):
            return None

    async def _cut(self, part: Slice) -> bytes:
        data = self._kept.get(part.digest)
        if data is None:
            data = await self._sink.read_blob(part.digest)
            self._kept[part.digest] = data
        self._kept.move_to_end(part.digest)
        while sum(map(len, self._kept.values())) > BASES:
            self._kept.popitem(last=False)
        return data[part.offset : part.offset + part.length]


def _read(location: Path, job: Job) -> bytes:
    """A shard's bytes, again. Raises PublishError where they are others by now."""
    with location.open("rb") as file:
        file.seek(job.start)
        data = file.read(job.size)
    if digest_of(data) != job.target:
        raise PublishError(f"{job.file}: changed while it was read")
    return data


def _unbased(runs: Iterable[Run]) -> tuple[Run, ...]:
    return tuple(replace(run, based=False) for run in runs)


def _parcels(job: Job, target: bytes, base: bytes, making: Making) -> list[tuple[bool, bytes, Digest]]:
    """The parcels of a shard that are worth it, each with whether it is upon its base; of both kinds where the one upon
    the base is that much smaller than the compressed shard."""
    kept, best = [], job.size
    for upon, wanted, runs in ((b"", making.compress, _unbased(job.runs)), (base, bool(base), job.runs)):
        if not wanted or not _promises(target, upon, runs, making):
            continue
        parcel = encode(memoryview(target), memoryview(upon), runs, making.effort)
        if _saves(len(parcel), best, making.least_gain):
            kept.append((bool(upon), parcel, digest_of(parcel)))
            best = len(parcel)
    return kept


def _saves(size: int, than: int, gain: float) -> bool:
    return size <= than * (1 - gain) and than - size >= LEAST_SAVED


def _promises(target: bytes, base: bytes, runs: Sequence[Run], making: Making) -> bool:
    """Whether a sample is saved half as much of as is asked for; any shard that is hardly larger than one is tried.

    Bytes that are no tensor's are upon whatever part of the base is like them: no sample shows that.
    """
    if len(target) <= 2 * SAMPLES * SAMPLE or any(run.based and not run.dtype for run in runs):
        return True
    parts, beside, chosen = _sample(target, base, runs)
    size = len(encode(memoryview(parts), memoryview(beside), chosen, Effort.FAST))
    return size <= len(parts) * (1 - making.least_gain / 2)


def _sample(target: bytes, base: bytes, runs: Sequence[Run]) -> tuple[bytes, bytes, list[Run]]:
    """Parts of a shard, evenly spread, with what they are upon."""
    parts, beside, chosen = [], [], []
    step, position, based, due = len(target) // SAMPLES, 0, 0, 0
    for run in runs:
        while due < position + run.length:
            skip = (max(due - position, 0)) // 8 * 8
            length = min(SAMPLE, run.length - skip)
            parts.append(target[position + skip : position + skip + length])
            if run.based:
                beside.append(base[based + skip : based + skip + length])
            chosen.append(replace(run, length=length, first=run.first + _elements(run, skip)))
            due += step
        position += run.length
        based += run.length if run.based else 0
    return b"".join(parts), b"".join(beside), chosen


def _elements(run: Run, size: int) -> int:
    return size * 8 // DTYPE_BITS[run.dtype] if run.dtype else 0
