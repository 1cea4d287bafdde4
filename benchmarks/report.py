"""Prints results as tables, writes them as JSON, and adds the facts of the machine to both."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


@dataclass
class Result:
    """The result of one benchmark."""

    title: str
    rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """Targets that were not met. If there are any, the process ends with status 1."""


def machine() -> dict[str, Any]:
    """Return the hardware and versions on which the figures depend."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = models[0] if models else cpu
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def show(result: Result) -> None:
    """Print a result as a table."""
    console = Console() if sys.stdout.isatty() else Console(width=170)
    columns = list(dict.fromkeys(name for row in result.rows for name in row))
    table = Table(title=result.title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    for row in result.rows:
        table.add_row(*(_cell(row.get(column, "")) for column in columns))
    console.print(table)
    for note in result.notes:
        console.print(note, highlight=False)
    for failure in result.failures:
        console.print(f"NOT MET: {failure}", style="bold red", highlight=False)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(benchmarks: Sequence[Callable[[], Result]], description: str | None = None) -> int:
    """Run benchmarks from a command line; return 1 if a target was not met."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the results to FILE")
    arguments = parser.parse_args()
    facts = machine()
    print("; ".join(f"{name} {value}" for name, value in facts.items()))
    results = []
    for benchmark in benchmarks:
        result = benchmark()
        show(result)
        results.append(result)
    if arguments.json is not None:
        content = {"machine": facts, "results": [vars(result) for result in results]}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")
    return int(any(result.failures for result in results))
