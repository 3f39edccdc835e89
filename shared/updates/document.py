"""An update as one document: what a site sends in a round. Pure.

``NSU`` and the version, the segments of all tensors one after the other, the header, and at the end the header's
length and ``NSU`` and the version again. So it is written in one pass, and read from any place. The header is a
msgpack map, compressed by zstd: ``codecs`` (names), and with an entry for each tensor ``names``, ``shapes``, ``codec``
(which of the names); and with one for each segment in order ``lengths`` in bytes and ``errors`` in units of 2^-16.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, BinaryIO

from shared import codec as plain
from shared.digest import Digest, from_hash
from shared.errors import DecodeError, NonFinite, RequestError, SchemaMismatch
from shared.tensorfile import MAX_NAME, MAX_TENSORS
from shared.updates.codecs import codec, codec_name
from shared.updates.segments import Segment, segments

if TYPE_CHECKING:
    from shared.updates.codec import Codec, Floats

MAGIC = b"NSU\x01"
MAX_HEADER = 4 << 20
"""Bytes of a header, decompressed."""
MAX_CODECS = 64
MAX_AXES = 64
MAX_COUNT = 1 << 48
"""Elements of a tensor."""
OVERHEAD = 64
"""Bytes of a segment beyond four an element, at most."""
_UNIT = 1 << 16
_MAX_ERROR = 2 * _UNIT
_LENGTH = struct.Struct("<I")
_END = _LENGTH.size + len(MAGIC)

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sent:
    """How a tensor was written: its codec, the bytes that it took, and the L2 norm of what was lost as a share of that
    of the values, rounded up."""

    codec: str
    size: int
    error: float


@dataclass(frozen=True, slots=True)
class Written:
    """A document that was written: its bytes and their digest, and how each tensor was."""

    size: int
    digest: Digest
    tensors: Mapping[str, Sent]


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a segment is in the document, and its declared error: the L2 norm of what was lost is at most this times
    that of what was to be sent (as who wrote it says)."""

    segment: Segment
    offset: int
    length: int
    error: float


@dataclass(frozen=True, slots=True)
class Head:
    """A tensor of a document."""

    shape: Shape
    codec: str
    segments: Sequence[Placed]


def write_update(
    file: BinaryIO,
    tensors: Mapping[str, Shape],
    read: Callable[[str, Segment], Floats],
    codecs: Codec | Mapping[str, Codec],
    kept: Callable[[str, Segment, Floats, Floats], None] | None = None,
) -> Written:
    """Write an update of ``tensors`` (names and shapes) to ``file``, from where it stands.

    ``read`` gives the values (float32, ``rows`` x ``columns``) of a segment; it is asked for one at a time, in order.
    ``codecs``: one for all, or by globs of names, of which the first that fits counts. ``kept`` is told the values of
    each segment and what whoever decodes it gets: error feedback keeps the difference. Memory: some ten times a
    segment's. Raises NonFinite, naming the tensor; RequestError (``unknown_codec``): no glob fits a name.
    """
    writer = _Writer(file)
    for name, shape in tensors.items():
        chosen = _chosen(name, codecs)
        writer.begin(name, shape, chosen.name)
        for segment in segments(shape):
            values = read(name, segment).reshape(segment.rows, segment.columns)
            try:
                writer.add(segment, values, chosen, kept)
            except NonFinite as error:
                raise NonFinite(f"{name}: {error}") from error
    return writer.end()


def _chosen(name: str, codecs: Codec | Mapping[str, Codec]) -> Codec:
    if not isinstance(codecs, Mapping):
        return codecs
    for glob, found in codecs.items():
        if fnmatchcase(name, glob):
            return found
    raise RequestError(f"no codec is given for the tensor {name!r}", code="unknown_codec")


class _Tally:
    """What a tensor's segments took and lost together."""

    def __init__(self) -> None:
        self.size = 0
        self._lost = self._whole = 0.0

    def add(self, size: int, lost: float, whole: float) -> None:
        """One segment more: its bytes, the norms of what was lost of it and of all of it."""
        self.size += size
        self._lost = math.hypot(self._lost, lost)
        self._whole = math.hypot(self._whole, whole)

    def error(self) -> float:
        """What was lost, as a share."""
        return _share(self._lost, self._whole) / _UNIT


