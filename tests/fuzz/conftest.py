"""How many inputs ran, at the end of the run; in the long profile too few of them are a failure."""

from __future__ import annotations

from pathlib import Path

import pytest

from .inputs import LONG, RAN

LEAST = 100_000
"""Inputs of all tests of this folder in the long profile, which `docs/security.md` promises."""
_HERE = Path(__file__).parent
_WHOLE = pytest.StashKey[bool]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    files = {path for path in _HERE.glob("test_*.py") if path.name != "test_count.py"}
    config.stash[_WHOLE] = (
        files <= {item.path for item in items}
        and not any("::" in argument for argument in config.args)
        and not config.option.collectonly
    )


def pytest_deselected(items: list[pytest.Item]) -> None:
    if items:
        items[0].config.stash[_WHOLE] = False


def _too_few(config: pytest.Config) -> bool:
    return LONG and config.stash.get(_WHOLE, False) and RAN.total() < LEAST


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == pytest.ExitCode.OK and _too_few(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not RAN:
        return
    if LONG:
        terminalreporter.section("inputs of the fuzz tests")
        for name, count in RAN.items():
            terminalreporter.line(f"{count:>7,} {name}")
    terminalreporter.line(f"fuzzing: {RAN.total():,} inputs in {len(RAN)} tests")
    if _too_few(config):
        terminalreporter.line(f"fuzzing: fewer than {LEAST:,} inputs, which is a failure", red=True)
