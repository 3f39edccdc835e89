"""Which revision of a model programs run: one path a ref, that never changes, and leads elsewhere by one rename.

    models/<org>/<name>/refs/<ref>            a symbolic link to ``../<commit>``: what programs are pointed to
    models/<org>/<name>/switches/<ref>.json   what is active and what was before: now, and before the last switch

The link alone says what is active. The file is written first, and has both states, before the switch and after it; the
one whose revision the link leads to is the one that counts. So whoever is killed in between leaves the state before,
all of it, or the one after.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nearshard.placing import on_disk
from shared.codec import decode_json, encode_json
from shared.digest import Digest, from_hash, parse_digest
from shared.errors import BadId, NearshardError
from shared.files import locked, replace_file, sync_folder
from shared.ids import commit_of

FORMAT = 1
MAX_FILE = 64 << 10


@dataclass(frozen=True)
class Switch:
    """What the path of a ref leads to."""

    active: Digest
    previous: Digest | None = None
    """What was active before: a rollback goes there."""
    left: Digest | None = None
    """What was rolled back from: fetching the ref does not go there again by itself."""
    stays: bool = False
    """Whether fetching the ref changes nothing here."""
    time: float = 0.0
    """Of the switch, in seconds since 1970."""


class Switches:
    """Of one model in a repository. Methods block on the disk, and raise DiskError."""

    def __init__(self, root: Path, model: str) -> None:
        """``root``: the repository's directory."""
        self._folder, self._metadata = root / "models" / model, root / "metadata" / model
        self._top = root.parent

    def path(self, ref: str) -> Path:
        """Where programs find what is active: ``files`` and ``tasks`` of the revision."""
        return self._folder / "refs" / ref

    def all(self) -> Mapping[str, Switch]:
        """What is active, by ref."""
        with suppress(OSError):
            names = sorted(link.name for link in (self._folder / "refs").iterdir() if link.name[0] != ".")
            return {ref: switch for ref in names if (switch := self.now(ref))}
        return {}

    def now(self, ref: str) -> Switch | None:
        """What the path of a ref leads to; None where nothing was activated."""
        try:
            commit = self.path(ref).readlink().name
        except OSError:
            return None
        if found := [state for state in self._states(ref) if commit_of(state.active) == commit]:
            return found[-1]
        manifests = list(self._metadata.glob(f"{commit}*.manifest"))
        with suppress(ValueError, BadId):
            return Switch(from_hash(bytes.fromhex(manifests[0].stem))) if manifests else None
        return None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """While others who switch wait; for a moment, however long somebody fetches."""
        with on_disk():
            self._folder.mkdir(parents=True, exist_ok=True)
            with locked(self._folder / "switches"):
                yield

    def switch(self, ref: str, new: Switch) -> None:
        """Lead elsewhere, under the lock. Every step leaves the state before or the one after, also to a power cut."""
        now = self.now(ref)
        target = self._folder / commit_of(new.active)
        with on_disk():
            self._sync(target)
            self._note(ref, [now, new] if now else [new])
            if now is None or now.active != new.active:
                self._lead(self.path(ref), target)

    def forget(self, revisions: Collection[Digest]) -> None:
        """These are removed: nothing leads to them any more. Under the lock."""
        for ref, now in self.all().items():
            if now.active in revisions:
                self.path(ref).unlink()
                self._file(ref).unlink(missing_ok=True)
            elif now.previous in revisions:
                self._note(ref, [replace(now, previous=None)])

    # The steps

    def _sync(self, target: Path) -> None:
        """Have all names of a revision, and those above, survive a power cut: its bytes do since they came."""
        for folder, _, _ in os.walk(target):
            sync_folder(Path(folder))
        for above in (self._folder / "blobs", *target.parents):
            sync_folder(above)
            if above == self._top:
                break

    def _note(self, ref: str, states: Sequence[Switch]) -> None:
        file = self._file(ref)
        file.parent.mkdir(exist_ok=True)
        replace_file(file, encode_json({"format": FORMAT, "states": [asdict(state) for state in states]}), sync=True)

    def _lead(self, path: Path, target: Path) -> None:
        """The one step that switches: the link is replaced."""
        path.parent.mkdir(exist_ok=True)
        for left in path.parent.glob(".*"):  # by who was killed
            left.unlink()
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        temporary.symlink_to(Path("..") / target.name)
        temporary.replace(path)
        sync_folder(path.parent)
        sync_folder(self._folder)

    def _file(self, ref: str) -> Path:
        return self._folder / "switches" / f"{ref}.json"

    def _states(self, ref: str) -> Sequence[Switch]:
        """The last two, the newest last; none where they are lost: the link says what is active."""
        with suppress(OSError, NearshardError, LookupError, TypeError, ValueError, AttributeError):
            return [_state(fields) for fields in decode_json(self._file(ref).read_bytes(), MAX_FILE)["states"]]
        return ()


def _state(fields: Mapping[str, Any]) -> Switch:
    """Raises LookupError, TypeError, ValueError, AttributeError, BadId."""
    previous, left = (parse_digest(fields[name]) if fields[name] else None for name in ("previous", "left"))
    return Switch(parse_digest(fields["active"]), previous, left, fields["stays"] is True, float(fields["time"]))
