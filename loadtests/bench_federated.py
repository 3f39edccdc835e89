"""``make bench-federated``: a federated fine-tune of a real model, with and without compression, and with hostile sites.

all-MiniLM-L6-v2 learns from which of twenty parts of libraries a docstring is (``loadtests/train_federated.py``). Ten
sites have the text, split by class as a Dirichlet distribution has it. In a round each site takes the model, trains a
few steps of AdamW, and its update goes through the project's own feedback, codecs, documents and rules; what is counted
are the bytes of the documents. One arm has no compression; the others begin with the same model and data, and differ in
what is sent, or in who is hostile. After the last round each model is tested on the same held-out sentences; the
standard error of a difference between two arms is that of the sentences' differences.

Arms run beside each other, ``--jobs`` at a time, one thread each. Those that were run before with the same settings and
code's constants are not run again (``--again``).
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from safetensors.numpy import load_file, save_file

from loadtests.demo import fetch_model
from loadtests.federated import ATTACKS, Arm, State, federate
from loadtests.report import console, note, processor
from loadtests.services import BenchmarkError, workspace

ROOT = Path(__file__).parent.parent
SITES = 10
WHOLE = 90.9e6
"""Bytes of a full update in fp32, which savings are against."""
EVERY, SAMPLE, HELD_OUT = 4, 500, 3000
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
        "sign": Plan(Arm("all weights, sign", ["sign"]), "whole", saved=98.3, loss=0.0),
        "top-10": Plan(Arm("all weights, top 10 % sign", ["top:0.1:sign"]), "whole", saved=98.3, loss=0.0),
        "top-1": Plan(
            Arm("all weights, top 1 % sign, momentum", WARM_UP, momentum=0.5), "whole", saved=99.5, loss=0.5
        ),
        "whole-trimmed": Plan(Arm("all weights, fp32, trimmed mean", rule="trimmed"), "whole"),
        "adapters": Plan(Arm("adapters, fp32"), "whole", lora=True),
        "adapters-int4": Plan(Arm("adapters, int4", ["int4"]), "adapters", lora=True, saved=99.6, loss=0.0),
    }
    for rule in ("trimmed", "mean"):
        clean = Arm(f"adapters, int4, {rule}, none hostile", ["int4"], rule=rule, clip=rule != "mean")
        found[f"clean-{rule}"] = Plan(clean, "", lora=True, short=True)
    for hostile in (1, 3):
        for attack in ATTACKS:
            for rule in ("trimmed", "mean"):
                arm = Arm(attack, ["int4"], rule=rule, clip=rule != "mean", attack=attack, hostile=hostile)
                name = f"{attack.replace(' ', '-')}-{hostile}-{rule}"
                found[name] = Plan(arm, "clean-mean", lora=True, short=True)
    return found


WARM_UP = ("top:0.04:sign", "top:0.03:sign", "top:0.02:sign", "top:0.015:sign", "top:0.0125:sign")
"""Shares that are sent in the first rounds, and in all others."""


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
    """Train an arm and write what came of it."""
    plan = plans()[name]
    rounds = options.short if plan.short else options.rounds
    began, sizes, seen = time.monotonic(), list[Sequence[int]](), list[tuple[int, float, float]]()
    within = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    with workspace(f"federated-{name}", within) as directory, trainer(options, directory, plan, rounds) as torch:
        for done in federate(plan.arm, torch, rounds, SITES):
            sizes.append(done.sizes)
            if done.number % EVERY == 0 or done.number == rounds:
                rows = HELD_OUT if done.number == rounds and not options.quick else SAMPLE
                right, loss = torch.evaluate(done.state, rows)
                seen.append((done.number, accuracy(right), loss))
                note(f"{name}: round {done.number}, accuracy {accuracy(right):.3f}, loss {loss:.3f}")
    figures = {
        "settings": settings(plan, options),
        "sizes": sizes,
        "seen": seen,
        "right": right,
        "seconds": time.monotonic() - began,
    }
    half = options.out / f"{name}.half"
    half.write_text(json.dumps(figures) + "\n")
    half.replace(options.out / f"{name}.json")


def settings(plan: Plan, options: argparse.Namespace) -> dict[str, Any]:
    """What an arm's result depends on."""
    rounds = options.short if plan.short else options.rounds
    made = asdict(plan.arm) | {"lora": plan.lora, "rounds": rounds, "layers": options.layers, "quick": options.quick}
    return json.loads(json.dumps(made))  # as it is read again


def accuracy(right: str) -> float:
    """The share that is right."""
    return right.count("1") / len(right)
