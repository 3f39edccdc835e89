"""Safetensors files as arrays: right values, mapped and not copied, and the file stays as it is."""

from __future__ import annotations

import importlib
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from nearshard.tensors import MissingPackage, UnknownDtype, load
from shared.errors import TensorFileError
from shared.tensorfile import TensorEntry, make_header

TENSORS: dict[str, Any] = {
    "float": np.arange(12, dtype=np.float32).reshape(3, 4),
    "half": np.array([[1.5], [-2.0]], dtype=np.float16),
    "byte": np.array([1, 2, 255], dtype=np.uint8),
    "flag": np.array([True, False]),
    "long": np.array(-5, dtype=np.int64),
    "none": np.empty((0, 7), dtype=np.float64),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    return path


def raw(path: Path, dtype: str, shape: tuple[int, ...], data: bytes) -> Path:
    """A file of one tensor ``x``."""
    path.write_bytes(make_header([("x", TensorEntry("x", dtype, shape, 0, len(data)))], {}) + data)
    return path


def mapping_of(array: Any) -> mmap.mmap:
    """What an array is a view of."""
    while isinstance(array, np.ndarray):
        array = array.base
    assert isinstance(array, memoryview) and isinstance(array.obj, mmap.mmap)
    return array.obj


def test_arrays_are_what_was_saved(file: Path) -> None:
    got = load(file)
    assert got.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert got[name].dtype == tensor.dtype and np.array_equal(got[name], tensor) and got[name].shape == tensor.shape


def test_arrays_are_one_mapping_of_the_file_and_never_change_it(file: Path) -> None:
    before = file.read_bytes()
    got = load(file)
    assert len({id(mapping_of(got[name])) for name in ("float", "half", "long")}) == 1, "views of one, no copies"
    got["float"][0, 0] = 99
    assert got["float"][0, 0] == 99 and file.read_bytes() == before
    assert load(file)["float"][0, 0] == 0


def test_bfloat16_is_that_of_ml_dtypes(tmp_path: Path) -> None:
    pytest.importorskip("ml_dtypes")
    path = raw(tmp_path / "b", "BF16", (2,), b"\x80\x3f\x00\xc0")
    array = load(path)["x"]
    assert str(array.dtype) == "bfloat16" and array.astype(np.float32).tolist() == [1.0, -2.0]


def test_without_the_package_there_is_an_error_that_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = raw(tmp_path / "b", "BF16", (2,), b"\x80\x3f\x00\xc0")
    real = importlib.import_module

    def none(name: str) -> Any:
        if name in ("ml_dtypes", "torch"):
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr(importlib, "import_module", none)
    for framework, said in (("numpy", "ml_dtypes"), ("torch", "torch")):
        with pytest.raises(MissingPackage, match=said):
            load(path, framework)  # type: ignore[arg-type]


def test_a_type_that_there_is_no_array_for_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UnknownDtype, match="F4"):
        load(raw(tmp_path / "x", "F4", (2,), b"\x12"))


@pytest.mark.parametrize("data", [b"", b"GGUF" + bytes(60), b"\xff" * 8])
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(data)
    with pytest.raises(TensorFileError):
        load(path)


def test_tensors_of_torch_are_the_same(file: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    got = load(file, "torch")
    for name, tensor in TENSORS.items():
        assert tuple(got[name].shape) == tensor.shape and np.array_equal(got[name].numpy(), tensor)
    b = load(raw(tmp_path / "b", "BF16", (2,), b"\x80\x3f\x00\xc0"), "torch")["x"]
    assert b.dtype == torch.bfloat16 and b.tolist() == [1.0, -2.0]
