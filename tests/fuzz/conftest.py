"""How many inputs ran, at the end of the run."""

from __future__ import annotations

import pytest

from .inputs import LONG, RAN


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not RAN:
        return
    if LONG:
        terminalreporter.section("inputs of the fuzz tests")
        for name, count in RAN.items():
            terminalreporter.line(f"{count:>7,} {name}")
    terminalreporter.line(f"fuzzing: {RAN.total():,} inputs in {len(RAN)} tests")
