"""Files being put together from shards, in a folder of their own, so that whoever is killed goes on where it was.

``<key>.part`` has the bytes, each shard at its place (a shard that is at none as a whole, behind the end);
``<key>.have`` how far each shard got, a big-endian u32 each, written after the bytes. ``key`` names what the file is
made of, so that another cut of the same file is another part. What is found of an earlier run is hashed before it
counts: a whole shard by its digest, half of one by going on with its hash.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from nearshard.landing import Landing
from nearshard.placing import copy_file, on_disk
from nearshard.room import check_room
from shared.digest import Digest, digest_of, hex_of
from shared.errors import DiskError
from shared.files import sync_folder
from shared.layout import Layout

BLOCK = 1 << 20
SYNCS = 8
"""Files made durable at once: a file system does many for the price of one."""
MODE = 0o444
"""Of what is whole: it may share its bytes with others by hard links, so nobody should write into it by accident."""
_HAVE = struct.Struct(">I")


@dataclass(frozen=True, slots=True)
class Place:
    """Where the bytes of a whole shard are in a file."""

    file: Path
    position: int


Places = Mapping[Digest, Sequence[Place]]
"""Where shards may be on this disk already; their bytes are checked."""


@dataclass(frozen=True, slots=True)
class _Copy:
    """A run of a shard that has to be at ``position`` too."""

    digest: Digest
    offset: int
    length: int
    position: int


def key_of(layout: Layout) -> str:
    """What names the bytes and the cut of a layout: 64 hex digits."""
    hashed = hashlib.sha256()
    for piece in layout.slices:
        hashed.update(f"{piece.digest} {piece.offset} {piece.length}\n".encode())
    return hashed.hexdigest()


def homes(layout: Layout, sizes: Mapping[Digest, int]) -> dict[Digest, int]:
    """Where the shards are that a file of this layout has as a whole."""
    found: dict[Digest, int] = {}
    position = 0
    for piece in layout.slices:
        if piece.length == sizes[piece.digest]:
            found.setdefault(piece.digest, position)
        position += piece.length
    return found


class Part:
    """One file that is being put together. Its methods block on the disk. Raises DiskError."""

    def __init__(self, folder: Path, layout: Layout, sizes: Mapping[Digest, int]) -> None:
        self.layout, self.sizes = layout, sizes
        name = key_of(layout)
        self.file, self._have_file = folder / f"{name}.part", folder / f"{name}.have"
        self.shards = layout.shards()
        self._number = {digest: number for number, digest in enumerate(self.shards)}
        self._homes = homes(layout, sizes)
        self._copies: list[_Copy] = []
        self._place()
        self.done: set[Digest] = set()

    def _place(self) -> None:
        """Decide where each shard lands."""
        behind = self.layout.size
        for digest in self.shards:
            if digest not in self._homes:
                self._homes[digest], behind = behind, behind + self.sizes[digest]
        self.length, position = behind, 0
        for piece in self.layout.slices:
            if position != self._homes[piece.digest]:
                self._copies.append(_Copy(piece.digest, piece.offset, piece.length, position))
            position += piece.length

    @on_disk()
    def open(self) -> None:
        """Make the files, or find those of an earlier run."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if os.fstat(descriptor).st_size != self.length:
                os.truncate(descriptor, self.length)
        finally:
            os.close(descriptor)
        size = _HAVE.size * len(self.shards)
        if not self._have_file.exists() or self._have_file.stat().st_size != size:
            self._have_file.write_bytes(bytes(size))

    @on_disk()
    def had(self) -> dict[Digest, int]:
        """How far each shard got in an earlier run, by what was noted."""
        noted = (count for (count,) in _HAVE.iter_unpack(self._have_file.read_bytes()))
        pairs = zip(self.shards, noted, strict=True)
        return {digest: min(count, self.sizes[digest]) for digest, count in pairs if count}

    def place(self, digest: Digest) -> Place:
        """Where a shard is, or comes to be."""
        return Place(self.file, self._homes[digest])

    def landing(self, digest: Digest, have: int = 0) -> PartLanding:
        """Where a shard's bytes go; ``have`` of them are there, and are read for their hash."""
        noted = Place(self._have_file, _HAVE.size * self._number[digest])
        return PartLanding(digest, self.sizes[digest], self.place(digest), noted, have)

    @on_disk()
    def take(self, digest: Digest, place: Place) -> bool:
        """Copy a shard from another place of this disk, if its bytes are right there."""
        data = read_shard(place, digest, self.sizes[digest])
        if data is not None:
            self.put(digest, data)
        return data is not None

    def put(self, digest: Digest, data: bytes | memoryview) -> None:
        """Have a shard: these are its bytes."""
        landing = self.landing(digest)
        try:
            landing.put(data)
        finally:
            landing.close()
        self.done.add(digest)

    @on_disk()
    def finish(self, target: Path, mode: int | None) -> None:
        """All shards are there: make it durable, and give it its name. ``mode``: the umask's choice by default."""
        descriptor = os.open(self.file, os.O_RDWR | os.O_CLOEXEC)
        try:
            for copy in self._copies:
                _copy(descriptor, self._homes[copy.digest] + copy.offset, copy.position, copy.length)
            if self.length != self.layout.size:
                os.truncate(descriptor, self.layout.size)
            if mode is not None:
                os.fchmod(descriptor, mode)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        target.parent.mkdir(parents=True, exist_ok=True)
        self.file.replace(target)
        self._have_file.unlink(missing_ok=True)
        sync_folder(target.parent)


