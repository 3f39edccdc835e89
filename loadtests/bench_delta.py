"""``make bench-delta``: bytes from one version of a real model to the next, by deltas and by what others do.

For each version that ``loadtests/train_versions.py`` trained: its base is published into a store of its own and the
version over it, as ``nearshard publish`` does it. What has to be moved is what a client with the base chooses to fetch
(``shared.deltas``), and the new manifest. It is decoded then, and every byte compared with the version's.

The same pair by others: zstd of the whole file; 64 KiB content-defined chunks with zstd, as Xet has them; tensors that
changed, with zstd; xdelta3 where it is installed; and bsdiff, of files of up to 25 MB, or with ``--all`` of all,
which takes minutes for each pair.

Speeds are MB of the model's file per second of the processor, of encoding and decoding alone. Bytes are exact and the
same each time; the versions are the same on one kind of processor only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from loadtests import rivals
from loadtests.demo import fetch_model
from loadtests.report import console, note, processor
from loadtests.services import BenchmarkError, workspace
from origin.commit import LocalSink
from origin.deltas import Making
from origin.keyring import load_ring
from origin.model_dir import read_sources
from origin.pairing import ParentTensors, jobs
from origin.publish import publish
from origin.storage import Storage
from origin.trust_setup import initialise
from origin.trust_store import TrustStore
from shared.deltas import bytes_moved, ways
from shared.digest import Digest, digest_of
from shared.layout import Slice
from shared.manifest import Delta, Manifest
from shared.parcel import Effort, decode, encode

ROOT = Path(__file__).parent.parent
MODEL, FILE = "bench/delta", "model.safetensors"
TRAINING = 3600.0
"""Seconds that training may take."""
TOLERANCE = 0.5
"""Points that a version's own training may make of a difference."""
GOALS = {
    "all": 62.6,
    "all-no-decay": 65.9,
    "all-50": 76.5,
    "all-fp16": 77.9,
    "all-bf16": 88.9,
    "trained-bf16": 98.0,
    "all-int8": 94.2,
    "last-two": 90.7,
    "last-two-bf16": 96.9,
    "lora-attention": 99.0,
    "lora-all": 96.0,
}
"""Bytes saved of the whole file, in %."""
BSDIFF_MOST = 25_000_000
"""Bytes of a file that bsdiff is run on without being asked to: its time grows faster than these."""
ZIPNN = {"bf16": "bfloat16", "fp16": "float16"}
TEXT = ("tokenizer.json", "vocab.txt")

Names = Sequence[str]


@dataclass(frozen=True)
class Moved:
    """One version by our deltas: bytes, and seconds of the processor."""

    size: int
    moved: int
    first: int
    """Bytes to move to who has nothing."""
    encode: float
    decode: float


@dataclass
class Row:
    """What came out for one version."""

    kind: str
    title: str
    steps: int
    """Of training."""
    ours: Moved
    others: dict[str, int] = field(default_factory=dict)
    """Bytes that others have to move, by their names."""

    @property
    def saved(self) -> float:
        """In % of the whole file, as all savings here."""
        return saved(self.ours.moved, self.ours.size)

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without one."""
        goal = GOALS.get(self.kind)
        return None if goal is None else self.saved >= goal - TOLERANCE and self.ours.moved <= self.ours.size


def saved(moved: int, size: int) -> float:
    """Bytes that need not be moved, in % of the whole."""
    return 100 * (1 - moved / size)


# Ours


class Store:
    """A store with keys of its own, published to as ``nearshard publish`` does."""

    def __init__(self, folder: Path, effort: Effort) -> None:
        self.folder, self.effort = folder, effort
        self.trust = TrustStore(Storage(str(folder / "store")))

    async def begin(self) -> None:
        """Make the keys."""
        await initialise(self.trust, self.folder / "keys", [MODEL.partition("/")[0]], now(), root_keys=1, threshold=1)

    async def publish(self, directory: Path) -> Manifest:
        """Publish a directory over what there is."""
        sink = LocalSink(self.trust, load_ring([self.folder / "keys"]), now)
        making = Making(effort=self.effort)
        done = await publish(sink, directory, MODEL, "main", making=making, pieces=False)
        return await self.trust.storage.manifest(MODEL, done.revision)

    async def read(self, slices: Iterable[Slice]) -> bytes:
        """The bytes of slices, joined."""
        parts = [(await self.trust.storage.read_blob(part.digest))[part.offset :][: part.length] for part in slices]
        return b"".join(parts)


async def measure(base: Path, version: Path, folder: Path, effort: Effort) -> Moved:
    """Publish a version over its base, and be a client that has the base. Raises BenchmarkError: other bytes."""
    store = Store(folder, effort)
    await store.begin()
    parent = await store.publish(base)
    manifest = await store.publish(version)
    chosen = ways(manifest, manifest.shards, parent.shards.__contains__)
    new = {digest: steps for digest, steps in chosen.items() if digest not in parent.shards}
    decoding, made = await decoded(store, manifest, new)
    await compare(store, manifest, made, version)
    return Moved(
        size=manifest.files[FILE].size,
        moved=bytes_moved(manifest, new) + len(manifest.encoded),
        first=bytes_moved(manifest, ways(manifest, manifest.shards, lambda _: False)) + len(manifest.encoded),
        encode=await encoding(store, parent, manifest, version),
        decode=decoding,
    )


async def decoded(
    store: Store, manifest: Manifest, chosen: Mapping[Digest, tuple[Delta, ...]]
) -> tuple[float, dict[Digest, bytes]]:
    """Seconds of the processor that decoding takes, and what it makes, checked."""
    seconds, made = 0.0, dict[Digest, bytes]()
    for steps in chosen.values():
        for delta in steps:
            parcel, base = await store.read([whole(manifest, delta.parcel)]), await store.read(delta.base)
            began = time.process_time()
            data = decode(memoryview(parcel), memoryview(base), manifest.size_of(delta.target))
            seconds += time.process_time() - began
            if digest_of(data) != delta.target:
                raise BenchmarkError(f"{delta.parcel} was decoded to other bytes")
            made[delta.target] = data
    return seconds, made


def whole(manifest: Manifest, digest: Digest) -> Slice:
    """All of a shard."""
    return Slice(digest, 0, manifest.size_of(digest))


async def compare(store: Store, manifest: Manifest, made: Mapping[Digest, bytes], version: Path) -> None:
    """Put every file together as a client does. Raises BenchmarkError unless they are the version's."""
    for path, layout in manifest.files.items():
        parts = [
            made[part.digest][part.offset :][: part.length] if part.digest in made else await store.read([part])
            for part in layout.slices
        ]
        if b"".join(parts) != (version / path).read_bytes():
            raise BenchmarkError(f"{version / path} came out as other bytes")


