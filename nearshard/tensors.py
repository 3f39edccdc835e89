"""A safetensors file as arrays, mapped into memory: nothing is read before it is used, and nothing is there twice.

Arrays may be written to: what is written is this process's alone (copy on write), the file never changes.
"""

from __future__ import annotations

import importlib
import mmap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from nearshard.placing import on_disk
from shared.errors import LocalError, MissingPackage, TensorFileError
from shared.tensorfile import PREFIX, TensorEntry, header_length, parse_header

Framework = Literal["numpy", "torch"]

NUMPY: Mapping[str, str] = {
    "BOOL": "?", "U8": "<u1", "I8": "<i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8",
    "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8", "C64": "<c8",
}  # fmt: skip
ML_DTYPES: Mapping[str, str] = {
    "BF16": "bfloat16", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
TORCH: Mapping[str, str] = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "F32": "float32", "F64": "float64", "C64": "complex64",
    **ML_DTYPES,
}  # fmt: skip
Make = Callable[[mmap.mmap, int, TensorEntry], Any]
"""An array of a tensor that begins at that byte of the mapped file."""


class UnknownDtype(LocalError):
    """A type that the library has no array for."""

    code = "unknown_dtype"


def load(file: Path, framework: Framework = "numpy") -> dict[str, Any]:
    """The tensors of a safetensors file by name, in the file's order: ``numpy.ndarray`` or ``torch.Tensor``.

    bfloat16 and the 8-bit floats are ``ml_dtypes`` in numpy. Raises TensorFileError, MissingPackage, UnknownDtype for
    a type that the library has no array for (those of 4 and 6 bits), DiskError.
    """
    make = _numpy() if framework == "numpy" else _torch()
    with on_disk(), file.open("rb") as opened:
        size = file.stat().st_size
        raw = opened.read(header_length(opened.read(PREFIX), size))
        header = parse_header(raw, size)
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    return {entry.name: make(mapped, header.data_start + entry.begin, entry) for entry in header.tensors}


def _numpy() -> Make:
    numpy = _package("numpy", "numpy")

    def make(mapped: mmap.mmap, begin: int, entry: TensorEntry) -> Any:
        name = _name(entry, {**NUMPY, **ML_DTYPES}, "numpy")
        dtype = getattr(_package("ml_dtypes", "numpy"), name) if entry.dtype in ML_DTYPES else name
        dtype = numpy.dtype(dtype)
        if not entry.size:
            return numpy.empty(entry.shape, dtype)
        return numpy.frombuffer(mapped, dtype, entry.size // dtype.itemsize, begin).reshape(entry.shape)

    return make


def _torch() -> Make:
    torch = _package("torch", "torch")

    def make(mapped: mmap.mmap, begin: int, entry: TensorEntry) -> Any:
        dtype = getattr(torch, _name(entry, TORCH, "torch"), None)
        if dtype is None:
            raise UnknownDtype(f"{entry.name}: this torch has no {entry.dtype}")
        if not entry.size:
            return torch.empty(entry.shape, dtype=dtype)
        count = entry.size // dtype.itemsize
        return torch.frombuffer(mapped, dtype=dtype, count=count, offset=begin).reshape(entry.shape)

    return make


def _name(entry: TensorEntry, names: Mapping[str, str], library: str) -> str:
    if entry.dtype not in names:
        raise UnknownDtype(f"{entry.name}: {library} has no array of {entry.dtype}; read its bytes with Client.open")
    return names[entry.dtype]


def _package(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackage(f"{name} is not installed: pip install 'nearshard[{extra}]'") from error


__all__ = ["Framework", "MissingPackage", "TensorFileError", "UnknownDtype", "load"]
