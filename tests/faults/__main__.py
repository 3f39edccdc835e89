"""``make faults``: faults injected into a network under load, one after the other, and the tests of all others.

First one network of real processes, and each fault that it can be given in turn; then pytest, with every test whose
docstring names a fault. A table at the end; 1 where an invariant broke. docs/faults.md says more.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.table import Table

from loadtests.report import console, note, processor
from tests.faults import invariants
from tests.faults.figures import COLUMNS, FAULTS, Case, exit_code, ids_by_fault, outcomes, row
from tests.faults.injections import LIVE
from tests.faults.live import WARMING, Options, run
from tests.faults.load import DEADLINE
from tests.faults.network import now
from tests.harness import Lab

ROOT = Path(__file__).parents[2]
FOLDERS = ["tests/unit", "tests/integration", "tests/e2e", "tests/faults"]
ELSEWHERE = {
    "F25": "with loss: make bench-cold and make bench-clients, over a WAN of network namespaces",
    "F35": "make soak",
}
"""What no test is of, or not wholly, and what is."""


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What is asked for."""
    parser = argparse.ArgumentParser(prog="make faults ARGS=...", description=__doc__)
    parser.add_argument("--only", type=parse_faults, default=list(FAULTS), help="faults, as F5,F7")
    parser.add_argument("--seed", type=int, default=0, help="chooses moments and victims")
    parser.add_argument("--repeats", type=int, default=1, help="how often each is injected into the network")
    parser.add_argument("--minutes", type=float, default=15, help="after this no fault and no test is begun")
    parser.add_argument("--hold", type=float, default=10, help="seconds that a fault lasts")
    parser.add_argument("--clients", type=int, default=24, help="clients of the steady load")
    parser.add_argument("--recovery", type=float, default=invariants.RECOVERY, help="seconds until all is well again")
    parser.add_argument("--settling", type=float, default=invariants.SETTLING, help="seconds until memory is back")
    parser.add_argument("--no-live", dest="live", action="store_false", help="tests only")
    parser.add_argument("--no-tests", dest="tests", action="store_false", help="the network only")
    parser.add_argument("--long", action="store_true", help="tests at full strength too (an hour)")
    parser.add_argument("--list", action="store_true", help="say what is covered by what, and run nothing")
    return parser.parse_args(words)


def parse_faults(text: str) -> list[str]:
    """Faults by number. Raises ArgumentTypeError."""
    found = text.upper().split(",")
    if unknown := [name for name in found if name not in FAULTS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: no such fault; they are F1 to F{len(FAULTS)}")
    return sorted(set(found), key=list(FAULTS).index)


@contextmanager
def workplace(name: str) -> Iterator[Lab]:
    """A lab in a temporary directory, where all that programs keep for their user is kept too."""
    with tempfile.TemporaryDirectory(prefix=f"nearshard-{name}-", ignore_cleanup_errors=True) as directory:
        folder = Path(directory)
        for kind in ("CACHE", "CONFIG", "DATA"):
            os.environ[f"XDG_{kind}_HOME"] = str(folder / kind.lower())
        os.environ["NEARSHARD_REPOSITORY"] = str(folder / "repository")
        os.environ["PYTHONPATH"] = str(ROOT / "tests" / "without")
        lab = Lab(folder)
        try:
            yield lab
        finally:
            lab.close()


def run_tests(asked: argparse.Namespace, cases: Mapping[str, Case], seconds: float) -> None:
    """All tests of these faults in one pytest; what came of them goes to ``cases``."""
    of = {name: tests for name, tests in ids_by_fault(ROOT, FOLDERS).items() if name in cases}
    ids = sorted({one for tests in of.values() for one in tests})
    if not ids:
        return
    note(f"{len(ids)} tests of {sum(map(bool, of.values()))} faults")
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results.xml")
        chosen = "long or not long" if asked.long else "not long"
        words = ["-m", "pytest", "-n", "2", "-m", chosen, f"--junitxml={results}", *ids]
        try:
            subprocess.run([sys.executable, *words], cwd=ROOT, stdout=sys.stderr, check=False, timeout=seconds)
        except subprocess.TimeoutExpired:
            note(f"the tests were not done after {seconds / 60:.0f} minutes: none of them counts")
            return
        if not results.exists():
            sys.exit("error: pytest did not run the tests; it says why above")
        came = outcomes(read_junit(results))
    for name, tests in of.items():
        for test in tests:
            counts = came.get(test, Counter())
            cases[name].passed += counts.get("passed", 0)
            cases[name].skipped += counts.get("skipped", 0)
            cases[name].broken += [f"{name} {test}: failed"] * counts.get("failed", 0)


def read_junit(file: Path) -> Iterator[tuple[str, str, str]]:
    """Module, name and outcome of each test in a report of pytest's."""
    for case in ElementTree.parse(file).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        yield case.get("classname", ""), case.get("name", ""), outcome


def show(cases: Mapping[str, Case], asked: argparse.Namespace) -> None:
    """The table, what broke, and what is covered elsewhere."""
    title = f"seed {asked.seed}, {asked.repeats} of each, {asked.hold:g} s each, {asked.clients} clients; {processor()}"
    table = Table(*COLUMNS, title=title, title_justify="left")
    for case in cases.values():
        table.add_row(*row(case))
    out = console()
    out.print(table)
    out.print(f"Deadlines: a request {DEADLINE:g} s, recovery {asked.recovery:g} s, resources {asked.settling:g} s.")
    for name in cases:
        if name in ELSEWHERE:
            out.print(f"{name} {ELSEWHERE[name]}", markup=False)
    for case in cases.values():
        for line in case.broken:
            out.print(f"BROKEN {line}", markup=False)


def cases_of(names: Sequence[str]) -> dict[str, Case]:
    """Nothing seen of these yet."""
    tests, live = ids_by_fault(ROOT, FOLDERS), {fault.number for fault in LIVE}
    return {name: Case(name, covered=bool(name in live or tests[name])) for name in names}


def coverage(names: Sequence[str] = tuple(FAULTS)) -> str:
    """What is covered by what, as a table in Markdown."""
    of = ids_by_fault(ROOT, FOLDERS)
    lines = ["| | fault | injected into the network under load | tests |", "|---|---|---|---|"]
    for name in names:
        live = ", ".join(fault.inject.__name__.replace("_", " ") for fault in LIVE if fault.number == name)
        files = ", ".join(f"`{file}`" for file in sorted({test.partition("::")[0] for test in of[name]}))
        tests = "; ".join(filter(None, [files.replace("tests/", ""), ELSEWHERE.get(name, "")]))
        lines.append(f"| {name} | {FAULTS[name]} | {live} | {tests or 'none' if not live else tests} |")
    return "\n".join(lines)


def main() -> int:
    """Run it; the exit code."""
    asked = arguments()
    if asked.list:
        sys.stdout.write(coverage(asked.only) + "\n")
        return 0
    started, cases = now(), cases_of(asked.only)
    left: Callable[[], float] = lambda: asked.minutes * 60 - (now() - started)  # noqa: E731
    faults = [fault for _ in range(asked.repeats) for fault in LIVE if fault.number in cases]
    if asked.live and faults:
        options = Options(
            asked.seed, asked.hold, asked.clients, recovery=asked.recovery, settling=asked.settling, warming=WARMING
        )
        with workplace("faults") as lab:
            asyncio.run(run(lab, options, faults, cases, lambda: left() > 0))
    if asked.tests and left() > 0:
        run_tests(asked, cases, left() + 60 if not asked.long else 7200)
    show(cases, asked)
    return exit_code(cases.values())


if __name__ == "__main__":
    sys.exit(main())
