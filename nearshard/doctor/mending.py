"""What the files of ``--apply`` say. Pure.

A file of ours begins with a line that has the SHA-256 of the rest: one that somebody changed is theirs.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

from nearshard.doctor.facts import Finding, Setting, Status

SYSCTL_FILE = "etc/sysctl.d/90-nearshard.conf"
UDEV_FILE = "etc/udev/rules.d/90-nearshard.rules"
_HEAD = "# By nearshard doctor --apply; nearshard doctor --undo takes it back. sha256:"
_SAFE = re.compile(r"(proc/sys|sys/block)(/[A-Za-z0-9_][A-Za-z0-9_:-]*)+")
_VALUE = re.compile(r"[A-Za-z0-9_-]+( [A-Za-z0-9_-]+)*")


def wanted(findings: Iterable[Finding]) -> tuple[Setting, ...]:
    """What was judged to need mending, and can be by a setting; each path once, in the order of the findings."""
    settings = {
        setting.path: setting
        for finding in findings
        if finding.status is not Status.OK
        for setting in finding.settings
        if is_safe(setting)
    }
    return tuple(settings.values())


def is_safe(setting: Setting) -> bool:
    """Whether path and value can stand in the files, and stay below the two directories."""
    return bool(_SAFE.fullmatch(setting.path) and _VALUE.fullmatch(setting.value))


def files_of(settings: Iterable[Setting]) -> dict[str, str]:
    """The files that set these at every start, by path below ``/``; one that would be empty is not there."""
    ordered = sorted(settings, key=_order)
    sysctls = [f"{one.line}\n" for one in ordered if one.path.startswith("proc/sys/")]
    rules = [_rule(one) for one in ordered if one.path.startswith("sys/block/")]
    texts = {SYSCTL_FILE: "".join(sysctls), UDEV_FILE: "".join(rules)}
    return {path: sealed(text) for path, text in texts.items() if text}


def _order(setting: Setting) -> tuple[bool, str]:
    """A change of the scheduler sets the number of requests anew, so it comes first."""
    return not setting.path.endswith("/scheduler"), setting.path


def _rule(setting: Setting) -> str:
    _, _, device, attribute = setting.path.split("/", 3)
    return f'ACTION=="add|change", SUBSYSTEM=="block", KERNEL=="{device}", ATTR{{{attribute}}}="{setting.value}"\n'


def sealed(text: str) -> str:
    """A file of ours with this content."""
    return f"{_HEAD}{_digest(text)}\n{text}"


def is_ours(text: str) -> bool:
    """Whether a file is as it was written here."""
    head, _, rest = text.partition("\n")
    return head == _HEAD + _digest(rest)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
