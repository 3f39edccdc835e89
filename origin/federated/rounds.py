"""Rounds at an origin: opened by its operator, ended at their deadline, led on by themselves where a key is at hand."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from structlog.typing import FilteringBoundLogger

from origin.federated.candidate import adapter_of
from origin.federated.closing import Closing
from origin.federated.documents import Gate, Noise, Round
from origin.federated.intake import Intake
from origin.federated.privacy import Noise as Protection
from origin.federated.privacy import check_installed
from origin.federated.records import Records
from origin.federated.rules import Rule, TooFewSites, parse_rule
from origin.federated.sites import enrol
from origin.federated.transitions import FINAL, State
from origin.trust_store import TrustStore
from shared.clock import Clock
from shared.errors import ConfigError, NearshardError, NotFound
from shared.federated import taken
from shared.ids import is_revision
from shared.tasks import end

AGAIN = 60.0
"""Seconds after which a round that could not be led on is tried again."""
LONGEST = timedelta(days=30)
"""A round's longest time."""


@dataclass(frozen=True)
class Opening:
    """What an operator asks for."""

    model: str
    sites: Mapping[str, str]
    """Public keys by name, as hex digits."""
    base: str
    """A ref or revision."""
    to_ref: str
    deadline: timedelta
    min_sites: int
    max_bytes: int
    tensors: tuple[str, ...] = ()
    codecs: tuple[str, ...] = ()
    """Globs of names; none for those that go with the rule."""
    rule: str = str(Rule())
    weights: Literal["equal", "examples"] = "equal"
    late: float = 0.0
    merge: bool = False
    gate: Gate | None = None
    noise: Noise | None = None

    @property
    def suited(self) -> tuple[str, ...]:
        """Globs of the codecs that go with the rule. Raises ConfigError."""
        return parse_rule(self.rule).codecs(len(self.sites))

    def check(self) -> None:
        """Raises ConfigError for what contradicts itself."""
        rule = parse_rule(self.rule)
        try:
            rule.f(self.min_sites)
        except TooFewSites as error:
            raise ConfigError(f"--min-sites: {error}") from error
        if self.min_sites > len(self.sites):
            raise ConfigError(f"--min-sites: {self.min_sites} are needed, and the file has {len(self.sites)}")
        if not timedelta() < self.deadline <= LONGEST:
            raise ConfigError(f"--deadline: up to {LONGEST.days} days from now")
        if not 0 <= self.late <= 1:
            raise ConfigError("--late is a factor from 0 to 1")
        if self.max_bytes < 1:
            raise ConfigError("--max-update is a number of bytes")
        if self.gate:
            _check_gate(self.gate)
        if self.noise:
            if not 0 < self.noise.delta < 1:
                raise ConfigError("--delta is between 0 and 1")
            if self.late or self.weights != "equal":
                raise ConfigError("--noise goes with equal weights only: without --late and --weights examples")
            Protection(self.noise.clip, self.noise.multiplier).deviation(rule, self.min_sites)
            check_installed()


def _check_gate(gate: Gate) -> None:
    try:
        words = shlex.split(gate.command)
    except ValueError as error:
        raise ConfigError(f"--gate: {error}") from error
    if not words:
        raise ConfigError("--gate is a command")
    if not 0 <= gate.margin <= 10:
        raise ConfigError("--gate-margin is a share from 0 to 10, like 1%")


