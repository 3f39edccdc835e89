"""Making an update: what was trained, as the difference from the base revision, with what earlier updates left out.

It goes through by segments, from files that are mapped to a file, so that a model of any size needs little memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, BinaryIO

from nearshard.federated.state import FEEDBACK, UPDATE, State
from nearshard.federated.values import Values, of_file
from shared.errors import RequestError
from shared.federated import accepts
from shared.tensorfile import TensorEntry, make_header
from shared.updates.codecs import codec, warm_up
from shared.updates.document import Written, write_update
from shared.updates.segments import Segment, segments

if TYPE_CHECKING:  # it takes long to import, and the command has other words
    from nearshard.federated.values import Floats

Shapes = Mapping[str, tuple[int, ...]]
DENSE = ("step:0.5", "int4", "int8", "bf16", "fp32")
DEFAULT: Mapping[str, Sequence[str]] = {"*lora_*": ("int4", *DENSE), "*": ("sign", *DENSE)}
"""Codecs by globs of tensors' names, where feedback is kept: of adapters, of all else. The first that is accepted."""
ONE_SHOT: Mapping[str, Sequence[str]] = {"*": DENSE}
"""The same where it is not: what is left out is lost."""
LEFT, VELOCITY = "left/", "velocity/"
"""Of names in a file of feedback, before those of tensors."""
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


@dataclass(frozen=True)
class Manner:
    """How updates are written."""

    codec: str = ""
    """Name of the codec; by default the one that suits the tensors."""
    feedback: bool = True
    """Whether what it leaves out is kept for the next update."""
    momentum: float = 0.0
    """Of what is kept, from 0 to below 1."""
    warm_up: int = 0
    """Updates of this site, its first ones, in which a ``top`` codec sends a larger share."""

    def __post_init__(self) -> None:
        """Raises RequestError."""
        if not 0 <= self.momentum < 1 or self.warm_up < 0 or (self.momentum and not self.feedback):
            raise RequestError("a momentum is from 0 to below 1, and of feedback; a warm-up is a number of updates")


def choose_codecs(manner: Manner, accepted: tuple[str, ...], number: int = 1) -> Mapping[str, str]:
    """Names of codecs by globs of tensors' names, for a site's update of this number. Raises RequestError where it is
    none, or none that the round accepts."""
    wanted = {"*": (manner.codec,)} if manner.codec else DEFAULT if manner.feedback else ONE_SHOT
    chosen = {}
    for glob, names in wanted.items():
        names = [warm_up(name, number, manner.warm_up) for name in names]
        found = next((name for name in names if accepts(accepted, name)), None)
        if found is None:
            raise RequestError(
                f"the round does not accept the codec {names[0]}, but {', '.join(accepted)}: name one of these",
                code="unknown_codec",
            )
        chosen[glob] = found
    return chosen


def make_update(
    state: State,
    shapes: Shapes,
    base: Mapping[str, Values],
    trained: Mapping[str, Values],
    codecs: Mapping[str, str],
    *,
    feedback: bool,
    momentum: float = 0.0,
) -> Made:
    """Write ``base - trained`` for these tensors, and what the codecs leave out of it, into the site's folder.
    ``momentum``: of what waits for its turn (``shared.updates.feedback``). Raises NonFinite, RequestError, DiskError.
    """
    chosen = {glob: codec(name) for glob, name in codecs.items()}

    def difference(name: str, segment: Segment) -> Floats:
        import numpy as np

        run = segment.first, segment.count
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused with its tensor's name
            values = base[name].run(*run) - trained[name].run(*run)
        return values.reshape(segment.rows, segment.columns)

    with state.writing(UPDATE) as (update, file):
        if feedback:
            with state.writing(FEEDBACK) as (left, into):
                before = of_file(state.path(state.kept.feedback)) if state.kept.feedback else {}
                making = _Feedback(into, shapes, before, momentum)
                written = write_update(file, shapes, partial(making.read, difference), chosen, making.keep)
        else:
            left, written = state.kept.feedback, write_update(file, shapes, difference, chosen)
    used = tuple(dict.fromkeys(sent.codec for sent in written.tensors.values()))
    return Made(written, update, left, used, WIDTH * sum(map(math.prod, shapes.values())))


class _Feedback:
    """What is added to an update's segments, and a new file of what they leave out: ``left/<tensor>``, and with
    momentum ``velocity/<tensor>``. Tensors that are not sent now keep what they have."""

    def __init__(self, file: BinaryIO, shapes: Shapes, before: Mapping[str, Values], momentum: float) -> None:
        self._file, self._before, self._momentum = file, before, momentum
        self._velocity: Floats | None = None
        """Of the segment that was read last."""
        kinds = (LEFT, VELOCITY) if momentum else (LEFT,)
        new = {kind + name: shape for kind in kinds for name, shape in shapes.items()}
        old = {key: values for key, values in before.items() if key.partition("/")[2] not in shapes}
        header, self._places = _layout({**new, **{key: values.shape for key, values in old.items()}})
        file.write(header)
        for key, values in old.items():
            for segment in segments(values.shape):
                self._put(key, segment, values.run(segment.first, segment.count))

    def read(self, difference: Callable[[str, Segment], Floats], name: str, segment: Segment) -> Floats:
        """What is sent of a segment."""
        import numpy as np  # takes long to import

        from shared.updates.feedback import compensated

        update = difference(name, segment)
        left, velocity = (self._part(kind + name, segment, update) for kind in (LEFT, VELOCITY))
        values, self._velocity = compensated(
            update, np.zeros_like(update) if left is None else left, velocity, self._momentum
        )
        return values

    def keep(self, name: str, segment: Segment, values: Floats, decoded: Floats) -> None:
        """What is left of it."""
        from shared.updates.feedback import settled

        left, velocity = settled(values, decoded, self._velocity)
        self._put(LEFT + name, segment, left)
        if velocity is not None:
            self._put(VELOCITY + name, segment, velocity)

    def _part(self, key: str, segment: Segment, like: Floats) -> Floats | None:
        """What was kept of a segment; nothing where the tensor has another size by now."""
        values = self._before.get(key)
        if values is None or values.shape != self._places.get(key, (0, values.shape))[1]:
            return None
        return values.run(segment.first, segment.count).reshape(like.shape)

    def _put(self, key: str, segment: Segment, values: Floats) -> None:
        self._file.seek(self._places[key][0] + WIDTH * segment.first)
        self._file.write(values.astype("<f4").tobytes())


def _layout(shapes: Shapes) -> tuple[bytes, Mapping[str, tuple[int, tuple[int, ...]]]]:
    """The beginning of a file of float32 tensors; where each has its bytes in it, and its shape."""
    at, entries = 0, []
    for name, shape in shapes.items():
        size = WIDTH * math.prod(shape)
        entries.append((name, TensorEntry(name, "F32", tuple(shape), at, at + size)))
        at += size
    header = make_header(entries, {})
    return header, {name: (len(header) + entry.begin, entry.shape) for name, entry in entries}
