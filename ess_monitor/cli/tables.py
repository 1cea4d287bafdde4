"""Output of the commands, as tables for a terminal and as JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ess_monitor.records import SCHEMA_VERSION, LayerInfo, Reading


def print_table(table: Table) -> None:
    """Print a table as wide as the terminal; without one, wide enough for dotted module names."""
    console = Console() if sys.stdout.isatty() or "COLUMNS" in os.environ else Console(width=160)
    console.print(table)


def print_json(**content: Any) -> None:
    """Print one JSON object that names the schema version."""
    print(json.dumps({"schema_version": SCHEMA_VERSION, **content}, indent=2, allow_nan=False))


def layer_table(title: str, layers: Iterable[LayerInfo]) -> Table:
    """Return what `describe` found, with a row for each layer."""
    table = plain_table(title, "layer", "module", "operator", numbers=("TSS", "channels"))
    table.add_column("handles or reason", overflow="fold")
    for layer in layers:
        if layer.supported:
            capacity = "?" if layer.state_capacity is None else str(layer.state_capacity)
            capacity = "grows" if layer.capacity_grows else capacity
            channels = str(layer.channels) if layer.channels else "?"
            handles = "\n".join(layer.handles) or "no handles"
            handles += f"\nnot diagnosed: {layer.uninformative}" if layer.uninformative else ""
            table.add_row(layer.name, layer.module, layer.operator, capacity, channels, handles)
        else:
            table.add_row(layer.name, layer.module, "skipped", "", "", layer.reason, style="dim")
    return table


def reading_table(title: str, readings: Iterable[Reading], skipped: Iterable[LayerInfo] = ()) -> Table:
    """Return what `profile` measured, with a row for each layer, also for those that are skipped. ESS is the
    tolerance-ESS."""
    readings = list(readings)
    numbers = ("ESS", "all positions", "entropy", "TSS", "ESS/TSS", "retention", "mean A", "far share")
    table = plain_table(title, "layer", numbers=numbers)
    table.caption, table.caption_justify = _explained(readings), "left"
    for reading in readings:
        if reading.status != "ok":
            table.add_row(reading.layer, f"{reading.status}: {reading.message}", style="yellow")
            continue
        table.add_row(
            reading.layer,
            (">= " if reading.is_lower_bound else "") + _number(reading.effective_size),
            _with_bounds(reading),
            _number(reading.entropy_size),
            _number(reading.state_capacity) + (" (grows)" if reading.capacity_grows else ""),
            _number(reading.utilization_ratio),
            _number(reading.retention_ratio),
            _number(reading.mean_decay),
            _number(reading.far_share_ratio),
        )
    for layer in skipped:
        table.add_row(layer.name, f"skipped: {layer.reason}", style="dim")
    return table


def featurizer_table(title: str, sizes: Sequence[int], rows: Iterable[dict[str, Any]]) -> Table:
    """Return the tolerance-ESS of each featurizer, with a column for each TSS."""
    table = plain_table(title, "featurizer", numbers=[f"TSS {size}" for size in sizes])
    table.add_column("ESS over TSS")
    for row in rows:
        table.add_row(row["featurizer"], *(f"{ess:.1f}" for ess in row["tolerance_ess"]), row["scaling"])
    return table


def plain_table(title: str, *texts: str, numbers: Iterable[str]) -> Table:
    """Return a table with columns of text, then columns of numbers."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in texts:
        table.add_column(heading, overflow="fold")
    for heading in numbers:
        table.add_column(heading, justify="right", overflow="fold")
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _with_bounds(reading: Reading) -> str:
    lower, upper = reading.effective_size_lower, reading.effective_size_upper
    bounds = "" if lower is None or upper is None else f" ({lower:.2f}..{upper:.2f})"
    return _number(reading.effective_size_between) + bounds


def _explained(readings: Sequence[Reading]) -> str:
    """Return which positions the sizes are of, and the ESS of each layer at other tolerances."""
    lines = []
    for positions in dict.fromkeys(reading.positions for reading in readings if reading.status == "ok"):
        counted = ", ".join(map(str, positions)) if len(positions) <= 12 else f"{len(positions)} positions"
        between = f"every position from {positions[0]} to {positions[-1]}"
        lines.append(f"ESS: mean over {counted}. All positions: mean over {between}, with certified bounds.")
    for reading in readings:
        if reading.basis == "jacobian":
            lines.append(f"{reading.layer or 'root'}: {reading.message}; {reading.products} Jacobian products")
        if reading.effective_size_at:
            sizes = ", ".join(f"{tau:g}: {size:.2f}" for tau, size in reading.effective_size_at)
            of = " (tau as a share of each token's output)" if reading.tolerance_scale == "output" else ""
            lines.append(f"{reading.layer or 'root'}: ESS by tau{of}: {sizes}")
    return "\n".join(lines)
