"""Defines what an exporter is: three methods, called by the hub (`ess_monitor.exporters.hub`).

`start` runs on the training thread, where an error stops the start of the run. `export` and `close` run on the
exporter's own thread behind a bounded queue, where an error is counted and never reaches the training. An exporter with
`inline = True` is called on the training thread instead (framework loggers are not thread-safe), with the same
protection.

An exporter may have more, which the hub looks for by name: `serves_at`, the address it serves at; `shown_by`, a line on
where its output is and which command shows it; `conclude(lines)`, which gets these lines once all sinks are closed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, runtime_checkable

from ess_monitor import validation
from ess_monitor.errors import ConfigError
from ess_monitor.records import Measurement, RunInfo, RunStatus, Snapshot


@runtime_checkable
class Exporter(Protocol):
    """Writes measurements to one sink."""

    name: str
    """Stable short name: the `exporter` label of the Prometheus metrics."""
    inline: bool
    """True: `export` is called on the training thread."""

    def start(self, run: RunInfo, snapshot: Callable[[], Snapshot]) -> None:
        """Open the sink.

        `snapshot` may be called at any time and from any thread. Raises `ExporterError` when the sink cannot be opened:
        a sink that was asked for and cannot start is an error at the start of the run.
        """

    def export(self, measurement: Measurement) -> None:
        """Write one measurement."""

    def close(self, status: RunStatus) -> None:
        """Flush and release everything. Called once, also after a failed run; a second call does nothing."""


def check_exporters(exporters: Iterable[Exporter]) -> tuple[Exporter, ...]:
    """Return the exporters as a tuple; raise `ConfigError` if one is something else, such as its settings."""
    hint = "for settings use MonitorConfig(exporters=...), or build_exporter(...)"
    found = validation.listed("exporters", exporters, hint=hint)
    for item in found:
        if isinstance(item, type) or not isinstance(item, Exporter):
            raise ConfigError(f"exporters: {validation.type_of(item)} is not an exporter; {hint}")
    return found


def final_snapshot(snapshot: Callable[[], Snapshot], status: RunStatus) -> Snapshot:
    """Return the counters of a run that ends with `status`. The monitor itself still counts as running here."""
    return snapshot().model_copy(update={"status": status})
