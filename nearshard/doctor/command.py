"""``nearshard doctor``."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import typer
from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.console import Console
from rich.text import Text

from nearshard.doctor import apply as applying
from nearshard.doctor import report
from nearshard.doctor.checks import examine
from nearshard.doctor.facts import Facts, Finding, Network, Setting, Status
from nearshard.doctor.machine import read_machine
from nearshard.doctor.mending import UDEV_FILE, wanted
from nearshard.doctor.network import Asking, look
from nearshard.guide import parse_routers
from shared.clock import SystemClock
from shared.errors import EXIT_BROKEN, RequestError
from shared.web.resolver import AheadResolver
from shared.web.session import make_session
from shared.web.tls import tls_by

RELOAD = "udevadm control --reload && udevadm trigger --subsystem-match=block --action=change"


@dataclass(frozen=True)
class Options:
    """What was asked for. ``places``: role and directory; ``root`` stands for ``/``."""

    routers: Sequence[str]
    places: Sequence[tuple[str, Path]]
    root: Path
    rate: str | None = None
    region: str | None = None
    ca: Path | None = None
    network: bool = True
    metered: bool = False
    apply: bool = False
    undo: bool = False
    yes: bool = False
    as_json: bool = False


def run(options: Options) -> int:
    """Do it; the exit code: 0, or EXIT_BROKEN where something is. Raises RequestError, ConfigError, LocalError."""
    if options.apply and options.undo:
        raise RequestError("--apply and --undo are two things: give one")
    console = Console(width=None if sys.stdout.isatty() else report.WIDTH, highlight=False, soft_wrap=False)
    if options.apply:
        applying.require_root(options.root)
    if options.undo:
        return _undo(console, options)
    facts = _facts(options)
    findings = examine(facts)
    if not options.as_json:
        report.show(console, facts, findings)
    changed = _apply(console, options, wanted(findings)) if options.apply else None
    if options.as_json:
        sys.stdout.write(json.dumps(report.document(facts, findings, changed)) + "\n")
    return _exit_code(findings)


def _exit_code(findings: Sequence[Finding]) -> int:
    return EXIT_BROKEN if any(finding.status is Status.BROKEN for finding in findings) else 0


def _facts(options: Options) -> Facts:
    clock, tls = SystemClock(), tls_by(options.ca)
    routers, rate = parse_routers(options.routers), _rate(options.rate)
    machine = read_machine(options.root, options.places, clock)
    if not options.network:
        network = Network(asked=False, rate=rate, rate_of="as given")
        return Facts(machine, network, clock.time())

    def session(resolver: AheadResolver) -> aiohttp.ClientSession:
        return make_session(resolver=resolver, tls=tls)

    asking = Asking(
        routers, clock, make_session=session, region=options.region or "", rate=rate, metered=options.metered
    )
    return Facts(machine, asyncio.run(look(asking)), clock.time())


def _rate(text: str | None) -> float | None:
    """Bytes a second of ``5MB``. Raises RequestError."""
    if text is None:
        return None
    try:
        rate = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError as error:
        raise RequestError("--rate is bytes a second, as 5MB or 12MiB") from error
    if rate <= 0:
        raise RequestError("--rate is more than nothing")
    return float(rate)


def _apply(console: Console, options: Options, settings: Sequence[Setting]) -> applying.Changed:
    if not settings:
        if not options.as_json:
            console.print(Text("\nnothing here needs a setting"))
        return applying.Changed()
    files = applying.plan(options.root, settings)
    if not options.yes and not _agreed(files, settings):
        raise RequestError("nothing was changed: say yes on a terminal, or give --yes")
    changed = applying.apply(options.root, settings)
    if not options.as_json:
        report.show_changed(console, changed)
        if UDEV_FILE in changed.files:
            console.print(Text(f"disks have their values now; for udev to know them too: {RELOAD}"))
    return changed


def _agreed(files: Mapping[str, str], settings: Sequence[Setting]) -> bool:
    """Show all of it, on stderr, and ask."""
    for name, text in files.items():
        sys.stderr.write(f"\n/{name} would be:\n{text}")
    sys.stderr.write("\nand now:\n" + "".join(f"{one.line}\n" for one in settings))
    return sys.stdin.isatty() and typer.confirm("Change this machine so?", err=True)


def _undo(console: Console, options: Options) -> int:
    changed = applying.undo(options.root)
    if options.as_json:
        sys.stdout.write(json.dumps({"changed": report.changes(changed)}) + "\n")
    elif changed == applying.Changed():
        console.print("there is nothing to take back")
    else:
        report.show_changed(console, changed)
        if UDEV_FILE in changed.files:
            console.print(Text(f"for udev to forget its rules: {RELOAD}"))
    return 0
