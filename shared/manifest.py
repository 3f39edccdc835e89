"""The manifest: what a revision is made of. Its digest names the revision.

On the wire it is one msgpack map (``shared.codec``). The long tables are packed, so that a model of 80,000
shards stays under 5 MB and decoding it allocates little:

* ``shards``: per shard 32 bytes of SHA-256 and a big-endian u32 size;
* a layout's slices: per slice three big-endian u32: index into ``shards``, offset, length;
* a delta's base: slices as well, of shards of this revision or of ``others`` (a table like ``shards``);
* a layout's ``pieces``: per piece of ``piece_length`` bytes 32 bytes of SHA-256. Shards are of all sizes, and other
  people's downloaders check pieces of equal length (RFC 5854 §4.2.11), so these are hashes of their own.

There is no time and no randomness in it: publishing the same directory again, over nothing or the same, gives the same
revision. Deltas are part of it: what is decoded at a client's has been signed.
What a federated round made says so in one key more.
``decode`` checks every rule, so whoever holds a ``Manifest`` need not check again.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from shared import codec
from shared.digest import SIZE, Digest, digest_of, from_hash, parse_digest, raw_of
from shared.errors import BadId, DecodeError, ManifestInvalid, ManifestTooLarge, NotFound
from shared.ids import commit_of, parse_model, parse_name
from shared.layout import Layout, Slice, piece_count

FORMAT = 1
MAX_MANIFEST = 5_000_000
"""Bytes of an encoded manifest."""
MAX_SHARDS = 100_000
MAX_SHARD = 32 << 20
"""Bytes of one shard: what a node must be ready to hold while it fills."""
MAX_TENSORS = 20_000
"""Tensors listed in a manifest: more would take it over its size."""
MIN_PIECE = 1 << 20
"""Bytes of the shortest pieces."""
MAX_PIECES = 8192
"""Pieces of all layouts of a manifest together: 256 KiB of it."""
MAX_PATH = 1024
MAX_TEXT = 4096

_SHARD = struct.Struct(">32sI")
_SLICE = struct.Struct(">III")
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
_HEX = re.compile(r"[0-9a-f]{64}")
_CODE = re.compile(r"[a-z_]{1,64}")


@dataclass(frozen=True)
class Tensor:
    """One tensor: where its bytes are. ``dtype`` and ``shape`` as in the safetensors header of ``file``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    slices: tuple[Slice, ...]


@dataclass(frozen=True)
class Task:
    """A named part of a model. ``layout`` is its body; ``files`` are small files that go with it.

    ``filename`` is what the body is called on a client's disk.
    """

    name: str
    layout: Layout
    filename: str
    files: tuple[str, ...] = ()
    description: str = ""


@dataclass(frozen=True)
class Delta:
    """A way to have a shard for fewer bytes: ``parcel``, a shard of its own, decoded upon ``base`` (``shared.parcel``).

    ``base``: slices of shards of an earlier revision, whose joined bytes are decoded upon; none where the parcel is but
    the shard compressed. ``target``: a shard of this revision, or one that is the base of another delta.
    """

    target: Digest
    parcel: Digest
    base: tuple[Slice, ...] = ()


@dataclass(frozen=True)
class Provenance:
    """How a federated round made a revision: what its publisher says of it."""

    round: int
    """Its number."""
    base: Digest
    """The revision that the sites' updates are upon."""
    sites: int
    """Those whose updates were counted. How they are called is nobody's business who may read the model."""
    rule: str
    """How their updates were made one."""
    rejected: Mapping[str, int] = field(default_factory=dict)
    """Updates that were refused, by code."""
    epsilon: float | None = None
    """Of differential privacy, where noise was added."""
    delta: float | None = None

    def record(self) -> dict[str, Any]:
        """As it is signed, and shown."""
        privacy = {"epsilon": self.epsilon, "delta": self.delta} if self.epsilon is not None else {}
        return {
            "round": self.round,
            "base": self.base,
            "sites": self.sites,
            "rule": self.rule,
            "rejected": dict(sorted(self.rejected.items())),
            **privacy,
        }