async def encoding(store: Store, parent: Manifest, manifest: Manifest, version: Path) -> float:
    """Seconds of the processor for the parcels upon the parent, encoded once more. Raises BenchmarkError where they are
    others than were published."""
    headers = {source.path: source.tensors for source in read_sources(version, None)[1] if source.tensors}
    published = {delta.target: delta.parcel for delta in manifest.deltas if delta.base}
    seconds = 0.0
    for job in jobs(manifest, headers, parent, ParentTensors(parent.tensors)):
        if job.base and job.target in published:
            target, base = await store.read([whole(manifest, job.target)]), await store.read(job.base)
            began = time.process_time()
            parcel = encode(memoryview(target), memoryview(base), job.runs, store.effort)
            seconds += time.process_time() - began
            if digest_of(parcel) != published[job.target]:
                raise BenchmarkError(f"{job.target} is encoded to other bytes each time")
    return seconds


def now() -> datetime:
    """The time that metadata is signed at."""
    return datetime.now(UTC)


# The pairs


def train(out: Path, options: argparse.Namespace) -> None:
    """Train the versions, unless they are there: by a Python that has torch, with this project beside it."""
    if (out / "versions.json").exists() and not options.again:
        note(f"{out}: trained before (--again trains them anew)")
        return
    command = [str(options.python), "-m", "loadtests.train_versions", str(fetch_model()), str(out)]
    command += ["--constant"] if options.constant else []
    command += ["--quick"] if options.quick else ["--steps", str(options.steps)]
    done = subprocess.run(command, cwd=ROOT, timeout=TRAINING)
    if done.returncode:
        raise BenchmarkError("the versions could not be trained")


def others(options: argparse.Namespace, kind: str, size: int) -> dict[str, rivals.Rival]:
    """What is measured beside ours on a file of ``size`` bytes, by name, where it is installed."""
    known: dict[str, rivals.Rival] = {"zstd": rivals.whole, "chunks": rivals.chunks, "tensors": rivals.tensors}
    for name, rival in (("xdelta3", rivals.xdelta3), ("bsdiff", rivals.bsdiff)):
        if rivals.installed(name) and (options.all or name != "bsdiff" or size <= BSDIFF_MOST):
            known[name] = rival
    if options.zipnn:
        known["ZipNN"] = rivals.zipnn(options.python, ZIPNN.get(kind.rpartition("-")[2], "float32"))
    return known


def compared(out: Path, kind: str, made: Mapping[str, Any], directory: Path, options: argparse.Namespace) -> Row:
    """One version, by ours and by others."""
    base, version = out / made["base"], out / kind
    with_keys = directory / kind
    ours = asyncio.run(measure(base, version, with_keys, Effort[options.effort.upper()]))
    shutil.rmtree(with_keys)
    row = Row(kind, str(made["title"]), int(made["steps"]), ours)
    target, held = (version / FILE).read_bytes(), (base / FILE).read_bytes()
    for name, rival in others(options, kind, len(target)).items():
        row.others[name] = rival(target, held)
    note(f"{row.title}: {row.saved:.1f} % saved")
    return row


