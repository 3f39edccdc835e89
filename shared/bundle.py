"""A bundle: a model, or what is new in it, as one file that can be carried where no network goes. Pure.

One uncompressed tar (POSIX ustar) of regular files, in this order, the same bytes for the same content:

    index.json              model, ref, revision; the one that it is upon; names of metadata; what follows, with sizes
    trust/<SHA-256>         the signed metadata, from the first root on, that says what the ref means
    manifests/<SHA-256>     the revision's manifest
    blobs/<SHA-256>         its shards; or parcels (``shared.parcel``), where these are fewer bytes

Nothing in it is believed: who takes it in knows a root of its own. The index says what comes, the metadata is verified,
the manifest is what it says, and shards are what the manifest says. Each entry has one canonical head, made again here
and compared: links, paths that lead elsewhere, sparse files and extensions of tar are no bundle.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Container, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shared import codec
from shared.deltas import ways
from shared.digest import Digest, digest_of, hex_of, parse_digest
from shared.errors import BadId, DecodeError, NotFound, RequestError
from shared.ids import parse_model, parse_name, parse_ref
from shared.manifest import MAX_MANIFEST, MAX_SHARD, MAX_SHARDS, Delta, Manifest
from shared.trust import LIMITS
from shared.trust_names import parse_file_name

FORMAT = 1
BLOCK = 512
INDEX = "index.json"
MAX_INDEX = 32 << 20
MAX_TRUST = 64 << 20
"""Bytes of all metadata together."""
END = bytes(2 * BLOCK)
"""Two empty blocks end a tar."""
_ENTRY = re.compile(r"(trust|manifests|blobs)/([0-9a-f]{64})")
_ORDER = ("trust", "manifests", "blobs")
_MOST = {"trust": max(LIMITS.values()), "manifests": MAX_MANIFEST, "blobs": MAX_SHARD}


class BundleInvalid(RequestError):
    """No bundle, or a damaged or incomplete one; what came before of it is verified and stays."""

    code = "bad_bundle"


class BaseMissing(NotFound):
    """A bundle that is upon a revision which is not held here, whole and right."""

    code = "base_missing"


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a bundle. ``data`` has the digest that its name says."""

    kind: str
    """``trust``, ``manifests`` or ``blobs``."""
    digest: Digest
    data: bytes


@dataclass(frozen=True)
class Index:
    """What a bundle says of itself. Sizes in bytes."""

    model: str
    ref: str
    revision: Digest
    trust: Mapping[str, Digest]
    """Digest by the name of the metadata file."""
    entries: tuple[tuple[str, int], ...]
    """Name and size of all that follows, in order."""
    tasks: tuple[str, ...] = ()
    """Those that it has; empty for all of the model."""
    base: Digest | None = None
    """The revision that it is upon: shards of that one are not in it."""

    @property
    def size(self) -> int:
        """Of the blobs together."""
        return sum(size for name, size in self.entries if name.startswith("blobs/"))

    def blobs(self) -> dict[Digest, int]:
        """Those that follow, and their sizes."""
        return {_digest(name): size for name, size in self.entries if name.startswith("blobs/")}

    def encode(self) -> bytes:
        """As it is in the bundle, with its head and the padding behind it."""
        document = {
            "format": FORMAT,
            "model": self.model,
            "ref": self.ref,
            "revision": self.revision,
            "base": self.base or "",
            "tasks": list(self.tasks),
            "trust": dict(self.trust),
            "entries": [list(entry) for entry in self.entries],
        }
        data = codec.encode_json(document)
        return head(INDEX, len(data)) + data + padding(len(data))


def entry_name(kind: str, digest: Digest) -> str:
    """What an entry is called."""
    return f"{kind}/{hex_of(digest)}"


def head(name: str, size: int) -> bytes:
    """The one head that an entry may have: no time, no owner, read-only."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o444
    return info.tobuf(tarfile.USTAR_FORMAT)


def padding(size: int) -> bytes:
    """What fills the last block of an entry."""
    return bytes(-size % BLOCK)


def decode_index(data: bytes) -> Index:
    """Raises BundleInvalid."""
    try:
        document = codec.decode_json(data, MAX_INDEX)
        if document["format"] != FORMAT:
            raise BundleInvalid("a bundle of a format that this version does not know")
        entries = tuple((str(name), _size(size)) for name, size in document["entries"])
        index = Index(
            parse_model(document["model"]),
            parse_ref(document["ref"]),
            parse_digest(document["revision"]),
            {str(name): parse_digest(digest) for name, digest in document["trust"].items()},
            entries,
            tuple(parse_name(name) for name in document["tasks"]),
            parse_digest(document["base"]) if document["base"] else None,
        )
    except (BadId, DecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleInvalid(f"its index is not valid: {error}") from error
    _check(index)
    return index


def _size(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise BundleInvalid("an entry has a size that is none")
    return value


def _check(index: Index) -> None:
    """Raises BundleInvalid where what is to follow cannot be a bundle's."""
    kinds, total = [], dict.fromkeys(_ORDER, 0)
    for name, size in index.entries:
        match = _ENTRY.fullmatch(name)
        if match is None or size > _MOST[match[1]]:
            raise BundleInvalid("an entry that is none of a bundle's, or too large")
        kinds.append(match[1])
        total[match[1]] += size
    if len({name for name, _ in index.entries}) != len(kinds):
        raise BundleInvalid("an entry is named twice")
    if kinds != sorted(kinds, key=_ORDER.index) or kinds.count("manifests") != 1:
        raise BundleInvalid("its entries are not in their order")
    if len(kinds) > 3 * MAX_SHARDS or total["trust"] > MAX_TRUST:
        raise BundleInvalid("more than a bundle may have")
    named = {entry_name("trust", digest) for digest in index.trust.values()}
    if not named <= {name for name, _ in index.entries} or not all(map(parse_file_name, index.trust)):
        raise BundleInvalid("its metadata is not named as metadata is")
    if entry_name("manifests", index.revision) not in {name for name, _ in index.entries}:
        raise BundleInvalid("its manifest is of another revision")


