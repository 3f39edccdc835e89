"""Changing the machine: ``--apply`` and ``--undo``.

What was there before is written down first (``STATE``, synced), then the files that count at the next start, then the
values that count now. Whoever is cut off in between finds all that ``undo`` needs; ``undo`` forgets it last.

Values are written to ``/proc/sys`` and ``/sys`` as sysctl(8) and udev do, so nothing needs to be installed, and below
``root`` a whole machine can stand in for this one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nearshard.doctor.facts import Setting
from nearshard.doctor.mending import SYSCTL_FILE, UDEV_FILE, files_of, is_ours, is_safe
from shared.codec import decode_json, encode_json
from shared.errors import DecodeError, DiskError, LocalError
from shared.files import locked, replace_file, sync_folder

STATE = "var/lib/nearshard/doctor.json"
FILES = (SYSCTL_FILE, UDEV_FILE)
_MAX = 1 << 20


class NeedsRoot(LocalError):
    """The machine can be changed by root only."""

    code = "needs_root"


class NotOurs(LocalError):
    """A file of our name that somebody else wrote or changed; nothing was touched."""

    code = "exists"


@dataclass(frozen=True)
class Changed:
    """What was done."""

    files: tuple[str, ...] = ()
    """Files that were written, or taken back."""
    values: tuple[Setting, ...] = ()
    """Values that the kernel has now."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Why not, by path: a container may not change its host, for example."""


@dataclass
class _State:
    before: dict[str, str | None] = field(default_factory=dict)
    """What each path was set to; None where it was not there."""
    settings: dict[str, str] = field(default_factory=dict)
    """What each was set to by us, also by earlier calls."""
    files: dict[str, str | None] = field(default_factory=dict)
    """Content of the files of our names before; None where there was none."""


def require_root(root: Path) -> None:
    """Raises NeedsRoot where this is not root and ``root`` is this machine's own."""
    if root == Path("/") and os.geteuid() != 0:
        raise NeedsRoot("this changes kernel settings of this machine: run it as root (sudo)")


def plan(root: Path, settings: Sequence[Setting]) -> Mapping[str, str]:
    """The files that ``apply`` would write, by path below ``root``: what was set before stays set.

    Raises LocalError where the state of an earlier call is damaged."""
    return files_of(_merged(_load(root), settings))


def apply(root: Path, settings: Sequence[Setting]) -> Changed:
    """Set all of these now and at every start. Raises NeedsRoot, NotOurs, DiskError, LocalError."""
    if not settings:
        return Changed()
    with _changing(root):
        files, state = _ours(root), _load(root)
        for one in settings:
            state.before.setdefault(one.path, _current(root / one.path))
        for name in FILES:
            state.files.setdefault(name, files[name])
        merged = _merged(state, settings)
        state.settings = {one.path: one.value for one in merged}
        _write(root / STATE, encode_json(vars(state)), 0o600)
        texts = files_of(merged)
        for name, text in texts.items():
            _write(root / name, text.encode(), 0o644)
        values, refused = _set(root, settings)
        return Changed(tuple(texts), values, refused)


def undo(root: Path) -> Changed:
    """Take all of it back: values, then files. What somebody else has set since is left as it is.

    Raises NeedsRoot, NotOurs, DiskError, LocalError."""
    with _changing(root):
        files, state = _ours(root), _load(root)
        back, refused = [], {}
        for path, before in state.before.items():
            now = _current(root / path)
            if now is None or before is None or now == before:
                continue
            if now != state.settings.get(path):
                refused[path] = f"somebody has set it to {now} since"
            else:
                back.append(Setting(path, before))
        values, failed = _set(root, sorted(back, key=lambda one: not one.path.endswith("/scheduler")))
        restored = [name for name in FILES if _restore(root / name, files[name], state.files.get(name))]
        for name in (*FILES, STATE):
            _sweep(root / name)
        _remove(root / STATE)
        return Changed(tuple(restored), values, {**refused, **failed})


def _merged(state: _State, settings: Sequence[Setting]) -> list[Setting]:
    return [
        Setting(path, value) for path, value in {**state.settings, **{one.path: one.value for one in settings}}.items()
    ]


@contextmanager
def _changing(root: Path) -> Iterator[None]:
    """One at a time, as root."""
    require_root(root)
    try:
        (root / STATE).parent.mkdir(parents=True, exist_ok=True)
        with locked(root / STATE):
            yield
    except OSError as error:
        raise DiskError(f"{error.filename or root}: {error.strerror}") from error


def _ours(root: Path) -> dict[str, str | None]:
    """The files of our names as they are. Raises NotOurs."""
    found: dict[str, str | None] = {}
    for name in FILES:
        file = root / name
        try:
            if file.is_symlink():
                raise NotOurs(f"{file} is a link, and not by nearshard doctor: move it away first")
            found[name] = file.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            found[name] = None
            continue
        if not is_ours(found[name] or ""):
            raise NotOurs(f"{file} is not by nearshard doctor, or was changed since: move it away first")
    return found


def _load(root: Path) -> _State:
    """Raises LocalError."""
    file = root / STATE
    try:
        document = decode_json(file.read_bytes(), _MAX)
        return _parsed(document)
    except FileNotFoundError:
        return _State()
    except PermissionError as error:
        raise NeedsRoot(f"{file} can be read by root only") from error
    except (DecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise LocalError(f"{file} is damaged; compare {' and '.join(FILES)} by hand", code="bad_config") from error


def _parsed(document: Any) -> _State:
    """What is in it is written to the kernel by root, so nothing but what ``apply`` can have written is taken."""
    state = _State(dict(document["before"]), dict(document["settings"]), dict(document["files"]))
    values = [(path, value) for path, value in {**state.before, **state.settings}.items() if value is not None]
    if not all(is_safe(Setting(path, value)) for path, value in values) or set(state.files) - set(FILES):
        raise ValueError("paths or values that are not ours")
    return state


def _current(file: Path) -> str | None:
    """A value as it can be written back: with single spaces; of ``none [mq-deadline]`` the one in use."""
    try:
        text = " ".join(file.read_text(encoding="utf-8", errors="replace").split())
    except OSError:
        return None
    if file.name == "scheduler":
        chosen = [word for word in text.split() if word.startswith("[")]
        text = chosen[0].strip("[]") if chosen else text
    return text


def _set(root: Path, settings: Sequence[Setting]) -> tuple[tuple[Setting, ...], dict[str, str]]:
    """What was set, and why the rest was not."""
    done, refused = [], {}
    for one in settings:
        try:
            # Not created where it is missing, and not by rename: each is a door into the kernel, not a file.
            with (root / one.path).open("r+", encoding="utf-8") as opened:
                opened.truncate(0)
                opened.write(one.value + "\n")
        except OSError as error:
            refused[one.path] = error.strerror or str(error)
        else:
            done.append(one)
    return tuple(done), refused


def _write(file: Path, data: bytes, mode: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, data, mode=mode, sync=True)


def _restore(file: Path, now: str | None, before: str | None) -> bool:
    """Whether there was something to do."""
    if now == before:
        return False
    if before is None:
        _remove(file)
    else:
        _write(file, before.encode(), 0o644)
    return True


def _sweep(file: Path) -> None:
    """Remove what a call that was killed has left beside it (``shared.files.replace_file``)."""
    for left in file.parent.glob(f".{file.name}.*"):
        left.unlink(missing_ok=True)


def _remove(file: Path) -> None:
    with suppress(FileNotFoundError):
        file.unlink()
        sync_folder(file.parent)
