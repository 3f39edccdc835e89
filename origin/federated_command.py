"""``nearshard federated open``, ``status``, ``close``, ``pardon``: the rounds of a store at hand, for who runs the
origin. (What sites do with ``nearshard federated`` is the client's.)"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from origin.audit import Audit
from origin.commit import publisher_keys
from origin.config import OriginSettings
from origin.federated import sites as book
from origin.federated.closing import Closing
from origin.federated.documents import Gate, Noise, Round
from origin.federated.records import Records, Seal
from origin.federated.rounds import Opening, open_round
from origin.federated.rules import Rule
from origin.federated.transitions import State
from origin.keyring import Keyring, keys_beside, load_ring
from origin.publish_command import Ca, Json, Keys, Routers, Store, tell_routers
from origin.signing import key_id
from origin.storage import Storage
from origin.trust_store import TrustStore
from shared import log
from shared.clock import SystemClock
from shared.config import load, size
from shared.errors import ConfigError, RequestError
from shared.federated import accepts
from shared.ids import DEFAULT_REF, parse_model, parse_name, parse_ref, parse_ref_or_revision
from shared.web.command import run_program

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Open, watch and close federated rounds. Sites have words of their own: `nearshard federated enroll`, `rounds`"
    " and `submit`.",
)
Model = Annotated[str, typer.Argument(metavar="MODEL", help="org/name.")]
DELTA = 1e-5
_SPAN = re.compile(r"([0-9]+(?:\.[0-9]+)?)([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass
class _Origin:
    """The store at hand, and what is done with its rounds."""

    settings: OriginSettings
    trust: TrustStore
    records: Records
    closing: Closing
    ring: Keyring
    audit: Audit
    changed: list[str]
    """Models that were published."""

    @classmethod
    def at(cls, store: str | None, keys: list[Path] | None) -> _Origin:
        """Raises ConfigError."""
        where = store or load(OriginSettings, []).store
        settings = load(OriginSettings, ["--store", where])
        trust, clock = TrustStore(Storage(where)), SystemClock()
        ring = load_ring(keys or [keys_beside(where)])
        audit = Audit(settings.audit_file, _now)
        records, changed = Records(trust.storage, Seal(trust, lambda: list(ring.values()))), list[str]()
        closing = Closing(
            records,
            trust,
            lambda: ring,
            settings.federated,
            settings.federated_folder / "work",
            audit,
            changed.append,
            clock,
            log.configure("warning", settings.log_format, "federated"),
        )
        return cls(settings, trust, records, closing, ring, audit, changed)

    async def who(self, model: str) -> str:
        """Whose key at hand may publish a model, for the audit log. Raises RequestError (``not_publisher``)."""
        state = await self.trust.state()
        private = next(iter(state.refs(model).values())).private
        return key_id(publisher_keys(state, model, self.ring, private=private)[0])


@app.command(name="open", epilog="Example: nearshard federated open acme/bert --sites sites.toml --deadline 1h")
def open_command(
    model: Model,
    sites: Annotated[Path, typer.Option(help='The sites: [sites.<name>] key = "<64 hex digits>" each, as TOML.')],
    min_sites: Annotated[int, typer.Option(help="Fewer than these at the deadline, and nothing is published.")] = 5,
    deadline: Annotated[str, typer.Option(help="From now: 90s, 30m, 1h, 2d.")] = "1h",
    base: Annotated[str, typer.Option(metavar="REF_OR_REV", help="What the sites train on.")] = DEFAULT_REF,
    to_ref: Annotated[str, typer.Option(help="The ref that is to mean the result.")] = "canary",
    tensors: Annotated[
        list[str] | None, typer.Option(help="Glob of tensors that take part; again for more. All floats by default.")
    ] = None,
    codec: Annotated[
        list[str] | None,
        typer.Option(help="Glob of codecs to accept; again for more. Those that go with the rule by default."),
    ] = None,
    rule: Annotated[
        str, typer.Option(help="How updates are made one: nnm, trimmed (with --noise), krum, median or mean.")
    ] = "",
    weights: Annotated[str, typer.Option(help="equal, or examples: by what sites say they have, capped.")] = "equal",
    late: Annotated[
        float, typer.Option(help="Take updates for earlier rounds, with this factor of weight for each round of age.")
    ] = 0.0,
    gate: Annotated[
        str, typer.Option(help="Command that is given a model's directory and prints its loss on held-out data.")
    ] = "",
    gate_margin: Annotated[str, typer.Option(help="By how much of the base's the result's may be higher.")] = "1%",
    merge: Annotated[
        bool, typer.Option("--merge", help="Also publish the weights with the adapter in them, as REF-merged.")
    ] = False,
    noise: Annotated[
        float, typer.Option(help="Differential privacy: noise of so many times a site's influence; with --clip.")
    ] = 0.0,
    clip: Annotated[float, typer.Option(help="The norm that updates are scaled down to; the median's else.")] = 0.0,
    delta: Annotated[float, typer.Option(help="Of differential privacy.")] = DELTA,
    max_update: Annotated[str, typer.Option(help="Bytes that an update may have; the origin's setting else.")] = "",
    store: Store = None,
    keys: Keys = None,
    as_json: Json = False,
) -> None:
    """Open a round: from now on the sites' updates of a model are taken in."""
    origin = _Origin.at(store, keys)
    try:
        named = book.parse_sites(sites.read_text(encoding="utf-8"), str(sites))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{sites}: {error}") from error
    if bool(noise) != bool(clip):
        raise ConfigError("--noise needs --clip, and the other way round")
    asked = Opening(
        model=parse_model(model),
        sites=named,
        base=parse_ref_or_revision(base),
        to_ref=parse_ref(to_ref),
        deadline=_span(deadline),
        min_sites=min_sites,
        max_bytes=_bytes(max_update) if max_update else int(origin.settings.federated.max_update),
        tensors=tuple(tensors or ()),
        codecs=tuple(codec or ()),
        rule=rule or str(Rule("trimmed") if noise else Rule()),
        weights=_weights(weights),
        late=late,
        merge=merge,
        gate=Gate(command=gate, margin=_share(gate_margin)) if gate else None,
        noise=Noise(multiplier=noise, clip=clip, delta=delta) if noise else None,
    )

    async def run() -> Round:
        who = await origin.who(asked.model)
        opened = await open_round(origin.records, origin.trust, origin.closing, asked, _now())
        if coarse := [name for name in asked.codecs if not accepts(asked.suited, name)]:
            sys.stderr.write(
                f"warning: {asked.rule} moves far what comes as {', '.join(coarse)}: better --rule nnm or mean, or "
                f"of codecs only {', '.join(asked.suited)}\n"
            )
        origin.audit.add(
            "round opened", who, model=opened.model, round=opened.number, base=opened.base, sites=list(opened.sites)
        )
        return opened

    _show(asyncio.run(run()), as_json=as_json)


