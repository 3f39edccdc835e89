"""Who is heard: the checks between a heartbeat and the membership. Pure but for what it remembers.

With an enrolment, everything is signed. A nonce of this router, which changes every half minute, makes a recorded
heartbeat useless after a minute at most, and at any other router; until then the order of heartbeats does: the
sequence of a boot only grows, and a boot that another one has followed does not come back.

Without one (development), whoever is on this machine may join with a loopback URL, signed or not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from shared.enrolment import (
    HEARTBEAT,
    LEAVE,
    Enrolled,
    Leave,
    Told,
    check_as_enrolled,
    check_proven,
    check_signature,
    is_loopback_address,
    parse_leave,
    parse_signature,
    parse_told,
)
from shared.errors import RequestError
from shared.nonces import NONCE_TIME, Nonces

_CHALLENGE = {"WWW-Authenticate": "Nearshard"}  # RFC 9110 §15.5.2: a 401 has one


@dataclass
class _Order:
    """What was heard last of a node."""

    boot: str
    sequence: int
    retired: dict[str, float] = field(default_factory=dict)
    """Boots before this one, with when each ended: for as long as a nonce that they signed may be accepted."""


class Admission:
    """``enrolled``: the nodes that may join, or None where there is no enrolment; it may be replaced at any time."""

    def __init__(
        self, enrolled: Mapping[str, Enrolled] | None, now: Callable[[], float], token: Callable[[], str]
    ) -> None:
        """``now`` gives seconds that only grow, ``token`` a random word of hex digits, at most 32."""
        self.enrolled = enrolled
        self._now = now
        self._nonces = Nonces(now, token)
        self._orders: dict[str, _Order] = {}

    @property
    def mode(self) -> str:
        """For people."""
        return "open on loopback" if self.enrolled is None else "enrolled"

    def nonce(self) -> str:
        """What a node is to sign with its next heartbeat."""
        return self._nonces.current()

    def heartbeat(self, node: str, body: bytes, signature: str | None, remote: str | None) -> Told:
        """What a node tells, proven. ``signature``: the field; ``remote``: the address that it came from.

        Raises RequestError: ``not_enrolled``, ``bad_signature``, ``stale_nonce`` (with the right one),
        ``stale_heartbeat``, ``not_as_enrolled``, ``bad_node``, ``bad_json``, ``too_large``.
        """
        if self.enrolled is None:
            told = parse_told(node, body)
            self._check_local(remote)
            check_proven(told, None)
        else:
            signed, known = self._check_signed(node, HEARTBEAT, body, signature)
            told = parse_told(node, body, signed)
            self._check_nonce(told.nonce)
            check_as_enrolled(told, known)
        self._follow(node, told.boot, told.sequence)
        return told

    def leave(self, node: str, body: bytes, signature: str | None, remote: str | None) -> Leave:
        """A node's word that it goes, proven. Raises RequestError, as ``heartbeat`` does."""
        if self.enrolled is None:
            self._check_local(remote)
            leave = parse_leave(node, body or b"{}")
        else:
            self._check_signed(node, LEAVE, body, signature)
            leave = parse_leave(node, body)
            self._check_nonce(leave.nonce)
        self._follow(node, leave.boot, leave.sequence)
        return leave

    def check(self, told: Told) -> None:
        """Whether a node may be a member as somebody else passed it on. Raises RequestError."""
        check_proven(told, self.enrolled)

    def _check_local(self, remote: str | None) -> None:
        if not is_loopback_address(remote or ""):
            raise RequestError("without an enrolment file, only nodes on loopback may join", code="not_enrolled")

    def _check_signed(self, node: str, purpose: bytes, body: bytes, field: str | None) -> tuple[bytes, Enrolled]:
        assert self.enrolled is not None
        try:
            if node not in self.enrolled:
                raise RequestError("the node is not enrolled", code="not_enrolled")
            signature = parse_signature(field or "")
            return signature, check_signature(self.enrolled.get(node), purpose, signature, body)
        except RequestError as error:
            if error.status == 401:
                error.headers.update(_CHALLENGE)
            raise

    def _check_nonce(self, nonce: str) -> None:
        if not self._nonces.fresh(nonce):
            raise RequestError(
                "the nonce is not of now", code="stale_nonce", public={"nonce": self.nonce()}, headers=_CHALLENGE
            )

    def _follow(self, node: str, boot: str, sequence: int) -> None:
        """Take this as the last that was heard of a node. Raises RequestError (``stale_heartbeat``)."""
        now = self._now()
        known = self._orders.get(node)
        if known is None or (self.enrolled is None and not boot):
            self._orders[node] = _Order(boot, sequence)
            return
        known.retired = {old: at for old, at in known.retired.items() if now - at < 2 * NONCE_TIME}
        if boot in known.retired or (boot == known.boot and sequence <= known.sequence):
            raise RequestError("a later one was heard already", code="stale_heartbeat")
        if boot != known.boot:
            known.retired[known.boot] = now
        known.boot, known.sequence = boot, sequence
