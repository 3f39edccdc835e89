"""``make bench-federated``: a federated fine-tune of a real model; with compression, and with hostile sites.

all-MiniLM-L6-v2 learns from which of twenty parts of libraries a docstring is (``loadtests/train_federated.py``). Ten
sites have the text, split by class as a Dirichlet distribution has it. In a round each site takes the model, trains a
few steps of AdamW, and its update goes through the project's own feedback, codecs, documents and rules; what is counted
are the bytes of the documents. One arm has no compression; the others begin with the same model and data, and differ in
what is sent, or in who is hostile. After the last round each model is tested on the same held-out sentences. A loss
is none that can be measured where it is within the standard error of the accuracy; that of the differences by sentence,
which is smaller for arms that go much the same way, is printed beside it.

Arms run beside each other, ``--jobs`` at a time, one thread each. Those that were run before with the same settings are
not run again (unless with ``--again``). At last, ``loadtests/bench_aggregate.py``: updates of 1 GB made one.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from safetensors.numpy import load_file, save_file

from loadtests.demo import fetch_model
from loadtests.federated import ATTACKS, Arm, Federation, State
from loadtests.report import console, note, processor
from loadtests.services import BenchmarkError, workspace
from shared.updates.codecs import warm_up

ROOT = Path(__file__).parent.parent
SITES = 10
WHOLE = 90.9e6
"""Bytes of a full update in fp32, which savings are against."""
EVERY, SAMPLE, HELD_OUT = 5, 300, 2000
"""Rounds between two looks at the first held-out sentences; of these; all."""
SHARED_MEMORY = Path("/dev/shm")
TRAINING = 4 * 3600.0
"""Seconds that all arms may take."""


@dataclass(frozen=True)
class Plan:
    """An arm, what is trained in it, and what it is compared with."""

    arm: Arm
    against: str = ""
    """The arm without compression, or without hostile sites."""
    lora: bool = False
    short: bool = False
    """Whether it has the fewer rounds of arms with hostile sites."""
    saved: float = 0.0
    loss: float | None = None
    """Goals: bytes saved, in %, and the points of accuracy that it may cost (0: none that can be measured)."""


def plans() -> dict[str, Plan]:
    """All arms, by name."""
    found = {
        "whole": Plan(Arm("all weights, fp32")),
        "sign": Plan(Arm("all weights, sign", ["sign"], HEAD), "whole", saved=98.3, loss=0.0),
        "top-10": Plan(Arm("all weights, top 10 % sign", ["top:0.1:sign"], HEAD), "whole", saved=98.3, loss=0.0),
        "top-1": Plan(
            Arm("all weights, top 1.5 % sign, momentum", SPARSE, HEAD, momentum=0.5), "whole", saved=99.5, loss=0.5
        ),
        "sign-nnm": Plan(Arm("all weights, sign, default rule", ["sign"], HEAD, rule="nnm"), "whole"),
        "adapters": Plan(Arm("adapters, fp32"), "whole", lora=True),
        "adapters-int4": Plan(Arm("adapters, int4", ["int4"]), "adapters", lora=True, saved=99.6, loss=0.0),
    }
    for hostile in (0, 1, 3):
        for attack in ATTACKS if hostile else [""]:
            if (attack, hostile) == ("colluding", 1):
                continue  # one by itself flips its sign
            for rule in [rule for rule in RULES if hostile != 1 or ":" not in rule]:
                arm = Arm(attack, ["int4"], rule=rule, clip=rule != "mean", attack=attack, hostile=hostile)
                name = f"{attack.replace(' ', '-') or 'clean'}-{hostile}-{rule}"
                found[name] = Plan(arm, lora=True, short=True)
    return found


HEAD = {"classifier.*": "int8"}
"""The head learns most, and is few bytes."""
RULES = {
    "nnm": "default: clipped, neighbours mixed",
    "mean": "plain mean",
    "trimmed": "clipped, trimmed mean",
    "trimmed:3": "the same, for 3",
}
"""What hostile sites meet. The plain mean clips nothing."""
SPARSE = [warm_up("top:0.015:sign", number, 5, 0.04) for number in range(1, 7)]
"""What is sent in the first rounds, and in all others."""


# The trainer


class Torch:
    """Sites that train in a process of their own, by a Python that has torch. Tensors go there and back as files."""

    def __init__(self, process: subprocess.Popen[str], directory: Path, rounds: int) -> None:
        self._process, self._rounds = process, rounds
        self._weights, self._trained = directory / "weights", directory / "trained"
        self._written: State | None = None

    def _ask(self, **command: object) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise BenchmarkError("the trainer has ended; it says above why")
        found: dict[str, Any] = json.loads(answer)
        return found

    def first(self) -> State:
        """The state before round 1."""
        self._ask(do="begin", out=str(self._weights))
        self._written = load_file(self._weights)
        return self._written

    def train(self, state: State, site: int, number: int, *, flip: bool) -> State:
        """The steps of a site in a round."""
        self._write(state)
        rate = rate_of(number, self._rounds)
        names = {"weights": str(self._weights), "out": str(self._trained)}
        self._ask(do="train", site=site, round=number, rate=rate, flip=flip, **names)
        return load_file(self._trained)

    def evaluate(self, state: State, rows: int) -> tuple[str, float]:
        """Which of the first held-out sentences are right, as 0 and 1; their mean loss."""
        self._write(state)
        found = self._ask(do="evaluate", weights=str(self._weights), rows=rows)
        return found["right"], found["loss"]

    def _write(self, state: State) -> None:
        if state is not self._written:
            save_file(dict(state), self._weights)
            self._written = state


def rate_of(number: int, rounds: int) -> float:
    """The share of the rate of learning in a round, from 1: half in the first one, then down to a tenth."""
    return min(1.0, number / 2) * max(0.1, 1 - (number - 1) / rounds)


@contextmanager
def trainer(options: argparse.Namespace, directory: Path, plan: Plan, rounds: int) -> Iterator[Torch]:
    """Start it; it ends with the context."""
    command = [str(options.python), "-m", "loadtests.train_federated", str(fetch_model()), str(text_of(options))]
    command += ["--lora"] * plan.lora + ["--layers", str(options.layers)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Torch(process, directory, rounds)
        finally:
            process.kill()


def text_of(options: argparse.Namespace) -> Path:
    """Where the sites' text is kept."""
    folder: Path = options.out
    return folder.parent / "federated-text.npz"


