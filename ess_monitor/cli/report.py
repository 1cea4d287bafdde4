"""`ess-monitor report` and `ess-monitor compare`: HTML pages from the event logs of runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, TextIO

import typer

from ess_monitor.errors import ConfigError
from ess_monitor.exporters import read_event_log
from ess_monitor.exporters.event_log.rotating_file import rotated_path
from ess_monitor.report import load_history, render_comparison, render_report
from ess_monitor.runtime.files import is_same_file, replace_file, require_writable

Output = Annotated[
    str | None,
    typer.Option("--output", "-o", help="File to write; '-' is standard output. An existing one is replaced."),
]


_WHICH = "Run of a log that has several: its name, or its number from 1. Default: the last."


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of runs, or an event log.")],
    output: Output = None,
    which: Annotated[str | None, typer.Option("--run", metavar="NAME|NUMBER", help=_WHICH)] = None,
) -> None:
    """Write one HTML page about a run: what was found, what to do next, and every layer over the steps.

    Of a folder with several logs it is the one that was written last. The page works without a network or another file.
    Without -o it is written beside the event log, as ess_report.html.
    """
    history = load_history(run, which)
    write_page(render_report(history), output or str(history.path.with_name("ess_report.html")), history.path)


def compare(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="Folder of runs, or an event log.")],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="The run to compare it with.")],
    output: Output = None,
    which_a: Annotated[str | None, typer.Option("--run-a", metavar="NAME|NUMBER", help=_WHICH)] = None,
    which_b: Annotated[str | None, typer.Option("--run-b", metavar="NAME|NUMBER", help="The same of RUN_B.")] = None,
) -> None:
    """Write one HTML page that compares two runs at equal steps; --run-a and --run-b take two of one log.

    Without -o it is written to the working directory, as ess_compare.html.
    """
    first, second = load_history(run_a, which_a), load_history(run_b, which_b)
    if is_same_file(first.path, second.path) and first.earlier_runs == second.earlier_runs:
        raise ConfigError(
            f"RUN_B: {run_b} and {run_a} are one run, {first.info.run_name} in {first.path}; give two logs, or two "
            "runs of one with --run-a and --run-b"
        )
    write_page(render_comparison(first, second), output or "ess_compare.html", first.path, second.path)


def write_page(page: str, output: str, *logs: Path, option: str = "--output", announced: TextIO | None = None) -> None:
    """Write a page to a file, or to standard output for '-', and name the file in `announced`, standard output.

    Raises:
        ConfigError: the file is an event log, or cannot be written.
    """
    if output == "-":
        sys.stdout.buffer.write(page.encode())
        return
    path = Path(output)
    check_page(path, *logs, option=option)
    try:
        replace_file(path, page.encode())
    except (OSError, ValueError) as error:
        raise _not_written(option, path, error) from error
    print(path, file=announced)


def check_page(path: Path, *logs: Path, option: str = "--output") -> None:
    """Check that a page can be written to a file, before there is one.

    Raises:
        ConfigError: the file is an event log, or cannot be written.
    """
    if any(is_same_file(path, part) for log in logs for part in (log, rotated_path(log))) or _is_event_log(path):
        raise ConfigError(f"{option}: {path} is an event log, which a page does not replace; give another file")
    try:
        require_writable(path)
    except (OSError, ValueError) as error:
        raise _not_written(option, path, error) from error


def _not_written(option: str, path: Path, error: Exception) -> ConfigError:
    reason = getattr(error, "strerror", None) or error
    return ConfigError(f"{option}: {path} cannot be written ({reason}); give a file in a folder this user may write to")


def _is_event_log(path: Path) -> bool:
    try:
        return path.is_file() and next(read_event_log(path), None) is not None
    except (OSError, ValueError):
        return False
