"""Runs all cases, and prints their table."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from tests.faults import (
    action_faults,
    callback_faults,
    loop_faults,
    model_faults,
    process_faults,
    sink_faults,
    soak,
    worker_faults,
)
from tests.faults.harness import CASES, Case, Outcome, injecting

MODULES = (
    model_faults,
    worker_faults,
    sink_faults,
    action_faults,
    loop_faults,
    process_faults,
    callback_faults,
    soak,
)
"""Modules that register their cases on import, in the order of the table."""


def run(case: Case) -> tuple[Outcome, list[str]]:
    """Run a case; return its outcome and the warnings of the monitor."""
    with injecting() as injection:
        outcome = case.run(injection)
    return outcome, injection.logged


def main() -> int:
    """Run every case and print a row for each; return the number of failed cases."""
    table = Table(title="Faults injected into a training with a monitor", show_lines=True)
    for column in ("case", "injected", "training unchanged", "event seen"):
        table.add_column(column)
    broken = 0
    for case in CASES:
        try:
            outcome, _ = run(case)
        except Exception as error:
            outcome = Outcome(unchanged=False, seen={f"{type(error).__name__}: {error}": False})
        held = outcome.unchanged and all(outcome.seen.values())
        broken += not held
        seen = "\n".join(where if there else f"[red]missing: {where}" for where, there in outcome.seen.items())
        table.add_row(case.name, case.injected, "bitwise" if outcome.unchanged else "[red]changed", seen)
    Console().print(table, f"{len(CASES) - broken} of {len(CASES)} cases hold", sep="\n")
    return broken
