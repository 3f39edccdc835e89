"""What a router and the Redis that routers share say to each other: one message each way. Pure.

The work is done by ``exchange.lua``, in one step at the server; its head says what is kept there. Asked at rest, an
answer is a few dozen bytes: records come only of nodes that changed since this router asked last.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack

from shared import trials
from shared.enrolment import MAX_BODY, Told, parse_told
from shared.errors import RequestError, UpstreamError
from shared.keys import SIGNATURE
from shared.node import Node, State

SCRIPT = Path(__file__).with_name("exchange.lua").read_bytes()
SHA = hashlib.sha1(SCRIPT, usedforsecurity=False).hexdigest()
"""What Redis calls the script."""
PAGE = 1000
"""Records in one answer."""
MAX_RECORD = MAX_BODY + 1024
SLACK = 2000
"""Milliseconds that an exchange may be under way, else what it tells is not taken: a server that stood still carries
out later what it was sent before. After as long without any exchange, the times of nodes begin anew: routers come
once a second."""
_HEAD = re.compile(rb"([0-9a-f]{0,32}) ([0-9]{1,16}) [0-9a-f]{8}")


@dataclass(frozen=True)
class Tell:
    """A node whose record is to be written. ``left``: milliseconds until it is out."""

    told: Told
    left: int
    force: bool = False
    """Whether what is there is known to be no heartbeat of the node, however new it looks."""
    loud: bool = False
    """Whether other routers should hear of it at once."""

    def encodable(self) -> list[object]:
        """For the script."""
        told = self.told
        node, print_ = told.node, fingerprint(told.node)
        return [node.id, told.boot, told.sequence, print_, self.left, self.force, self.loud, to_record(told)]


@dataclass(frozen=True)
class Ask:
    """What a router knows and tells."""

    life: bytes = b""
    seen: int = 0
    as_of: int = 0
    """The server's clock now, as the router reckons by its last answer; milliseconds."""
    epoch: int = 0
    ttl: int = 6000
    candidate: str = ""
    """A random word: names the life that begins, should one begin."""
    tells: Sequence[Tell] = ()
    leaves: Sequence[tuple[str, str, int]] = ()
    """Node, boot and sequence of those that left."""
    heard: Sequence[tuple[str, int]] = ()
    """Nodes whose record is right, that are there for so many milliseconds more."""

    checks: Sequence[tuple[str, bytes]] = ()
    """Nodes with the record that they should have."""

    def encoded(self) -> bytes:
        """For the script."""
        packed: bytes = msgpack.packb(
            {
                "life": self.life,
                "seen": self.seen,
                "as_of": self.as_of,
                "epoch": self.epoch,
                "ttl": self.ttl,
                "candidate": self.candidate,
                "page": PAGE,
                "most": MAX_RECORD,
                "slack": SLACK,
                "tells": [tell.encodable() for tell in self.tells],
                "leaves": [list(leave) for leave in self.leaves],
                "checks": [part for node, record in self.checks for part in (node, _sha1(record))],
                "heard": [part for node, left in self.heard for part in (node, left // 100)],
            },
            use_bin_type=False,  # servers' Lua knows the msgpack of old, where bytes are strings
        )
        return packed


@dataclass(frozen=True)
class Reply:
    """What Redis has."""

    life: bytes
    now: int
    """Its clock, milliseconds."""
    epoch: int
    seen: int
    """Where to go on."""
    more: bool
    """Whether changes are left; nothing that was told has been taken then."""
    fresh: bool
    """Whether what was told has been taken."""
    page: Sequence[tuple[bytes, bytes]] = field(repr=False)
    """Nodes that changed, each with its record: empty for one that is gone, ``!`` for one over MAX_RECORD."""
    unknown: Sequence[bytes] = ()
    """Nodes that were heard and have no record, or another one than they should."""


def parse_reply(value: Any) -> Reply:
    """What the script answered. Raises UpstreamError."""
    try:
        life, now, epoch, seen, more, fresh, page, unknown = value
        pairs = list(zip(page[::2], page[1::2], strict=True))
        if not all(isinstance(part, bytes) for part in (life, *page, *unknown)):
            raise TypeError("not bytes")
        return Reply(life, int(now), int(epoch), int(seen), bool(more), bool(fresh), pairs, list(unknown))
    except (TypeError, ValueError) as error:
        raise UpstreamError(f"Redis answered what the script does not: {error}") from error


def _sha1(record: bytes) -> str:
    return hashlib.sha1(record, usedforsecurity=False).hexdigest()  # what the server's Lua has


def to_record(told: Told) -> bytes:
    """What is kept of a node: its own word as it gave it, for every router to check."""
    return f"{told.boot} {told.sequence} {fingerprint(told.node)}\n".encode() + told.signature + told.body


def from_record(node: bytes, record: bytes) -> Told:
    """What a record says; nothing of it is proven yet. Raises RequestError."""
    head, _, rest = record.partition(b"\n")
    if len(record) > MAX_RECORD or not (match := _HEAD.fullmatch(head)) or len(rest) < SIGNATURE:
        raise RequestError("not a record of a node", code="bad_node")
    try:
        name = node.decode()
    except UnicodeDecodeError as error:
        raise RequestError("not a node's name", code="bad_node") from error
    told = parse_told(name, rest[SIGNATURE:], rest[:SIGNATURE])
    if (told.boot.encode(), told.sequence) != (match[1], int(match[2])):
        raise RequestError("the record's head is not its body's", code="bad_node")
    return told


def fingerprint(node: Node) -> str:
    """Changes where a ring changes."""
    text = f"{node.url} {node.region} {node.weight}"
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def moved(old: State, new: State) -> bool:
    """Whether other routers should know of a new state: load that is a quarter and four requests off, round trips
    that are a quarter and two milliseconds off. Less is not worth the bytes."""

    def off(a: float, b: float, least: float) -> bool:
        return abs(a - b) >= max(least, max(a, b) / 4)

    if old.draining != new.draining or old.rtt.keys() != new.rtt.keys() or trials.moved(old.trials, new.trials):
        return True
    return off(old.in_flight, new.in_flight, 4) or any(off(old.rtt[region], new.rtt[region], 2) for region in new.rtt)
