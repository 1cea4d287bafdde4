"""What the tables of analyses share: cells, rows without a result, captions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ess_monitor.exporters.terminal.inspected import add_skipped, add_unmeasured
from ess_monitor.exporters.terminal.table import plain_text
from ess_monitor.records import LayerInfo, layer_title

if TYPE_CHECKING:
    from rich.table import Table

    from ess_monitor.analysis.results import LayerResult


def add_row(table: Table, *texts: str) -> None:
    """Add a row of texts that may hold brackets."""
    table.add_row(*map(plain_text, texts))


def add_layer(table: Table, layer: LayerResult, *texts: str) -> None:
    """Add the row of a layer."""
    add_row(table, layer_title(layer.layer), *texts)


def add_caption(table: Table, lines: Iterable[str]) -> None:
    """Put lines below a table."""
    table.caption, table.caption_justify = plain_text("\n".join(lines), "table.caption"), "left"


def add_without_result(table: Table, layers: Sequence[LayerResult], skipped: Sequence[LayerInfo], caption: str) -> None:
    """Add the layers without a result with the reason, and a caption with what is to be known of the others."""
    lines = [caption]
    for layer in layers:
        if layer.status != "ok":
            add_unmeasured(table, layer.layer, layer.status, layer.message)
        elif layer.message:
            lines.append(f"{layer_title(layer.layer)}: {layer.message}")
    add_skipped(table, skipped)
    add_caption(table, lines)