async def open_round(records: Records, trust: TrustStore, closing: Closing, asked: Opening, now: datetime) -> Round:
    """Open a model's next round. Raises ConfigError, NotFound, PublishError for what cannot be merged; Conflict
    (``round_open``) while there is another one."""
    asked.check()
    state = await trust.state()
    meant = state.refs(asked.model)
    base = asked.base if is_revision(asked.base) else state.ref(asked.model, asked.base).revision
    manifest = await records.storage.manifest(asked.model, await trust.resolve(asked.model, base))
    names = taken(manifest.tensors, asked.tensors)
    if not names:
        raise ConfigError(f"{asked.model} has no tensors of floats that {', '.join(asked.tensors) or 'a round'} names")
    if asked.merge:
        adapter_of(manifest, names)
    if asked.noise:
        await _check_accountable(records, asked.model)
    await enrol(records, asked.sites)
    dropped: list[Round] = []

    def make(number: int, last: Round | None) -> Round:
        # what an expired round has got is not lost, where late updates are taken: no site would send it again
        carries = last is not None and last.state is State.EXPIRED and not last.cleaned
        carries = carries and asked.late > 0 and last is not None and last.tensors == asked.tensors
        found = last.updates if carries and last else {}
        dropped[:] = [last] if last and not carries else []
        return Round(
            model=asked.model,
            number=number,
            base=base,
            private=next(iter(meant.values())).private,
            to_ref=asked.to_ref,
            tensors=asked.tensors,
            codecs=asked.codecs or asked.suited,
            rule=asked.rule,
            weights=asked.weights,
            late=asked.late,
            min_sites=asked.min_sites,
            max_bytes=asked.max_bytes,
            opened=now,
            deadline=now + asked.deadline,
            sites=tuple(sorted(asked.sites)),
            merge=asked.merge,
            gate=asked.gate,
            noise=asked.noise,
            updates={site: entry for site, entry in found.items() if site in asked.sites},
        )

    opened = await records.open(asked.model, make)
    for last in dropped:
        await closing.delete_updates(last)
    return opened


async def _check_accountable(records: Records, model: str) -> None:
    """Whether an epsilon can be told of all rounds together. Raises ConfigError."""
    with suppress(NotFound):
        last = await records.newest(model)
        for number in range(1, last.number + 1):
            known = await records.round(model, number)
            if known.candidates and not known.noise:
                raise ConfigError(
                    f"--noise: round {number} of {model} was made without, so no epsilon holds for its sites any more;"
                    " publish the base under another name and begin there"
                )


class Rounds:
    """Looks after the rounds of an origin, from start to close."""

    def __init__(
        self,
        records: Records,
        closing: Closing,
        intake: Intake,
        clock: Clock,
        log: FilteringBoundLogger,
        *,
        look: float,
        publishes: bool,
    ) -> None:
        """``look``: seconds between two looks at what is open. ``publishes``: whether a publisher's key is at hand."""
        self._records, self._closing, self._intake = records, closing, intake
        self._clock, self._log, self._look, self._publishes = clock, log, look, publishes
        self._news = asyncio.Event()
        self._not_before: dict[str, float] = {}
        self._leading: dict[str, asyncio.Task[None]] = {}
        """By model, a gate or an aggregate of which may take long, while other models go on."""
        self._watcher: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Look after them from now on."""
        self._watcher = asyncio.create_task(self._watch(), name="federated rounds")

    async def close(self) -> None:
        """Leave off; whoever comes next goes on."""
        await end([self._watcher] if self._watcher else [])
        await end(self._leading.values())

    def look_now(self) -> None:
        """Something has changed."""
        self._news.set()

    async def _watch(self) -> None:
        while True:
            self._news.clear()
            try:
                await self._look_after()
            except NearshardError as error:
                self._log.warning("federated rounds cannot be looked after", reason=str(error))
                await self._clock.sleep(self._look)
            with suppress(TimeoutError):
                async with asyncio.timeout(self._look):
                    await self._news.wait()

    async def _look_after(self) -> None:
        opened: dict[str, int] = {}
        for model, _ in await self._records.active():
            current = await self._records.newest(model)
            if current.state is State.OPEN:
                current = await self._closing.end_if_over(current)
            if current.state is State.OPEN:
                opened[model] = current.number
            elif self._may_lead(current):
                self._leading[model] = asyncio.create_task(self._lead(current), name=f"round of {model}")
        await self._intake.clean(opened)

    def _may_lead(self, current: Round) -> bool:
        running = self._leading.get(current.model)
        if (running and not running.done()) or self._not_before.get(current.model, 0.0) > self._clock.monotonic():
            return False
        return current.state in FINAL or (self._publishes and current.state is not State.HELD)

    async def _lead(self, current: Round) -> None:
        try:
            if current.state in FINAL:
                await self._closing.clean(current)
            else:
                await self._closing.lead(current)
        except NearshardError as error:
            self._say_failed(current, code=error.error_code, reason=str(error))
        except Exception as error:  # noqa: BLE001 - nobody awaits this task, so nobody else would say so
            self._say_failed(current, exc_info=error)

    def _say_failed(self, current: Round, **what: object) -> None:
        self._log.warning("a round cannot be led on", model=current.model, round=current.number, **what)
        self._not_before[current.model] = self._clock.monotonic() + AGAIN
