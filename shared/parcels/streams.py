"""The compressors: bytes by zstd, integers by pcodec; what is decoded is bounded before it is decoded. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import zstandard
from pcodec import ChunkConfig, DeltaSpec, ModeSpec, PagingSpec, standalone

from shared.errors import DecodeError
from shared.parcels.kinds import Bytes, Integers, Kind

MAX_WINDOW = 1 << 27
PAGE = 1 << 19
"""Integers that pcodec makes one table for."""
LEVEL = 8


def squeeze(data: Bytes, level: int) -> bytes:
    """``data`` by zstd."""
    return zstandard.ZstdCompressor(level=level).compress(data.data)


def unsqueeze(stream: memoryview, size: int) -> Bytes:
    """The ``size`` bytes that were squeezed. Raises DecodeError."""
    try:
        if zstandard.get_frame_parameters(stream).content_size != size:
            raise DecodeError("a stream of another size")
        decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
        data = decompressor.decompress(stream, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise DecodeError(f"not a stream of zstd: {error}") from error
    if len(data) != size:
        raise DecodeError("a stream of another size than it says")
    return np.frombuffer(data, np.uint8)


def pack(values: Integers, groups: Sequence[int] | None = None) -> bytes:
    """``values`` by pcodec; ``groups``: how many of them, in order, are alike."""
    pages: list[int] = []
    for count in [len(values)] if groups is None else groups:
        parts = -(-count // PAGE)
        pages += [count // parts + (part < count % parts) for part in range(parts)]
    if not pages:
        return b""
    config = ChunkConfig(
        compression_level=LEVEL,
        mode_spec=ModeSpec.classic(),
        delta_spec=DeltaSpec.no_op(),
        paging_spec=PagingSpec.exact_page_sizes(pages),
        enable_8_bit=True,
    )
    return bytes(standalone.simple_compress(np.require(values, requirements=["C", "A"]), config))


def unpack(stream: memoryview, count: int, kind: Kind) -> Integers:
    """The ``count`` integers that were packed. Raises DecodeError."""
    values = np.empty(count, kind.integer)
    if not count:
        if stream.nbytes:
            raise DecodeError("a stream of nothing that is not empty")
        return values
    try:
        progress = standalone.simple_decompress_into(bytes(stream), values)
    except (RuntimeError, TypeError, ValueError) as error:
        raise DecodeError(f"not a stream of pcodec: {error}") from error
    except BaseException as error:
        # a Rust library that is surprised raises what is no Exception, so that nobody takes it for one
        if type(error).__name__ != "PanicException":
            raise
        raise DecodeError("not a stream of pcodec: it panics") from error
    if progress.n_processed != count or not progress.finished:
        raise DecodeError("a stream of another number of integers")
    return values
