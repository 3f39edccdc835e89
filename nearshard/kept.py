"""The last view of the network that a client had: in memory, and in a file for the next process.

``<cache>/nearshard/rings/<hash of the routers and the region>.json``, written beside it and renamed. What is in such a
file is checked like what comes over the network, and counts for as little: it says whom to ask.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from shared.codec import decode_json, encode_json
from shared.errors import DecodeError, UpstreamError
from shared.files import home, replace_file
from shared.view import MAX_VIEW, View, parse

MAX_FILE = MAX_VIEW + 4096
MAX_AGE = 7 * 86_400.0
"""Seconds that a file is good for: later its addresses may be somebody else's, who would be asked what refs mean."""
MAX_FILES = 16
_ETAG = re.compile(r'"[0-9a-f]{64}"')


@dataclass(frozen=True)
class Stored:
    """A view, and when and from whom it came."""

    view: View
    etag: str
    """With its quotes, for If-None-Match; may be empty."""
    source: str
    """The router's base URL."""
    at: float
    """Seconds since 1970 when it was last confirmed."""


class Kept:
    """The last view of a set of routers. ``load`` and ``save`` block on the disk; trouble there is never an error."""

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._stored: Stored | None = None

    def load(self, now: float) -> Stored | None:
        """What there is, where it is not too old at ``now`` (seconds since 1970)."""
        if self._stored is None and self._file is not None:
            with suppress(OSError, DecodeError, UpstreamError, KeyError, TypeError, ValueError):
                self._stored = _decode(_read(self._file))
        if self._stored and now - self._stored.at > MAX_AGE:
            self._stored = None
        return self._stored

    def save(self, stored: Stored) -> None:
        """Keep this."""
        self._stored = stored
        if self._file is not None:
            with suppress(OSError):
                _write(self._file, _encode(stored))


def cache_file(routers: Sequence[str], region: str | None) -> Path:
    """Where the view of a client of these routers in this region is kept, in the user's cache directory."""
    key = hashlib.sha256("\n".join([*routers, region or ""]).encode()).hexdigest()
    return home("XDG_CACHE_HOME", "~/.cache") / "rings" / f"{key[:32]}.json"


def _encode(stored: Stored) -> bytes:
    record = {"view": stored.view.record(), "etag": stored.etag, "source": stored.source, "at": stored.at}
    return encode_json(record)


def _decode(data: bytes) -> Stored:
    document = decode_json(data, MAX_FILE)
    etag, source, at = document["etag"], document["source"], document["at"]
    if not isinstance(source, str) or not isinstance(etag, str) or not (etag == "" or _ETAG.fullmatch(etag)):
        raise ValueError("not a view that was kept")
    return Stored(parse(document["view"]), etag, source, float(at))


def _read(file: Path) -> bytes:
    """Raises OSError, ValueError. Only a plain file of this user's, of a size that one has."""
    descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as opened:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_size > MAX_FILE:
            raise ValueError("not a view that was kept")
        return opened.read(MAX_FILE + 1)


def _write(file: Path, data: bytes) -> None:
    if len(data) > MAX_FILE:
        return
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    replace_file(file, data, mode=0o600)
    by_age = sorted(file.parent.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for old in by_age[MAX_FILES:]:
        old.unlink(missing_ok=True)
