"""The model directory that a round makes: the base's files as they were published, with the aggregate taken off.

Everything is done in place and a part at a time, so memory is that of a few segments; merging an adapter holds one
weight at a time. The base's files are checked by their digests as they come from the store.
"""

from __future__ import annotations

import asyncio
import glob
import hashlib
import json
import math
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from origin.storage import Storage
from shared.errors import DiskError, IntegrityError, NonFinite, PublishError
from shared.federated import FLOATS, named
from shared.ids import DEFAULT_TASK
from shared.layout import Layout, Span
from shared.manifest import Manifest, Task, Tensor
from shared.tensorfile import PREFIX, TensorEntry, TensorHeader, header_length, parse_header
from shared.updates.segments import Segment, segments

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from shared.updates.codec import Floats

    Real = npt.NDArray[np.float32] | npt.NDArray[np.float64]

ADAPTERS, ADAPTER_CONFIG, ADAPTER_MODEL = "adapters", "adapter_config.json", "adapter_model.safetensors"
"""Where adapters are in a model, and what PEFT calls their files."""
_PEFT = "base_model.model."
"""What PEFT puts in front of a module's name."""
_OTHER_KINDS = ("use_dora", "alpha_pattern", "trainable_token_indices", "modules_to_save")
"""Settings of PEFT with which a merge would take more than the product of two matrices."""


# The base