def _share(lost: float, whole: float) -> int:
    """What was lost in units, rounded up; one is added for whoever decodes with other rounding. Nothing lost is 0."""
    return min(_MAX_ERROR, math.ceil(lost / whole * _UNIT) + 1) if lost and whole else 0


class _Writer:
    """A document on its way to a file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash, self._size = file, hashlib.sha256(), 0
        self._shapes: dict[str, Shape] = {}
        self._codecs: dict[str, str] = {}
        self._tallies: dict[str, _Tally] = {}
        self._lengths: list[int] = []
        self._errors: list[int] = []
        self._tensor = ""
        self._put(MAGIC)

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._size += len(data)

    def begin(self, name: str, shape: Shape, codec_name: str) -> None:
        """The segments that are added from now on are of this tensor."""
        self._tensor = name
        self._shapes[name], self._codecs[name], self._tallies[name] = tuple(shape), codec_name, _Tally()

    def add(
        self,
        segment: Segment,
        values: Floats,
        chosen: Codec,
        kept: Callable[[str, Segment, Floats, Floats], None] | None,
    ) -> None:
        """The next segment."""
        from shared.updates.codec import norm  # numpy takes long to import; by now it is

        data = chosen.encode(values)
        decoded = chosen.decode(data, segment.rows, segment.columns)
        lost, whole = norm(values - decoded), norm(values)
        self._lengths.append(len(data))
        self._errors.append(_share(lost, whole))
        self._tallies[self._tensor].add(len(data), lost, whole)
        self._put(data)
        if kept is not None:
            kept(self._tensor, segment, values, decoded)

    def end(self) -> Written:
        """The header, and what was written."""
        import zstandard  # as the codecs, which are not imported by who only reads headers' names

        numbers = {name: number for number, name in enumerate(dict.fromkeys(self._codecs.values()))}
        header = plain.encode(
            {
                "codecs": list(numbers),
                "names": list(self._shapes),
                "shapes": [list(shape) for shape in self._shapes.values()],
                "codec": [numbers[name] for name in self._codecs.values()],
                "lengths": self._lengths,
                "errors": self._errors,
            }
        )
        packed = zstandard.ZstdCompressor(level=19).compress(header)
        self._put(packed + _LENGTH.pack(len(packed)) + MAGIC)
        tensors = {name: Sent(self._codecs[name], tally.size, tally.error()) for name, tally in self._tallies.items()}
        return Written(self._size, from_hash(self._hash.digest()), tensors)


class Update:
    """A document that is open: its tensors, and their values a segment at a time. Not for two threads at once."""

    def __init__(self, file: BinaryIO, tensors: Mapping[str, Head]) -> None:
        self._file = file
        self.tensors = tensors

    def codecs(self) -> set[str]:
        """The names of all codecs in use."""
        return {head.codec for head in self.tensors.values()}

    def read(self, name: str, number: int) -> Floats:
        """The values (``rows`` x ``columns``) of a tensor's segment: new, finite. Raises DecodeError, NonFinite."""
        head = self.tensors[name]
        placed = head.segments[number]
        self._file.seek(placed.offset)
        data = self._file.read(placed.length)
        if len(data) != placed.length:
            raise DecodeError("an update that ends before its segments")
        return codec(head.codec).decode(data, placed.segment.rows, placed.segment.columns)


def open_update(file: BinaryIO, size: int) -> Update:
    """The update in the first ``size`` bytes of ``file``, which it goes on reading from; only its header is read now.

    Takes memory for the header, and nothing for what it claims. Raises DecodeError; ``too_large``: it would be more
    than any update's.
    """
    header = _header(file, size)
    codecs = [_known(name) for name in _items(header, "codecs", MAX_CODECS)]
    names, shapes = _items(header, "names", MAX_TENSORS), _items(header, "shapes", MAX_TENSORS)
    chosen = _items(header, "codec", MAX_TENSORS)
    lengths, errors = _items(header, "lengths", MAX_HEADER), _items(header, "errors", MAX_HEADER)
    if not len(names) == len(shapes) == len(chosen) or len(lengths) != len(errors):
        raise DecodeError("lists of an update's header that are not of one length")
    if len(set(map(_name, names))) != len(names):
        raise DecodeError("an update with a tensor twice")
    places = _Places(lengths, errors)
    tensors = {
        name: Head(_shape(shape), codecs[_number(which, len(codecs) - 1)], places.take(segments(shape)))
        for name, shape, which in zip(names, shapes, chosen, strict=True)
    }
    places.end(size - _END - header["size"])
    return Update(file, tensors)


