"""Metalink 4 (RFC 5854): where a file can be had and what its bytes must be, for other people's downloaders. Pure.

The same input gives the same bytes, so that a document has a validator: no date and no generator is in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from xml.sax.saxutils import escape

from shared.digest import SIZE
from shared.layout import Layout

METALINK = "application/metalink4+xml"
SUFFIX = ".meta4"
"""What a metalink's own name ends in (RFC 5854 §5)."""


def build(name: str, layout: Layout, piece_length: int, urls: Sequence[str]) -> bytes:
    """The metalink of one file of ``layout``, hashed in pieces of ``piece_length`` bytes; ``urls`` best first."""
    return "\n".join([*_lines(name, layout, piece_length, urls), ""]).encode()


def _lines(name: str, layout: Layout, piece_length: int, urls: Sequence[str]) -> Iterator[str]:
    yield '<?xml version="1.0" encoding="UTF-8"?>'
    yield '<metalink xmlns="urn:ietf:params:xml:ns:metalink">'
    # RFC 5854 §4.1.2.1: a name must not lead out of the folder that it is put in; the last part never does.
    yield f'<file name="{_quoted(PurePosixPath(name).name)}">'
    yield f"<size>{layout.size}</size>"
    yield f'<hash type="sha-256">{layout.sha256}</hash>'
    if layout.pieces:
        yield f'<pieces length="{piece_length}" type="sha-256">'  # RFC 5854 §4.2.11: hashes in order
        yield from (f"<hash>{piece.hex()}</hash>" for piece in _hashes(layout.pieces))
        yield "</pieces>"
    for priority, url in enumerate(urls, 1):  # RFC 5854 §4.2.16.1: 1 is the best
        yield f'<url priority="{priority}">{escape(url)}</url>'
    yield "</file>"
    yield "</metalink>"


def _hashes(pieces: bytes) -> Iterable[bytes]:
    return (pieces[start : start + SIZE] for start in range(0, len(pieces), SIZE))


def _quoted(text: str) -> str:
    return escape(text, {'"': "&quot;"})
