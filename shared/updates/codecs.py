"""The codecs by their names. Names can be checked without numpy; to make a codec imports it. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from shared.errors import RequestError

if TYPE_CHECKING:
    from shared.updates.codec import Codec

MAX_NAME = 64
_NUMBER = re.compile(r"\d{1,4}(\.\d{1,6})?")


class _Name(NamedTuple):
    """A name's parts: what kind of codec, its arguments."""

    family: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return ":".join([self.family, *self.arguments])


def codec_name(text: str) -> str:
    """The canonical spelling of a codec's name. Raises RequestError (``unknown_codec``): there is no such codec."""
    return str(_parse(text))


def family(name: str) -> str:
    """What a codec is without its numbers: ``top`` of ``top:0.1:sign``."""
    return name.partition(":")[0]


def codec(text: str) -> Codec:
    """The codec of this name. Raises RequestError (``unknown_codec``)."""
    name = _parse(text)
    return _MAKERS[name.family](name)


def _parse(text: str) -> _Name:
    kind, *arguments = text.split(":") if len(text) <= MAX_NAME else [""]
    if kind not in _ARGUMENTS or (checked := _ARGUMENTS[kind](arguments)) is None:
        raise RequestError(f"no such codec: {text[:MAX_NAME]!r}; there are {KNOWN}", code="unknown_codec")
    return _Name(kind, checked)


def _none(arguments: list[str]) -> tuple[str, ...] | None:
    return None if arguments else ()


def _clipped(arguments: list[str]) -> tuple[str, ...] | None:
    return tuple(arguments) if arguments in ([], ["clipped"]) else None


_ARGUMENTS: Mapping[str, Callable[[list[str]], tuple[str, ...] | None]] = {
    "fp32": _none,
    "bf16": _none,
    "int8": _none,
    "int4": _clipped,
    "ternary": _none,
    "sign": _none,
}
KNOWN = "fp32, bf16, int8, int4, int4:clipped, ternary, sign"


# Each imports when it is called: numpy and pcodec take long, and most who check names never encode.


def _planes(name: _Name) -> Codec:
    from shared.updates import planes

    return planes.Fp32() if name.family == "fp32" else planes.Bf16()


def _blocks(name: _Name) -> Codec:
    from shared.updates import blocks

    if name.family == "int8":
        return blocks.Blocks("int8", 8, 256)
    if name.arguments:
        return blocks.Blocks(str(name), 4, 256, clipped=True)
    return blocks.Blocks("int4", 4, 64)


def _ternary(name: _Name) -> Codec:
    from shared.updates import blocks

    return blocks.Ternary()


def _sign(name: _Name) -> Codec:
    from shared.updates import blocks

    return blocks.Sign()


_MAKERS: Mapping[str, Callable[[_Name], Codec]] = {
    "fp32": _planes,
    "bf16": _planes,
    "int8": _blocks,
    "int4": _blocks,
    "ternary": _ternary,
    "sign": _sign,
}
