"""A model directory as it comes from a hub: which files it has, which are refused, which tasks it names."""

from __future__ import annotations

import fnmatch
import os
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import BadId, ManifestInvalid, PublishError, TasksError, TensorFileError
from shared.ids import DEFAULT_TASK, parse_name
from shared.manifest import MAX_TEXT, check_paths
from shared.tensorfile import PREFIX, TensorHeader, header_length, parse_header

TASKS_FILE = "nearshard.toml"
SMALL_FILE = 32 << 20
"""Bytes: larger files do not go along with ``all`` unless a tasks file says so."""

_SKIPPED_FOLDERS = {".git", ".cache", ".huggingface", "__pycache__"}
_SKIPPED_FILES = {TASKS_FILE, ".DS_Store"}
_WEIGHTS = (
    ".safetensors",
    ".gguf",
    ".onnx",
    ".bin",
    ".h5",
    ".msgpack",
    ".tflite",
    ".pb",
    ".ot",
    ".npz",
    ".npy",
)
_PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill")


@dataclass(frozen=True)
class SourceFile:
    """One file to publish. ``tensors`` is set for safetensors files."""

    path: str
    location: Path
    size: int
    tensors: TensorHeader | None = None

    @property
    def is_weight(self) -> bool:
        """Whether this holds weights, by its name."""
        return self.path.endswith(_WEIGHTS)


@dataclass(frozen=True)
class TaskSpec:
    """One task of a tasks file: globs over tensor names, or one file as the body."""

    name: str
    tensors: tuple[str, ...] = ()
    file: str = ""
    files: tuple[str, ...] = ()
    description: str = ""


def read_sources(directory: Path, tasks_file: Path | None) -> tuple[list[TaskSpec], list[SourceFile]]:
    """The tasks and the files of a model directory; by its own tasks file where it has one and no other is given.

    Raises PublishError, TasksError.
    """
    own = directory / TASKS_FILE
    specs, exclude = read_tasks(tasks_file or (own if own.is_file() else None))
    return specs, read_model_dir(directory, exclude)


def read_model_dir(directory: Path, exclude: tuple[str, ...] = ()) -> list[SourceFile]:
    """The files of a model directory in path order, safetensors headers parsed.

    ``exclude``: globs over paths to leave out. Raises PublishError, which names the file.
    """
    if not directory.is_dir():
        raise PublishError(f"{directory}: not a directory")
    allowed = _allowed_roots(directory)
    sources = []
    for path, location in sorted(_walk(directory)):
        if any(fnmatch.fnmatchcase(path, pattern) for pattern in exclude):
            continue
        target = location.resolve()
        if not any(target.is_relative_to(root) for root in allowed):
            raise PublishError(f"{path}: a symlink that leads out of the directory")
        if not target.is_file():
            raise PublishError(f"{path}: not a regular file, or a broken symlink")
        size = target.stat().st_size
        refuse_pickle(path, target)
        sources.append(SourceFile(path, target, size, _tensors(path, target, size)))
    if not sources:
        raise PublishError(f"{directory}: no files to publish")
    try:
        check_paths([source.path for source in sources])
    except ManifestInvalid as error:
        raise PublishError(f"{directory}: {error}") from error
    return sources


def read_tasks(file: Path | None) -> tuple[list[TaskSpec], tuple[str, ...]]:
    """The tasks and the ``exclude`` globs of a tasks file; none for None. Raises TasksError."""
    if file is None:
        return [], ()
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # also an integer of 5,000 digits
        raise TasksError(f"{file}: {error}") from error
    if unknown := document.keys() - {"tasks", "exclude"}:
        raise TasksError(f"{file}: unknown key {sorted(unknown)[0]!r}; 'tasks' and 'exclude' are known")
    exclude = _texts(document.get("exclude", []), f"{file}: exclude")
    tables = document.get("tasks", {})
    if not isinstance(tables, dict):
        raise TasksError(f"{file}: tasks is not a table")
    return [_task(name, table, f"{file}: tasks.{name}") for name, table in tables.items()], exclude


