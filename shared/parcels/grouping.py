"""Differences in the order of how much each is expected to change, so that those that are alike share a table. Pure.

What both sides know tells: a scale for each row, the base's exponents, and hints. A row that has not changed has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from shared.parcels.kinds import Bytes, Integers, Kind, exponent_bias, exponents, floats, ordered, unordered

GROUP = 2048
"""Elements that are a group, at least: each has a table of up to a kilobyte."""
GROUPS = 24
"""Groups that there are, about, of tensors as they are trained."""
HINTS, DOWN = 4, 128
"""A hint at what rounding took away of where an element was expected: how many of as many parts of half a unit in the
last place, and DOWN with it if it was rounded up, so that a change downwards is the likelier one."""
NONE = -128
"""The scale of a row that has not changed."""
_BLOCK = 1 << 15
_LEAST, _MOST = -32, 144
"""Keys: halves of the binary logarithm of how much an element is expected to change, in units in its last place."""
_HINTED = range(-12 - _LEAST, 6 - _LEAST)
"""Keys of elements that hints say more about: each has a key for each hint, from the first that is free on."""
_FREE = _MOST - _LEAST + 1

Rows = npt.NDArray[np.int64]
Scales = npt.NDArray[np.int8]


def groupable(kind: Kind) -> bool:
    """Whether elements can be grouped: floats, and quantised ones."""
    return kind.fraction is not None or kind.width == 1


def gathered(
    target: Bytes, base: Bytes, kind: Kind, rows: Rows, hints: Bytes | None
) -> tuple[Scales, Integers, Sequence[int]]:
    """The scales of rows (``rows``: elements of each), the differences in their order, and how many are alike."""
    values = ordered(target, kind) - ordered(base, kind)
    scales = _scales(values, target, base, kind, rows)
    changed = _changed(scales, rows)
    if changed is not None:
        values, base = values[changed], _chosen(base, kind, changed)
        hints = None if hints is None else hints[changed]
        rows = rows[scales != NONE]
    order = _Order(_keys(base, kind, scales[scales != NONE], rows, hints))
    return scales, order.gathered(_turned(values, hints)), order.groups


def scattered(
    scales: Scales, unpack: Callable[[int], Integers], base: Bytes, kind: Kind, rows: Rows, hints: Bytes | None
) -> Bytes:
    """The bytes of the target. ``unpack`` gives so many differences as there are, in their order."""
    changed = _changed(scales, rows)
    if changed is None:
        order = _Order(_keys(base, kind, scales, rows, hints))
        return order.scattered(unpack(sum(order.groups)), base, kind, hints)
    target = base.view(kind.integer).copy()
    still = scales == NONE
    hints = None if hints is None else hints[changed]
    part = scattered(scales[~still], unpack, _chosen(base, kind, changed), kind, rows[~still], hints)
    target[changed] = part.view(kind.integer)
    return target.view(np.uint8)


def _changed(scales: Scales, rows: Rows) -> npt.NDArray[np.bool_] | None:
    """Which elements are in rows that have changed; None: all are."""
    return np.repeat(scales != NONE, rows) if NONE in scales else None


def _chosen(data: Bytes, kind: Kind, chosen: npt.NDArray[np.bool_]) -> Bytes:
    return data.view(kind.integer)[chosen].view(np.uint8)


def _turned(values: Integers, hints: Bytes | None) -> Integers:
    """Differences, those that are expected to be negative turned around; its own inverse. In place."""
    if hints is not None and hints.any():
        signs = (hints.view(np.int8) >> 7).astype(values.dtype)
        values ^= signs
        values -= signs
    return values


def _scales(values: Integers, target: Bytes, base: Bytes, kind: Kind, rows: Rows) -> Scales:
    """For each row the logarithm of how much its elements have changed on average, in halves; NONE: not at all.

    It is advice, so that it may be rounded otherwise elsewhere: who decodes gets it sent.
    """
    starts = np.cumsum(rows) - rows
    with np.errstate(all="ignore"):
        changes = floats(target, kind)
        changes -= floats(base, kind)
        np.abs(changes, out=changes)
        changes[~np.isfinite(changes)] = 0
        means = np.add.reduceat(changes, starts) / rows
    parts, logarithms = np.frexp(means)
    halves = 2 * logarithms - (parts < np.sqrt(0.5))
    halves = np.where((means > 0) & np.isfinite(means), np.clip(halves, NONE + 1, 127), NONE + 1)
    still = ~np.logical_or.reduceat(values != 0, starts)
    return np.where(still, NONE, halves).astype(np.int8)


def _keys(base: Bytes, kind: Kind, scales: Scales, rows: Rows, hints: Bytes | None) -> Bytes:
    """How large each element's change is expected to be: its row's scale, in units of the base's last place."""
    scale = np.repeat(scales, rows)
    keys = np.empty(len(scale), np.uint8)
    for place in _blocks(len(keys)):
        known = base[place.start * kind.width : place.stop * kind.width]
        keys[place] = _keys_of(known, kind, scale[place], None if hints is None else hints[place])
    return keys