@dataclass(frozen=True)
class Manifest:
    """One immutable revision of a model."""

    model: str
    shards: Mapping[Digest, int]
    """Digest to size in bytes, in order of first use by files, then tasks."""
    files: Mapping[str, Layout]
    tasks: Mapping[str, Task]
    tensors: tuple[Tensor, ...] = field(default=())
    """Empty for a model of more than MAX_TENSORS: the headers of its files have them too."""
    piece_length: int = MIN_PIECE
    """Bytes of a piece of every layout; a power of two."""
    parent: Digest | None = None
    """The revision that this one was published over, where its deltas are from there."""
    deltas: tuple[Delta, ...] = field(default=())
    """Those to this revision's shards first, then those to the shards that these are from, and so on."""
    others: Mapping[Digest, int] = field(default_factory=dict)
    """Parcels, bases and targets of deltas that are no shards of this revision: digest to size in bytes."""
    provenance: Provenance | None = None
    """Of a revision that a federated round made."""

    @cached_property
    def encoded(self) -> bytes:
        """The bytes that the revision is the digest of. Raises ManifestTooLarge."""
        data = codec.encode(_to_wire(self))
        if len(data) > MAX_MANIFEST:
            raise ManifestTooLarge(
                f"the manifest takes {len(data)} bytes, {MAX_MANIFEST} are allowed: use larger shards"
            )
        return data

    @cached_property
    def revision(self) -> Digest:
        """The name of this revision."""
        return digest_of(self.encoded)

    @cached_property
    def content(self) -> Manifest:
        """The same files and tasks, without a way to them: equal for revisions that differ in their deltas only, or in
        what is said of how they were made."""
        return replace(self, parent=None, deltas=(), others={}, provenance=None)

    @cached_property
    def deltas_to(self) -> Mapping[Digest, Sequence[Delta]]:
        """The deltas by their target."""
        found: dict[Digest, list[Delta]] = {}
        for delta in self.deltas:
            found.setdefault(delta.target, []).append(delta)
        return found

    def size_of(self, digest: Digest) -> int:
        """Bytes of a shard, a parcel or a base. Raises KeyError."""
        return self.shards.get(digest) or self.others[digest]

    @cached_property
    def stored(self) -> Mapping[Digest, int]:
        """What is stored where this manifest is: its shards and its parcels, with their sizes. What deltas are upon, or
        make on the way, need not be there."""
        return {**self.shards, **{delta.parcel: self.size_of(delta.parcel) for delta in self.deltas}}

    @property
    def commit(self) -> str:
        """What other people's clients call the revision."""
        return commit_of(self.revision)

    def task(self, name: str) -> Task:
        """The task of that name. Raises NotFound, with the names that exist."""
        try:
            return self.tasks[name]
        except KeyError:
            raise NotFound(
                f"{self.model} has no task {name!r}; it has: {', '.join(self.tasks) or 'none'}",
                code="unknown_task",
                public={"tasks": list(self.tasks)},
            ) from None

    def file(self, path: str) -> Layout:
        """The layout of that file. Raises NotFound."""
        try:
            return self.files[path]
        except KeyError:
            raise NotFound(f"{self.model} has no file {path!r}", code="unknown_file") from None


def decode(data: bytes) -> Manifest:
    """The manifest in ``data``. Raises ManifestTooLarge or ManifestInvalid."""
    if len(data) > MAX_MANIFEST:
        raise ManifestTooLarge(f"more than {MAX_MANIFEST} bytes")
    try:
        manifest = _from_wire(codec.decode(data, MAX_MANIFEST))
    except (DecodeError, BadId, KeyError, TypeError, ValueError, AttributeError, struct.error) as error:
        raise ManifestInvalid(f"not a valid manifest: {error}") from error
    manifest.__dict__["encoded"] = data  # the revision is of the bytes that came, not of a re-encoding
    return manifest


def check_path(path: str) -> str:
    """``path`` if it can be a file of a model on every platform. Raises ManifestInvalid."""
    parts = path.split("/")
    if (
        not path
        or len(path.encode("utf-8", "surrogatepass")) > MAX_PATH
        or not path.isprintable()
        or any(mark in path for mark in '\\:*?"<>|')
        or any(part in ("", ".", "..") or part.endswith((" ", ".")) for part in parts)
        or any(_RESERVED.fullmatch(part) for part in parts)
    ):
        raise ManifestInvalid(f"not a usable file path: {path!r}")
    return path


def check_paths(paths: list[str]) -> None:
    """Raises ManifestInvalid where two paths cannot live side by side (letter case, file against folder)."""
    seen: dict[str, str] = {}
    folders: set[str] = set()
    for path in paths:
        check_path(path)
        if other := seen.get(path.casefold()):
            raise ManifestInvalid(f"{path!r} and {other!r} differ in letter case only")
        seen[path.casefold()] = path
        parts = path.casefold().split("/")
        folders.update("/".join(parts[:n]) for n in range(1, len(parts)))
    for folded, path in seen.items():
        if folded in folders:
            raise ManifestInvalid(f"{path!r} is a file and a folder")


