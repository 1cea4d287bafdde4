"""What the commands of analyses share: progress, and where results go."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from ess_monitor.analysis.results import AnalysisResult
from ess_monitor.analysis.tables import table_of
from ess_monitor.cli.report import check_page, write_page
from ess_monitor.cli.tables import print_json, print_table
from ess_monitor.errors import ConfigError
from ess_monitor.runtime.files import is_same_file

Heads = Annotated[int, typer.Option(min=1, help="Heads or channels of each layer at most.")]


def progress(items: Sequence[Any], label: str = "layers") -> Iterable[Any]:
    """Pass layers, or others, on with a progress bar on standard error, where that is a terminal."""
    console = Console(stderr=True)
    bar: Iterator[Any] = iter(track(items, label, console=console, transient=True, disable=not console.is_terminal))
    return bar


def check_outputs(html: str | None, as_json: bool, *others: str | Path | None) -> None:
    """Check before an analysis that its results can be put out.

    Args:
        html, as_json: the options.
        others: files that the command reads or writes besides; None and names of objects are no files.

    Raises:
        ConfigError: they cannot be.
    """
    if html is None:
        return
    if html == "-":
        if as_json:
            raise ConfigError("html: '-' and --json both write to standard output; give a file, or leave out --json")
        return
    path = Path(html)
    for other in others:
        if other is not None and (is_same_file(path, Path(other)) or path.absolute() == Path(other).absolute()):
            raise ConfigError(f"html: {html} is read or written by this command already; give another file")
    check_page(path, option="--html")


def put_out(
    result: AnalysisResult, page: str | None, title: str | None = None, *, as_json: bool, html: str | None
) -> None:
    """Print a result as a table, under a title of its own or another one, or as JSON, and write its page, if any."""
    if page is not None and html is not None:
        write_page(page, html, option="--html", announced=sys.stderr)
        if html == "-":
            return
    if as_json:
        print_json(**result.model_dump(mode="json"))
    else:
        print_table(table_of(result, title))