@app.command(name="status", epilog="Example: nearshard federated status acme/bert")
def status(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="org/name; all that have rounds by default.")] = "",
    store: Store = None,
    as_json: Json = False,
) -> None:
    """Show the last round of a model, and the sites that were refused too often."""
    origin = _Origin.at(store, [])

    async def run() -> tuple[list[Round], dict[str, Any]]:
        named = [parse_model(model)] if model else await origin.records.models()
        sites = await origin.records.sites()
        struck = {name: site.model_dump(exclude={"key"}) for name, site in sites.items() if site.strikes}
        return [await origin.records.newest(name) for name in named], struck

    rounds, struck = asyncio.run(run())
    if as_json:
        document = {"rounds": [found.model_dump(mode="json") for found in rounds], "strikes": struck}
        sys.stdout.write(json.dumps(document) + "\n")
        return
    for found in rounds:
        _show(found, as_json=False)
    for name, site in struck.items():
        state = "in quarantine" if site["quarantined"] else "not in quarantine"
        sys.stdout.write(f"site {name}: {site['strikes']} strikes, {state}\n")


@app.command(name="close", epilog="Example: nearshard federated close acme/bert --accept")
def close(
    model: Model,
    accept: Annotated[bool, typer.Option("--accept", help="Publish a round that is held.")] = False,
    discard: Annotated[bool, typer.Option("--discard", help="Give the round up; nothing is published.")] = False,
    store: Store = None,
    keys: Keys = None,
    router: Routers = None,
    ca: Ca = None,
    as_json: Json = False,
) -> None:
    """End a round now: aggregate what is there, ask the gate, and publish."""
    if accept and discard:
        raise ConfigError("--accept and --discard are two ends; give one")
    origin, name = _Origin.at(store, keys), parse_model(model)

    async def run() -> Round:
        who, closing = await origin.who(name), origin.closing
        current = await origin.records.newest(name)
        steps: dict[str, Callable[[Round], Awaitable[Round]]] = {"accept": closing.accept, "discard": closing.discard}
        asked = "accept" if accept else "discard" if discard else "close"
        origin.audit.add(f"round {asked}", who, model=name, round=current.number)
        if asked in steps:
            return await steps[asked](current)
        if current.state is State.HELD:
            raise RequestError(
                f"round {current.number} is held: {current.reason}; --accept or --discard it", code="round_state"
            )
        return await closing.lead(await closing.end_if_over(current, now=True))

    done = asyncio.run(run())
    if origin.changed:
        asyncio.run(tell_routers(router or [], name, ca))
    _show(done, as_json=as_json)


