"""Conditional requests and byte ranges, by RFC 9110 §13 and §14: pure, and the only place for both.

Where we are stricter than the RFC, and why:

* A malformed ``bytes=`` range may be ignored (§14.2). We answer 416, also where it is one of several: a client
  that resumes and mistypes would otherwise get the whole of a file of gigabytes.
* Several ranges may be answered as multipart (§14.6). We send the whole for a few, and 416 for many or
  overlapping ones (§17.15): nobody fetches models that way, and amplification is the only other use.
* We keep no Last-Modified: the ETag is the SHA-256 of the content, so a date never says more than it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shared.errors import RequestError
from shared.layout import Span

MAX_RANGES = 8
_RANGE = re.compile(r"([0-9]{0,19})-([0-9]{0,19})")
_ENTITY_TAG = re.compile(r'\s*(W/)?"([\x21\x23-\x7e\x80-\xff]*)"\s*')


@dataclass(frozen=True, slots=True)
class Whole:
    """200: all of it."""


@dataclass(frozen=True, slots=True)
class Partial:
    """206: this span."""

    span: Span


@dataclass(frozen=True, slots=True)
class NotModified:
    """304: the client has it."""


Decision = Whole | Partial | NotModified


@dataclass(frozen=True, slots=True)
class Conditions:
    """The fields of a request that decide what is sent. Each holds every line of that name.

    Kept apart from any HTTP library, so that all tiers and both ends can use it.
    """

    method: str
    range: Sequence[str] = ()
    if_range: Sequence[str] = ()
    if_match: Sequence[str] = ()
    if_none_match: Sequence[str] = ()


def evaluate(conditions: Conditions, etag: str, size: int | None) -> Decision:
    """What to send of a representation with this strong ``etag`` (without quotes) and ``size`` in bytes.

    ``size`` None: not known yet; ranges are then left for a second call.
    Order as in RFC 9110 §13.2.2. Raises RequestError (412, 416, or 400 for two Range lines).
    """
    if conditions.if_match and not _matches(conditions.if_match, etag, weak=False):
        raise RequestError(code="precondition_failed")  # §13.1.1: strong comparison
    if conditions.if_none_match and _matches(conditions.if_none_match, etag, weak=True):
        return NotModified()  # §13.1.2: weak comparison; comes before Range (§13.2.2 step 5)
    if conditions.method != "GET" or not conditions.range or size is None:
        return Whole()  # §14.2: Range means something for GET only
    if len(conditions.range) > 1:
        raise RequestError("two Range fields")
    if conditions.if_range and not _same(conditions.if_range[-1], etag):
        return Whole()  # §13.1.5: strong comparison; a date never matches, we keep none
    span = _parse(conditions.range[0], size)
    return Partial(span) if span else Whole()


def _parse(value: str, size: int) -> Span | None:
    """The one span that a Range field asks for; None where the field is to be ignored."""
    unit, equals, ranges = value.partition("=")
    if not equals or unit.strip(" \t").lower() != "bytes":
        return None  # §14.2: an unknown range unit MUST be ignored
    specs = [spec.strip(" \t") for spec in ranges.split(",")]
    if len(specs) > MAX_RANGES:
        raise _unsatisfiable(size)
    spans = [_parse_one(spec, size) for spec in specs]
    if len(spans) == 1:
        return spans[0]
    if sum(1 for _ in _overlaps(spans)) > 2:
        raise _unsatisfiable(size)
    return None


def _parse_one(spec: str, size: int) -> Span:
    """One range-spec (§14.1.1) clamped to ``size``."""
    match = _RANGE.fullmatch(spec)
    if not match:
        raise _unsatisfiable(size)
    first, last = match.groups()
    if first:  # int-range; a last position past the end means the end (§14.1.2)
        start = int(first)
        stop = min(int(last) + 1, size) if last else size
        if start >= size or (last and int(last) < start):
            raise _unsatisfiable(size)
        return Span(start, stop)
    if last and int(last) and size:  # suffix-range; longer than the whole means the whole
        return Span(max(0, size - int(last)), size)
    raise _unsatisfiable(size)


def _overlaps(spans: Sequence[Span]) -> Iterator[Span]:
    """Spans that start before an earlier one (in byte order) ends, and those that they overlap."""
    reach, counted = -1, False
    previous: Span | None = None
    for span in sorted(spans, key=lambda s: s.start):
        if span.start < reach and previous is not None:
            if not counted:
                yield previous
            yield span
            counted = True
        else:
            counted = False
        reach, previous = max(reach, span.stop), span


def _unsatisfiable(size: int) -> RequestError:
    """§15.5.17: 416 carries the size, so that the client can ask again."""
    return RequestError(code="range_not_satisfiable", headers={"Content-Range": f"bytes */{size}"})


def _same(value: str, etag: str) -> bool:
    """Strong comparison of one entity tag (§8.8.3.2)."""
    match = _ENTITY_TAG.fullmatch(value)
    return bool(match and not match[1] and match[2] == etag)


def _matches(lines: Sequence[str], etag: str, *, weak: bool) -> bool:
    """Whether ``*`` or a list of entity tags names ``etag``. A malformed list names nothing."""
    text = ",".join(lines).strip()
    if text == "*":
        return True
    position, found = 0, False
    while position < len(text):
        if text[position] in ", \t":  # empty members of a list are skipped (§5.6.1.2)
            position += 1
            continue
        match = _ENTITY_TAG.match(text, position)
        if not match or (match.end() < len(text) and text[match.end()] != ","):
            return False
        found = found or (match[2] == etag and (weak or not match[1]))
        position = match.end()
    return found
