"""Safetensors headers: read with suspicion, and made for tasks. Pure.

A file is eight bytes of little-endian header length, that many bytes of JSON, then tensor data without holes.
The published library accepts duplicate keys, odd names and headers that take half a minute to parse, so the
checks are here and come before anything else looks at the file.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from shared.errors import TensorFileError

MAX_HEADER = 8 << 20
MAX_MADE = 100_000_000
"""Bytes of a header that we make, of many files' tensors: what readers of the format accept."""
MAX_TENSORS = 20_000
MAX_NAME = 1024
PREFIX = 8

DTYPE_BITS: Mapping[str, int] = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a header. ``begin`` and ``end`` are byte offsets into the data, after the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size(self) -> int:
        """Bytes of data."""
        return self.end - self.begin


@dataclass(frozen=True)
class TensorHeader:
    """A whole header: ``data_start`` is where tensor data begins in the file."""

    data_start: int
    metadata: Mapping[str, str]
    tensors: tuple[TensorEntry, ...]
    """In the order of their data, which they tile exactly."""


def header_length(prefix: bytes, file_size: int) -> int:
    """The length of the JSON header from a file's first eight bytes. Raises TensorFileError."""
    if len(prefix) < PREFIX:
        raise TensorFileError("shorter than its header")
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER:
        raise TensorFileError(f"a header of {length} bytes; {MAX_HEADER} are allowed")
    if PREFIX + length > file_size:
        raise TensorFileError("truncated: the header is longer than the file")
    return int(length)


def parse_header(raw: bytes, file_size: int) -> TensorHeader:
    """The header in ``raw`` (the JSON, without its length prefix) of a file of ``file_size`` bytes.

    Raises TensorFileError for whatever a reader could take in two ways: see tables X1 to X3 in the tests.
    """
    if not raw.startswith(b"{"):
        raise TensorFileError("the header is not a JSON object")
    # A tensor takes one map and two lists: counting brackets costs nothing, parsing a bomb costs seconds. Texts in
    # the metadata may have some too.
    if raw.count(b"{") > 2 * MAX_TENSORS or raw.count(b"[") > 4 * MAX_TENSORS:
        raise TensorFileError(f"more than {MAX_TENSORS} tensors")
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise TensorFileError("the header is not valid JSON") from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(_is_text(item) for pair in metadata.items() for item in pair):
        raise TensorFileError("__metadata__ is not a map of texts")
    if len(header) > MAX_TENSORS:
        raise TensorFileError(f"more than {MAX_TENSORS} tensors")
    tensors = sorted((_entry(name, entry) for name, entry in header.items()), key=lambda t: (t.begin, t.end))
    data_start = PREFIX + len(raw)
    position = 0
    for tensor in tensors:
        if tensor.begin != position:
            kind = "overlaps another" if tensor.begin < position else "leaves a hole before it"
            raise TensorFileError(f"tensor {tensor.name!r} {kind}")
        position = tensor.end
    if data_start + position != file_size:
        kind = "truncated" if data_start + position > file_size else "bytes after the last tensor"
        raise TensorFileError(f"{kind}: the header tells of {data_start + position} bytes, not {file_size}")
    return TensorHeader(data_start, metadata, tuple(tensors))


def make_header(tensors: Iterable[tuple[str, TensorEntry]], metadata: Mapping[str, str]) -> bytes:
    """Length prefix and JSON for these tensors (under these names), their data joined in this order.

    Padded with spaces to eight bytes, so that mapped data is aligned. The same input gives the same bytes.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for name, tensor in tensors:
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.size],
        }
        position += tensor.size
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_MADE:
        raise TensorFileError(f"a header of {len(raw)} bytes; the format has {MAX_MADE}")
    return struct.pack("<Q", len(raw)) + raw


def names_apart(tensors: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """What each tensor (file, name) of a model is called: its own name, which is unique in most models.

    Where two files use the same name (the parts of a diffusion pipeline), files in a folder have the folder in front:
    ``unet/conv_in.weight``. Raises TensorFileError where that is not enough.
    """
    plain = {(file, name): name for file, name in tensors}
    if len(set(plain.values())) == len(plain):
        return plain
    folders = {(file, name): f"{file.rpartition('/')[0]}/{name}" if "/" in file else name for file, name in plain}
    seen: dict[str, str] = {}
    for (file, _), name in folders.items():
        if (other := seen.setdefault(name, file)) != file:
            raise TensorFileError(f"{file}: tensor {name!r} is in {other} too; leave one out with exclude = [...]")
    return folders


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise TensorFileError("the header has a key twice")
    return value


def _refuse(name: str) -> None:
    raise TensorFileError(f"{name} in the header")


def _entry(name: str, entry: object) -> TensorEntry:
    if not name or len(name) > MAX_NAME or not name.isprintable() or ".." in name or name != name.strip():
        raise TensorFileError(f"a tensor with an unusable name: {name[:80]!r}")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise TensorFileError(f"tensor {name!r} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise TensorFileError(f"tensor {name!r} has an unknown dtype")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise TensorFileError(f"tensor {name!r} has an unusable shape or data_offsets")
    # A zero hides any overflow in the product, so the other dimensions are bounded on their own.
    if len(shape) > 64 or math.prod(n or 1 for n in shape) >= 1 << 56:
        raise TensorFileError(f"tensor {name!r} has an unusable shape")
    if (offsets[1] - offsets[0]) * 8 != math.prod(shape) * DTYPE_BITS[dtype]:
        raise TensorFileError(f"tensor {name!r} has not the size that its shape and dtype give")
    return TensorEntry(name, dtype, tuple(shape), offsets[0], offsets[1])


def _is_text(value: object) -> bool:
    """Text that can be written as UTF-8: JSON escapes can spell half of a surrogate pair."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)
