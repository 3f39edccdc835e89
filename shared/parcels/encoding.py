"""A parcel from bytes and their base: the method for each run is chosen by what it makes of a sample. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from shared.parcel import Effort, Run
from shared.parcels import decay, fitting, grouping, lowrank, methods, streams
from shared.parcels.container import MAX_PIECES, Contents, Part, Piece, write
from shared.parcels.kinds import BYTES, Bytes, Kind, kind_of
from shared.parcels.methods import Method, Shape

SMALL = 1 << 16
"""Bytes: shorter runs are looked at together."""
BLOCK = 1 << 15
BLOCKS = 4
"""A sample: so many blocks of so many bytes of a run."""
POOLED = 16
"""Blocks in a sample of all runs that are written by the differences."""
TABLE = 400
"""Bytes that the tables of a group take, about: in a sample they count for more than they are."""
MATRIX = 64
"""Rows and columns of a matrix whose change is looked at for a low rank."""
LEVELS = {Effort.FAST: 1, Effort.DEFAULT: 3, Effort.MOST: 12}
"""Of zstd."""


@dataclass(frozen=True, slots=True)
class _Stretch:
    """A part of a run on its way: its elements, those of its base, and where they are in their tensor. With steps of
    decay or factors, the base is what these make of it."""

    target: Bytes
    base: Bytes | None
    kind: Kind
    shape: Shape
    decay: tuple[decay.Run, ...] = ()
    factors: lowrank.Factors | None = None
    hints: Bytes | None = None

    def cut(self, first: int, count: int) -> _Stretch:
        """Some of the elements."""
        place = slice(first * self.kind.width, (first + count) * self.kind.width)
        shape = Shape(count, self.shape.columns, self.shape.first + first)
        base = None if self.base is None else self.base[place]
        hints = None if self.hints is None else self.hints[first : first + count]
        return _Stretch(self.target[place], base, self.kind, shape, self.decay, None, hints)

    def unbased(self) -> _Stretch:
        """The same without its base."""
        return _Stretch(self.target, None, self.kind, self.shape)


@dataclass(frozen=True, slots=True)
class _Choice:
    """How stretches are written: those of the same choice together."""

    method: Method
    kind: Kind
    based: bool


def encode(target: memoryview, base: memoryview, runs: Sequence[Run], effort: Effort) -> bytes:
    """The parcel of ``target``."""
    stretches = list(_stretches(target, base, runs, effort))
    if len(stretches) > MAX_PIECES:
        stretches = [_Stretch(np.frombuffer(target, np.uint8), None, BYTES, Shape(target.nbytes))]
    choices = _choices(stretches, effort)
    members: dict[_Choice, list[_Stretch]] = {}
    for choice, stretch in zip(choices, stretches, strict=True):
        members.setdefault(choice, []).append(stretch)
    numbers = {choice: number for number, choice in enumerate(members)}
    parts = [_part(choice, found, LEVELS[effort]) for choice, found in members.items()]
    pieces = _pieces(stretches, parts, [numbers[choice] for choice in choices])
    parcel = write(Contents(base.nbytes, parts, pieces))
    plain = _plain(target, base.nbytes)
    return parcel if len(parcel) < len(plain) else plain


def _plain(target: memoryview, base: int) -> bytes:
    size = target.nbytes
    parts, pieces = ([Part(Method.RAW, BYTES, False, [target])], [Piece(0, size)]) if size else ([], [])
    return write(Contents(base, parts, pieces))


def _stretches(target: memoryview, base: memoryview, runs: Sequence[Run], effort: Effort) -> Iterator[_Stretch]:
    """What is written: the runs; where a matrix is moved by factors, what is before and after its whole rows apart."""
    wanted, origin = np.frombuffer(target, np.uint8), np.frombuffer(base, np.uint8)
    at = below = 0
    for run in runs:
        data, old = wanted[at : at + run.length], origin[below : below + run.length] if run.based else None
        at += run.length
        below += run.length if run.based else 0
        if not run.length:
            continue
        kind = kind_of(run.dtype, run.length)
        shape = Shape(run.length // kind.width, max(1, run.columns), run.first)
        yield from _predicted(_Stretch(data, old, kind, shape), effort)
    if at != target.nbytes or below != base.nbytes:
        raise ValueError("runs that are not all of the bytes")


def _predicted(whole: _Stretch, effort: Effort) -> Iterable[_Stretch]:
    """A stretch, or the three parts of one whose base is moved to where training seems to have moved it."""
    columns, count = whole.shape.columns, whole.shape.count
    head = -whole.shape.first % columns
    rows = max(0, count - head) // columns
    if whole.base is None or effort is Effort.FAST or min(rows, columns) < MATRIX:
        return [whole]
    middle = whole.cut(head, rows * columns)
    assert middle.base is not None
    if runs := decay.found(middle.target, middle.base, whole.kind, columns):
        whole = replace(whole, base=decay.decayed(whole.base, whole.kind, runs), decay=runs)
        middle = whole.cut(head, rows * columns)
    moved = _moved(middle, effort)
    if moved is None:
        return [whole]
    tail = head + rows * columns
    cuts = [whole.cut(0, head), moved, whole.cut(tail, count - tail)]
    return [part for part in cuts if part.shape.count]


def _moved(matrix: _Stretch, effort: Effort) -> _Stretch | None:
    """A matrix upon its base and factors of low rank: of all of its change, or of what of it they save bytes for."""
    assert matrix.base is not None
    given = (matrix.target, matrix.base, matrix.kind, matrix.shape.columns)
    factors = lowrank.factored(*given) if effort is Effort.MOST or lowrank.looks_low(*given) else None
    for found in (factors, None):
        factors = found or fitting.fitted(*given)
        if factors is not None:
            base, hints = lowrank.move(matrix.base, matrix.kind, factors)
            moved = replace(matrix, base=base, factors=factors, hints=hints if hints.any() else None)
            if _worth(matrix, moved, factors):
                return moved
    return None


def _worth(matrix: _Stretch, moved: _Stretch, factors: lowrank.Factors) -> bool:
    """Whether the factors and what is left take fewer bytes than the change itself."""
    samples = _sample([matrix], 2 * BLOCKS), _sample([moved], 2 * BLOCKS)
    share = matrix.target.nbytes / sum(part.target.nbytes for part in samples[0])
    before, after = (_cost(Method.GROUPED, sample) for sample in samples)
    return len(streams.pack(factors.integers())) < (before - after) * share


def _choices(stretches: Sequence[_Stretch], effort: Effort) -> list[_Choice]:
    """How each stretch is written."""
    alone: dict[object, list[int]] = {}
    for number, stretch in enumerate(stretches):
        small = stretch.target.nbytes < SMALL and stretch.factors is None
        alone.setdefault((stretch.kind, stretch.base is None) if small else number, []).append(number)
    choices: dict[int, _Choice] = {}
    for numbers in alone.values():
        chosen = _chosen([stretches[number] for number in numbers], effort)
        choices |= dict.fromkeys(numbers, chosen)
    for choice in dict.fromkeys(choices.values()):
        if choice.method in (Method.PLANES, Method.PACKED) and choice.based and grouping.groupable(choice.kind):
            numbers = [number for number, found in choices.items() if found == choice]
            if effort is not Effort.FAST and _better_grouped(choice.method, [stretches[number] for number in numbers]):
                choices |= dict.fromkeys(numbers, replace(choice, method=Method.GROUPED))
    return [choices[number] for number in range(len(stretches))]


def _chosen(alike: Sequence[_Stretch], effort: Effort) -> _Choice:
    """The method that makes the least of a sample of stretches of one kind, all with a base or all without."""
    first = alike[0]
    if first.factors is not None:
        return _Choice(Method.PACKED, first.kind, True)
    sample = _sample(alike, BLOCKS)
    bare = [part.unbased() for part in sample]
    size = sum(part.target.nbytes for part in sample)
    costs = {_Choice(Method.RAW, BYTES, False): size}
    level = min(LEVELS[effort], LEVELS[Effort.DEFAULT])

    def consider(method: Method, parts: Sequence[_Stretch]) -> None:
        choice = _Choice(method, first.kind, parts[0].base is not None)
        costs[choice] = _cost(method, parts, level)

    if first.base is not None:
        consider(Method.PLANES, sample)
        if effort is not Effort.FAST:
            consider(Method.PACKED, sample)
    if min(costs.values()) > size / 2:  # the base may have nothing to do with it
        consider(Method.SQUEEZED, bare)
        if first.kind.width > 1:
            consider(Method.PLANES, bare)
        if effort is not Effort.FAST and first.kind is not BYTES:
            consider(Method.PACKED, bare)
    return min(costs, key=lambda choice: costs[choice])


def _better_grouped(method: Method, alike: Sequence[_Stretch]) -> bool:
    """Whether differences take fewer bytes in groups; by a sample, in which tables count for what they are in all."""
    sample = _sample(alike, POOLED)
    share = sum(part.target.nbytes for part in alike) / sum(part.target.nbytes for part in sample)
    (packed, few), (grouped, many) = (_measured(which, sample) for which in (method, Method.GROUPED))
    return (grouped - many) * share + many < (packed - few) * share + few


def _measured(method: Method, sample: Sequence[_Stretch]) -> tuple[int, int]:
    """What a sample takes, and how much of it is tables."""
    size = _cost(method, sample)
    groups = grouping.GROUPS if method is Method.GROUPED else 1
    return size, min(size, TABLE * groups)


def _sample(alike: Sequence[_Stretch], blocks: int) -> list[_Stretch]:
    """Up to so many blocks of the elements of stretches of one kind, evenly."""
    width = alike[0].kind.width
    count, block = sum(part.shape.count for part in alike), BLOCK // width
    if count <= blocks * block:
        return list(alike)
    wanted = [(count - block) * number // (blocks - 1) for number in range(blocks)]
    found, before = [], 0
    for part in alike:
        for start in wanted:
            first, last = max(start - before, 0), min(start + block - before, part.shape.count)
            if first < last:
                found.append(part.cut(first, last - first))
        before += part.shape.count
    return found


def _cost(method: Method, parts: Sequence[_Stretch], level: int = LEVELS[Effort.DEFAULT]) -> int:
    return sum(len(stream) for stream in _written(method, parts, level))


def _written(method: Method, parts: Sequence[_Stretch], level: int) -> list[bytes]:
    bases = [part.base for part in parts if part.base is not None]
    base = methods.together(bases) if bases else None
    hints = None
    if any(part.hints is not None for part in parts):
        hints = methods.together(
            [np.zeros(part.shape.count, np.uint8) if part.hints is None else part.hints for part in parts]
        )
    target, shapes = methods.together([part.target for part in parts]), [part.shape for part in parts]
    return methods.encode(method, target, base, parts[0].kind, shapes, level, hints)


def _part(choice: _Choice, members: Sequence[_Stretch], level: int) -> Part:
    if not choice.based:
        members = [part.unbased() for part in members]
    written = _written(choice.method, members, level)
    integers = [part.factors.integers() for part in members if part.factors is not None]
    if integers:
        written.append(streams.pack(np.concatenate(integers)))
    return Part(choice.method, choice.kind, choice.based, written)


def _pieces(stretches: Sequence[_Stretch], parts: Sequence[Part], numbers: Sequence[int]) -> list[Piece]:
    """The stretches as the header has them: neighbours in a part that does not ask for rows are one."""
    found: list[Piece] = []
    skipped = 0
    for stretch, number in zip(stretches, numbers, strict=True):
        length, part = stretch.target.nbytes, parts[number]
        if stretch.base is not None and not part.based:
            skipped += length
        gap = skipped if part.based else 0
        skipped -= gap
        if stretch.factors is not None or (part.based and (stretch.decay or part.method is Method.GROUPED)):
            found.append(_placed(Piece(number, length, gap), stretch))
        elif found and found[-1].part == number and not (found[-1].rank or found[-1].decay or gap):
            found[-1] = replace(found[-1], length=found[-1].length + length)
        else:
            found.append(Piece(number, length, gap))
    return found


def _placed(piece: Piece, stretch: _Stretch) -> Piece:
    shape, factors = stretch.shape, stretch.factors
    placed = replace(piece, columns=shape.columns, first=shape.first % shape.columns, decay=stretch.decay)
    return replace(placed, rank=factors.left.shape[1], shift=factors.shift) if factors is not None else placed
