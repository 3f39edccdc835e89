"""Figures that fault tests measure are printed at the end of a run, so that a change of them is seen."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Mount = Callable[[Path, str], None]

FIGURE = "measured"
"""What a figure is called among a report's properties: those come from other processes too, where there are several."""


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Note a figure; it is printed with the name of the test."""
    node: pytest.Item = request.node
    return lambda figure: node.user_properties.append((FIGURE, f"{node.name}: {figure}"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The figures, where there are any."""
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    figures = [
        value for report in reports if report.when == "call" for name, value in report.user_properties if name == FIGURE
    ]
    if figures:
        terminalreporter.section("measured")
        for figure in figures:
            terminalreporter.write_line(str(figure))


@pytest.fixture
def mount(need: Callable[[str], str]) -> Iterator[Mount]:
    """Mounts a tmpfs with these options; a second time on the same place, changes them. All are gone at the end."""
    program, mounted = need("mount"), []
    if os.geteuid():
        pytest.skip("only root can mount a tmpfs")

    def make(where: Path, options: str) -> None:
        words = ["-o", f"remount,{options}"] if where in mounted else ["-t", "tmpfs", "-o", options, "tmpfs"]
        where.mkdir(exist_ok=True)
        done = subprocess.run([program, *words, str(where)], capture_output=True, text=True, check=False)
        if done.returncode and os.environ.get("CI") != "true":
            pytest.skip(f"mount: {done.stderr.strip()}")
        assert done.returncode == 0, done.stderr
        if where not in mounted:
            mounted.append(where)

    yield make
    for where in mounted:
        subprocess.run(["umount", "--lazy", str(where)], check=True)
