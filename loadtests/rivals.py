"""What other ways take to bring somebody who has one file to another: bytes to move, by each. For ``bench-delta``.

Each takes the file wanted and the file held, and gives the bytes that have to be moved.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import zstandard
from pyfastcdc import FastCDC

from loadtests.services import BenchmarkError
from shared.tensorfile import PREFIX, TensorHeader, header_length, parse_header

LEVEL = 3
CHUNK_MIN, CHUNK, CHUNK_MAX = 8 << 10, 64 << 10, 128 << 10
"""Xet's. Without the first and the last, the library takes a quarter of the average and four times that."""
LIMIT = 1800.0
"""Seconds that a program may take: bsdiff needs about five minutes for 90 MB."""

Rival = Callable[[bytes, bytes], int]


def whole(target: bytes, base: bytes) -> int:
    """zstd of the whole file; what is held does not count."""
    return _packed(target)


def chunks(target: bytes, base: bytes) -> int:
    """Content-defined chunks that are not held, each compressed, or as it is where that is less: as Xet does."""
    cut = FastCDC(CHUNK, min_size=CHUNK_MIN, max_size=CHUNK_MAX)
    held = {hashlib.sha256(chunk.data).digest() for chunk in cut.cut_buf(base)}
    new = {hashlib.sha256(chunk.data).digest(): bytes(chunk.data) for chunk in cut.cut_buf(target)}
    return sum(min(len(data), _packed(data)) for digest, data in new.items() if digest not in held)


def tensors(target: bytes, base: bytes) -> int:
    """Tensors that are not the same as those of the same name, each compressed, and the header."""
    wanted, held = _header(target), _header(base)
    data, before = memoryview(target)[wanted.data_start :], memoryview(base)[held.data_start :]
    known = {entry.name: before[entry.begin : entry.end] for entry in held.tensors}
    moved = (data[entry.begin : entry.end] for entry in wanted.tensors)
    named = zip(wanted.tensors, moved, strict=True)
    new = [tensor for entry, tensor in named if known.get(entry.name) != tensor]
    return wanted.data_start + sum(min(len(tensor), _packed(tensor)) for tensor in new)


def xdelta3(target: bytes, base: bytes) -> int:
    """xdelta3 with a window that has all of what is held in it."""
    return _by("xdelta3", "-e", "-f", "-B", str(max(1 << 20, len(base))), "-s", "base", "target", "patch")(target, base)


def bsdiff(target: bytes, base: bytes) -> int:
    """bsdiff: minutes."""
    return _by("bsdiff", "base", "target", "patch")(target, base)


def installed(name: str) -> bool:
    """Whether a program is there."""
    return shutil.which(name) is not None


def _by(*command: str) -> Rival:
    """A program that makes ``patch`` of the files ``base`` and ``target``."""

    def run(target: bytes, base: bytes) -> int:
        with tempfile.TemporaryDirectory(prefix="nearshard-rivals-") as place:
            (Path(place) / "base").write_bytes(base)
            (Path(place) / "target").write_bytes(target)
            _run(command, place)
            return (Path(place) / "patch").stat().st_size

    return run


def zipnn(python: Path, dtype: str) -> Rival:
    """ZipNN of the whole file, by the Python of an environment that has it."""
    script = (
        "import pathlib, zipnn; data = pathlib.Path('target').read_bytes(); "
        f"packed = zipnn.ZipNN(input_format='byte', bytearray_dtype='{dtype}').compress(bytearray(data)); "
        "pathlib.Path('patch').write_bytes(packed)"
    )
    return _by(str(python), "-c", script)


def _run(command: Sequence[str], place: str) -> None:
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=LIMIT)
    if done.returncode:
        raise BenchmarkError(f"{command[0]} failed: {done.stderr[-2000:]}")


def _packed(data: bytes | memoryview) -> int:
    return len(zstandard.ZstdCompressor(level=LEVEL).compress(data))


def _header(data: bytes) -> TensorHeader:
    length = header_length(data[:PREFIX], len(data))
    return parse_header(data[PREFIX : PREFIX + length], len(data))
