"""Nonces that are signed to show that a request is of now. Pure but for what it remembers."""

from __future__ import annotations

from collections.abc import Callable

NONCE_TIME = 30.0
"""Seconds for which a nonce is given out; it is accepted for as long again."""


class Nonces:
    """One nonce for all who ask, changed every half minute: nothing is kept for anybody."""

    def __init__(self, now: Callable[[], float], token: Callable[[], str]) -> None:
        """``now`` gives seconds that only grow, ``token`` a random word of hex digits, at most 32."""
        self._now, self._token = now, token
        self._nonces = (token(), token())
        self._since = now()

    def current(self) -> str:
        """What is to be signed now."""
        age = self._now() - self._since
        if age >= NONCE_TIME:
            former = self._nonces[0] if age < 2 * NONCE_TIME else self._token()
            self._nonces, self._since = (self._token(), former), self._now()
        return self._nonces[0]

    def fresh(self, nonce: str) -> bool:
        """Whether this was given out within the last minute."""
        self.current()
        return nonce in self._nonces
