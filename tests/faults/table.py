"""All cases in the order of their table, and the table itself."""

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
"""Importing them registers their cases."""


def run(case: Case) -> tuple[Outcome, list[str]]:
    """What became of a case, and the warnings of the monitor."""
    with injecting() as injection:
        outcome = case.run(injection)
    return outcome, injection.logged


def main() -> int:
    """Run every case and print a row for each; the number of those that did not hold."""
    table = Table(title="Faults injected into a training that is watched", show_lines=True)
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
