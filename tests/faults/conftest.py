"""Figures that fault tests measure are printed at the end of a run, so that a change of them is seen."""

from __future__ import annotations

from collections.abc import Callable

import pytest

_FIGURES: list[str] = []


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Note a figure; it is printed with the name of the test."""
    name = request.node.name
    return lambda figure: _FIGURES.append(f"{name}: {figure}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The figures, where there are any."""
    if _FIGURES:
        terminalreporter.section("measured")
        for figure in _FIGURES:
            terminalreporter.write_line(figure)
