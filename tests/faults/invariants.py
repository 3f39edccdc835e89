"""What must hold after every fault, whatever it was.

Each function asserts one of: nothing wrong or partial is kept, no request hangs, memory and descriptors come back,
service comes back, nothing crashes.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from tests.faults.client import Answer, get, until
from tests.harness import NotYet, Service

RECOVERY = 10.0
"""Seconds after the end of a fault in which a service must be well."""
SETTLING = 60.0
"""Seconds in which memory and descriptors are back."""
SLACK_MEMORY, SLACK_FILES = 24 << 20, 8
"""Beside a tenth: what an allocator keeps, and a few connections upstream."""
_FAILED = re.compile(r"status=500\b|a request failed|a fill failed")


@dataclass(frozen=True)
class Usage:
    """Memory (bytes) and open descriptors of a process."""

    memory: int
    files: int


def usage(service: Service) -> Usage:
    """Right now."""
    return Usage(_status(service, "VmRSS"), open_files(service))


def open_files(service: Service) -> int:
    """Open descriptors of a process."""
    return len(os.listdir(f"/proc/{service.pid}/fd"))


def forget_peak(service: Service) -> int:
    """Begin a new peak of memory; what is in use now."""
    Path(f"/proc/{service.pid}/clear_refs").write_text("5")
    return _status(service, "VmRSS")


def peak(service: Service) -> int:
    """The most memory in use since ``forget_peak``."""
    return _status(service, "VmHWM")


def _status(service: Service, name: str) -> int:
    lines = Path(f"/proc/{service.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name + ":"))


def nothing_wrong_is_kept(data: Path) -> int:
    """Every file with a final name is named by its bytes' digest: none is wrong or partial. Gives their number."""
    count = 0
    for path in (data / "blobs").rglob("*"):
        if path.is_file():
            assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name, f"{path} has other bytes than its name"
            assert path.parent.name == path.name[:2]
            count += 1
    return count


def nothing_wrong_came(answer: Answer, digest: str) -> None:
    """A whole 200 is right; everything else shows itself as an error, or is short of its Content-Length."""
    assert answer.gave(digest) or not (answer.status == 200 and answer.whole), "wrong bytes that look whole"
    assert answer.status == 200 or answer.is_refusal() or answer.status == 0, (answer.status, answer.body)


async def usage_returns(service: Service, before: Usage) -> None:
    """Memory and descriptors are within a tenth of what they were."""

    def back() -> bool:
        now = usage(service)
        memory = now.memory <= before.memory * 1.1 + SLACK_MEMORY
        return memory and now.files <= before.files * 1.1 + SLACK_FILES

    try:
        await until(back, "memory and descriptors back", SETTLING)
    except NotYet:
        raise AssertionError(f"{before} before, {usage(service)} after") from None


async def serves(service: Service, digest: str, deadline: float = RECOVERY) -> None:
    """A shard is served, whole and right, within the time to recover; refusals on the way are typed."""
    loop = asyncio.get_running_loop()
    end = loop.time() + deadline
    while True:
        answer = await get(service.port, f"/blobs/{digest}", deadline=deadline)
        if answer.gave(digest):
            return
        nothing_wrong_came(answer, digest)
        assert loop.time() < end, f"not served again within {deadline} s: {answer.status}"


def nothing_crashed(service: Service) -> None:
    """The process runs; its log has no traceback, and no answer was 500."""
    assert not service.ended(), service.text()
    text = service.text()
    assert "Traceback" not in text, text
    found = _FAILED.search(text)
    assert found is None, text[max(0, found.start() - 500) : found.end() + 500] if found else ""


async def settled(service: Service) -> None:
    """No fill is under way, nothing is pinned, nobody is being served."""

    def still() -> bool:
        status = service.status()
        pinned = status["memory"]["pinned"] + status["disk"]["pinned"]
        return bool(status["fills"] == pinned == status["in_flight"] == 0)

    await until(still, "nothing under way")


async def all_hold(service: Service, data: Path, before: Usage | None = None) -> int:
    """After any fault: settled, nothing wrong or partial kept, nothing crashed, resources back. Gives shards kept."""
    await settled(service)
    kept = nothing_wrong_is_kept(data)
    assert list((data / "tmp").iterdir()) == [], "a fill left its temporary file"
    nothing_crashed(service)
    if before:
        await usage_returns(service, before)
    return kept


def code_of(answer: Answer) -> str:
    """The error code of a problem document."""
    return str(json.loads(answer.body)["code"])
