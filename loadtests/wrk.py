"""wrk, run once: what it saw, what that cost the server, and whether other programs were in the way."""

from __future__ import annotations

import json
import re
import resource
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtests.services import BenchmarkError, Service, bound, busy_seconds, cpu_seconds

HEAD = 2048
"""Bytes that the head of an answer has at most."""
NOISE = 0.2
"""Cores taken by other programs from which on a sample is not to be trusted."""
PATIENCE = 60
"""Seconds that may be spent, in all, on taking such samples again."""
SCRIPT = """\
done = function(summary, latency)
    local e = summary.errors
    io.write(string.format('{"us": %d, "requests": %d, "bytes": %d, "errors": %d, "p50": %d, "p99": %d}',
        summary.duration, summary.requests, summary.bytes,
        e.connect + e.read + e.write + e.status + e.timeout, latency:percentile(50), latency:percentile(99)))
end
"""
CYCLE = """
local number, requests = 0, {}
init = function(args)
    for path in io.lines("%s") do requests[#requests + 1] = wrk.format("GET", path) end
end
request = function()
    number = number %% #requests + 1
    return requests[number]
end
"""
"""Asks for one path after the other, from a file with one in each line."""


@dataclass(frozen=True)
class Sample:
    """One run. Rates are by second, bytes with heads; latencies in milliseconds; processor time in cores."""

    requests: float
    bytes: float
    p50: float
    p99: float
    cpu: float
    """Taken by the server."""
    others: float
    """Taken by neither the server nor wrk, of the whole machine: noise."""

    @property
    def requests_by_cpu(self) -> float:
        """Requests by second of the server's processor time."""
        return self.requests / self.cpu

    @property
    def bytes_by_cpu(self) -> float:
        """Bytes by second of the server's processor time."""
        return self.bytes / self.cpu


class Wrk:
    """wrk with one thread on one core. Keeps its script in ``directory``."""

    def __init__(self, directory: Path, core: int) -> None:
        self._script = directory / "done.lua"
        self._script.write_text(SCRIPT)
        self._cycle, self._paths = directory / "cycle.lua", directory / "paths"
        self._cycle.write_text(SCRIPT + CYCLE % self._paths)
        self._core = core
        self._patience = PATIENCE

    def load(
        self, server: Service, path: str, *, size: int, fields: Mapping[str, str], connections: int, seconds: int
    ) -> Sample:
        """Ask for ``path`` over and over; answers have ``size`` bytes and a head.

        A sample amid noise is taken again while there is patience. Raises BenchmarkError where a request failed,
        or answers were shorter or longer.
        """
        headers = [word for name, value in fields.items() for word in ("-H", f"{name}: {value}")]
        words = [*headers, "-s", str(self._script), server.url + path]
        return self._sample(server, words, size=size, connections=connections, seconds=seconds)

    def cycle(self, server: Service, paths: Sequence[str], *, connections: int, seconds: int) -> Sample:
        """Ask for one path after the other; answers have a head and next to no body. Raises as ``load`` does."""
        self._paths.write_text("".join(f"{path}\n" for path in paths))
        words = ["-s", str(self._cycle), server.url]
        return self._sample(server, words, size=0, connections=connections, seconds=seconds)

    def _sample(self, server: Service, words: Sequence[str], *, size: int, connections: int, seconds: int) -> Sample:
        command = ["wrk", "-t", "1", "-c", str(connections), "-d", f"{seconds}s", "--timeout", "10s", *words]
        command = bound(command, self._core)
        while True:
            sample, saw = _run(command, server.pid, seconds + 30)
            unfinished = connections * size
            fits = size * saw["requests"] <= saw["bytes"] <= (size + HEAD) * saw["requests"] + unfinished
            if saw["errors"] or not saw["requests"] or not fits:
                raise BenchmarkError(f"{words[-1]}: not what was asked for: {saw}")
            if sample.others <= NOISE or self._patience < seconds:
                return sample
            self._patience -= seconds


def _run(command: Sequence[str], pid: int, timeout: int) -> tuple[Sample, dict[str, int]]:
    """One run against the server with that process id: as a sample, and in wrk's own figures."""
    server, own, busy = cpu_seconds(pid), _children_seconds(), busy_seconds()
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, start_new_session=True)
    server, own, busy = cpu_seconds(pid) - server, _children_seconds() - own, busy_seconds() - busy
    found = re.search(r'\{"us".*\}', done.stdout)
    if done.returncode or not found:
        raise BenchmarkError(f"wrk failed: {done.stdout}{done.stderr}")
    saw: dict[str, int] = json.loads(found[0])
    duration = saw["us"] / 1e6
    sample = Sample(
        requests=saw["requests"] / duration,
        bytes=saw["bytes"] / duration,
        p50=saw["p50"] / 1000,
        p99=saw["p99"] / 1000,
        cpu=max(server, 0.01) / duration,
        others=max(busy - server - own, 0.0) / duration,
    )
    return sample, saw


def _children_seconds() -> float:
    """Processor time of our children that have ended: of wrk, between two looks."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