# One arm


def run(name: str, options: argparse.Namespace) -> None:
    """Train an arm and write what came of it; every few rounds also all that it takes to go on from there."""
    plan = plans()[name]
    rounds = options.short if plan.short else options.rounds
    within = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    with workspace(f"federated-{name}", within) as directory, trainer(options, directory, plan, rounds) as torch:
        federation = Federation(plan.arm, torch, SITES)
        figures = resumed(name, options, federation) or {"settings": settings(plan, options), "sizes": [], "seen": []}
        while federation.number < rounds:
            began = time.process_time()
            done = federation.step()
            figures["sizes"].append(done.sizes)
            note(f"{name}: round {done.number}, {np.mean(done.sizes):.0f} B, {time.process_time() - began:.1f} s here")
            if done.number % EVERY == 0 or done.number == rounds:
                rows = HELD_OUT if done.number == rounds and not options.quick else SAMPLE
                right, loss = torch.evaluate(done.state, rows)
                figures["seen"].append((done.number, accuracy(right), loss))
                note(f"{name}: round {done.number}, accuracy {accuracy(right):.3f}, loss {loss:.3f}")
                if done.number < rounds:
                    checkpoint(name, options, federation, figures)
    write(options.out / f"{name}.json", figures | {"right": right})
    for left in options.out.glob(f"{name}.half-*"):
        shutil.rmtree(left)


def checkpoint(name: str, options: argparse.Namespace, federation: Federation, figures: Mapping[str, Any]) -> None:
    """Keep a round's state, instead of the one before."""
    folder: Path = options.out / f"{name}.half-{federation.number}"
    shutil.rmtree(folder, ignore_errors=True)
    federation.save(folder)
    write(folder / "figures.json", figures)
    for other in options.out.glob(f"{name}.half-*"):
        if other != folder:
            shutil.rmtree(other)


