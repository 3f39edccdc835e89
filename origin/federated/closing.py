"""The end of a round: its updates are made one, that becomes a model, the model is looked at and signed.

Each step ends with the round's record in its next state (``origin.federated.transitions``), so whoever comes after a
kill goes on from there: what a step had done until then is done again, and nobody has seen any of it. A candidate is
noted before it is signed, and the metadata is what says whether it was. So a version is published exactly once, by
however many processes; those of one machine do one at a time.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import math
import os
import shlex
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from structlog.typing import FilteringBoundLogger

from origin.audit import Audit
from origin.commit import LocalSink
from origin.config import FederatedSettings
from origin.federated import sites as book
from origin.federated.admission import TOO_LARGE, usual_norm
from origin.federated.aggregate import Aggregation, Block, Contribution
from origin.federated.candidate import adapter_of, fetch_model, merge_adapter, take_off, tasks_of, write_tasks
from origin.federated.documents import Candidate, Entry, Gate, Rejection, Round
from origin.federated.privacy import Noise, epsilon, noisy
from origin.federated.records import Records, folder
from origin.federated.rules import TooFewSites, parse_rule, weights
from origin.federated.transitions import FINAL, Event, State
from origin.keyring import Keyring
from origin.publish import publish
from origin.signing import Ref, Source
from origin.trust_store import TrustStore
from shared.clock import Clock
from shared.digest import Digest
from shared.errors import Conflict, DiskError, IntegrityError, LocalError, NonFinite, NotFound
from shared.federated import taken
from shared.manifest import Manifest, Provenance
from shared.updates.document import open_update

if TYPE_CHECKING:
    from shared.metrics import Metrics

MERGED = "-merged"
"""What the ref of a model with its adapter merged ends with."""
OUTPUT = 4000
"""Characters of a gate's output that are kept to say why a round is held."""


class GateFailed(LocalError):
    """A gate that gave no value."""

    code = "gate_failed"


@dataclass(frozen=True)
class _Made:
    """What came of a round's updates."""

    candidates: Mapping[str, Candidate]
    statistics: Mapping[str, dict[str, float]]
    rejected: Sequence[Rejection]
    epsilon: float | None


class _StoringSink(LocalSink):
    """Stores all of a candidate, and signs nothing."""

    async def move_ref(
        self,
        model: str,
        ref: str,
        manifest: Manifest,
        before: Ref | None,
        source: Source | None = None,
        *,
        private: bool,
    ) -> bool:
        """Nobody is to see it yet."""
        return True


