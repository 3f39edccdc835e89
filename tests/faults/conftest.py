"""Figures that fault tests measure are printed at the end of a run, so that a change of them is seen."""

from __future__ import annotations

from collections.abc import Callable

import pytest

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