def _blocks(count: int) -> Iterator[slice]:
    """What is looked at together, so that it stays in a processor's cache."""
    return (slice(start, min(count, start + _BLOCK)) for start in range(0, count, _BLOCK))


def _keys_of(base: Bytes, kind: Kind, scales: Scales, hints: Bytes | None) -> Bytes:
    wide = scales.astype(np.int16)
    wide += np.int16((0 if kind.fraction is None else 2 * exponent_bias(kind)) - _LEAST)
    if kind.fraction is not None:
        fields = exponents(base, kind)
        wide -= fields
        wide -= fields
    np.clip(wide, 0, _FREE - 1, out=wide)
    keys = wide.astype(np.uint8)
    if hints is not None and hints.any():
        # Bytes that wrap around, and no branches: so it is done many at a time.
        place = keys - np.uint8(_HINTED.start)
        hinted = (hints & np.uint8(HINTS - 1)) + (place * np.uint8(HINTS) + np.uint8(_FREE)) - keys
        hinted *= (place < np.uint8(len(_HINTED))).view(np.uint8)
        keys += hinted
    return keys


class _Order:
    """Elements in the order of their groups and, of one group, of their places."""

    def __init__(self, keys: Bytes) -> None:
        self._keys = keys
        blocks = [np.bincount(keys[place], minlength=256) for place in _blocks(len(keys))]
        counts = np.array(blocks, np.int64).reshape(-1, 256)
        self._group, starts = _merged(counts.sum(axis=0).tolist())
        self._counts = np.add.reduceat(counts, starts, axis=1)
        self.groups: list[int] = [count for count in self._counts.sum(axis=0).tolist() if count]

    def gathered(self, values: Integers) -> Integers:
        """``values`` in this order."""
        found = np.empty_like(values)
        for place, order, spans in self._sorted():
            block = values[place].take(order)
            for here, among in spans:
                found[among] = block[here]
        return found

    def scattered(self, values: Integers, base: Bytes, kind: Kind, hints: Bytes | None) -> Bytes:
        """The bytes that ``values``, the differences in this order, make of ``base``."""
        target = np.empty(len(base), np.uint8)
        for place, order, spans in self._sorted():
            block = np.empty(len(order), values.dtype)
            block[order] = np.concatenate([values[among] for _, among in spans])
            _turned(block, None if hints is None else hints[place])
            known = slice(place.start * kind.width, place.stop * kind.width)
            block += ordered(base[known], kind)
            target[known] = unordered(block, kind)
        return target

    def _sorted(self) -> Iterator[tuple[slice, npt.NDArray[np.intp], list[tuple[slice, slice]]]]:
        """Elements that are sorted at a time: where they are, their order, and for each group where those of it are in
        the sorted block and among all."""
        totals = self._counts.sum(axis=0)
        following = (np.cumsum(totals) - totals).tolist()
        for place, counts in zip(_blocks(len(self._keys)), self._counts.tolist(), strict=True):
            start, spans = 0, []
            for group, count in enumerate(counts):
                if count:
                    spans.append((slice(start, start + count), slice(following[group], following[group] + count)))
                    following[group] += count
                    start += count
            yield place, np.argsort(self._group.take(self._keys[place]), kind="stable"), spans


def _merged(counts: Sequence[int]) -> tuple[Bytes, list[int]]:
    """The group of each key, and the first key of each group: keys of few elements are one with the next ones."""
    groups, starts, held = np.zeros(len(counts), np.uint8), [0], 0
    for key, count in enumerate(counts):
        if held >= GROUP:
            starts.append(key)
            held = 0
        groups[key] = len(starts) - 1
        held += count
    return groups, starts