async def fetch_model(storage: Storage, manifest: Manifest, space: str, folder: Path) -> None:
    """Put a revision's files into a new folder. ``space``: the model of private shards, or empty.

    Raises IntegrityError where a file is not what was signed; NotFound, DiskError, StoreError.
    """
    for path, layout in manifest.files.items():
        file = folder / path
        with _disk(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("xb") as opened:
                await _fetch_file(storage, layout, space, opened, path)


async def _fetch_file(storage: Storage, layout: Layout, space: str, opened: BinaryIO, path: str) -> None:
    digest = hashlib.sha256()

    def take(data: memoryview) -> None:
        digest.update(data)
        opened.write(data)

    for piece in layout.slices:
        async for data in storage.stream_blob(piece.digest, piece.offset, piece.length, space):
            await asyncio.to_thread(take, data)
    if digest.hexdigest() != layout.sha256:
        raise IntegrityError(f"{path}: the store has other bytes than were published")


async def tasks_of(storage: Storage, manifest: Manifest, space: str) -> dict[str, dict[str, Any]]:
    """The tasks of a revision as a tasks file has them, with every tensor by its name. Raises as ``fetch_model``."""
    return {
        task.name: await _task_of(storage, manifest, task, space)
        for task in manifest.tasks.values()
        if task.name != DEFAULT_TASK
    }


async def _task_of(storage: Storage, manifest: Manifest, task: Task, space: str) -> dict[str, Any]:
    fields = {"description": task.description, "files": list(task.files)}
    for path, layout in manifest.files.items():
        if layout.sha256 == task.layout.sha256 and path.rpartition("/")[2] == task.filename:
            return {**fields, "file": path}
    raw = await _read(storage, task.layout, Span(0, PREFIX), space)
    end = PREFIX + header_length(raw, task.layout.size)
    header = parse_header(await _read(storage, task.layout, Span(PREFIX, end), space), task.layout.size)
    return {**fields, "tensors": [tensor.name for tensor in header.tensors]}


async def _read(storage: Storage, layout: Layout, span: Span, space: str) -> bytes:
    parts = [
        bytes(data)
        for piece in layout.cut(span)
        async for data in storage.stream_blob(piece.digest, piece.offset, piece.length, space)
    ]
    return b"".join(parts)


def write_tasks(file: Path, tasks: Mapping[str, Mapping[str, Any]], gone: Collection[str] = ()) -> None:
    """A tasks file. ``gone``: files and tensors that are no longer there; a task that has one of them is not either."""
    lines = []
    for name, task in tasks.items():
        if {task.get("file"), *task["files"], *task.get("tensors", ())} & set(gone):
            continue
        lines.append(f"[tasks.{json.dumps(name)}]")
        lines.append(f"description = {_text(task['description'])}")
        lines.append(f"files = [{', '.join(_text(glob.escape(path)) for path in task['files'])}]")
        if "file" in task:
            lines.append(f"file = {_text(task['file'])}")
        else:
            lines.append(f"tensors = [{', '.join(_text(glob.escape(tensor)) for tensor in task['tensors'])}]")
    file.write_text("\n".join([*lines, ""]), encoding="utf-8")


def _text(value: str) -> str:
    """As TOML: JSON's escapes are among its own."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


# Tensors in place


class TensorFiles:
    """The safetensors files of a folder, read and written a part at a time."""

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """``tensors``: those that may be used, by their public names."""
        self._folder, self._tensors = folder, tensors
        self._headers: dict[str, tuple[TensorHeader, dict[str, TensorEntry]]] = {}

    def read(self, name: str, segment: Segment) -> Real:
        """Values (rows, columns) of a tensor: float32, or float64 of an F64. Raises DiskError."""
        tensor = self._tensors[name]
        file, at, size = self._place(name, segment)
        with _disk(file), file.open("rb") as opened:
            opened.seek(at)
            return decode_floats(opened.read(size), tensor.dtype).reshape(segment.rows, segment.columns)

    def write(self, name: str, segment: Segment, values: Real) -> None:
        """Put values there, rounded to the tensor's type. Raises NonFinite where they do not fit it; DiskError."""
        tensor = self._tensors[name]
        file, at, _ = self._place(name, segment)
        try:
            data = encode_floats(values, tensor.dtype)
        except OverflowError as error:
            raise NonFinite(f"{file.name}: {name} would have values that are not finite") from error
        with _disk(file), file.open("r+b") as opened:
            opened.seek(at)
            opened.write(data)

    def _place(self, name: str, segment: Segment) -> tuple[Path, int, int]:
        tensor = self._tensors[name]
        file, width = self._folder / tensor.file, FLOATS[tensor.dtype]
        if tensor.file not in self._headers:
            header = read_header(file)
            self._headers[tensor.file] = header, {entry.name: entry for entry in header.tensors}
        header, entries = self._headers[tensor.file]
        return file, header.data_start + entries[tensor.name].begin + segment.first * width, segment.count * width


def read_header(file: Path) -> TensorHeader:
    """The header of a safetensors file. Raises TensorFileError, DiskError."""
    with _disk(file), file.open("rb") as opened:
        size = file.stat().st_size
        return parse_header(opened.read(header_length(opened.read(PREFIX), size)), size)


def decode_floats(data: bytes, dtype: str) -> Real:
    """Bytes of a tensor as a flat array: float32, or float64 of F64."""
    import numpy as np

    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype == "F64":
        return np.frombuffer(data, "<f8").astype(np.float64)
    return np.frombuffer(data, {"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32)


def encode_floats(values: Real, dtype: str) -> bytes:
    """Values as bytes of a tensor, rounded to the nearest. Raises OverflowError for what is not finite then."""
    import numpy as np

    with np.errstate(over="ignore"):
        if dtype == "BF16":
            bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
            rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
            finite = np.isfinite(values).all() and ((rounded & 0x7F80) != 0x7F80).all()
            made: npt.NDArray[Any] = rounded
        else:
            made = np.asarray(values).astype({"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype])
            finite = np.isfinite(made).all()
    if not finite:
        raise OverflowError
    return made.tobytes()


def take_off(folder: Path, manifest: Manifest, parts: Iterable[tuple[str, Segment, Floats]]) -> None:
    """Make a model of a base: new weights = base - aggregate, in place. Raises NonFinite, DiskError."""
    files = TensorFiles(folder, named(manifest.tensors))
    for name, segment, values in parts:
        files.write(name, segment, files.read(name, segment) - values)


# Adapters


def adapter_of(manifest: Manifest, names: Collection[str]) -> str:
    """The folder of the one adapter that these tensors are of. Raises PublishError where they are not of one."""
    tensors = named(manifest.tensors)
    folders = {tensors[name].file.rpartition("/")[0] for name in names}
    files = {tensors[name].file.rpartition("/")[2] for name in names}
    (folder, *others) = sorted(folders) or [""]
    if others or files != {ADAPTER_MODEL} or f"{folder}/{ADAPTER_CONFIG}" not in manifest.files:
        raise PublishError(
            f"to be merged, the tensors of a round are those of one adapter: {ADAPTERS}/<name>/{ADAPTER_MODEL} with its"
            f" {ADAPTER_CONFIG}, as PEFT writes them"
        )
    return folder


def merge_adapter(folder: Path, manifest: Manifest, adapter: str) -> list[str]:
    """Add an adapter's product to the weights of the model in ``folder``, and remove the adapter from it. Gives the
    files and public names of tensors that are gone. Raises PublishError for what cannot be merged, DiskError."""
    config = _adapter_config(folder / adapter / ADAPTER_CONFIG)
    tensors = named(manifest.tensors)
    own = {name: tensor for name, tensor in tensors.items() if tensor.file == f"{adapter}/{ADAPTER_MODEL}"}
    weights = {name: tensor for name, tensor in tensors.items() if not tensor.file.startswith(f"{ADAPTERS}/")}
    by_own_name = {tensor.name: name for name, tensor in own.items()}
    files = TensorFiles(folder, tensors)
    left = set(by_own_name)
    for down_name in sorted(by_own_name):
        if not down_name.endswith(".lora_A.weight"):
            continue
        module = down_name.removesuffix(".lora_A.weight")
        up_name = f"{module}.lora_B.weight"
        if up_name not in by_own_name:
            raise PublishError(f"{adapter}: {down_name} has no lora_B beside it")
        left -= {down_name, up_name}
        target = _target(module.removeprefix(_PEFT), weights, adapter)
        _add_product(files, tensors, by_own_name[down_name], by_own_name[up_name], target, config)
    if left:
        raise PublishError(f"{adapter}: {sorted(left)[0]} is no part of a product of two matrices")
    gone = [path for path in manifest.files if path.startswith(f"{adapter}/")]
    with _disk(folder / adapter):
        shutil.rmtree(folder / adapter)
        if not any((folder / ADAPTERS).iterdir()):
            (folder / ADAPTERS).rmdir()
    return [*gone, *own]


def _adapter_config(file: Path) -> dict[str, Any]:
    with _disk(file):
        try:
            config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            known = isinstance(config, dict) and config.get("peft_type", "LORA") == "LORA"
            if not known or not isinstance(config["lora_alpha"], int | float):
                raise ValueError("not of a LoRA adapter")
        except (ValueError, KeyError, RecursionError) as error:
            raise PublishError(f"{file.name}: {error}") from error
    if other := next((name for name in _OTHER_KINDS if config.get(name)), ""):
        raise PublishError(f"{file.name}: an adapter with {other} is not merged here")
    return config


def _target(module: str, weights: Mapping[str, Tensor], adapter: str) -> str:
    """The weight that a module's name means; what was wrapped may have had a name in front, or lost one."""
    wanted = f"{module}.weight"
    if wanted in weights:
        return wanted
    found = [name for name in weights if name.endswith(f".{wanted}") or wanted.endswith(f".{name}")]
    if len(found) != 1:
        raise PublishError(f"{adapter}: {'no weight is' if not found else 'several weights are'} called {wanted}")
    return found[0]


def _add_product(
    files: TensorFiles,
    tensors: Mapping[str, Tensor],
    down_name: str,
    up_name: str,
    target: str,
    config: Mapping[str, Any],
) -> None:
    down, up = _whole(files, tensors, down_name), _whole(files, tensors, up_name)
    rank = len(down)
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    product = scale * (up @ down)
    if config.get("fan_in_fan_out"):
        product = product.T
    if tensors[target].shape != product.shape:
        raise PublishError(f"{target} has another shape than the adapter's product")
    flat = product.reshape(-1)
    for segment in segments(product.shape):
        base = files.read(target, segment)
        files.write(target, segment, base + flat[segment.first : segment.first + segment.count].reshape(base.shape))


def _whole(files: TensorFiles, tensors: Mapping[str, Tensor], name: str) -> npt.NDArray[np.float64]:
    import numpy as np

    shape = tensors[name].shape
    if len(shape) != 2:
        raise PublishError(f"{name}: not a matrix")
    whole: npt.NDArray[np.float64] = np.empty(shape)
    flat = whole.reshape(-1)
    for segment in segments(shape):
        flat[segment.first : segment.first + segment.count] = files.read(name, segment).reshape(-1)
    return whole


@contextmanager
def _disk(file: Path) -> Iterator[None]:
    """The disk's errors as ours."""
    try:
        yield
    except OSError as error:
        raise DiskError(f"{file}: {error.strerror}") from error
