"""What a site keeps of one model from round to round, so that nothing is counted twice and nothing gets lost.

    state.json             which of the files below count; replaced in one step, the only thing that is ever changed
    feedback-<word>        what codecs left out of the updates that were counted, as safetensors of float32
    update-<word>          the update that is on its way
    lock                   held by who submits

An update is written, with the feedback that it would leave, and both are synced before ``state.json`` names them as
*pending*. Only then is the first byte sent. When the origin has said that the update is counted, one replacement of
``state.json`` makes the new feedback the one that counts, and forgets the update; when it will never be counted, one
replacement forgets both. So a process that is killed anywhere leaves either what was, or something pending, which the
next run settles by asking with the same body. Files that ``state.json`` does not name are removed by the next run.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO

from nearshard.placing import on_disk
from shared.codec import decode_json, encode_json
from shared.digest import Digest, parse_digest
from shared.errors import BadId, ConfigError, DecodeError, LocalError
from shared.files import replace_file, sync_folder

FORMAT = 1
STATE, LOCK, UPDATE, FEEDBACK = "state.json", "lock", "update-", "feedback-"


class SiteBusy(LocalError):
    """Another process submits for this site and model."""

    code = "in_use"


@dataclass(frozen=True, slots=True)
class Pending:
    """An update that was made, and of which nobody has said yet what became of it."""

    round: int
    base: Digest
    examples: int
    digest: Digest
    size: int
    codecs: tuple[str, ...]
    update: str
    """Name of its file."""
    feedback: str
    """Name of the file that counts once the update does; empty where it keeps none."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What counts."""

    feedback: str = ""
    """Name of the file with what was left out so far; empty where there is nothing."""
    rounds: int = 0
    """Updates that were counted."""
    last: int = 0
    """Number of the last round that one was counted in, by what it was made for; 0: none yet."""
    pending: Pending | None = None


class State:
    """Of one site and model. Methods block on the disk, and raise DiskError. Changed under ``locked`` only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kept = Kept()

    def __repr__(self) -> str:
        return f"<State of {self.folder}: {self.kept}>"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """While this process alone submits; what counts is read at its beginning. Raises SiteBusy, ConfigError."""
        with on_disk():
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SiteBusy(f"another process submits for this site and model: {self.folder}") from None
            self._load()
            self._sweep()
            yield
        finally:
            os.close(descriptor)

    def path(self, name: str) -> Path:
        """Of one of the files."""
        return self.folder / name

    @contextmanager
    def writing(self, kind: str) -> Iterator[tuple[str, BinaryIO]]:
        """A new file (UPDATE or FEEDBACK) and its name; at the end of the block it survives a power cut."""
        name = f"{kind}{secrets.token_hex(8)}"
        with on_disk():
            descriptor = os.open(self.path(name), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "w+b") as file:
                yield name, file
                file.flush()
                os.fsync(file.fileno())
            sync_folder(self.folder)

    def begin(self, pending: Pending) -> None:
        """From now on this is asked about, until it is counted or dropped."""
        self._save(replace(self.kept, pending=pending))

    def counted(self) -> None:
        """What is pending was counted: its feedback counts too."""
        pending = self.kept.pending
        assert pending is not None
        self._save(Kept(pending.feedback, self.kept.rounds + 1, max(self.kept.last, pending.round)))
        self._sweep()

    def dropped(self) -> None:
        """What is pending will never be counted: all is as if it had not been made."""
        self._save(replace(self.kept, pending=None))
        self._sweep()

    @on_disk()
    def _save(self, kept: Kept) -> None:
        document = {"format": FORMAT, **asdict(kept)}
        replace_file(self.path(STATE), encode_json(document), mode=0o600, sync=True)
        self.kept = kept

    def _load(self) -> None:
        try:
            with on_disk():
                if not self.path(STATE).exists():
                    self.kept = Kept()
                    return
                document = decode_json(self.path(STATE).read_bytes())
            self.kept = _parse(document)
        except (DecodeError, BadId, KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{self.path(STATE)} is damaged ({error}); remove the folder to begin anew: what codecs left out of"
                " earlier updates is lost then, nothing else"
            ) from error

    def _sweep(self) -> None:
        """Remove files that nothing names: of a process that was killed, or of what is settled."""
        pending = self.kept.pending
        named = {self.kept.feedback, *((pending.update, pending.feedback) if pending else ())}
        for kind in (UPDATE, FEEDBACK):
            for file in self.folder.glob(f"{kind}*"):
                if file.name not in named:
                    with suppress(OSError):  # the next run tries again
                        file.unlink()


def _parse(document: object) -> Kept:
    """Raises KeyError, TypeError, ValueError, BadId."""
    if not isinstance(document, dict) or document["format"] != FORMAT:
        raise ValueError("another format")
    found = document["pending"]
    return Kept(
        _name(document["feedback"]),
        int(document["rounds"]),
        int(document["last"]),
        None
        if found is None
        else Pending(
            int(found["round"]),
            parse_digest(found["base"]),
            int(found["examples"]),
            parse_digest(found["digest"]),
            int(found["size"]),
            tuple(map(str, found["codecs"])),
            _name(found["update"]),
            _name(found["feedback"]),
        ),
    )


def _name(value: object) -> str:
    """Of a file in the folder; it is opened, so it must not lead elsewhere."""
    if not isinstance(value, str) or "/" in value:
        raise ValueError("not the name of a file")
    return value