def _header(file: BinaryIO, size: int) -> dict[str, Any]:
    """The header, with its compressed ``size``."""
    from shared.updates.packing import expand  # numpy takes long to import

    if size < len(MAGIC) + _END:
        raise DecodeError("too short for an update")
    file.seek(0)
    begin = file.read(len(MAGIC))
    file.seek(size - _END)
    end = file.read(_END)
    if begin != MAGIC or end[_LENGTH.size :] != MAGIC:
        raise DecodeError("not an update, or one of another version")
    (length,) = _LENGTH.unpack_from(end)
    if length > min(MAX_HEADER, size - len(MAGIC) - _END):
        raise DecodeError("an update's header that is too long")
    file.seek(size - _END - length)
    packed = expand(memoryview(file.read(length)), MAX_HEADER)
    header = plain.decode(packed.tobytes(), MAX_HEADER)
    if not isinstance(header, dict) or header.keys() != _KEYS:
        raise DecodeError("not the header of an update")
    return {**header, "size": length}


_KEYS = {"codecs", "names", "shapes", "codec", "lengths", "errors"}


def _items(header: Mapping[str, Any], key: str, most: int) -> list[Any]:
    found = header[key]
    if not isinstance(found, list) or len(found) > most:
        raise DecodeError("no list, or a list that is too long, in an update's header")
    return found


def _number(value: Any, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise DecodeError("a number in an update's header that cannot be")
    return value


def _known(name: Any) -> str:
    if not isinstance(name, str):
        raise DecodeError("a codec without a name")
    try:
        found = codec_name(name)
    except RequestError as error:
        raise DecodeError(str(error), code="unknown_codec") from error
    if found != name:
        raise DecodeError("a codec's name that is not in its canonical spelling")
    return found


def _name(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME:
        raise DecodeError("a tensor with a name that cannot be")
    return value


def _shape(value: Any) -> Shape:
    if not isinstance(value, list) or len(value) > MAX_AXES:
        raise DecodeError("a shape that is none")
    shape = tuple(_number(length, MAX_COUNT) for length in value)
    # a zero hides any overflow of the product
    if math.prod(length or 1 for length in shape) > MAX_COUNT:
        raise DecodeError("a shape that is too large", code="too_large")
    return shape


class _Places:
    """Hands out the places of segments, one after the other."""

    def __init__(self, lengths: list[Any], errors: list[Any]) -> None:
        self._lengths, self._errors = lengths, errors
        self._taken, self._at = 0, len(MAGIC)

    def take(self, wanted: Sequence[Segment]) -> list[Placed]:
        """Those of a tensor's segments. A shape that claims more of them than are there is refused before they are
        counted out."""
        first, self._taken = self._taken, self._taken + len(wanted)
        if self._taken > len(self._lengths):
            raise DecodeError("an update with fewer segments than its shapes have", code="too_large")
        found = []
        for number, segment in enumerate(wanted, first):
            length = _number(self._lengths[number], 4 * segment.count + OVERHEAD)
            error = _number(self._errors[number], _MAX_ERROR) / _UNIT
            found.append(Placed(segment, self._at, length, error))
            self._at += length
        return found

    def end(self, at: int) -> None:
        """Nothing is left, and the header begins here."""
        if self._taken != len(self._lengths) or self._at != at:
            raise DecodeError("an update with more or fewer bytes than its segments")


def check_schema(update: Update, expected: Mapping[str, Shape]) -> None:
    """Raises SchemaMismatch: the tensors of ``update`` are not those that are expected, by name and shape."""
    missing, more = expected.keys() - update.tensors.keys(), update.tensors.keys() - expected.keys()
    if missing or more:
        raise SchemaMismatch(f"{len(missing)} tensors are missing from the update, {len(more)} are not asked for")
    for name, shape in expected.items():
        if update.tensors[name].shape != tuple(shape):
            raise SchemaMismatch(f"{name}: its shape is {list(shape)}, not {list(update.tensors[name].shape)}")
