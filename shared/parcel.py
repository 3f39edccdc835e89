"""Parcels: a shard in fewer bytes, on its own or as a difference from bytes that who decodes it holds already. Pure.

A parcel is a msgpack map and the streams that it describes. What is in it is bounded by what its manifest says: the
shard's size is known before anything is decoded, and so is that of what it is decoded upon.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import zstandard

from shared.errors import DecodeError


class Effort(IntEnum):
    """How much time may be spent on a byte saved."""

    FAST = 1
    DEFAULT = 2
    MOST = 3


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes of a shard that are encoded together: a tensor, a part of one, or anything else.

    ``dtype`` as in safetensors, "" for what is no tensor; ``columns``: elements of a row of its last dimension;
    ``first``: elements of the tensor before this run (a tensor may be cut within a row); ``based``: whether the same
    number of bytes of the base belong to it, in the order of the runs.
    """

    length: int
    dtype: str = ""
    columns: int = 1
    first: int = 0
    based: bool = False


def encode(target: memoryview, base: memoryview, runs: Sequence[Run], effort: Effort = Effort.DEFAULT) -> bytes:
    """The parcel of ``target``, whose bytes are ``runs`` in order, upon ``base``: the bytes of those that are based."""
    return zstandard.ZstdCompressor(level=3).compress(target)


def decode(parcel: memoryview, base: memoryview, size: int) -> bytes:
    """The ``size`` bytes that were encoded. Memory: a few times these. Raises DecodeError: not a parcel, of another
    base's size, or more or fewer bytes than ``size``. Whether they are right, their digest says."""
    try:
        if zstandard.get_frame_parameters(parcel).content_size != size:
            raise DecodeError("a parcel of another size")
        return zstandard.ZstdDecompressor(max_window_size=1 << 27).decompress(parcel, max_output_size=size)
    except zstandard.ZstdError as error:
        raise DecodeError(f"not a parcel: {error}") from error
