"""Output of the commands, as tables for a terminal and as JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from ess_monitor.exporters.terminal.inspected import plain_table
from ess_monitor.records import SCHEMA_VERSION


def print_table(table: Table) -> None:
    """Print a table as wide as the terminal; without one, wide enough for dotted module names."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160
    Console(width=width, markup=False, emoji=False).print(table)  # names and reasons may hold brackets


def print_json(**content: Any) -> None:
    """Print one JSON object that names the schema version."""
    print(json.dumps({"schema_version": SCHEMA_VERSION, **content}, indent=2, allow_nan=False))


def featurizer_table(title: str, sizes: Sequence[int], rows: Iterable[dict[str, Any]]) -> Table:
    """Return the tolerance-ESS of each featurizer, with a column for each TSS."""
    table = plain_table(title, "featurizer", numbers=[f"TSS {size}" for size in sizes])
    table.add_column("ESS over TSS")
    for row in rows:
        table.add_row(row["featurizer"], *(f"{ess:.1f}" for ess in row["tolerance_ess"]), row["scaling"])
    return table