class Closing:
    """Leads rounds on, as far as they go by themselves."""

    def __init__(
        self,
        records: Records,
        trust: TrustStore,
        ring: Callable[[], Keyring],
        settings: FederatedSettings,
        work: Path,
        audit: Audit,
        tell: Callable[[str], None],
        clock: Clock,
        log: FilteringBoundLogger,
        metrics: Metrics | None = None,
    ) -> None:
        """``ring``: the publisher's key and the online key. ``work``: a folder for candidates on their way. ``tell`` is
        called with a model that changed."""
        self._records, self._trust, self._storage = records, trust, records.storage
        self._ring, self._settings, self._work = ring, settings, work
        self._audit, self._tell, self._clock, self._log, self._metrics = audit, tell, clock, log, metrics

    async def end_if_over(self, current: Round, *, now: bool = False) -> Round:
        """End the collecting where it is over: at the deadline, with the last site, or ``now``."""
        if current.state is not State.OPEN:
            return current

        def edit(known: Round) -> Round:
            over = now or self._now() >= known.deadline or known.updates.keys() >= set(known.sites)
            if known.state is not State.OPEN or not over:
                return known
            if len(known.updates) < known.min_sites:
                return self._ended(known, Event.EXPIRE, f"{len(known.updates)} of {known.min_sites} sites delivered")
            return known.go(Event.END)

        return await self._change(current, edit)

    async def lead(self, current: Round) -> Round:
        """Take a round whose collecting has ended to its end, or to where it waits for a person.

        Raises what a step fails with: the round stays where it is, and the step can be taken again.
        """
        steps = {
            State.COLLECTED: self._aggregate,
            State.AGGREGATED: self._look,
            State.PUBLISHING: self._publish,
        }
        with _one_at_a_time(self._place(current.model)):
            while step := steps.get(current.state):
                current = await step(current)
        return await self.clean(current)

    async def accept(self, current: Round) -> Round:
        """Publish a round that is held, all the same. Raises Conflict (``round_state``)."""
        noted = await self._refs_now(current)
        return await self.lead(await self._change(current, lambda known: known.go(Event.ACCEPT, candidates=noted)))

    async def discard(self, current: Round) -> Round:
        """Give up a round that is not being published. Raises Conflict (``round_state``)."""
        return await self.clean(
            await self._change(current, lambda known: self._ended(known, Event.DISCARD, "by the operator"))
        )

    async def clean(self, current: Round) -> Round:
        """Delete the updates of a round that needs them no more, and note that nothing is left to be done."""
        needs = current.state in (State.OPEN, State.COLLECTED)
        carried = current.state is State.EXPIRED and current.late > 0  # the next round takes them
        if not needs and not carried and not current.cleaned:
            await self.delete_updates(current)
            current = await self._records.change(
                current.model, current.number, lambda known: known.model_copy(update={"cleaned": True})
            )
        if current.state in FINAL:
            await self._records.done(current.model, current.number)
        return current

    async def delete_updates(self, current: Round) -> None:
        """Delete the updates of a round, and what an earlier one has left."""
        paths = [entry.path for entry in current.updates.values()]
        for number in (current.number, current.number - 1):
            paths += [path async for path in self._storage.paths(f"{folder(current.model, number)}/updates")]
        for start in range(0, len(paths), 1000):
            await self._storage.objects.delete(paths[start : start + 1000])

    # Aggregating

    async def _aggregate(self, current: Round) -> Round:
        """Make and store the candidates, and note them."""
        try:
            made = await self._make(current)
        except (TooFewSites, NonFinite) as error:
            reason = str(error)
            return await self._go(current, lambda known: self._ended(known, Event.EXPIRE, reason))
        now = await self._go(
            current,
            lambda known: known.go(
                Event.AGGREGATE,
                candidates=dict(made.candidates),
                statistics=dict(made.statistics),
                rejected=(*known.rejected, *made.rejected),
                epsilon=made.epsilon,
            ),
        )
        for rejection in made.rejected if now.candidates == made.candidates else ():
            if rejection.code == "norm_exceeded":
                struck = await book.strike(self._records, rejection.site, self._settings.strikes)
                about = {"model": now.model, "round": now.number, "strikes": struck.strikes, "code": rejection.code}
                await asyncio.to_thread(self._audit.add, "strike", rejection.site, **about)
        return now

    async def _make(self, current: Round) -> _Made:
        rejected = await self._rejected(current)
        chosen = {site: entry for site, entry in current.updates.items() if site not in {r.site for r in rejected}}
        if len(chosen) < current.min_sites:
            raise TooFewSites(f"{len(chosen)} of {current.min_sites} sites are left")
        base = await self._storage.manifest(current.model, current.base_revision)
        space = current.model if current.private else ""
        epsilon = await self._epsilon(current)
        codes = Counter(rejection.code for rejection in (*current.rejected, *rejected))
        provenance = Provenance(
            current.number,
            current.base_revision,
            len(chosen),
            current.rule,
            dict(codes),
            epsilon,
            current.noise.delta if current.noise and epsilon is not None else None,
        )
        async with self._folder(current.model) as place:
            model, tasks_file = place / "model", place / "tasks.toml"
            await fetch_model(self._storage, base, space, model)
            tasks = await tasks_of(self._storage, base, space)
            statistics = await self._take_off(current, chosen, base, model, place)
            write_tasks(tasks_file, tasks)
            ref = current.to_ref
            candidates = {ref: await self._store(current, model, ref, tasks_file, provenance)}
            if current.merge:
                adapter = adapter_of(base, taken(base.tensors, current.tensors))
                gone = await asyncio.to_thread(merge_adapter, model, base, adapter)
                write_tasks(tasks_file, tasks, gone)
                ref += MERGED
                candidates[ref] = await self._store(current, model, ref, tasks_file, provenance)
        return _Made(candidates, statistics, rejected, epsilon)

    async def _rejected(self, current: Round) -> list[Rejection]:
        """Updates that are left out, now that all are there: of sites that were put into quarantine since, and of a
        norm that could not be seen to be unusual when it came."""
        sites, at = await self._records.sites(), self._now().isoformat(timespec="seconds")
        norms = [entry.norm for entry in current.updates.values()]
        usual = current.noise.clip if current.noise else usual_norm(norms, len(norms))
        found = []
        for site, entry in current.updates.items():
            if sites[site].quarantined:
                found.append(Rejection(site=site, code="quarantined", time=at))
            elif usual is not None and entry.norm > TOO_LARGE * usual:
                found.append(Rejection(site=site, code="norm_exceeded", time=at))
        return found

    async def _take_off(
        self, current: Round, chosen: Mapping[str, Entry], base: Manifest, model: Path, place: Path
    ) -> dict[str, dict[str, float]]:
        """Change the base in ``model`` by the aggregate of the chosen updates; what the rule says of each site."""
        rule, noise = parse_rule(current.rule), current.noise
        ages = [current.number - entry.round for entry in chosen.values()]
        examples = [entry.examples for entry in chosen.values()]
        weighed = weights(examples, ages, by_examples=current.weights == "examples", late=current.late)
        async with AsyncExitStack() as stack:
            given = []
            for (site, entry), weight in zip(chosen.items(), weighed, strict=True):
                file = await stack.enter_async_context(self._storage.objects.local(entry.path, place))
                opened = stack.enter_context(file.open("rb"))
                if (
                    "sha256:" + (await asyncio.to_thread(hashlib.file_digest, opened, "sha256")).hexdigest()
                    != entry.digest
                ):
                    raise IntegrityError(f"the store has other bytes than {site} has sent")
                update = open_update(opened, entry.size)
                given.append(Contribution(site, weight, entry.norm, update))
            scratch = stack.enter_context((place / "scratch").open("x+b"))
            clip = noise.clip if noise else None
            parts = Aggregation(
                given,
                taken(base.tensors, current.tensors),
                rule,
                clip,
                budget=int(self._settings.memory),
                scratch=scratch,
            )
            blocks: Iterable[Block] = parts
            if noise:
                blocks = noisy(parts, Noise(noise.clip, noise.multiplier).deviation(rule, len(given)))
            await asyncio.to_thread(take_off, model, base, blocks)
            return _statistics(parts)

    async def _epsilon(self, current: Round) -> float | None:
        """What this round and those before it cost together; None without noise."""
        if current.noise is None:
            return None
        multipliers = [current.noise.multiplier]
        for number in range(1, current.number):
            before = await self._records.round(current.model, number)
            if before.candidates:
                multipliers.append(before.noise.multiplier if before.noise else 0.0)
        cost = await asyncio.to_thread(epsilon, multipliers, current.noise.delta)
        return cost if math.isfinite(cost) else None

    async def _store(
        self, current: Round, directory: Path, ref: str, tasks_file: Path, provenance: Provenance
    ) -> Candidate:
        """Store a directory as a revision, with deltas over the round's base."""
        done = await publish(
            _StoringSink(self._trust, self._ring(), self._now),
            directory,
            current.model,
            ref,
            private=current.private,
            tasks_file=tasks_file,
            base=current.base,
            provenance=provenance,
        )
        return Candidate(revision=done.revision)

    # The gate

    async def _look(self, current: Round) -> Round:
        """Ask the gate; what it says is noted with where the round goes."""
        gate, reason = current.gate, ""
        if gate:
            try:
                gate = await self._values(current, gate)
                reason = _worse(gate)
            except GateFailed as error:
                reason = str(error)
        if reason:
            return await self._go(current, lambda known: known.go(Event.HOLD, gate=gate, reason=reason))
        noted = await self._refs_now(current)
        return await self._go(current, lambda known: known.go(Event.SIGN, gate=gate, candidates=noted))

    async def _values(self, current: Round, gate: Gate) -> Gate:
        """What the command says of the base and of the candidate. Raises GateFailed."""
        revisions = (current.base, current.candidates[current.to_ref].revision)
        space, found = current.model if current.private else "", []
        async with self._folder(current.model) as place:
            for revision in revisions:
                manifest = await self._storage.manifest(current.model, Digest(revision))
                await fetch_model(self._storage, manifest, space, place / "model")
                found.append(await self._run(gate.command, place / "model"))
                await asyncio.to_thread(shutil.rmtree, place / "model")
        return gate.model_copy(update={"values": tuple(found)})

    async def _run(self, command: str, directory: Path) -> float:
        """The number in the last line that a command prints, given a model's directory. Raises GateFailed."""
        words = [*shlex.split(command), str(directory)]
        try:
            process = await asyncio.create_subprocess_exec(
                *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, start_new_session=True
            )
        except OSError as error:
            raise GateFailed(f"the gate did not start: {error.strerror}") from error
        try:
            async with asyncio.timeout(self._settings.gate_timeout):
                out, err = await process.communicate()
        except TimeoutError:
            raise GateFailed(f"the gate took over {self._settings.gate_timeout:.0f} s") from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
        lines = out.decode(errors="replace").split()
        try:
            if process.returncode:
                raise ValueError(f"it ended with {process.returncode}")
            value = float(lines[-1])
            if not math.isfinite(value):
                raise ValueError(f"it gave {value}")
        except (ValueError, IndexError) as error:
            tail = err.decode(errors="replace")[-OUTPUT:].strip()
            raise GateFailed(f"the gate gave no number at the end of its output: {error}; {tail}") from None
        return value

    # Publishing

    async def _refs_now(self, current: Round) -> dict[str, Candidate]:
        """The candidates, each with what its ref means now."""
        state = await self._trust.state()
        noted = {}
        for ref, candidate in current.candidates.items():
            before = ""
            with suppress(NotFound):
                before = state.ref(current.model, ref).revision
            noted[ref] = candidate.model_copy(update={"before": before})
        return noted

    async def _publish(self, current: Round) -> Round:
        """Sign what is not signed yet."""
        try:
            for ref, candidate in current.candidates.items():
                await self._sign(current, ref, candidate)
        except Conflict as error:
            if error.error_code != "ref_conflict":
                raise
            reason = str(error)
            return await self._go(current, lambda known: known.go(Event.HOLD, reason=reason))
        done = await self._go(current, lambda known: self._ended(known, Event.PUBLISH, ""))
        self._tell(current.model)
        return done

    async def _sign(self, current: Round, ref: str, candidate: Candidate) -> None:
        sink = LocalSink(self._trust, self._ring(), self._now)
        before = await sink.begin(current.model, ref, private=current.private)
        meant = before.revision if before else ""
        if meant == candidate.revision:
            return  # whoever was here before has signed it
        if meant != candidate.before:
            raise Conflict(f"{current.model}@{ref} was moved by somebody else meanwhile", code="ref_conflict")
        manifest = await self._storage.manifest(current.model, Digest(candidate.revision))
        if not await sink.put_manifest(manifest):
            raise DiskError(f"{candidate.revision}: shards are gone from the store; was gc run since?")
        await sink.move_ref(current.model, ref, manifest, before, private=current.private)

    # Records

    async def _go(self, current: Round, edit: Callable[[Round], Round]) -> Round:
        """The end of a step: change the record, unless somebody else has taken the step meanwhile."""
        return await self._change(current, lambda known: edit(known) if known.state is current.state else known)

    async def _change(self, current: Round, edit: Callable[[Round], Round]) -> Round:
        """Change a round's record, and say so where that brought it into another state."""
        came: list[bool] = []

        def noting(known: Round) -> Round:
            changed = edit(known)
            came[:] = [changed.state != known.state]
            return changed

        now = await self._records.change(current.model, current.number, noting)
        if came[-1:] == [True]:
            await self._say(now)
        return now

    async def _say(self, now: Round) -> None:
        about: dict[str, Any] = {"model": now.model, "round": now.number, "sites": len(now.updates)}
        if now.reason:
            about["reason"] = now.reason
        if now.candidates:
            about["candidates"] = {ref: candidate.revision for ref, candidate in now.candidates.items()}
        if now.rejected:
            about["rejected"] = dict(Counter(rejection.code for rejection in now.rejected))
        self._log.info(f"round {now.state}", **about)
        if self._metrics:
            self._metrics.federated_rounds.labels(now.state).inc()
        await asyncio.to_thread(self._audit.add, f"round {now.state}", "", **about)

    def _ended(self, known: Round, event: Event, reason: str) -> Round:
        return known.go(event, reason=reason, ended=self._now().isoformat(timespec="seconds"))

    def _place(self, model: str) -> Path:
        return self._work / f"{model.replace('/', '~')}.d"

    @asynccontextmanager
    async def _folder(self, model: str) -> AsyncIterator[Path]:
        """A model's folder, for a while; to whoever holds its lock."""
        place = self._place(model)
        try:
            place.mkdir()
        except OSError as error:
            raise DiskError(f"{place}: {error.strerror}") from error
        try:
            yield place
        finally:
            await asyncio.to_thread(shutil.rmtree, place, ignore_errors=True)

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock.time(), UTC)


def _worse(gate: Gate) -> str:
    """Why a round is held, by the gate's values (lower is better); empty where it goes on."""
    assert gate.values is not None
    base, candidate = gate.values
    if candidate - base <= gate.margin * abs(base):
        return ""
    return f"the gate gives {candidate:g}, and {base:g} for the base; {gate.margin:.2%} more are allowed"


def _statistics(parts: Aggregation) -> dict[str, dict[str, float]]:
    return {
        found.site: {
            "share": found.share,
            "norm": found.norm,
            "scale": found.scale,
            "distance": found.distance,
            "trimmed": found.trimmed,
        }
        for found in parts.statistics()
    }


@contextmanager
def _one_at_a_time(place: Path) -> Iterator[None]:
    """A lock of this machine on the rounds of a model, with a new folder for what is made of them.

    Raises Conflict (``in_use``), DiskError."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(place.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise DiskError(f"{place}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict("another process is closing this round", code="in_use") from None
        shutil.rmtree(place, ignore_errors=True)  # what one that was killed has left
        yield
    finally:
        os.close(descriptor)
