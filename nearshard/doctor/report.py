"""What the doctor says: a table for people, a document for machines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nearshard.doctor.apply import Changed
from nearshard.doctor.checks import CHECKS, ms, size
from nearshard.doctor.facts import Facts, Finding, Status

_STYLES = {Status.OK: "green", Status.SLOW: "yellow", Status.BROKEN: "bold red", Status.UNKNOWN: "dim"}
WIDTH = 500
"""Columns where there is no terminal: lines that are not broken can be searched."""


def show(console: Console, facts: Facts, findings: Sequence[Finding]) -> None:
    """The table, and below it what to do, why, and where that is from."""
    table = Table("", "check", "of", "found", box=None, pad_edge=False, header_style="dim")
    for finding in findings:
        verdict = Text(finding.status.value, _STYLES[finding.status])
        table.add_row(verdict, finding.check, Text(finding.subject), Text(finding.value))
    console.print(table)
    console.print(Text(_path(facts)), highlight=False)
    todo = [finding for finding in findings if finding.advice and finding.status is not Status.OK]
    for finding in sorted(todo, key=lambda one: one.status is not Status.BROKEN):
        _show_advice(console, finding)
    counted = Counter(finding.status for finding in findings)
    console.print(Text("\n" + ", ".join(f"{counted[status]} {status.value}" for status in Status)))
    if any(finding.settings for finding in todo):
        console.print(Text("nearshard doctor --apply sets what can be set here; --undo takes it back"))


def _show_advice(console: Console, finding: Finding) -> None:
    check = next(check for check in CHECKS if check.id == finding.check)
    subject = f" ({finding.subject})" if finding.subject else ""
    console.print(
        Text.assemble("\n", (f"{check.id}{subject}", _STYLES[finding.status]), f": {check.why}\n  {finding.advice}\n"),
        Text(f"  see {check.source}", "dim"),
        sep="",
    )


def _path(facts: Facts) -> str:
    network = facts.network
    if network.rate is None or facts.product is None:
        return "\nThe path: its rate or its round trip is not known"
    round_trip = network.rate_round_trip or facts.round_trip or 0.0
    return (
        f"\nThe path: {size(network.rate)}/s ({network.rate_of}), {ms(round_trip)} round trip:"
        f" {size(facts.product)} under way when it is full"
    )


def document(facts: Facts, findings: Sequence[Finding], changed: Changed | None = None) -> dict[str, Any]:
    """The same for a script: sizes in bytes, times in seconds."""
    counted = Counter(finding.status for finding in findings)
    return {
        "findings": [_record(finding) for finding in findings],
        "counts": {status.value: counted[status] for status in Status},
        "path": {
            "rate": facts.network.rate,
            "round_trip": facts.network.rate_round_trip or facts.round_trip,
            "bandwidth_delay_product": facts.product,
        },
        **({"changed": changes(changed)} if changed else {}),
    }


def _record(finding: Finding) -> dict[str, Any]:
    return {
        "check": finding.check,
        "subject": finding.subject,
        "status": finding.status.value,
        "value": finding.value,
        "advice": finding.advice,
        "settings": {f"/{one.path}": one.value for one in finding.settings},
    }


def changes(changed: Changed) -> dict[str, Any]:
    """What was changed, for a script."""
    return {
        "files": [f"/{name}" for name in changed.files],
        "values": {f"/{one.path}": one.value for one in changed.values},
        "refused": {f"/{path}": why for path, why in changed.refused.items()},
    }


def show_changed(console: Console, changed: Changed) -> None:
    """What was changed, for people."""
    for name in changed.files:
        console.print(Text(f"/{name}: done"))
    for one in changed.values:
        console.print(Text(f"now: {one.line}"))
    for path, why in changed.refused.items():
        console.print(Text(f"/{path} is as it was ({why}); the files have it for the next start", "yellow"))
