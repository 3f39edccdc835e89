"""Programs that a benchmark runs beside itself: started, awaited, and gone at its end, whatever happens.

Each runs in a session of its own, so that Ctrl-C reaches the benchmark and the benchmark stops them; should the
benchmark be killed, the kernel stops them (``setpriv --pdeathsig``, of util-linux like ``taskset``).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

READY = 30.0
"""Seconds that a program has to become ready."""
GRACE = 10.0
"""Seconds that a program has to end after SIGTERM."""
POLL = 0.05
"""Seconds between two looks at what is starting."""

Process = subprocess.Popen[bytes]


class BenchmarkError(Exception):
    """A benchmark that cannot be run, or whose result would mean nothing; says why."""


@dataclass(frozen=True)
class Service:
    """A program that is ready."""

    url: str
    pid: int


@contextmanager
def workspace(name: str, within: Path | None = None) -> Iterator[Path]:
    """What a benchmark runs in: a temporary directory (``within`` another), gone at the end.

    SIGTERM and SIGHUP end it as Ctrl-C does. Raises SystemExit: 130 then; with the message of a BenchmarkError.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup and the like are left alone
            signal.signal(number, _interrupt)
    try:
        with tempfile.TemporaryDirectory(
            prefix=f"nearshard-{name}-", dir=within, ignore_cleanup_errors=True
        ) as directory:
            yield Path(directory)
    except BenchmarkError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


@contextmanager
def service(
    module: str,
    directory: Path,
    *flags: str,
    core: int | None = None,
    inside: Callable[[Sequence[str]], Sequence[str]] = list,
    port: int = 0,
) -> Iterator[Service]:
    """``python -m MODULE`` on ``port`` (0: any free one), ready to serve. Its log and ready file are in ``directory``.

    ``inside`` makes the command one that runs somewhere else (``loadtests.wan``), in the same process. Edges and
    routers trust the network whose store was published to in ``directory`` or above it.
    """
    if module in ("edge_node", "router"):
        flags = (*flags, "--trust-root", str(trust_root(directory)))
    ready = directory / f"{module}.ready"
    ready.unlink(missing_ok=True)  # of one before it
    command = [sys.executable, "-m", module, "--port", str(port), "--ready-file", str(ready)]
    command += ["--log-level", "warning"]
    with running(inside([*command, *flags]), directory / f"{module}.log", core=core) as process:
        wait_until(ready.exists, process, module, directory / f"{module}.log")
        yield Service(json.loads(ready.read_bytes())["url"], process.pid)


@contextmanager
def running(command: Sequence[str], log: Path, *, core: int | None = None) -> Iterator[Process]:
    """A program with its output in ``log``; stopped, by force if need be, at the end."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            bound(command, core),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment(),
            start_new_session=True,
        )
    try:
        yield process
    finally:
        _stop(process)


def publish(
    model: Path, name: str, store: str, *flags: str, inside: Callable[[Sequence[str]], Sequence[str]] = list
) -> str:
    """Publish a model directory, in a store that gets its keys with the first one; the revision.

    ``inside`` as for ``service``. Raises BenchmarkError.
    """
    if not (Path(store) / "trust").is_dir():
        _python("origin.trust_command", "init", "--store", store)
    words = [str(model), name, "--store", store, "--json", *flags]
    return str(json.loads(_python("origin.publish_command", *words, inside=inside))["revision"])


def trust_root(directory: Path) -> Path:
    """What the network that was published in ``directory``, or above it, is trusted by. Raises BenchmarkError."""
    for folder in (directory, *directory.parents):
        if (file := folder / "keys" / "root.json").is_file():
            return file
    raise BenchmarkError("nothing was published yet, so there is no root of trust")


def _python(module: str, *words: str, inside: Callable[[Sequence[str]], Sequence[str]] = list) -> str:
    command = bound(inside([sys.executable, "-m", module, *words]))
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)
    if done.returncode:
        raise BenchmarkError(f"{module} failed: {done.stderr}")
    return done.stdout


def bound(command: Sequence[str], core: int | None = None) -> list[str]:
    """The command, bound to our life and to one core: exec'ed in place, so its pid is the program's."""
    pin = ["taskset", "--cpu-list", str(core)] if core is not None else []
    return ["setpriv", "--pdeathsig", "TERM", *pin, *command]


def environment() -> dict[str, str]:
    """Our environment without settings of nearshard, and without proxies: a benchmark runs what it says it runs. And
    without what only the tests of this project install (``tests/without``): users' commands do not import it."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("NEARSHARD_") and not name.lower().endswith("_proxy")
    }
    return kept | {"PYTHONPATH": str(Path(__file__).parents[1] / "tests" / "without")}


def wait_until(ready: Callable[[], bool], process: Process, name: str, log: Path) -> None:
    """Wait for ``ready``. Raises BenchmarkError, with the end of the log, where the program ends or never is."""
    deadline = time.monotonic() + READY
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            raise BenchmarkError(f"{name} did not become ready:\n{log.read_text(errors='replace')[-2000:]}")
        time.sleep(POLL)


def cpu_seconds(pid: int) -> float:
    """Processor time that a process and its children, all threads counted, have taken so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return own + sum(cpu_seconds(int(child)) for child in children)


def busy_seconds() -> float:
    """Processor time that the whole machine has spent so far, time taken by its host too."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = _processor_times()
    return user + nice + system + irq + softirq + steal


def stolen_seconds() -> float:
    """Processor time that the machine's host has taken for others so far, while there was work here."""
    return _processor_times()[7]


def _processor_times() -> list[float]:
    """Seconds, by the columns of ``/proc/stat`` (proc(5))."""
    ticks = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    return [int(count) / os.sysconf("SC_CLK_TCK") for count in ticks]


def _stop(process: Process) -> None:
    process.terminate()
    try:
        process.wait(GRACE)
    except BaseException as error:  # a second Ctrl-C too: nothing is left running
        os.killpg(process.pid, signal.SIGKILL)  # with its children
        process.wait()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