@app.command(name="pardon", epilog="Example: nearshard federated pardon berlin")
def pardon(
    site: Annotated[str, typer.Argument(metavar="SITE", help="Its name.")],
    store: Store = None,
    keys: Keys = None,
) -> None:
    """Forget a site's strikes, and take it out of quarantine."""
    origin = _Origin.at(store, keys)
    before = asyncio.run(book.pardon(origin.records, parse_name(site, "a site")))
    origin.audit.add("site pardoned", "", site=site, strikes=before.strikes)
    sys.stdout.write(f"{site} had {before.strikes} strikes; it has none now\n")


def _show(found: Round, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(found.model_dump_json() + "\n")
        return
    lines = [
        f"{found.model} round {found.number} is {found.state}: {len(found.updates)} of {len(found.sites)} sites"
        f" delivered, {found.min_sites} needed"
    ]
    if found.state is State.OPEN:
        lines.append(f"upon {found.base}, until {found.deadline:%Y-%m-%d %H:%M:%S} UTC")
    if found.reason:
        lines.append(f"because: {found.reason}")
    for ref, candidate in found.candidates.items():
        lines.append(f"{found.model}@{ref}: {candidate.revision}")
    if found.epsilon is not None and found.noise:
        lines.append(f"epsilon {found.epsilon:.3g} at delta {found.noise.delta:g}, all rounds together")
    for site, told in found.statistics.items():
        lines.append(
            f"  {site}: norm {told['norm']:.4g}, scaled by {told['scale']:.3g}, {told['distance']:.4g} from the result,"
            f" {told['trimmed']:.0%} left out"
        )
    lines += [f"  {rejection.site}: refused, {rejection.code}" for rejection in found.rejected]
    sys.stdout.write("\n".join([*lines, ""]))


def _span(text: str) -> timedelta:
    match = _SPAN.fullmatch(text)
    if match is None:
        raise ConfigError(f"--deadline: {text!r} is not like 90s, 30m, 1h or 2d")
    try:
        return timedelta(seconds=float(match[1]) * _SECONDS[match[2]])
    except OverflowError:
        raise ConfigError("--deadline: up to 30 days from now") from None


def _share(text: str) -> float:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(%?)", text)
    if match is None:
        raise ConfigError(f"--gate-margin: {text!r} is not like 1% or 0.01")
    return float(match[1]) / (100 if match[2] else 1)


def _bytes(text: str) -> int:
    try:
        return int(size(text))
    except ValueError:
        raise ConfigError(f"--max-update: {text!r} is not like 256MiB") from None


def _weights(text: str) -> Literal["equal", "examples"]:
    if text == "equal":
        return "equal"
    if text == "examples":
        return "examples"
    raise ConfigError(f"--weights: {text!r} is not equal or examples")


def _now() -> datetime:
    return datetime.now(UTC)


def main() -> None:
    """Run the command."""
    run_program(app, "nearshard federated")


if __name__ == "__main__":
    main()
