"""Making an update: what was trained, as the difference from the base revision, with what earlier updates left out.

It goes through by segments, from files that are mapped to a file, so that a model of any size needs little memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from nearshard.federated.state import FEEDBACK, UPDATE, State
from nearshard.federated.values import Values, of_file
from shared.errors import RequestError
from shared.federated import accepts
from shared.tensorfile import TensorEntry, make_header
from shared.updates.codecs import codec
from shared.updates.document import Written, write_update
from shared.updates.segments import Segment, segments

if TYPE_CHECKING:  # it takes long to import, and the command has other words
    from nearshard.federated.values import Floats

Shapes = Mapping[str, tuple[int, ...]]
DEFAULT: Mapping[str, str] = {"*lora_*": "int4", "*": "sign"}
"""Codecs by globs of tensors' names, where feedback is kept: of adapters, of all else."""
ONE_SHOT: Mapping[str, str] = {"*": "step:0.5"}
"""The same where it is not: what is left out is lost."""
WIDTH = 4
"""Bytes of a float32."""


@dataclass(frozen=True)
class Made:
    """An update in the site's folder."""

    written: Written
    update: str
    """Name of its file."""
    feedback: str
    """Name of the file with what it left out; empty where that is not kept."""
    codecs: tuple[str, ...]
    full: int
    """Bytes of the same values as float32."""


def choose_codecs(given: str, accepted: tuple[str, ...], *, feedback: bool) -> Mapping[str, str]:
    """Names of codecs by globs of tensors' names: the one that is given, or the defaults. Raises RequestError where it
    is none, or none that the round accepts."""
    chosen = {"*": given} if given else DEFAULT if feedback else ONE_SHOT
    for name in chosen.values():
        codec(name)
        if not accepts(accepted, name):
            raise RequestError(
                f"the round does not accept the codec {name}, but {', '.join(accepted)}: name one of these",
                code="unknown_codec",
            )
    return chosen


def make_update(
    state: State,
    shapes: Shapes,
    base: Mapping[str, Values],
    trained: Mapping[str, Values],
    codecs: Mapping[str, str],
    *,
    feedback: bool,
) -> Made:
    """Write ``base - trained`` for these tensors, and what the codecs leave out of it, into the site's folder. Raises
    NonFinite, RequestError, DiskError."""
    kept = of_file(state.path(state.kept.feedback)) if feedback and state.kept.feedback else {}
    kept = {name: values for name, values in kept.items() if name not in shapes or values.shape == shapes[name]}

    def read(name: str, segment: Segment) -> Floats:
        import numpy as np

        run = segment.first, segment.count
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused with its tensor's name
            values = base[name].run(*run) - trained[name].run(*run)
            if name in kept:
                values += kept[name].run(*run)
        return values.reshape(segment.rows, segment.columns)

    chosen = {glob: codec(name) for glob, name in codecs.items()}
    with state.writing(UPDATE) as (update, file), _feedback(state, shapes, kept, wanted=feedback) as (left, keep):
        written = write_update(file, shapes, read, chosen, keep)
    used = tuple(dict.fromkeys(sent.codec for sent in written.tensors.values()))
    return Made(written, update, left, used, WIDTH * sum(map(math.prod, shapes.values())))


Keep = Callable[[str, Segment, "Floats", "Floats"], None]


@contextmanager
def _feedback(
    state: State, shapes: Shapes, kept: Mapping[str, Values], *, wanted: bool
) -> Iterator[tuple[str, Keep | None]]:
    """A new file of feedback and what fills it; tensors that are not sent now keep what they have."""
    if not wanted:
        yield state.kept.feedback, None
        return
    others = {name: values for name, values in kept.items() if name not in shapes}
    with state.writing(FEEDBACK) as (name, file):
        file.write(_header({**shapes, **{other: values.shape for other, values in others.items()}}))

        def keep(_: str, __: Segment, values: Floats, decoded: Floats) -> None:
            file.write((values - decoded).astype("<f4").tobytes())

        yield name, keep
        for values in others.values():
            _copy(values, file)


def _header(shapes: Shapes) -> bytes:
    at, entries = 0, []
    for name, shape in shapes.items():
        size = WIDTH * math.prod(shape)
        entries.append((name, TensorEntry(name, "F32", tuple(shape), at, at + size)))
        at += size
    return make_header(entries, {})


def _copy(values: Values, file: BinaryIO) -> None:
    for segment in segments(values.shape):
        file.write(values.run(segment.first, segment.count).astype("<f4").tobytes())
