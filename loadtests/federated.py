"""Federated training in one process: what sites send is encoded, checked and made one by the project's own code.

Whoever trains is given (``Trainer``), so ``make bench-federated`` runs it with a real model, and the tests with a small
one. Nothing goes over a network here: bytes are those of the documents that sites would upload.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from origin.federated.aggregate import Aggregation, Contribution, Readable, measure
from origin.federated.rules import parse_rule
from shared.updates.codecs import codec
from shared.updates.document import open_update, write_update
from shared.updates.feedback import Feedback
from shared.updates.segments import Segment, segments

Floats: TypeAlias = npt.NDArray[np.float32]
State: TypeAlias = Mapping[str, Floats]
"""The tensors that are trained, by their names; or an update of them."""
SEED = 11


class Trainer(Protocol):
    """The sites' training."""

    def first(self) -> State:
        """The state before round 1."""

    def train(self, state: State, site: int, number: int, *, flip: bool) -> State:
        """``state`` after the steps of a site in a round; with ``flip`` on wrong labels."""


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    title: str
    codecs: Sequence[str] = ()
    """Of each round, the last one of all that follow; none: updates as they are."""
    apart: Mapping[str, str] = field(default_factory=dict)
    """Codecs of tensors, by globs of names, in every round."""
    feedback: bool = True
    momentum: float = 0.0
    """Of the sites (Deep Gradient Compression), with feedback."""
    rule: str = "mean"
    clip: bool = True
    """Whether updates are scaled down to the median of their norms."""
    attack: str = ""
    hostile: int = 0
    """Sites that attack: the first ones."""

    def codec(self, number: int) -> str:
        """The codec's name in a round, from 1; empty: none."""
        return self.codecs[min(number, len(self.codecs)) - 1] if self.codecs else ""


# Hostile sites


Attack: TypeAlias = Callable[[Sequence[State], np.random.Generator], Sequence[State]]
"""What hostile sites send instead of the updates that they have, which they all know."""


def _times(factor: float) -> Attack:
    return lambda updates, _: [{name: factor * x for name, x in update.items()} for update in updates]


def _noise(updates: Sequence[State], chance: np.random.Generator) -> Sequence[State]:
    """Gaussian noise of ten times the update's norm."""
    return [_noise_like(update, chance) for update in updates]


def _noise_like(update: State, chance: np.random.Generator) -> State:
    deviation = 10 * norm(update) / sum(x.size for x in update.values()) ** 0.5
    return {name: chance.normal(0, deviation, x.shape).astype(np.float32) for name, x in update.items()}


def _collude(updates: Sequence[State], _: np.random.Generator) -> Sequence[State]:
    """All the same: against the mean of theirs, at the mean of their norms (Xie et al. 2020, inner product manipulation)."""
    middle = {name: np.mean([update[name] for update in updates], axis=0) for name in updates[0]}
    size = float(np.mean([norm(update) for update in updates]))
    factor = np.float32(-size / max(norm(middle), 1e-30))
    return [{name: factor * x for name, x in middle.items()}] * len(updates)


ATTACKS: Mapping[str, Attack] = {
    "sign flip": _times(-1),
    "scaled": _times(-10),
    "noise": _noise,
    "label flip": _times(1),  # what it does is in its training
    "colluding": _collude,
}


def norm(update: State) -> float:
    """The L2 norm."""
    return float(np.sqrt(sum(float(np.vdot(x, x)) for x in update.values())))


# What a site sends


@dataclass(frozen=True)
class Whole:
    """An update as it is, of which segments are read as from a document."""

    update: State

    def read(self, name: str, number: int, /) -> Floats:
        """One segment's values."""
        x = self.update[name]
        return taken(x, segments(x.shape)[number])


def taken(x: Floats, segment: Segment) -> Floats:
    """A tensor's segment, (rows, columns)."""
    return x.reshape(-1)[segment.first :][: segment.count].reshape(segment.rows, segment.columns)


class Sender:
    """A site's side: its feedback, and the documents that it writes."""

    def __init__(self, arm: Arm) -> None:
        self._arm = arm
        self._feedback = Feedback(momentum=arm.momentum) if arm.feedback else None

    def send(self, update: State, number: int) -> tuple[Readable, int]:
        """The update of a round as whoever aggregates reads it, and its bytes."""
        name = self._arm.codec(number)
        if not name:
            return Whole(update), sum(x.nbytes for x in update.values())
        file = io.BytesIO()
        shapes = {name: x.shape for name, x in update.items()}

        def read(name: str, segment: Segment) -> Floats:
            values = taken(update[name], segment)
            return self._feedback.compensate(name, segment, values) if self._feedback else values

        codecs = {glob: codec(other) for glob, other in self._arm.apart.items()} | {"*": codec(name)}
        written = write_update(file, shapes, read, codecs, self._feedback.kept if self._feedback else None)
        if self._feedback:
            self._feedback.commit()
        return open_update(file, written.size), written.size


# Rounds


@dataclass(frozen=True)
class Round:
    """What came of a round."""

    number: int
    state: State
    """The new one."""
    sizes: Sequence[int]
    """Bytes of the update of each site."""


def federate(arm: Arm, trainer: Trainer, rounds: int, sites: int) -> Iterator[Round]:
    """Train for so many rounds."""
    state = trainer.first()
    senders = [Sender(arm) for _ in range(sites)]
    for number in range(1, rounds + 1):
        sent = [
            sender.send(update, number)
            for sender, update in zip(senders, updates(arm, trainer, state, number, sites), strict=True)
        ]
        state = applied(arm, state, [update for update, _ in sent])
        yield Round(number, state, [size for _, size in sent])


def applied(arm: Arm, state: State, sent: Sequence[Readable]) -> State:
    """The state after the updates of a round were made one, as the origin does it."""
    shapes = {name: x.shape for name, x in state.items()}
    given = [
        Contribution(f"site-{place}", 1.0, measure(update, shapes), update) for place, update in enumerate(sent)
    ]
    new = {name: x.copy() for name, x in state.items()}
    for name, segment, values in Aggregation(given, shapes, parse_rule(arm.rule), None if arm.clip else math.inf):
        taken(new[name], segment)[...] -= values
    return new


def updates(arm: Arm, trainer: Trainer, state: State, number: int, sites: int) -> Iterator[State]:
    """The updates of all sites, before they are encoded: those of hostile ones as they make them."""
    flip = arm.attack == "label flip"
    own = [minus(state, trainer.train(state, site, number, flip=flip)) for site in range(arm.hostile)]
    if own:
        yield from ATTACKS[arm.attack](own, np.random.default_rng([SEED, number]))
    for site in range(arm.hostile, sites):
        yield minus(state, trainer.train(state, site, number, flip=False))


def minus(base: State, trained: State) -> State:
    """The update: what is subtracted from the base."""
    return {name: base[name] - trained[name] for name in base}
