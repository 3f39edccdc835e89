"""Whether what the repository holds is right: every byte is read, and what is not right is named."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from nearshard.assembly import damage, same
from nearshard.placing import on_disk
from nearshard.repository import Repository, Stamp, stamp_of
from shared.digest import Digest
from shared.errors import DiskError, IntegrityError, NotFound
from shared.layout import Layout
from shared.manifest import Manifest


@dataclass(frozen=True)
class Damage:
    """Bytes that are not right."""

    model: str
    revision: Digest
    path: Path
    """The file, where the repository shows it."""
    shard: Digest | None
    """The shard; None: the revision's manifest, or a link to the file."""
    offset: int
    """Where the shard begins in the file."""


@dataclass(frozen=True)
class Verified:
    """What a check found."""

    revisions: int
    bytes: int
    """That were read: each blob once."""
    damages: tuple[Damage, ...]


def verify(repository: Repository, chosen: Sequence[tuple[str, Digest]]) -> Verified:
    """Read all that is held of these revisions. What is right is noted in the index. Raises DiskError."""
    damages: list[Damage] = []
    right: dict[str, dict[str, Stamp]] = {}
    seen: dict[Path, list[tuple[Digest, int]]] = {}
    size = 0
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for model, revision in chosen:
            try:
                manifest, links = held(repository, model, revision)
            except (NotFound, IntegrityError):
                folder = repository.root / "metadata" / model
                damages.append(Damage(model, revision, folder, None, 0))
                continue
            for path, layout in links.items():
                blob = repository.blob(model, layout)
                if blob not in seen:
                    stamp = stamp_of(blob)
                    seen[blob] = damage(blob, layout, manifest.shards, pool)
                    size += layout.size
                    if stamp and not seen[blob]:
                        right.setdefault(model, {})[layout.sha256] = stamp
                damages += [Damage(model, revision, path, shard, offset) for shard, offset in seen[blob]]
                if not seen[blob] and not _shows(path, blob, layout):
                    damages.append(Damage(model, revision, path, None, 0))
    try:
        repository.checked(right)
    except DiskError:
        if os.access(repository.root, os.W_OK):
            raise  # else it is read-only: what was found is true all the same
    return Verified(len(chosen), size, tuple(damages))


def held(repository: Repository, model: str, revision: Digest) -> tuple[Manifest, dict[Path, Layout]]:
    """A revision and what is held of it. Raises NotFound, IntegrityError."""
    manifest = repository.manifest(model, revision)
    found = repository.index()[model].revisions[revision]
    return manifest, repository.links(manifest, found.tasks, found.files)


def choose(repository: Repository, model: str = "", ref: str = "") -> list[tuple[str, Digest]]:
    """The revisions that are held: all, a model's, or what ``ref`` names. Raises NotFound."""
    return list(_chosen(repository, model, ref))


def _chosen(repository: Repository, model: str, ref: str) -> Iterator[tuple[str, Digest]]:
    for name in [model] if model else repository.index():
        for revision in repository.revisions(name, ref):
            yield name, revision


@on_disk()
def _shows(path: Path, blob: Path, layout: Layout) -> bool:
    return path.exists() and (path.samefile(blob) or same(path, layout))
