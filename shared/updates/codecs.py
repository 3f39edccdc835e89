"""The codecs by their names. Names can be checked without numpy; to make a codec imports it. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from shared.errors import RequestError

if TYPE_CHECKING:
    from shared.updates.codec import Codec

MAX_NAME = 64
_NUMBER = re.compile(r"[0-9]{1,4}(\.[0-9]{1,6})?")


class _Name(NamedTuple):
    """A name's parts: what kind of codec, its arguments, whether decoded rows get their norm back."""

    family: str
    arguments: tuple[str, ...]
    lifted: bool = False

    def __str__(self) -> str:
        return ":".join([self.family, *self.arguments, *(["lifted"] * self.lifted)])


def codec_name(text: str) -> str:
    """The canonical spelling of a codec's name. Raises RequestError (``unknown_codec``): there is no such codec."""
    return str(_parse(text))


def family(name: str) -> str:
    """What a codec is without its numbers: ``top`` of ``top:0.1:sign``."""
    return name.partition(":")[0]


def codec(text: str) -> Codec:
    """The codec of this name. Raises RequestError (``unknown_codec``)."""
    name = _parse(text)
    if not name.lifted:
        return _MAKERS[name.family](name)
    from shared.updates.lifted import Lifted  # as the makers below

    return Lifted(str(name), _MAKERS[name.family](name._replace(lifted=False)))


def warm_up(name: str, number: int, rounds: int, first: float = 0.25) -> str:
    """The codec of a site's round ``number`` (its first is 1), where it sends a larger share in the first ``rounds``
    than that of ``name``: from ``first`` on by the same factor each time (Lin et al. 2018, section 3.3). A codec
    other than ``top`` is the same in all rounds. Raises RequestError (``unknown_codec``)."""
    parsed = _parse(name)
    if parsed.family != "top" or number > rounds:
        return str(parsed)
    last = float(parsed.arguments[0])
    share = max(last, first * (last / first) ** ((number - 1) / rounds))
    return str(parsed._replace(arguments=(_plain(share), *parsed.arguments[1:])))


def _parse(text: str) -> _Name:
    kind, *arguments = text.split(":") if len(text) <= MAX_NAME else [""]
    lifted = arguments[-1:] == ["lifted"] and kind in LIFTABLE
    if kind not in _ARGUMENTS or (checked := _ARGUMENTS[kind](arguments[:-1] if lifted else arguments)) is None:
        raise RequestError(f"no such codec: {text[:MAX_NAME]!r}; there are {KNOWN}", code="unknown_codec")
    return _Name(kind, checked, lifted)


def _none(arguments: list[str]) -> tuple[str, ...] | None:
    return None if arguments else ()


def _clipped(arguments: list[str]) -> tuple[str, ...] | None:
    return tuple(arguments) if arguments in ([], ["clipped"]) else None


def _step(arguments: list[str]) -> tuple[str, ...] | None:
    return _numbers(arguments, 0.05, 8)


def _top(arguments: list[str]) -> tuple[str, ...] | None:
    share = _numbers(arguments[:1], 1e-6, 1)
    return (*share, *arguments[1:]) if share and arguments[1:] in (["sign"], ["int4"], ["int8"]) else None


def _rank(arguments: list[str]) -> tuple[str, ...] | None:
    rank = _numbers(arguments, 1, 128)
    return rank if rank and rank[0].isdigit() else None


def _numbers(arguments: list[str], least: float, most: float) -> tuple[str, ...] | None:
    """The one number there is, in its canonical spelling."""
    if len(arguments) != 1 or not _NUMBER.fullmatch(arguments[0]) or not least <= float(arguments[0]) <= most:
        return None
    return (_plain(float(arguments[0])),)


def _plain(number: float) -> str:
    return f"{number:.6f}".rstrip("0").rstrip(".")


_ARGUMENTS: Mapping[str, Callable[[list[str]], tuple[str, ...] | None]] = {
    "fp32": _none,
    "bf16": _none,
    "int8": _none,
    "int4": _clipped,
    "ternary": _none,
    "sign": _none,
    "step": _step,
    "top": _top,
    "lowrank": _rank,
}
LIFTABLE = frozenset({"ternary", "sign", "step", "top"})
KNOWN = (
    "fp32, bf16, int8, int4, int4:clipped, ternary, sign, step:<RMS>, top:<share>:<sign|int4|int8>, lowrank:<rank>; "
    "ternary, sign, step and top also with :lifted"
)


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


def _steps(name: _Name) -> Codec:
    from shared.updates.steps import Step

    return Step(str(name), float(name.arguments[0]))


def _largest(name: _Name) -> Codec:
    from shared.updates.top import Top

    share, values = name.arguments
    return Top(str(name), float(share), codec(values))


def _low_rank(name: _Name) -> Codec:
    from shared.updates.lowrank import LowRank

    return LowRank(str(name), int(name.arguments[0]), codec(FACTORS), codec("int4"))


FACTORS = "step:0.25"
"""How factors of low rank are written: what that loses is nothing beside what the rank does."""

_MAKERS: Mapping[str, Callable[[_Name], Codec]] = {
    "fp32": _planes,
    "bf16": _planes,
    "int8": _blocks,
    "int4": _blocks,
    "ternary": _ternary,
    "sign": _sign,
    "step": _steps,
    "top": _largest,
    "lowrank": _low_rank,
}