def resumed(name: str, options: argparse.Namespace, federation: Federation) -> dict[str, Any] | None:
    """Go on from the last state that was kept with these settings. Gives its figures."""
    for file in options.out.glob(f"{name}.half-*/figures.json"):
        found: dict[str, Any] = json.loads(file.read_text())
        if found["settings"] == settings(plans()[name], options):
            federation.resume(file.parent, len(found["sizes"]))
            return found
    return None


def write(file: Path, figures: Mapping[str, Any]) -> None:
    """Figures, whole or not at all."""
    half = file.with_suffix(".part")
    half.write_text(json.dumps(figures) + "\n")
    half.replace(file)


def settings(plan: Plan, options: argparse.Namespace) -> dict[str, Any]:
    """What an arm's result depends on."""
    rounds = options.short if plan.short else options.rounds
    made = asdict(plan.arm) | {"lora": plan.lora, "rounds": rounds, "layers": options.layers, "quick": options.quick}
    as_read: dict[str, Any] = json.loads(json.dumps(made))
    return as_read


def accuracy(right: str) -> float:
    """The share that is right."""
    return right.count("1") / len(right)


# All arms


def run_all(names: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """What came of each arm, run in processes of their own unless it is known. Raises BenchmarkError."""
    options.out.mkdir(parents=True, exist_ok=True)
    missing = [name for name in names if options.again or known(name, options) is None]
    with ThreadPoolExecutor(options.jobs) as pool:
        for name, code in zip(missing, pool.map(lambda name: in_process(name, options), missing), strict=True):
            if code:
                raise BenchmarkError(f"the arm {name} failed")
    return {name: known(name, options) for name in names}


def known(name: str, options: argparse.Namespace) -> dict[str, Any] | None:
    """What came of an arm with these settings before."""
    file: Path = options.out / f"{name}.json"
    if not file.exists():
        return None
    found: dict[str, Any] = json.loads(file.read_text())
    return found if found["settings"] == settings(plans()[name], options) else None


def in_process(name: str, options: argparse.Namespace) -> int:
    """Run an arm; the exit code."""
    command = [sys.executable, "-m", "loadtests.bench_federated", "--arm", name, "--python", str(options.python)]
    command += ["--out", str(options.out), "--rounds", str(options.rounds), "--short", str(options.short)]
    command += ["--layers", str(options.layers), *["--quick"] * options.quick]
    return subprocess.run(command, cwd=ROOT, timeout=TRAINING).returncode


@dataclass(frozen=True)
class Row:
    """An arm's result beside that of the arm that it is compared with."""

    plan: Plan
    accuracy: float
    saved: float
    """Of full updates in fp32, in %, over all sites and rounds."""
    largest: int
    """Bytes of the largest update."""
    mean: float
    """Bytes of an update."""
    error: float
    """Standard error of the accuracy, in points."""
    difference: float | None = None
    difference_error: float = 0.0
    """In points of accuracy; the standard error is that of the differences by sentence."""

    @property
    def met(self) -> bool | None:
        """Whether both goals are met; None without goals."""
        if self.plan.loss is None or self.difference is None:
            return None
        return self.saved >= self.plan.saved and self.difference >= -(self.plan.loss or self.error)


def row(plan: Plan, made: Mapping[str, Any], against: Mapping[str, Any] | None) -> Row:
    """An arm's row."""
    right = digits(made["right"])
    sizes = np.array(made["sizes"], float)
    found = Row(
        plan,
        accuracy=float(right.mean()),
        saved=100 * (1 - float(sizes.mean()) / WHOLE),
        largest=int(sizes.max()),
        mean=float(sizes.mean()),
        error=100 * float(right.std()) / math.sqrt(len(right)),
    )
    if against is None:
        return found
    each = right - digits(against["right"])
    error = 100 * float(each.std()) / math.sqrt(len(each))
    return replace(found, difference=100 * float(each.mean()), difference_error=error)


def digits(text: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Zeros and ones as numbers."""
    return np.array([float(digit) for digit in text])


def show(made: Mapping[str, Any], options: argparse.Namespace) -> None:
    """The tables."""
    rows = {name: row(plans()[name], found, made.get(plans()[name].against)) for name, found in made.items()}
    out = console()
    out.print(compression([one for one in rows.values() if not one.plan.short], options))
    if any(one.plan.short for one in rows.values()):
        out.print(hostile(rows, options))
    out.print(f"{processor()}; {SITES} sites, {options.layers} layers")


def compression(rows: Sequence[Row], options: argparse.Namespace) -> Table:
    """What is saved, and what it costs."""
    table = Table(title=f"After {options.rounds} rounds; saved of {WHOLE / 1e6} MB a site and round")
    table.add_column("sent")
    columns = ("kB", "largest, kB", "saved, %", "accuracy, %", "difference, points", "goals: saved, loss", "met")
    for column in columns:
        table.add_column(column, justify="right")
    for one in rows:
        goal = f"{one.plan.saved} %, {one.plan.loss or 'none'}" if one.plan.loss is not None else ""
        table.add_row(
            one.plan.arm.title,
            f"{one.mean / 1e3:.0f}",
            f"{one.largest / 1e3:.0f}",
            f"{one.saved:.2f}",
            f"{100 * one.accuracy:.1f} ± {one.error:.1f}",
            "" if one.difference is None else f"{one.difference:+.1f} ± {one.difference_error:.1f}",
            goal,
            {None: "", True: "yes", False: "NO"}[one.met],
        )
    return table


def hostile(rows: Mapping[str, Row], options: argparse.Namespace) -> Table:
    """What hostile sites do to the default rule and to the plain mean."""
    table = Table(title=f"Adapters, int4, {options.short} rounds: accuracy, %, with hostile sites")
    table.add_column("hostile of 10")
    for column in ("attack", *RULES.values()):
        table.add_column(column, justify="right")
    by_arm: dict[tuple[int, str], dict[str, Row]] = {}
    for one in rows.values():
        if one.plan.short:
            by_arm.setdefault((one.plan.arm.hostile, one.plan.arm.attack), {})[one.plan.arm.rule] = one
    for (sites, attack), found in sorted(by_arm.items()):
        cells = (
            f"{100 * found[rule].accuracy:.1f} ± {found[rule].error:.1f}" if rule in found else "" for rule in RULES
        )
        table.add_row(str(sites), attack or "none", *cells)
    return table


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.bench_federated", description=__doc__.partition("\n")[0])
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="that has torch, to train with")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results are kept; .demo/federated")
    parser.add_argument("--again", action="store_true", help="run again what was run")
    parser.add_argument("--quick", action="store_true", help="few arms and rounds, for which the goals are not meant")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help=f"of these only: {', '.join(plans())}")
    parser.add_argument("--rounds", type=int, help="20; quick: 2")
    parser.add_argument("--short", type=int, help="rounds of adapters with hostile sites: 8; quick: 2")
    parser.add_argument("--layers", type=int, default=6, help="of the encoder that are used")
    parser.add_argument("--jobs", type=int, default=2, help="arms at a time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write every figure")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out = options.out or ROOT / ".demo" / ("federated-quick" if options.quick else "federated")
    options.rounds = options.rounds or (2 if options.quick else 20)
    options.short = options.short or (2 if options.quick else 8)
    return options


QUICK = ("whole", "sign", "adapters", "adapters-int4", "scaled-3-trimmed", "scaled-3-mean")


def main() -> None:
    """Run the benchmark, or one arm of it."""
    options = arguments()
    if options.arm:
        run(options.arm, options)
        return
    names = options.arms or (QUICK if options.quick else list(plans()))
    try:
        made = run_all(names, options)
    except BenchmarkError as error:
        sys.exit(f"error: {error}")
    show(made, options)
    if options.json:
        options.json.write_text(json.dumps(made, indent=1) + "\n")
    if not options.arms:
        aggregate = [sys.executable, "-m", "loadtests.bench_aggregate", *["--gigabytes", "0.1"] * options.quick]
        sys.exit(subprocess.run(aggregate, cwd=ROOT).returncode)


if __name__ == "__main__":
    main()
