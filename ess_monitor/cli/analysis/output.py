"""What the commands of analyses share: progress, and where results go."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ess_monitor.cli.report import write_page
from ess_monitor.cli.tables import add_skipped, add_unmeasured, print_json, print_table
from ess_monitor.errors import ConfigError
from ess_monitor.records import LayerInfo, layer_title

if TYPE_CHECKING:
    from ess_monitor.analysis.results import LayerResult

Heads = Annotated[int, typer.Option(min=1, help="Heads or channels of each layer at most.")]


def progress(items: Sequence[Any], label: str = "layers") -> Iterable[Any]:
    """Pass layers, or others, on with a progress bar on standard error, where that is a terminal."""
    console = Console(stderr=True)
    bar: Iterator[Any] = iter(track(items, label, console=console, transient=True, disable=not console.is_terminal))
    return bar


def add_without_result(table: Table, layers: Sequence[LayerResult], skipped: Sequence[LayerInfo], caption: str) -> None:
    """Add the layers without a result with the reason, and a caption with what is to be known of the others."""
    lines = [caption]
    for layer in layers:
        if layer.status != "ok":
            add_unmeasured(table, layer.layer, layer.status, layer.message)
        elif layer.message:
            lines.append(f"{layer_title(layer.layer)}: {layer.message}")
    add_skipped(table, skipped)
    table.caption, table.caption_justify = "\n".join(lines), "left"


def put_out(content: dict[str, Any], table: Table, page: str | None, *, as_json: bool, html: str | None) -> None:
    """Print a result as a table or as JSON, and write its page where one is asked for."""
    if page is not None and html == "-" and as_json:
        raise ConfigError("html: '-' and --json both write to standard output; give a file, or leave out --json")
    if page is not None and html is not None:
        write_page(page, html, option="--html", announced=sys.stderr)
        if html == "-":
            return
    if as_json:
        print_json(**content)
    else:
        print_table(table)
