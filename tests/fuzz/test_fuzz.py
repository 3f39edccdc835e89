"""A short run of the fuzzing, the same each time; and that it would find something."""

from __future__ import annotations

import hashlib
import random

import pytest

from shared.errors import BadId
from tests.fuzz.fuzz import Found, Target, fuzz, inputs, mutated
from tests.fuzz.targets import TARGETS

EXECUTIONS = 100


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_damaged_documents_are_refused_by_our_own_errors(target: Target) -> None:
    assert fuzz(target, 0, lambda number: number < EXECUTIONS) == EXECUTIONS


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_the_seeds_are_valid(target: Target) -> None:
    """One at least: what is refused at once is not looked into."""
    target.run(target.seeds[0])


def test_what_a_parser_must_not_do_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(data: bytes) -> None:
        if data != b"seed":
            raise KeyError("leaks")

    def slow(data: bytes) -> None:
        hashlib.pbkdf2_hmac("sha256", data, data, 200_000)

    def greedy(data: bytes) -> bytes:
        return bytes(17 << 20)

    def right(data: bytes) -> None:
        raise BadId("typed")

    monkeypatch.setattr("tests.fuzz.fuzz.CPU_TIME", 0.02)
    for run, what in ((wrong, "KeyError"), (slow, "CPU"), (greedy, "MiB")):
        with pytest.raises(Found, match=what):
            fuzz(Target("bad", run, [b"seed"]), 0, lambda number: number < 100)
    assert fuzz(Target("good", right, [b"seed"]), 0, lambda number: number < 10) == 10


def test_a_run_is_the_same_again() -> None:
    target = TARGETS[0]
    runs = [[data for data, _ in zip(inputs(target, 5), range(50), strict=False)] for _ in range(2)]
    assert runs[0] == runs[1] and len(set(runs[0])) > 30
    assert runs[0][9] == mutated(random.Random(f"5/{target.name}/9"), target.seeds)
