"""What is written down of rounds and sites: the documents, and what follows from one alone. Pure."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict

from origin.federated.transitions import Event, State, after
from shared.digest import Digest
from shared.federated import OpenRound, PastRound


class Record(BaseModel):
    """One document."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Site(Record):
    """A participant."""

    key: str
    """Its public key: 64 hex digits."""
    strikes: int = 0
    quarantined: bool = False


class SiteBook(Record):
    """All sites that any round was opened for."""

    sites: dict[str, Site] = {}


class Known(Record):
    """A model's newest round."""

    number: int
    active: bool
    """Whether there is anything left to do."""


class Index(Record):
    """The models that have rounds."""

    models: dict[str, Known] = {}


class Entry(Record):
    """A counted update."""

    digest: str
    size: int
    examples: int
    norm: float
    """L2, of all of it."""
    round: int
    """The number of the round that it was made for."""
    path: str
    """Where the body is."""
    time: str
    codecs: tuple[str, ...] = ()


class Rejection(Record):
    """An update that was refused after its site was proven."""

    site: str
    code: str
    time: str


class Candidate(Record):
    """What a ref is to mean."""

    revision: str
    before: str = ""
    """What the ref meant when the candidate was to be signed; empty for nothing."""


class Gate(Record):
    """The operator's command on held-out data."""

    command: str
    margin: float
    """By what share of its base's the candidate's value may be higher."""
    values: tuple[float, float] | None = None
    """Of the base and of the candidate, once it was run."""


class Noise(Record):
    """Differential privacy: updates are clipped to a fixed norm, and noise is added."""

    multiplier: float
    clip: float
    delta: float


class Round(Record):
    """All there is to know of a round."""

    model: str
    number: int
    state: State = State.OPEN
    base: str
    private: bool = False
    to_ref: str
    tensors: tuple[str, ...] = ()
    codecs: tuple[str, ...] = ("*",)
    rule: str
    weights: Literal["equal", "examples"] = "equal"
    late: float = 0.0
    min_sites: int
    max_bytes: int
    opened: datetime
    deadline: datetime
    sites: tuple[str, ...]
    merge: bool = False
    gate: Gate | None = None
    noise: Noise | None = None
    updates: dict[str, Entry] = {}
    rejected: tuple[Rejection, ...] = ()
    candidates: dict[str, Candidate] = {}
    """By ref; the first is of ``to_ref``."""
    statistics: dict[str, dict[str, float]] = {}
    """By site, what the rule made of its update."""
    epsilon: float | None = None
    reason: str = ""
    """Why it is held, or has expired."""
    ended: str = ""
    cleaned: bool = False
    """Whether its updates are gone."""

    @property
    def base_revision(self) -> Digest:
        """The revision that updates are upon."""
        return Digest(self.base)

    def go(self, event: Event, **changes: object) -> Round:
        """The same, after an event. Raises Conflict (``round_state``)."""
        return self.model_copy(update={"state": after(self.state, event), **changes})

    def shown(self) -> OpenRound | PastRound:
        """What sites are told of it."""
        if self.state is State.OPEN:
            return OpenRound(
                self.number,
                self.base_revision,
                self.state,
                self.tensors,
                self.deadline,
                self.codecs,
                self.min_sites,
                len(self.sites),
                len(self.updates),
                self.max_bytes,
                self.late,
                self.rule,
            )
        published = self.candidates.get(self.to_ref) if self.state is State.PUBLISHED else None
        revision = Digest(published.revision) if published else None
        return PastRound(self.number, self.base_revision, self.state, len(self.updates), revision, self.ended)