def _to_wire(manifest: Manifest) -> dict[str, Any]:
    index = {digest: number for number, digest in enumerate([*manifest.shards, *manifest.others])}

    def slices(items: tuple[Slice, ...]) -> bytes:
        return b"".join(_SLICE.pack(index[s.digest], s.offset, s.length) for s in items)

    def table(sizes: Mapping[Digest, int]) -> bytes:
        return b"".join(_SHARD.pack(raw_of(d), size) for d, size in sizes.items())

    def layout(item: Layout) -> dict[str, Any]:
        return {
            "size": item.size,
            "sha256": bytes.fromhex(item.sha256),
            "slices": slices(item.slices),
            "pieces": item.pieces,
        }

    paths = {path: number for number, path in enumerate(manifest.files)}
    return {
        "format": FORMAT,
        "model": manifest.model,
        "piece_length": manifest.piece_length,
        "shards": table(manifest.shards),
        "files": [{"path": path, **layout(item)} for path, item in manifest.files.items()],
        "tensors": [[t.name, t.dtype, list(t.shape), paths[t.file], slices(t.slices)] for t in manifest.tensors],
        "tasks": [
            {
                "name": task.name,
                "description": task.description,
                "filename": task.filename,
                "files": [paths[path] for path in task.files],
                **layout(task.layout),
            }
            for task in manifest.tasks.values()
        ],
        "deltas": {
            "parent": raw_of(manifest.parent) if manifest.parent else b"",
            "others": table(manifest.others),
            "entries": [[index[d.target], index[d.parcel], slices(d.base)] for d in manifest.deltas],
        }
        if manifest.deltas
        else [],
        # only where there is any: a manifest without has the bytes that it always had
        **({"provenance": manifest.provenance.record()} if manifest.provenance else {}),
    }


def _from_wire(wire: Any) -> Manifest:
    keys = {"format", "model", "piece_length", "shards", "files", "tensors", "tasks", "deltas"}
    _expect(wire, keys | ({"provenance"} & wire.keys()))
    if type(wire["format"]) is not int or wire["format"] != FORMAT:
        raise ManifestInvalid("a manifest of a format that this version does not know")
    table = list(_shards(wire["shards"]))
    shards = dict(table)
    if len(shards) != len(table):
        raise ManifestInvalid("a shard is listed twice")

    piece_length = _natural(wire["piece_length"])
    if piece_length < MIN_PIECE or piece_length & (piece_length - 1):
        raise ManifestInvalid("a piece's length is a power of two from 1 MiB up")

    def layout(item: Any) -> Layout:
        parts = _slices(item["slices"], table)
        size = _natural(item["size"])
        if sum(part.length for part in parts) != size:
            raise ManifestInvalid("slices do not add up to the size")
        sha256 = item["sha256"]
        if not isinstance(sha256, bytes) or len(sha256) != SIZE:
            raise ManifestInvalid("a SHA-256 has 32 bytes")
        pieces = item["pieces"]
        if not isinstance(pieces, bytes) or len(pieces) != SIZE * piece_count(size, piece_length):
            raise ManifestInvalid("there is one SHA-256 for each piece")
        return Layout(size, sha256.hex(), parts, pieces)

    files: dict[str, Layout] = {}
    for item in wire["files"]:
        _expect(item, {"path", "size", "sha256", "slices", "pieces"})
        files[_text(item["path"], MAX_PATH)] = layout(item)
    paths = list(files)
    if len(paths) != len(wire["files"]):
        raise ManifestInvalid("a file is listed twice")
    check_paths(paths)

    def path_at(number: object) -> str:
        if _natural(number) >= len(paths):
            raise ManifestInvalid("a file that is not listed")
        return paths[_natural(number)]

    tensors = []
    for name, dtype, shape, file, packed in wire["tensors"]:
        tensors.append(
            Tensor(
                _text(name, MAX_TEXT),
                _text(dtype, 16),
                tuple(_natural(n) for n in shape),
                path_at(file),
                _slices(packed, table),
            )
        )
    tasks: dict[str, Task] = {}
    for item in wire["tasks"]:
        _expect(item, {"name", "description", "filename", "files", "size", "sha256", "slices", "pieces"})
        name = parse_name(item["name"])
        if name in tasks:
            raise ManifestInvalid("a task is listed twice")
        tasks[name] = Task(
            name,
            layout(item),
            check_path(_text(item["filename"], MAX_PATH)),
            tuple(path_at(number) for number in item["files"]),
            _text(item["description"], MAX_TEXT),
        )
    parent, deltas, others = _deltas(wire["deltas"], table) if wire["deltas"] != [] else (None, (), {})
    layouts = (*files.values(), *(task.layout for task in tasks.values()))
    if sum(len(item.pieces) for item in layouts) > SIZE * MAX_PIECES:
        raise ManifestTooLarge(f"more than {MAX_PIECES} pieces")
    return Manifest(
        parse_model(wire["model"]),
        shards,
        files,
        tasks,
        tuple(tensors),
        piece_length,
        parent,
        deltas,
        others,
        _provenance(wire["provenance"]) if "provenance" in wire else None,
    )


