"""What the commands of analyses share: progress, and where results go."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from ess_monitor.analysis.results import AnalysisResult
from ess_monitor.analysis.tables import table_of
from ess_monitor.cli.report import write_page
from ess_monitor.cli.tables import print_json, print_table
from ess_monitor.errors import ConfigError

Heads = Annotated[int, typer.Option(min=1, help="Heads or channels of each layer at most.")]


def progress(items: Sequence[Any], label: str = "layers") -> Iterable[Any]:
    """Pass layers, or others, on with a progress bar on standard error, where that is a terminal."""
    console = Console(stderr=True)
    bar: Iterator[Any] = iter(track(items, label, console=console, transient=True, disable=not console.is_terminal))
    return bar


def put_out(
    result: AnalysisResult, page: str | None, title: str | None = None, *, as_json: bool, html: str | None
) -> None:
    """Print a result as a table, under a title of its own or another one, or as JSON, and write its page, if any."""
    if page is not None and html == "-" and as_json:
        raise ConfigError("html: '-' and --json both write to standard output; give a file, or leave out --json")
    if page is not None and html is not None:
        write_page(page, html, option="--html", announced=sys.stderr)
        if html == "-":
            return
    if as_json:
        print_json(**result.model_dump(mode="json"))
    else:
        print_table(table_of(result, title))
