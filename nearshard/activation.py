"""What may become active in the local repository, and who says so: a fetch of the ref, or a person."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from nearshard.repository import ModelIndex, Repository
from nearshard.switches import Switch, Switches
from shared.clock import Clock, SystemClock
from shared.digest import Digest
from shared.errors import LocalError, NotFound
from shared.manifest import Manifest


class Incomplete(LocalError):
    """Not all is here of what should be active."""

    code = "incomplete"


class Activation:
    """Of one model. Methods block on the disk, and raise DiskError."""

    def __init__(self, repository: Repository, model: str, clock: Clock | None = None) -> None:
        self._repository, self._model = repository, model
        self._switches, self._clock = Switches(repository.root, model), clock or SystemClock()

    def follow(self, manifest: Manifest, ref: str) -> bool:
        """All was fetched that was asked for of what ``ref`` means: activate that, unless something speaks against it.

        Gives whether it is active: it is not where the path stays where it is, where it was rolled back from, or as
        long as something is not here that the active revision has (another task, say).
        """
        revision, now = manifest.revision, self._switches.now(ref)
        if now and now.active == revision:
            return True
        with self._switches.locked():
            now = self._switches.now(ref)
            if now and (now.stays or now.left == revision or self._lacking(now, manifest)):
                return now.active == revision
            self._switch(ref, Switch(revision), now)
            return True

    def activate(self, revision: Digest, ref: str, *, stay: bool = False, force: bool = False) -> Switch:
        """Have the path of a ref lead to a revision that is here. ``stay``: whatever the ref comes to mean. ``force``:
        also where something is missing that the active one has. Raises NotFound, IntegrityError, Incomplete."""
        manifest = self._repository.manifest(self._model, revision)
        with self._switches.locked():
            now = self._switches.now(ref)
            if now and not force and (names := self._lacking(now, manifest)):
                raise Incomplete(
                    f"{self._model} {revision[:19]} lacks what the active revision has: {', '.join(names)}; get it"
                    f" first (nearshard get {self._model}:TASK@{revision}), or --force"
                )
            self._check_whole(manifest)
            return self._switch(ref, Switch(revision, stays=stay), now)

    def roll_back(self, ref: str) -> Switch:
        """Back to what was active before; nobody is asked. Raises NotFound, IntegrityError, Incomplete."""
        with self._switches.locked():
            now = self._switches.now(ref)
            if now is None or now.previous is None:
                raise NotFound(f"no revision was active as {self._model}@{ref} before", code="unknown_revision")
            self._check_whole(self._repository.manifest(self._model, now.previous))
            return self._switch(ref, Switch(now.previous, left=now.active), now)

    def _switch(self, ref: str, new: Switch, now: Switch | None) -> Switch:
        before = None if now is None else now.previous if now.active == new.active else now.active
        new = replace(new, previous=before, time=self._clock.time())
        self._switches.switch(ref, new)
        return new

    def _lacking(self, now: Switch, manifest: Manifest) -> Sequence[str]:
        """Tasks and files that are here of the active revision, and of this one, which has them too, are not."""
        held = self._repository.index().get(self._model, ModelIndex()).revisions
        old, new = held.get(now.active), held.get(manifest.revision)
        if old is None:
            return ()
        tasks = (set(old.tasks) & manifest.tasks.keys()) - set(new.tasks if new else ())
        files = (set(old.files) & manifest.files.keys()) - set(new.files if new else ())
        return [*(f"task {name}" for name in sorted(tasks)), *sorted(files)]

    def _check_whole(self, manifest: Manifest) -> None:
        """Whether all that is held of a revision has its size; to read it takes long, and ``verify`` does."""
        held = self._repository.index().get(self._model, ModelIndex()).revisions.get(manifest.revision)
        if held is None:
            raise Incomplete(f"{self._model} {manifest.revision[:19]} is not here; nearshard get fetches it")
        for path, layout in self._repository.links(manifest, held.tasks, held.files).items():
            if not path.exists() or path.stat().st_size != layout.size:
                raise Incomplete(f"{path} is damaged; nearshard repair {self._model}@{manifest.revision} mends it")