def _digest(name: str) -> Digest:
    return parse_digest(f"sha256:{name.rpartition('/')[2]}")


class Unpacker:
    """A bundle as it comes. Holds one entry at the most; an entry is given out once its digest was right."""

    def __init__(self) -> None:
        self.index: Index | None = None
        """There once it came."""
        self._waiting = bytearray()
        self._steps = self._read()
        self._need = BLOCK
        next(self._steps)
        self._over = False

    def __repr__(self) -> str:
        return f"<Unpacker of {self.index.model if self.index else 'nothing yet'}>"

    def feed(self, data: bytes | memoryview) -> list[Entry]:
        """The entries that are whole now. Raises BundleInvalid."""
        self._waiting += data
        found = []
        while not self._over and len(self._waiting) >= self._need:
            run = bytes(self._waiting[: self._need])
            del self._waiting[: self._need]
            try:
                step = self._steps.send(run)
                if isinstance(step, Entry):
                    found.append(step)
                    step = next(self._steps)
                assert isinstance(step, int)
                self._need = step
            except StopIteration:
                self._over = True
        if self._over and any(self._waiting):
            raise BundleInvalid("something follows its end")
        if self._over:
            self._waiting.clear()
        return found

    def end(self) -> None:
        """Nothing more comes. Raises BundleInvalid where something is missing."""
        if not self._over:
            raise BundleInvalid("it is cut short")

    def _read(self) -> Generator[int | Entry, bytes, None]:
        """Yields how many bytes are wanted, and is sent them; yields each entry."""
        first = yield BLOCK
        size = _index_size(first)
        run = yield size + len(padding(size))
        if any(run[size:]):
            raise BundleInvalid("its index is damaged")
        self.index = decode_index(run[:size])
        for name, size in self.index.entries:
            run = yield BLOCK
            if run != head(name, size):
                raise BundleInvalid("an entry has another head than its index says")
            run = yield size + len(padding(size))
            digest = _digest(name)
            data = run[:size]
            if any(run[size:]) or digest_of(data) != digest:
                raise BundleInvalid(f"{name} is damaged")
            yield Entry(name.partition("/")[0], digest, data)
        if any((yield len(END))):
            raise BundleInvalid("something follows its end")


def _index_size(first: bytes) -> int:
    """Raises BundleInvalid."""
    try:
        size = tarfile.TarInfo.frombuf(first, "ascii", "strict").size
    except (tarfile.HeaderError, ValueError):
        size = 0
    if not 0 < size <= MAX_INDEX or first != head(INDEX, size):
        raise BundleInvalid("this is no bundle of nearshard's")
    return size


# What is in it


def wanted(manifest: Manifest, tasks: Sequence[str]) -> list[Digest]:
    """The shards of these tasks and their small files; all of the model where none is named. Raises NotFound."""
    if not tasks:
        return list(manifest.shards)
    found = [manifest.task(name) for name in tasks]
    layouts = [layout for task in found for layout in (task.layout, *(manifest.files[path] for path in task.files))]
    return list(dict.fromkeys(digest for layout in layouts for digest in layout.shards()))


def pick(manifest: Manifest, wanted: Sequence[Digest], held: Container[Digest]) -> list[Digest]:
    """The blobs by which all of ``wanted`` can be had where ``held`` is: shards, or parcels where these are less."""
    blobs: dict[Digest, None] = {}
    for digest, steps in ways(manifest, wanted, held.__contains__).items():
        if steps:
            blobs |= dict.fromkeys(delta.parcel for delta in steps)
        elif digest not in held:
            blobs[digest] = None
    return list(blobs)


def rebuilding(
    manifest: Manifest, missing: Sequence[Digest], blobs: Container[Digest], held: Callable[[Digest], bool]
) -> Mapping[Digest, tuple[Delta, ...]]:
    """For each shard that did not come itself, the deltas to decode, in order; of parcels that came (``blobs``).

    Raises BaseMissing where there is no such way.
    """
    came = replace(manifest, deltas=tuple(delta for delta in manifest.deltas if delta.parcel in blobs))
    found = ways(came, missing, held)
    if lost := [digest for digest, steps in found.items() if not steps]:
        raise BaseMissing(f"{len(lost)} shards are neither in the bundle nor here: it is upon another revision")
    return found


def check_blob(manifest: Manifest, digest: Digest, size: int) -> None:
    """Raises BundleInvalid for a blob that is none of the manifest's."""
    try:
        known = manifest.size_of(digest)
    except KeyError:
        known = 0
    if size != known:
        raise BundleInvalid("it has a shard that its manifest does not name")
