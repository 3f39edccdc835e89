"""Strict msgpack and JSON: what a decoder lets through is plain, bounded and unambiguous.

msgpack lets a 64 KiB body claim arrays that take 67 MB, and accepts extension types, duplicate keys and NaN.
Here arrays and maps have a cap (the library goes 1,024 deep whatever we say, and makes room for what each level
claims), so a list of more than ``MAX_ARRAY`` items travels as ``{"pages": [[...], [...]]}``, all pages but the last
full. ``encode`` and ``decode`` do that for every list, so no caller sees it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import msgpack

from shared.errors import DecodeError

MAX_ARRAY = 512
MAX_MAP = 256
MAX_DEPTH = 32
MAX_CONTAINERS = 250_000
MAX_JSON = 1 << 20
"""Bytes of a JSON body (a heartbeat, a listing)."""

_PAGES = "pages"


def encode(value: object) -> bytes:
    """``value`` as msgpack, the same bytes for the same value (map order is insertion order)."""
    packed: bytes = msgpack.packb(_paged(value), use_bin_type=True)
    return packed


def decode(data: bytes, limit: int) -> Any:
    """The one value in ``data``; at most ``limit`` bytes. Raises DecodeError."""
    if len(data) > limit:
        raise DecodeError(f"more than {limit} bytes", code="too_large")
    containers = _Containers()
    try:
        value = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            max_array_len=MAX_ARRAY,
            max_map_len=MAX_MAP,
            max_str_len=limit,
            max_bin_len=limit,
            max_ext_len=0,
            object_pairs_hook=containers.map,
            list_hook=containers.sequence,
        )
        return _joined(value, 0)
    # msgpack raises subclasses of ValueError, and StackError's RecursionError kin for deep nesting
    except DecodeError:
        raise
    except (ValueError, TypeError, RecursionError) as error:
        raise DecodeError(f"not acceptable msgpack: {error}") from error


class _Containers:
    """Counts what a decoder makes: a byte of input can ask for an empty map, which takes a hundred."""

    def __init__(self) -> None:
        self._made = 0

    def _count(self) -> None:
        self._made += 1
        if self._made > MAX_CONTAINERS:
            raise DecodeError(f"more than {MAX_CONTAINERS} lists and maps")

    def map(self, pairs: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
        """One map more."""
        self._count()
        return _map(pairs)

    def sequence(self, value: list[Any]) -> list[Any]:
        """One list more."""
        self._count()
        return value


def _map(pairs: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise DecodeError("a map has a key twice")
    if not all(type(key) is str for key in value):
        raise DecodeError("a map has a key that is not a string")
    return value


def _paged(value: object) -> object:
    if isinstance(value, Mapping):
        if value.keys() == {_PAGES}:
            raise ValueError("a map with the one key 'pages' would come back as a list")
        return {key: _paged(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_paged(item) for item in value]
        paged: object = items
        while isinstance(paged, list) and len(paged) > MAX_ARRAY:
            pages = [paged[i : i + MAX_ARRAY] for i in range(0, len(paged), MAX_ARRAY)]
            paged = {_PAGES: pages if len(pages) <= MAX_ARRAY else _paged(pages)}
        return paged
    return value


def _joined(value: Any, depth: int) -> Any:
    if isinstance(value, (dict, list)) and depth >= MAX_DEPTH:
        raise DecodeError(f"nested more than {MAX_DEPTH} deep")
    if isinstance(value, dict):
        if value.keys() == {_PAGES}:
            pages = _joined(value[_PAGES], depth + 1)
            full = isinstance(pages, list) and len(pages) > 1 and all(isinstance(page, list) for page in pages)
            if not full or any(len(page) != MAX_ARRAY for page in pages[:-1]) or not pages[-1]:
                raise DecodeError("pages that are not full lists")
            return [item for page in pages for item in page]
        return {key: _joined(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_joined(item, depth + 1) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise DecodeError("a number that is not finite")
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    raise DecodeError("an extension type")


def encode_json(value: object) -> bytes:
    """``value`` as JSON for the wire: UTF-8, no spaces, no NaN."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def decode_json(data: bytes, limit: int = MAX_JSON) -> Any:
    """The JSON value in ``data``: no NaN, no duplicate keys, at most 32 deep. Raises DecodeError."""
    if len(data) > limit:
        raise DecodeError(f"more than {limit} bytes", code="too_large")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_json_map, parse_constant=_refuse)
        _check_json(value, 0)
    except DecodeError:
        raise
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError and integers of 5,000 digits
        raise DecodeError("not acceptable JSON", code="bad_json") from error
    return value


def _json_map(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise DecodeError("an object has a key twice", code="bad_json")
    return value


def _refuse(_: str) -> NoReturn:
    raise DecodeError("a number that is not finite", code="bad_json")


def _check_json(value: Any, depth: int) -> None:
    if isinstance(value, (dict, list)) and depth >= MAX_DEPTH:
        raise DecodeError(f"nested more than {MAX_DEPTH} deep", code="bad_json")
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        for item in value:
            _check_json(item, depth + 1)
    elif isinstance(value, str):
        value.encode()  # half of a surrogate pair, written as an escape, is no text
    elif isinstance(value, float) and not math.isfinite(value):  # 1e999 parses as infinity
        raise DecodeError("a number that is not finite", code="bad_json")
