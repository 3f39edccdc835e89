"""Tensors as float32, a run of elements at a time: of safetensors files that are mapped, or of a state dict.

What is in files is never there as a whole in memory. numpy has no bfloat16, and none is needed: its sixteen bits are
the upper half of a float32.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nearshard.placing import on_disk
from shared.errors import RequestError, TensorFileError
from shared.federated import FLOATS
from shared.tensorfile import PREFIX, TensorEntry, header_length, parse_header

if TYPE_CHECKING:  # it takes long to import, and the command has other words
    from numpy import float32
    from numpy.typing import NDArray

    Floats = NDArray[float32]

SUFFIX = ".safetensors"
_VIEWS: Mapping[str, str] = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True)
class Values:
    """One tensor."""

    shape: tuple[int, ...]
    run: Callable[[int, int], Floats]
    """Elements from the first one on, so many, as float32 in one dimension; as they lie in memory, row by row."""


def of_file(file: Path) -> dict[str, Values]:
    """The tensors of floats in a safetensors file, by name. Raises TensorFileError, DiskError."""
    with on_disk(), file.open("rb") as opened:
        size = file.stat().st_size
        try:
            raw = opened.read(header_length(opened.read(PREFIX), size))
            header = parse_header(raw, size)
        except TensorFileError as error:
            raise TensorFileError(f"{file}: {error}") from error
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    return {
        entry.name: Values(entry.shape, _mapped(mapped, header.data_start + entry.begin, entry))
        for entry in header.tensors
        if entry.dtype in FLOATS
    }


def _mapped(mapped: mmap.mmap, begin: int, entry: TensorEntry) -> Callable[[int, int], Floats]:
    import numpy as np

    width, dtype = FLOATS[entry.dtype], np.dtype(_VIEWS[entry.dtype])

    def run(first: int, count: int) -> Floats:
        found = np.frombuffer(mapped, dtype, count, begin + first * width)
        if entry.dtype == "BF16":
            return (found.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(over="ignore"):  # to infinity, which is refused with its name
            return found.astype(np.float32)

    return run


def of_path(path: Path) -> dict[str, Values]:
    """The tensors of a safetensors file, or of all such files below a directory. Raises RequestError where there are
    none, or two files have one of the same name; TensorFileError, DiskError."""
    if not path.exists():
        raise RequestError(f"{path} is not there; give the trained model, a directory or a {SUFFIX} file")
    files = sorted(path.rglob(f"*{SUFFIX}")) if path.is_dir() else [path]
    if not files:
        raise RequestError(f"there is no {SUFFIX} file in {path}")
    return joined(files)


def joined(files: Iterable[Path]) -> dict[str, Values]:
    """The tensors of several files. Raises RequestError, TensorFileError, DiskError."""
    found: dict[str, Values] = {}
    for file in files:
        more = of_file(file)
        if twice := found.keys() & more.keys():
            raise RequestError(f"{file}: tensor {min(twice)!r} is in another file too; give one of them")
        found |= more
    return found


def of_state_dict(state: Mapping[str, Any]) -> dict[str, Values]:
    """The tensors of a state dict: numpy arrays, or torch tensors wherever they are. What is no float is left out.

    Raises RequestError for what is neither.
    """
    return {name: found for name, value in state.items() if (found := _of_array(name, value))}


def _of_array(name: str, value: Any) -> Values | None:
    """By what it can do: torch is not imported for it, so it need not be installed. None where it has no floats."""
    if callable(getattr(value, "detach", None)):
        if not value.is_floating_point():
            return None
        flat = value.detach().reshape(-1)
        return Values(tuple(value.shape), lambda first, count: flat[first : first + count].cpu().float().numpy())
    import numpy as np

    if not isinstance(value, np.ndarray):
        raise RequestError(f"{name}: a state dict has numpy arrays or torch tensors")
    if value.dtype.kind != "f" and value.dtype.name != "bfloat16":
        return None
    elements = value.reshape(-1)
    return Values(value.shape, lambda first, count: elements[first : first + count].astype(np.float32))


def check_covers(trained: Mapping[str, Values], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Whether what was trained has all tensors that take part, in their shapes. Raises RequestError
    (``schema_mismatch``)."""
    if missing := [name for name in wanted if name not in trained]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise RequestError(
            f"what was trained lacks {missing[0]!r}{more}, which the round takes; see `nearshard federated rounds`",
            code="schema_mismatch",
        )
    for name, shape in wanted.items():
        if trained[name].shape != shape:
            raise RequestError(
                f"{name!r} was trained as {list(trained[name].shape)} and is {list(shape)} in the base revision",
                code="schema_mismatch",
            )


def elements(shape: tuple[int, ...]) -> int:
    """How many a tensor of this shape has."""
    return math.prod(shape)
