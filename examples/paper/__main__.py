"""Runs the experiments of the paper, prints the verdicts and writes the page."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from importlib import import_module
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from examples.paper.experiment import SEEN, Experiment, Outcome, Run, cluster, perform, planned

EXPERIMENTS = (
    "task_model_sweep",
    "initialization",
    "memory_decay",
    "regularizer",
    "distillation",
    "hybrids",
    "modulation",
    "open_questions",
)
"""Modules of experiments, in the order of the page."""


def load(name: str) -> Experiment:
    """Return an experiment by the name of its module."""
    experiment: Experiment = import_module(f"examples.paper.{name}").EXPERIMENT
    return experiment


def performed(experiments: list[Experiment], folder: Path, address: str | None, short: bool) -> list[Outcome]:
    """Do all runs that have no result in `folder`, under a progress bar."""
    outcomes = []
    plans = {
        experiment.name: planned(experiment, SEEN if short else experiment.seeds, short) for experiment in experiments
    }
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with cluster(address), Progress(*columns) as progress:
        task = progress.add_task("paper", total=sum(map(len, plans.values())))
        for experiment in experiments:
            progress.update(task, description=experiment.name)
            place = folder / experiment.name
            place.mkdir(parents=True, exist_ok=True)
            rows: list[Run] = []
            for row in perform(plans[experiment.name], experiment, place):
                rows.append(row)
                progress.advance(task)
            order = {run["run_id"]: index for index, run in enumerate(plans[experiment.name])}
            outcomes.append(Outcome(experiment, sorted(rows, key=lambda row: order[row["run_id"]])))
    return outcomes


def show(console: Console, outcomes: list[Outcome]) -> None:
    """Print the table of verdicts."""
    table = Table(title="The findings of the paper, run again", title_justify="left", show_lines=True)
    for column in ("finding", "verdict", "result", "core minutes"):
        table.add_column(column, justify="right" if column == "core minutes" else "left")
    for outcome in outcomes:
        for finding in outcome.findings:
            table.add_row(finding.name, finding.verdict, finding.result, f"{outcome.minutes:.1f}")
    console.print(table)


def machine() -> str:
    """Return what the runs ran on, in words."""
    return (
        f"Python {platform.python_version()}, torch {torch.__version__.split('+')[0]}, {os.cpu_count()} cores of a CPU"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, print the table, write the page; return 1 if a run failed."""
    parser = argparse.ArgumentParser(prog="python -m examples.paper", description=__doc__)
    parser.add_argument("experiments", nargs="*", choices=[[], *EXPERIMENTS], help="by default all")
    parser.add_argument("--folder", type=Path, default=Path("runs/paper"), help="folder of the results of runs")
    parser.add_argument("--address", help="address of a Ray cluster; without it Ray runs on this machine")
    parser.add_argument("--page", type=Path, metavar="FOLDER", help="write the page, its figures and numbers there")
    parser.add_argument("--short", action="store_true", help="a few steps each: proves nothing but that it runs")
    given = parser.parse_args(arguments)
    experiments = [load(name) for name in given.experiments or EXPERIMENTS]
    started, before = time.monotonic(), _kept(given.folder)
    outcomes = performed(experiments, given.folder, given.address, given.short)
    took = given.folder / "minutes.txt"
    if not before:
        took.write_text(f"{(time.monotonic() - started) / 60:.0f}\n", encoding="utf-8")
    elif before != _kept(given.folder):  # some were done before, and some now
        took.unlink(missing_ok=True)
    failed = [row for outcome in outcomes for row in outcome.rows if "error" in row]
    for row in failed:
        print(f"{row['run_id']}: {row['error']}", file=sys.stderr)
    if failed:
        print(f"{len(failed)} runs failed; the same command runs them again", file=sys.stderr)
        return 1
    for outcome in outcomes:
        outcome.findings = outcome.experiment.findings(outcome.rows)
    show(Console(), outcomes)
    if given.page is not None:
        from examples.paper.page import write_page

        minutes = took.read_text(encoding="utf-8").strip() if took.exists() else None
        write_page(given.page, outcomes, machine(), minutes)
    return 0


def _kept(folder: Path) -> set[Path]:
    return set(folder.rglob("*.json"))


if __name__ == "__main__":
    sys.exit(main())
