"""Parcels: a shard in fewer bytes, on its own or as a difference from bytes that who decodes it holds already. Pure.

A parcel is a msgpack map and the streams that it describes. What is in it is bounded by what its manifest says: the
shard's size is known before anything is decoded, and so is that of what it is decoded upon.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum


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
    """The parcel of ``target``, whose bytes are ``runs`` in order, upon ``base``: the bytes of those that are based.

    At most a small header larger than ``target``; the same bytes for the same input. Memory: some ten times these.
    """
    from shared.parcels import encoding  # numpy and pcodec take long to import, and most who are here use neither

    return encoding.encode(target, base, runs, effort)


def decode(parcel: memoryview, base: memoryview, size: int) -> bytes:
    """The ``size`` bytes that were encoded. Memory: some ten times these. Raises DecodeError: not a parcel, of another
    base's size, or more or fewer bytes than ``size``. Whether they are right, their digest says."""
    from shared.parcels import decoding  # as above

    return decoding.decode(parcel, base, size)
