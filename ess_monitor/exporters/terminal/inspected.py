"""Renders what `describe` and `profile` found as tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ess_monitor.exporters.terminal.table import plain_text
from ess_monitor.records import LayerInfo, Reading, layer_title

if TYPE_CHECKING:
    from rich.table import Table


def layer_table(title: str, layers: Iterable[LayerInfo], caption: str = "") -> Table:
    """Return what `describe` found, with a row for each layer."""
    table = plain_table(title, "layer", "module", "operator", numbers=("TSS", "channels", "seconds"))
    table.caption, table.caption_justify = plain_text(caption, "table.caption"), "left"
    table.add_column("handles or reason", overflow="fold")
    for layer in layers:
        if layer.supported:
            capacity = "?" if layer.state_capacity is None else str(layer.state_capacity)
            capacity = "grows" if layer.capacity_grows else capacity
            channels = str(layer.channels) if layer.channels else "?"
            handles = "\n".join(layer.handles) or "no handles"
            handles += f"\nnot diagnosed: {layer.uninformative}" if layer.uninformative else ""
            seconds = "?" if layer.sample_seconds is None else f"{layer.sample_seconds:.2g}"
            texts = (layer_title(layer.name), layer.module, layer.operator, capacity, channels, seconds, handles)
        else:
            texts = (layer_title(layer.name), layer.module, "skipped", "", "", "", layer.reason)
        table.add_row(*map(plain_text, texts), style="" if layer.supported else "dim")
    return table


def reading_table(title: str, readings: Iterable[Reading], skipped: Iterable[LayerInfo] = ()) -> Table:
    """Return what `profile` measured, with a row for each layer, also for those that are skipped. ESS is the
    tolerance-ESS."""
    readings = list(readings)
    numbers = ("ESS", "all positions", "entropy", "TSS", "ESS/TSS", "retention", "mean A", "far share")
    table = plain_table(title, "layer", numbers=numbers)
    table.caption, table.caption_justify = plain_text(_explained(readings), "table.caption"), "left"
    for reading in readings:
        if reading.status != "ok":
            add_unmeasured(table, reading.layer, reading.status, reading.message)
            continue
        table.add_row(
            plain_text(layer_title(reading.layer)),
            (">= " if reading.is_lower_bound else "") + _number(reading.effective_size),
            _with_bounds(reading),
            _number(reading.entropy_size),
            capacity_text(_number(reading.state_capacity), grows=reading.capacity_grows),
            _number(reading.utilization_ratio),
            _number(reading.retention_ratio),
            _number(reading.mean_decay),
            _number(reading.far_share_ratio),
        )
    add_skipped(table, skipped)
    return table


def add_unmeasured(table: Table, layer: str, status: str, message: str) -> None:
    """Add the row of a layer without a result, with the reason."""
    table.add_row(plain_text(layer_title(layer)), plain_text(f"{status}: {message}"), style="yellow")


def add_skipped(table: Table, layers: Iterable[LayerInfo]) -> None:
    """Add a row for each mixer that cannot be measured, with the reason."""
    for layer in layers:
        table.add_row(plain_text(layer_title(layer.name)), plain_text(f"skipped: {layer.reason}"), style="dim")


def capacity_text(number: str, *, grows: bool) -> str:
    """Return a TSS as it is shown, with a remark where it grows with the position.

    >>> capacity_text("64", grows=True)
    '64 (grows)'
    """
    return f"{number} (grows)" if grows else number


def plain_table(title: str, *texts: str, numbers: Iterable[str]) -> Table:
    """Return a table with columns of text, then columns of numbers."""
    from rich import box
    from rich.table import Table

    table = Table(title=plain_text(title, "table.title"), title_justify="left", box=box.SIMPLE_HEAD)
    for heading in texts:
        table.add_column(heading, overflow="fold")
    for heading in numbers:
        table.add_column(heading, justify="right", overflow="fold")
    return table


def cell(value: float | None, form: str = "g") -> str:
    """Return a number as it is shown.

    >>> cell(0.25, ".1f"), cell(None)
    ('0.2', '-')
    """
    return "-" if value is None else format(value, form)


def _number(value: float | None) -> str:
    return cell(value, ".2f")


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
            lines.append(f"{layer_title(reading.layer)}: {reading.message}; {reading.products} Jacobian products")
        if reading.effective_size_at:
            sizes = ", ".join(f"{tau:g}: {size:.2f}" for tau, size in reading.effective_size_at)
            of = " (tau as a share of each token's output)" if reading.tolerance_scale == "output" else ""
            lines.append(f"{layer_title(reading.layer)}: ESS by tau{of}: {sizes}")
    return "\n".join(lines)