class PartLanding(Landing):
    """At its place in a part."""

    def __init__(self, digest: Digest, size: int, place: Place, noted: Place, have: int) -> None:
        super().__init__(digest, size)
        self._place, self._noted, self._before = place, noted, have
        self._files: list[int] = []

    def _begin(self) -> None:
        with on_disk():
            for place in (self._place, self._noted):
                self._files.append(os.open(place.file, os.O_RDWR | os.O_CLOEXEC))
            for block in _blocks(self._files[0], self._place.position, self._before):
                self._hashed.update(block)
                self.reached += len(block)
            self._written = self.reached

    def _store(self, chunks: Sequence[bytes | memoryview], position: int) -> None:
        file, noted = self._files
        with on_disk():
            for chunk in chunks:
                write_at(file, chunk, self._place.position + position)
                position += len(chunk)
            os.pwrite(noted, _HAVE.pack(position), self._noted.position)

    def put(self, data: bytes | memoryview) -> None:
        """All of it, from this disk or made here."""
        self._begin()
        self._store([data], 0)

    def close(self) -> None:
        while self._files:
            os.close(self._files.pop())


class Assembly:
    """Several files that are put together from the same shards. Blocks on the disk. Raises DiskError."""

    def __init__(self, folder: Path, layouts: Sequence[Layout], sizes: Mapping[Digest, int]) -> None:
        self._parts = {key_of(layout): Part(folder, layout, sizes) for layout in layouts}
        self._sizes = sizes
        self._begun: dict[Digest, tuple[Part, int]] = {}
        """Where a shard landed in part in an earlier run, and how much of it."""
        self._of: dict[Digest, list[Part]] = {}
        for part in self._parts.values():
            for digest in part.shards:
                self._of.setdefault(digest, []).append(part)

    def prepare(self, find: Places) -> None:
        """Take up what an earlier run left, and what else is on this disk, checked."""
        for part in self._parts.values():
            part.open()
        had = [(part, digest, have) for part in self._parts.values() for digest, have in part.had().items()]
        check_room({part.file: part.length - sum(part.had().values()) for part in self._parts.values()})
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            for _ in pool.map(self._take_up, had):
                pass
            for _ in pool.map(lambda digest: self._take_over(digest, find), list(self._of)):
                pass

    def _take_up(self, found: tuple[Part, Digest, int]) -> None:
        part, digest, have = found
        if have < self._sizes[digest]:
            self._begun[digest] = (part, have)
        elif self._right(part, digest):
            part.done.add(digest)

    def _right(self, part: Part, digest: Digest) -> bool:
        return read_shard(part.place(digest), digest, self._sizes[digest]) is not None

    def _take_over(self, digest: Digest, find: Places) -> None:
        """Have a shard in all parts that need it, if one of them or the disk has it."""
        parts = self._of[digest]
        places = self.places(digest)
        for part in parts:
            if digest not in part.done:
                any(part.take(digest, place) for place in places or find.get(digest, ()))

    def places(self, digest: Digest) -> list[Place]:
        """Where a shard is whole here."""
        return [part.place(digest) for part in self._of.get(digest, ()) if digest in part.done]

    def needed(self) -> tuple[Digest, ...]:
        """The shards to fetch, in order of first use; those that were begun first."""
        missing = [digest for digest, parts in self._of.items() if any(digest not in part.done for part in parts)]
        return tuple(sorted(missing, key=lambda digest: digest not in self._begun))

    def left(self, digest: Digest) -> int:
        """Bytes of a needed shard that are not here."""
        return self._sizes[digest] - self._home(digest)[1]

    def _home(self, digest: Digest) -> tuple[Part, int]:
        """Where a needed shard lands, and how much of it is there."""
        return self._begun.get(digest, (self._of[digest][0], 0))

    def landing(self, digest: Digest) -> PartLanding:
        """Where the rest of a needed shard goes."""
        part, have = self._home(digest)
        return part.landing(digest, have)

    def put(self, digest: Digest, data: memoryview) -> None:
        """A needed shard has these bytes, which are right."""
        for part in self._of[digest]:
            if digest not in part.done:
                part.put(digest, data)

    def landed(self, digest: Digest) -> None:
        """A shard is there, and right: it goes wherever else it belongs."""
        home = self._home(digest)[0]
        home.done.add(digest)
        for part in self._of[digest]:
            if digest not in part.done:
                part.take(digest, home.place(digest))

    def finish(self, targets: Mapping[Path, Layout], mode: int | None = None) -> None:
        """Give each file its name, once all its shards are there; where two have the same bytes, the second is a copy.

        ``mode``: of the files; the umask's choice by default.
        """
        firsts: dict[str, Path] = {}
        for target, layout in targets.items():
            firsts.setdefault(key_of(layout), target)
        with ThreadPoolExecutor(SYNCS) as pool:
            for _ in pool.map(lambda item: self._parts[item[0]].finish(item[1], mode), firsts.items()):
                pass
        for target, layout in targets.items():
            if (first := firsts[key_of(layout)]) != target:
                copy_file(first, target)