def first_downloads(out: Path, kinds: Iterable[str], directory: Path) -> dict[str, Moved]:
    """What who has nothing downloads, by what it is of: each base, and the tokenizer's text."""
    text = directory / "text"
    text.mkdir()
    for name in TEXT:
        shutil.copy(fetch_model() / name, text)
    found: dict[str, Moved] = {}
    for name, folder in {**{kind: out / kind for kind in kinds}, "tokenizer, text": text}.items():
        place = directory / f"first-{len(found)}"
        found[name] = asyncio.run(first(folder, place))
        shutil.rmtree(place)
    return found


async def first(folder: Path, place: Path) -> Moved:
    """Publish a directory over nothing, and be a client that has nothing."""
    store = Store(place, Effort.DEFAULT)
    await store.begin()
    manifest = await store.publish(folder)
    chosen = ways(manifest, manifest.shards, lambda _: False)
    seconds, made = await decoded(store, manifest, chosen)
    await compare(store, manifest, made, folder)
    size = sum(layout.size for layout in manifest.files.values())
    moved = bytes_moved(manifest, chosen) + len(manifest.encoded)
    return Moved(size, moved, moved, math.inf, seconds)


# The report


def show(rows: Sequence[Row], firsts: Mapping[str, Moved], effort: str) -> None:
    """The tables."""
    names = list(dict.fromkeys(name for row in rows for name in row.others))
    table = Table(title=f"Bytes saved from one version to the next, % of the whole file; effort {effort}")
    table.add_column("version")
    for column in ("steps", *names, "nearshard", "goal", "met", "encode, MB/s", "decode, MB/s"):
        table.add_column(column, justify="right")
    for row in rows:
        size, goal = row.ours.size, GOALS.get(row.kind)
        table.add_row(
            row.title,
            str(row.steps),
            *(f"{saved(row.others[name], size):.1f}" if name in row.others else "" for name in names),
            f"{row.saved:.1f}",
            f"{goal:.1f}" if goal else "",
            {None: "", True: "yes", False: "NO"}[row.met],
            speed(size, row.ours.encode),
            speed(size, row.ours.decode),
        )
    out = console()
    out.print(table)
    table = Table("first download", "MB", "saved, %", "decode, MB/s", title="Compressed transfer to who has nothing")
    for name, moved in firsts.items():
        rate = speed(moved.size, moved.decode)
        table.add_row(name, f"{moved.size / 1e6:.1f}", f"{saved(moved.moved, moved.size):.1f}", rate)
    out.print(table)
    out.print(f"{processor()}; every version was put together again, byte for byte")


def speed(size: int, seconds: float) -> str:
    """MB of the whole file per second of the processor."""
    return f"{size / 1e6 / seconds:.0f}" if 0 < seconds < math.inf else ""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.bench_delta", description=__doc__.partition("\n")[0])
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="that has torch, to train with")
    parser.add_argument("--versions", type=Path, metavar="DIR", help="where they are, or will be; .demo/versions")
    parser.add_argument("--again", action="store_true", help="train them again")
    parser.add_argument("--steps", type=int, default=200, help="of training, of 16 sentences each")
    parser.add_argument("--constant", action="store_true", help="train at a rate that stays as it is, with no warm-up")
    parser.add_argument(
        "--quick", action="store_true", help="a few kinds, after a few steps, for which the goals are not meant"
    )
    parser.add_argument("--all", action="store_true", help="bsdiff of large files too, minutes for each version")
    parser.add_argument("--kinds", nargs="+", metavar="KIND", help="of these only")
    parser.add_argument("--effort", choices=[effort.name.lower() for effort in Effort], default="default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write every figure")
    options = parser.parse_args()
    options.python = options.python.absolute()  # not resolved: the link is what makes it that environment's
    check = subprocess.run([str(options.python), "-c", "import zipnn"], capture_output=True)
    options.zipnn = check.returncode == 0
    return options


def main() -> None:
    """Run the benchmark."""
    options, began = arguments(), time.monotonic()
    out = options.versions or ROOT / ".demo" / ("versions-quick" if options.quick else "versions")
    with workspace("bench-delta") as directory:
        train(out, options)
        table = json.loads((out / "versions.json").read_text())
        kinds = {kind: made for kind, made in table.items() if not options.kinds or kind in options.kinds}
        rows = [compared(out, kind, made, directory, options) for kind, made in kinds.items()]
        firsts = first_downloads(out, dict.fromkeys(made["base"] for made in kinds.values()), directory)
    show(rows, firsts, options.effort)
    met = [row.met for row in rows if row.met is not None]
    note(f"{sum(met)} of {len(met)} goals are met; {(time.monotonic() - began) / 60:.0f} minutes, training included")
    if options.json:
        figures = {
            "rows": [asdict(row) for row in rows],
            "first": {name: asdict(found) for name, found in firsts.items()},
        }
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
