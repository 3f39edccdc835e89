"""The hashes of a body while its bytes come by: of the whole, and of each piece. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from shared.layout import piece_count

Update = Callable[[bytes | memoryview], None]


class BodyHash:
    """SHA-256 of a body of ``size`` bytes and, where there are several, of its pieces of ``piece_length`` bytes."""

    def __init__(self, size: int, piece_length: int) -> None:
        self._whole = hashlib.sha256()
        self._piece_length = piece_length
        self._pieces = bytearray()
        self._piece = hashlib.sha256()
        self._room = piece_length
        """Bytes that the piece under way still takes."""
        self.updates: tuple[Update, ...] = (self._whole.update,)
        """Each is to be called with all of the body, in order; they need not wait for each other."""
        if piece_count(size, piece_length):
            self.updates += (self._update_pieces,)

    def update(self, data: bytes | memoryview) -> None:
        """The next bytes of the body."""
        for update in self.updates:
            update(data)

    @property
    def sha256(self) -> str:
        """64 hex digits, of all so far."""
        return self._whole.hexdigest()

    @property
    def pieces(self) -> bytes:
        """32 bytes for each piece so far; empty where the body is one piece."""
        begun = self._room < self._piece_length
        return bytes(self._pieces) + (self._piece.digest() if begun else b"")

    def _update_pieces(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            part, view = view[: self._room], view[self._room :]
            self._piece.update(part)
            self._room -= len(part)
            if not self._room:
                self._pieces += self._piece.digest()
                self._piece, self._room = hashlib.sha256(), self._piece_length