def damage(
    file: Path, layout: Layout, sizes: Mapping[Digest, int], pool: Executor | None = None
) -> list[tuple[Digest, int]]:
    """The shards whose bytes in ``file`` are not right, and where they begin there; all of a file that is missing.

    A file that has less than the whole of some shard is checked as a whole too; should only that be wrong, all of its
    shards are named. ``pool``: for several at once. Raises DiskError.
    """
    whole, places, position = homes(layout, sizes), list[tuple[Digest, int]](), 0
    for piece in layout.slices:
        places.append((piece.digest, position))
        position += piece.length
    checked = [place for place in places if whole.get(place[0]) == place[1]]
    with on_disk():
        if not file.exists():
            return places
        right = (pool.map if pool else map)(lambda p: _is_right(file, p[1], p[0], sizes[p[0]]), checked)
        wrong = [place for place, ok in zip(checked, right, strict=True) if not ok]
        if wrong:
            return wrong
        sound = file.stat().st_size == layout.size and (len(checked) == len(places) or same(file, layout))
        return [] if sound else places or [(digest_of(b""), 0)]


def _is_right(file: Path, position: int, digest: Digest, size: int) -> bool:
    return read_shard(Place(file, position), digest, size) is not None


def read_shard(place: Place, digest: Digest, size: int) -> bytes | None:
    """The bytes of a shard at a place of this disk; None where there are others. Raises DiskError."""
    try:
        descriptor = os.open(place.file, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        data = b"".join(_blocks(descriptor, place.position, size))
    except OSError as error:
        raise DiskError(f"{place.file}: {error.strerror}") from error
    finally:
        os.close(descriptor)
    return data if len(data) == size and hashlib.sha256(data).hexdigest() == hex_of(digest) else None


def read_run(place: Place, offset: int, into: memoryview) -> None:
    """Fill ``into`` with the bytes of a shard from ``offset`` on, whatever they are. Raises DiskError."""
    with on_disk():
        descriptor = os.open(place.file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            position = place.position + offset
            while into and (count := os.preadv(descriptor, [into], position)):
                into, position = into[count:], position + count
        finally:
            os.close(descriptor)
    if into:
        raise DiskError(f"{place.file}: ends too early")


def _sha256(file: Path) -> str:
    hashed = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(BLOCK):
            hashed.update(block)
    return hashed.hexdigest()


def same(file: Path, layout: Layout) -> bool:
    """Whether a file has just these bytes. Raises OSError."""
    return file.stat().st_size == layout.size and _sha256(file) == layout.sha256


def _blocks(descriptor: int, position: int, length: int) -> Iterator[bytes]:
    while length and (block := os.pread(descriptor, min(BLOCK, length), position)):
        yield block
        position, length = position + len(block), length - len(block)


def _copy(descriptor: int, source: int, target: int, length: int) -> None:
    for block in _blocks(descriptor, source, length):
        write_at(descriptor, block, target)
        target += len(block)


def write_at(descriptor: int, data: bytes | memoryview, position: int) -> None:
    """Write all of it there. Raises OSError."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, position)
        view, position = view[written:], position + written
