"""Submitting an update, from what was trained to the origin's word that it is counted.

What an earlier run left on its way is settled first, by asking with the same body: whatever was lost, an answer or the
process itself, an update is counted once or not at all, and its feedback is kept if and only if it was counted.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from nearshard.federated.making import Made, Manner, choose_codecs, make_update
from nearshard.federated.sending import Rejected, Sender, Upload
from nearshard.federated.site import Site
from nearshard.federated.state import Pending, State
from nearshard.federated.values import Values, check_covers, of_path, of_state_dict
from shared.clock import Clock
from shared.digest import Digest
from shared.errors import RequestError
from shared.federated import NONCE, Counted, OpenRound, Rounds, Statement, sign_statement, taken
from shared.manifest import Manifest

T = TypeVar("T")

ABOUT_THE_UPDATE = (
    "stale_round", "other_update", "bad_update", "bad_body", "too_large", "digest_mismatch", "schema_mismatch",
    "non_finite", "norm_exceeded", "unknown_codec",
)  # fmt: skip
"""Refusals that stay what they are however often the same body is sent. After any other (of who asks, or when), the
update is kept, and sent again by the next run."""


@dataclass(frozen=True)
class Submitted:
    """What became of an update."""

    model: str
    site: str
    round: int
    """The round that it was made for."""
    base: Digest
    size: int
    """Bytes of the update."""
    clipped: bool
    """Whether it was larger than most, and counts scaled down."""
    resumed: bool
    """Whether it is one that an earlier run had made: what was given now was not sent."""
    full: int = 0
    """Bytes of the same values as float32; 0 where it was made by an earlier run."""
    codecs: tuple[str, ...] = ()


class Submitting:
    """Of one site and model."""

    def __init__(self, site: Site, model: str, sender: Sender, clock: Clock) -> None:
        self._site, self._model, self._sender, self._clock = site, model, sender, clock
        self._state = State(site.folder / model)

    async def submit(
        self,
        trained: Path | Mapping[str, Any],
        base: Digest,
        read_base: Callable[[Digest, OpenRound], Awaitable[tuple[Manifest, Mapping[str, Values]]]],
        *,
        examples: int,
        manner: Manner,
    ) -> Submitted:
        """Have what was trained upon ``base`` counted in the open round. ``read_base``: the manifest of a revision, and
        the tensors that the round takes.

        Raises Rejected, SiteClock, RequestError; UpstreamError where it could not be sent to the end: the next call
        goes on. NonFinite, SchemaMismatch, TensorFileError, SiteBusy, ConfigError, DiskError.
        """
        with self._state.locked():
            rounds, before = await self._sender.rounds(self._model), self._state.kept.pending
            if before is not None and (settled := await self._settle(before, base, rounds)) is not None:
                return settled
            opened, number = self._find_round(rounds, base)
            manifest, values = await read_base(base, opened)
            made = await asyncio.to_thread(self._make, manifest, values, trained, opened, manner)
            written, files = made.written, (made.update, made.feedback)
            pending = Pending(number, base, examples, written.digest, written.size, made.codecs, *files)
            await asyncio.to_thread(self._state.begin, pending)
            counted = await self._send(pending, late=bool(opened.late))
            done = self._submitted(pending, counted)
            return replace(done, full=made.full)

    # What is on its way

    async def _settle(self, pending: Pending, base: Digest, rounds: Rounds) -> Submitted | None:
        """What became of an earlier run's update; None where the way is free for another."""
        opened = rounds.open
        try:
            if opened is not None and opened.base == base != pending.base:
                await self._withdraw(pending)  # a site has one update a round, and now there is a fresh one
                return None
            counted = await self._send(pending, late=opened is None)
        except Rejected:
            if self._state.kept.pending is not None:
                raise
            return None
        return self._submitted(pending, counted, resumed=True) if pending.base == base else None

    async def _withdraw(self, pending: Pending) -> None:
        """Not send it, unless it is counted already."""
        offer = await self._asked(pending, self._sender.ask, late=False)
        await asyncio.to_thread(self._state.counted if offer.duplicate else self._state.dropped)

    async def _send(self, pending: Pending, *, late: bool) -> Counted:
        """Send what is pending, and keep what is said of it. ``late``: whether a later round may take it."""
        counted = await self._asked(pending, self._sender.send, late=late)
        await asyncio.to_thread(self._state.counted)
        return counted

    async def _asked(self, pending: Pending, ask: Callable[[Upload], Awaitable[T]], *, late: bool) -> T:
        """What the origin says to what is pending. What it will never take is dropped."""
        try:
            return await ask(self._upload(pending))
        except Rejected as error:
            if error.error_code == "stale_round" and late:
                raise Rejected(
                    f"round {pending.round} of {self._model} was closed meanwhile. The update is kept: the next"
                    " `nearshard federated submit` sends it to the round that is open then, if that takes late ones",
                    code=error.error_code,
                ) from error
            if error.error_code in ABOUT_THE_UPDATE:
                await asyncio.to_thread(self._state.dropped)
            raise

    def _submitted(self, pending: Pending, counted: Counted, *, resumed: bool = False) -> Submitted:
        return Submitted(
            self._model,
            self._site.name,
            pending.round,
            pending.base,
            pending.size,
            counted.clipped,
            resumed,
            codecs=pending.codecs,
        )

    def _upload(self, pending: Pending) -> Upload:
        def state() -> tuple[bytes, str]:
            statement = Statement(
                self._site.name,
                self._model,
                pending.round,
                pending.base,
                secrets.token_bytes(NONCE),
                datetime.fromtimestamp(self._clock.time(), UTC),
                pending.examples,
                pending.digest,
                pending.size,
                pending.codecs,
            )
            return sign_statement(statement, self._site.key)

        return Upload(self._model, pending.size, self._state.path(pending.update), state)

    # A new one

    def _find_round(self, rounds: Rounds, base: Digest) -> tuple[OpenRound, int]:
        """The open round, and the number of the one that an update upon ``base`` is for. Raises RequestError."""
        if rounds.open is None:
            raise RequestError(f"no round of {self._model} is open; see `nearshard federated rounds`", code="no_round")
        number = rounds.number_for(base)
        if number is None:
            raise RequestError(
                f"round {rounds.open.number} of {self._model} is upon {rounds.open.base}, and what was trained is upon"
                f" {base}: get that revision, and train on it",
                code="stale_round",
            )
        return rounds.open, number

    def _make(
        self,
        manifest: Manifest,
        base: Mapping[str, Values],
        trained: Path | Mapping[str, Any],
        opened: OpenRound,
        manner: Manner,
    ) -> Made:
        shapes = taken(manifest.tensors, opened.tensors)
        values = of_path(trained) if isinstance(trained, Path) else of_state_dict(trained)
        check_covers(values, shapes)
        codecs = choose_codecs(manner, opened.codecs, self._state.kept.rounds + 1)
        made = make_update(
            self._state, shapes, base, values, codecs, feedback=manner.feedback, momentum=manner.momentum
        )
        if made.written.size > opened.max_bytes:
            raise RequestError(
                f"the update takes {made.written.size} bytes, the round {opened.max_bytes}; a smaller --codec helps",
                code="too_large",
            )
        return made
