"""Federated training in one process: what sites send is encoded, checked and made one by the project's own code.

Whoever trains is given (``Trainer``), so ``make bench-federated`` runs it with a real model, and the tests with a small
one. Nothing goes over a network here: bytes are those of the documents that sites would upload.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

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
    """All the same: against the mean of theirs, at the mean of their norms (Xie et al. 2020)."""
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

    def left(self) -> dict[str, Floats]:
        """What it keeps for the next round."""
        if self._feedback is None:
            return {}
        kinds = {"left": self._feedback.left, "velocity": self._feedback.velocities}
        return {f"{kind}/{name}": x for kind, arrays in kinds.items() for name, x in arrays.items()}

    def resume(self, left: Mapping[str, Floats]) -> None:
        """Take what was kept for the next round."""
        kinds: dict[str, dict[str, Floats]] = {"left": {}, "velocity": {}}
        for name, x in left.items():
            kind, _, tensor = name.partition("/")
            kinds[kind][tensor] = x
        if self._feedback is not None:
            self._feedback = Feedback(kinds["left"], kinds["velocity"], momentum=self._arm.momentum)


# Rounds


@dataclass(frozen=True)
class Round:
    """What came of a round."""

    number: int
    state: State
    """The new one."""
    sizes: Sequence[int]
    """Bytes of the update of each site."""


class Federation:
    """Sites and the origin of an arm, round after round."""

    def __init__(self, arm: Arm, trainer: Trainer, sites: int) -> None:
        self.arm, self.number, self.state = arm, 0, trainer.first()
        self._trainer = trainer
        self._senders = [Sender(arm) for _ in range(sites)]

    def step(self) -> Round:
        """The next round."""
        self.number += 1
        found = updates(self.arm, self._trainer, self.state, self.number, len(self._senders))
        sent = [sender.send(update, self.number) for sender, update in zip(self._senders, found, strict=True)]
        self.state = applied(self.arm, self.state, [update for update, _ in sent])
        return Round(self.number, self.state, [size for _, size in sent])

    def save(self, directory: Path) -> None:
        """Write all that the next rounds depend on into a new directory."""
        directory.mkdir(parents=True)
        save_file(dict(self.state), directory / "state")
        for place, sender in enumerate(self._senders):
            save_file(sender.left(), directory / f"site-{place}")

    def resume(self, directory: Path, number: int) -> None:
        """Go on after round ``number``, as it was saved."""
        self.number, self.state = number, load_file(directory / "state")
        for place, sender in enumerate(self._senders):
            sender.resume(load_file(directory / f"site-{place}"))


def federate(arm: Arm, trainer: Trainer, rounds: int, sites: int) -> Iterator[Round]:
    """Train for so many rounds."""
    federation = Federation(arm, trainer, sites)
    for _ in range(rounds):
        yield federation.step()


def applied(arm: Arm, state: State, sent: Sequence[Readable]) -> State:
    """The state after the updates of a round were made one, as the origin does it."""
    shapes = {name: x.shape for name, x in state.items()}
    given = [Contribution(f"site-{place}", 1.0, measure(update, shapes), update) for place, update in enumerate(sent)]
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
