"""The members as one router knows them, and what it asks and tells Redis about them. Pure: times are arguments.

A member is one of three:

* heard: by its heartbeats to this router, for TTL after each;
* read: as Redis has it, for as long as Redis says so. While Redis is away they stay, but for those that this router
  had heard itself and hears no more;
* lost: was read, and vanished without anybody's word that it left or fell silent, as Redis was emptied or lost
  writes (or it is from before a restart). It stays a while, in which whoever hears it tells Redis anew.

What Redis has is read in pages, from the last change that was seen; after anything out of order, from the beginning
(a listing), and nothing is told before the end of one: until then it is not known what Redis lacks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from zlib import crc32

from router.exchange import Ask, Reply, Tell, moved, to_record
from shared.enrolment import Leave, Told
from shared.node import State
from shared.routing import Snapshot

MAX_TELLS, MAX_STATES = 2000, 500
"""Records in one exchange, and those among them that tell no more than a new load."""
PATIENCE = 2.0
"""Seconds between two looks at who is silent; what is longer is our own standing still, not theirs."""
ROUNDS = 30
"""Exchanges in which the record of each node that is heard is compared once with what it should be."""
BEFORE = float("-inf")
"""When a member joined that was there before this router knew."""


class Members:
    """Times are seconds of one clock that only grows. ``snapshot`` never changes in place."""

    def __init__(self, ttl: float) -> None:
        self.ttl = ttl
        self.snapshot = Snapshot([], 0)
        self.states: dict[str, State] = {}
        self.joined: dict[str, float] = {}
        self.behind = False
        """Whether ``snapshot`` is not of now: ``rebuild`` is due."""
        self._anew = False
        """Whether it has to be made anew though the nodes are the same: one began to drain, or started again."""
        self._heard: dict[str, tuple[Told, float]] = {}
        """With when each is out."""
        self._read: dict[str, Told] = {}
        self._lost: dict[str, tuple[Told, float]] = {}
        self._untold: dict[str, Told] = {}
        """Heartbeats since Redis was told last."""
        self._leaves: dict[str, Leave] = {}
        """Nodes that left, and Redis has not been told."""
        self._forged: set[str] = set()
        """Nodes whose record in Redis is not theirs: it has to give way, however new it looks."""
        self._life, self._seen, self._server = b"", 0, (0, 0.0)
        """Which history of Redis is known, how far, and its clock (ms) at a time of ours."""
        self._looked, self._round = float("inf"), 0
        self._listed: set[str] | None = set()
        """In a listing: what has come so far."""

    def __repr__(self) -> str:
        return f"<Members {len(self._heard)} heard, {len(self._read)} read, {len(self._lost)} lost; {self.snapshot!r}>"

    def all(self) -> dict[str, Told]:
        """What each member told, as far as it came here."""
        lost = {node: told for node, (told, _) in self._lost.items()}
        return {**lost, **self._read, **{node: told for node, (told, _) in self._heard.items()}}

    def get(self, node: str) -> Told | None:
        """What a member told."""
        if node in self._heard:
            return self._heard[node][0]
        return self._read.get(node) or (self._lost[node][0] if node in self._lost else None)

    # What this router hears

    def heard(self, told: Told, now: float) -> bool:
        """A node is there. Gives whether others should know soon."""
        node = told.node.id
        known = self.get(node)
        self._heard[node] = told, now + self.ttl
        self._lost.pop(node, None)
        self._leaves.pop(node, None)
        self._untold[node] = told
        self.states[node] = told.state
        if known is None or known.node != told.node:
            self.behind = True
            return True
        if known.boot != told.boot:
            self.joined[node] = now
            self.behind = self._anew = True
        if known.state.draining != told.state.draining:
            self.behind = self._anew = True
        return self._anew

    def left(self, leave: Leave) -> None:
        """A member goes by its own word."""
        known = self.get(leave.node)
        if known is not None:
            if not leave.boot:  # one without an order of its own comes after whatever was heard
                leave = replace(leave, boot=known.boot, sequence=known.sequence)
            self._leaves[leave.node] = leave
            self.drop(leave.node)

    def drop(self, node: str) -> None:
        """A member goes by ours."""
        for pop in (self._heard.pop, self._read.pop, self._lost.pop, self._untold.pop):
            pop(node, None)
        self.behind = True

    def remember(self, members: Iterable[Told], until: float) -> None:
        """These were members before a restart."""
        for told in members:
            self._lost[told.node.id] = told, until
            self.states[told.node.id] = told.state
            self.behind = True

    def expire(self, now: float, *, alone: bool) -> None:
        """Drop nodes that were not heard in time. ``alone``: Redis is away, so our own silence is the last word."""
        deaf, self._looked = now - self._looked - PATIENCE, now
        if deaf > 0:  # they may have beaten all the time
            self._heard = {node: (told, self._later(until, deaf, now)) for node, (told, until) in self._heard.items()}
            self._lost = {node: (told, self._later(until, deaf, now)) for node, (told, until) in self._lost.items()}
        for node in [node for node, (_, until) in self._heard.items() if until <= now]:
            del self._heard[node]
            self._untold.pop(node, None)
            self._lost.pop(node, None)
            if alone:
                self._read.pop(node, None)
            self.behind = True
        for node in [node for node, (_, until) in self._lost.items() if until <= now]:
            del self._lost[node]
            self.behind = True

    def _later(self, until: float, seconds: float, now: float) -> float:
        return max(until, min(until + seconds, now + self.ttl))

    def forget_read(self) -> None:
        """Redis has been away for too long to believe what it said."""
        self.behind |= bool(self._read)
        self._read.clear()

    # The snapshot

    def rebuild(self, now: float, epoch: int = 0) -> set[str]:
        """Make the snapshot anew where the members are not its own. ``epoch``: what Redis counts. Gives who is out."""
        former = self.snapshot
        if self.behind:
            self.behind = False
            nodes = {node: told.node for node, told in self.all().items()}
            if nodes != former.nodes or self._anew:
                self._anew = False
                gone = former.nodes.keys() - nodes.keys()
                for node in gone:
                    self.joined.pop(node, None)
                    self.states.pop(node, None)
                for node in nodes.keys() - former.nodes.keys():
                    before = self._listed is not None and node not in self._heard
                    self.joined[node] = BEFORE if before else now
                self.snapshot = Snapshot(nodes.values(), max(former.epoch + 1, epoch), former)
                return gone
        if epoch > former.epoch:
            self.snapshot = Snapshot(former.nodes.values(), epoch, former)
        return set()

    # Redis

    def begin_listing(self) -> None:
        """Read all of Redis anew."""
        self._life, self._listed = b"", set()

    def ask(self, now: float, candidate: str) -> Ask:
        """The next exchange. ``candidate``: a random word."""
        server, at = self._server
        tells: list[Tell] = []
        heard: list[tuple[str, int]] = []
        leaves: list[tuple[str, str, int]] = []
        checks: list[tuple[str, bytes]] = []
        if self._listed is None:
            leaves = [(leave.node, leave.boot, leave.sequence) for leave in self._leaves.values()]
            states, self._round = 0, (self._round + 1) % ROUNDS
            # A record may be replaced behind everybody's back, without a change that readers would see.
            checks = [
                (node, to_record(self._read[node]))
                for node in self._heard
                if node in self._read and node not in self._untold and crc32(node.encode()) % ROUNDS == self._round
            ]
            for node, told in self._untold.items():
                left, known = int((self._heard[node][1] - now) * 1000), self._read.get(node)
                new = known is None or known.node != told.node or known.boot != told.boot
                loud = new or (known is not None and known.state.draining != told.state.draining)
                state = not loud and states < MAX_STATES and known is not None and moved(known.state, told.state)
                if (loud or state) and len(tells) < MAX_TELLS:
                    states += state
                    tells.append(Tell(told, left, force=node in self._forged, loud=loud))
                elif not new:
                    heard.append((node, left))
        return Ask(
            life=self._life,
            seen=self._seen,
            as_of=server + int((now - at) * 1000),
            epoch=self.snapshot.epoch,
            ttl=int(self.ttl * 1000),
            candidate=candidate,
            tells=tells,
            leaves=leaves,
            heard=heard,
            checks=checks,
        )

    def answered(self, ask: Ask, reply: Reply, now: float) -> None:
        """Begin to take an answer; ``take``, ``refuse`` or ``gone`` follows for each node in it, then ``done``."""
        if reply.life != ask.life:
            self.begin_listing()
        self._life, self._server = reply.life, (reply.now, now)

    def gone(self, node: str) -> None:
        """Redis says that a node left, or fell silent."""
        self.behind |= node in self._read or node in self._lost
        self._read.pop(node, None)
        self._lost.pop(node, None)

    def take(self, told: Told, now: float) -> None:
        """Redis has a node, and it has proven that it is the one."""
        node = told.node.id
        if self._listed is not None:
            self._listed.add(node)
        leave = self._leaves.get(node)
        if leave and leave.boot == told.boot and leave.sequence >= told.sequence:
            return  # it has just left
        known = self.get(node)
        self._read[node] = told
        self._lost.pop(node, None)
        if node not in self._heard:
            self.states[node] = told.state
            self.behind |= known is None or known.node != told.node
            if known and known.boot != told.boot:
                self.joined[node] = now
                self.behind = self._anew = True
            if known and known.state.draining != told.state.draining:
                self.behind = self._anew = True

    def refuse(self, node: str, now: float) -> bool:
        """Redis has a record that proves nothing. It takes nothing away: what was read stays as if it had vanished.
        Gives whether we can tell Redis better."""
        if node in self._read:
            self._lose(node, now)
        if node in self._heard:
            self._untold[node] = self._heard[node][0]
            self._forged.add(node)
        return node in self._heard

    def done(self, ask: Ask, reply: Reply, now: float) -> None:
        """The whole of an answer was taken; ``rebuild`` is due where nothing more is to come."""
        self._seen = reply.seen
        if reply.more:
            return
        if self._listed is not None:
            self.rebuild(now)  # those that came with it were there before
            for node in self._read.keys() - self._listed:
                self._lose(node, now)
            self._listed = None
            soon = now + self.ttl
            self._lost = {node: (told, min(until, soon)) for node, (told, until) in self._lost.items()}
            self._untold |= {node: told for node, (told, _) in self._heard.items()}
        if reply.fresh:
            self._was_told(ask, reply)

    def _was_told(self, ask: Ask, reply: Reply) -> None:
        """Redis has taken what we told: no need to read or to tell that again."""
        told = {tell.told.node.id: tell.told for tell in ask.tells}
        for node in told:
            if node not in self._leaves:
                self._read[node] = told[node]
            self._forged.discard(node)
        for node in (*told, *(node for node, _ in ask.heard)):
            later = self._untold.get(node)
            if later is not None and (node not in told or later is told[node]):
                del self._untold[node]
        for node, boot, sequence in ask.leaves:
            leave = self._leaves.get(node)
            if leave and (leave.boot, leave.sequence) == (boot, sequence):
                del self._leaves[node]
        changed = {name for name, _ in reply.page}
        for name in reply.unknown:
            node = name.decode()  # one of those that we named
            if node in self._heard and name not in changed:
                self._read.pop(node, None)
                self._untold[node] = self._heard[node][0]
                self._forged.add(node)

    def _lose(self, node: str, now: float) -> None:
        self._lost[node] = self._read.pop(node), now + self.ttl