def _task(name: str, table: Any, where: str) -> TaskSpec:
    try:
        parse_name(name)
    except BadId as error:
        raise TasksError(f"{where}: {error}") from error
    if name == DEFAULT_TASK:
        raise TasksError(f"{where}: 'all' is made by nearshard: it is every tensor of every safetensors file")
    if not isinstance(table, dict):
        raise TasksError(f"{where}: not a table")
    if unknown := table.keys() - {"tensors", "file", "files", "description"}:
        raise TasksError(f"{where}: unknown key {sorted(unknown)[0]!r}; tensors, file, files and description are known")
    spec = TaskSpec(
        name,
        _texts(table.get("tensors", []), f"{where}.tensors"),
        str(table.get("file", "")),
        _texts(table.get("files", []), f"{where}.files"),
        str(table.get("description", ""))[:MAX_TEXT],
    )
    if bool(spec.tensors) == bool(spec.file):
        raise TasksError(f'{where}: needs either tensors = [globs] or file = "path"')
    return spec


def _texts(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise TasksError(f"{where}: not a list of texts")
    return tuple(value)


def _walk(directory: Path) -> Iterator[tuple[str, Path]]:
    def failed(error: OSError) -> None:
        raise PublishError(f"{error.filename}: {error.strerror}") from error

    for folder, subfolders, names in os.walk(directory, onerror=failed):
        for name in list(subfolders):
            if name in _SKIPPED_FOLDERS:
                subfolders.remove(name)
            elif (Path(folder) / name).is_symlink():
                raise PublishError(f"{Path(folder, name).relative_to(directory)}: a symlink to a folder")
        for name in names:
            if name not in _SKIPPED_FILES:
                location = Path(folder, name)
                yield location.relative_to(directory).as_posix(), location


def _allowed_roots(directory: Path) -> list[Path]:
    """Where links may lead: the directory itself, and for a Hugging Face cache snapshot its own blobs."""
    root = directory.resolve()
    roots = [root]
    if root.parent.name == "snapshots":
        roots.append(root.parent.parent / "blobs")
    return roots


def refuse_pickle(path: str, location: Path) -> None:
    """Raises PublishError for a file that runs code when it is loaded."""
    lower = path.lower()
    advice = "publish safetensors instead, or leave it out with exclude = [...] in nearshard.toml"
    if lower.endswith(_PICKLES):
        raise PublishError(f"{path}: pickle files run code when they are loaded: {advice}")
    with location.open("rb") as file:
        head = file.read(256)
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and lower.endswith((".bin", ".dat")):
        raise PublishError(f"{path}: is a pickle: {advice}")
    if head.startswith(b"\x93NUMPY") and b"'descr': '|O'" in head:
        raise PublishError(f"{path}: holds Python objects (a pickle): {advice}")
    if head.startswith(b"PK\x03\x04") and _zip_has_pickle(location):
        raise PublishError(f"{path}: holds a pickle: {advice}")


def _zip_has_pickle(location: Path) -> bool:
    try:
        with zipfile.ZipFile(location) as archive:
            for name in archive.namelist():
                if name.endswith((".pkl", ".pickle")):
                    return True
                if name.endswith(".npy") and b"'descr': '|O'" in archive.open(name).read(256):
                    return True
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError):
        return False  # not a readable archive, so nothing loads it as one
    return False


def _tensors(path: str, location: Path, size: int) -> TensorHeader | None:
    if not path.endswith(".safetensors"):
        return None
    try:
        with location.open("rb") as file:
            length = header_length(file.read(PREFIX), size)
            raw = file.read(length)
        return parse_header(raw, size)
    except TensorFileError as error:
        raise TensorFileError(f"{path}: {error}") from error
    except OSError as error:
        raise PublishError(f"{path}: {error.strerror}") from error


def match_tensors(spec: TaskSpec, names: Mapping[str, object]) -> set[str]:
    """The tensors that a task's globs name. Raises TasksError for a glob that matches nothing."""
    matched: set[str] = set()
    for pattern in spec.tensors:
        found = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            raise TasksError(f"tasks.{spec.name}: the glob {pattern!r} matches no tensor")
        matched.update(found)
    return matched


def match_files(patterns: tuple[str, ...], paths: list[str], task: str) -> tuple[str, ...]:
    """The files that a task's globs name, in path order. Raises TasksError for one that matches nothing."""
    matched: set[str] = set()
    for pattern in patterns:
        found = [path for path in paths if fnmatch.fnmatchcase(path, pattern)]
        if not found:
            raise TasksError(f"tasks.{task}: {pattern!r} matches no file")
        matched.update(found)
    return tuple(sorted(matched))
