"""Prints the table of layers to the terminal, beside any progress bar."""

from __future__ import annotations

import io
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import Literal

from pydantic import Field

from ess_monitor import validation
from ess_monitor.exporters.terminal.table import render_actions, render_findings, render_table, render_warning
from ess_monitor.records import Measurement, RunInfo, RunStatus, Snapshot
from ess_monitor.validation.settings import Settings


class TerminalConfig(Settings):
    """Settings of the terminal table."""

    kind: Literal["terminal"] = "terminal"
    """Which exporter this is."""
    every_seconds: float = Field(default=10.0, ge=0.0)
    """Shortest time between two tables; findings and actions do not wait. Ten seconds leave the log readable."""
    width: int | None = Field(default=None, ge=40)
    """Columns of the table; None: those of the terminal, or 100 without a terminal."""
    color: bool | None = None
    """Escape codes for colors; None: only if stderr is a terminal and NO_COLOR is not set."""


class TerminalExporter:
    """Prints a table at the first measurement, with every finding and action, every few seconds, and at the end.

    A table is written in one piece and never overwritten: cursor movements would break progress bars.

    Args:
        config: how often and how wide.
        write: writes the finished text and a newline, as `print` and `tqdm.write` do; None writes to stderr, which
            keeps tables out of a pipe.
        clock: seconds that never go back.

    Examples:
        >>> exporter = TerminalExporter(TerminalConfig(color=False), write=print)
        >>> exporter.name
        'terminal'
    """

    name = "terminal"
    inline = False

    def __init__(
        self,
        config: TerminalConfig | None = None,
        write: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = validation.optional("config", config, TerminalConfig) or TerminalConfig()
        self._write = _write_to_stderr if write is None else validation.function("write", write, hint="such as print")
        self._clock = validation.function("clock", clock)
        self._run = RunInfo(run_name="", model="", layers=())
        self._last_written_seconds: float | None = None
        self._pending: Measurement | None = None

    def start(self, run: RunInfo, snapshot: Callable[[], Snapshot]) -> None:
        """Store the run, and print the first table of this run at once; there is nothing to open."""
        self._run, self._last_written_seconds, self._pending = run, None, None

    def export(self, measurement: Measurement) -> None:
        """Print the table if it is time for one."""
        last = self._last_written_seconds
        news = measurement.findings or measurement.actions or measurement.warnings
        if news or last is None or self._clock() - last >= self.config.every_seconds:
            self._print(measurement)
        else:
            self._pending = measurement

    def close(self, status: RunStatus) -> None:
        """Print the newest table if it has not been printed."""
        if self._pending is not None:
            self._print(self._pending)

    def conclude(self, lines: Sequence[str]) -> None:
        """Print where what the run wrote can be seen."""
        self._write("\n".join(lines))

    def _print(self, measurement: Measurement) -> None:
        self._pending = None
        self._last_written_seconds = self._clock()
        self._write(self._render(measurement))

    def _render(self, measurement: Measurement) -> str:
        from rich.console import Console

        color = self.config.color
        if color is None:
            color = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
        text = io.StringIO()
        console = Console(
            file=text,
            width=self.config.width or shutil.get_terminal_size((100, 24)).columns,
            force_terminal=color,
            force_jupyter=False,  # in a notebook it would display the table in the place of the text
            no_color=not color,
            color_system="standard" if color else None,
            legacy_windows=False,
        )
        run = self._run
        table = render_table(
            measurement, run.layers, every_n_steps=run.every_n_steps, budget_ratio=run.overhead_budget_ratio
        )
        console.print(table)
        if measurement.findings:
            console.print(render_findings(measurement))
        for warning in measurement.warnings:
            console.print(render_warning(warning))
        if measurement.actions:
            console.print(render_actions(measurement), soft_wrap=True)  # one line each, for grep
        return text.getvalue().rstrip("\n")


def _write_to_stderr(text: str) -> None:
    stream = sys.stderr  # not at import: progress bars and notebooks replace it
    text += "\n"
    try:
        stream.write(text)
    except UnicodeEncodeError:  # the terminal lacks the characters of the bar
        encoding = stream.encoding or "ascii"
        stream.write(text.encode(encoding, "replace").decode(encoding))
    stream.flush()