def _slices(packed: bytes, table: Sequence[tuple[Digest, int]]) -> tuple[Slice, ...]:
    if len(packed) % _SLICE.size:
        raise ManifestInvalid("slices are cut short")
    items = []
    for number, offset, length in _SLICE.iter_unpack(packed):
        if number >= len(table) or not length or offset + length > table[number][1]:
            raise ManifestInvalid("a slice is not within its shard")
        items.append(Slice(table[number][0], offset, length))
    return tuple(items)


def _deltas(
    wire: Any, shards: Sequence[tuple[Digest, int]]
) -> tuple[Digest | None, tuple[Delta, ...], dict[Digest, int]]:
    """Parent, deltas, and the shards that only these name."""
    _expect(wire, {"parent", "others", "entries"})
    others = list(_shards(wire["others"]))
    table = [*shards, *others]
    if len(dict(table)) != len(table):
        raise ManifestInvalid("a shard is listed twice")
    deltas = []
    for target, parcel, base in wire["entries"]:
        if max(_natural(target), _natural(parcel)) >= len(table):
            raise ManifestInvalid("a delta of a shard that is not listed")
        made = Delta(table[target][0], table[parcel][0], _slices(base, table))
        if sum(part.length for part in made.base) > MAX_SHARD or table[parcel][1] >= table[target][1]:
            raise ManifestInvalid("a delta that saves nothing, or is upon more than a shard")
        deltas.append(made)
    if not deltas or len(deltas) > MAX_SHARDS:
        raise ManifestInvalid("no deltas, or too many")
    named = {digest for d in deltas for digest in (d.target, d.parcel, *(part.digest for part in d.base))}
    if not dict(others).keys() <= named:
        raise ManifestInvalid("a shard that nothing uses")
    parent = wire["parent"]
    if not isinstance(parent, bytes) or len(parent) not in (0, SIZE):
        raise ManifestInvalid("a revision's digest has 32 bytes")
    return from_hash(parent) if parent else None, tuple(deltas), dict(others)


def _provenance(wire: Any) -> Provenance:
    private = {"epsilon", "delta"} if "epsilon" in wire else set()
    _expect(wire, {"round", "base", "sites", "rule", "rejected"} | private)
    rejected = wire["rejected"]
    if not isinstance(rejected, dict) or not all(_CODE.fullmatch(code) for code in rejected):
        raise ManifestInvalid("refusals are counted by their codes")
    for name in private:
        if not isinstance(wire[name], float) or wire[name] < 0:
            raise ManifestInvalid("epsilon and delta are numbers from 0 up")
    return Provenance(
        _natural(wire["round"]),
        parse_digest(wire["base"]),
        _natural(wire["sites"]),
        _text(wire["rule"], 64),
        {code: _natural(count) for code, count in rejected.items()},
        wire.get("epsilon"),
        wire.get("delta"),
    )


def _shards(packed: object) -> Iterator[tuple[Digest, int]]:
    if not isinstance(packed, bytes) or len(packed) % _SHARD.size:
        raise ManifestInvalid("the shard table is cut short")
    if len(packed) // _SHARD.size > MAX_SHARDS:
        raise ManifestTooLarge(f"more than {MAX_SHARDS} shards")
    for raw, size in _SHARD.iter_unpack(packed):
        if not 0 < size <= MAX_SHARD:
            raise ManifestInvalid(f"a shard has 1 to {MAX_SHARD} bytes")
        yield from_hash(raw), size


def _expect(item: object, keys: set[str]) -> None:
    """Raises ManifestInvalid unless ``item`` is a map with just these keys: nothing unsigned rides along."""
    if not isinstance(item, dict) or item.keys() != keys:
        raise ManifestInvalid(f"a map with the keys {', '.join(sorted(keys))} was expected")


def _natural(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 53:
        raise ManifestInvalid("a number that is negative, too large or not whole")
    return value


def _text(value: object, limit: int) -> str:
    if not isinstance(value, str) or len(value) > limit:
        raise ManifestInvalid("a text that is too long or none")
    return value
