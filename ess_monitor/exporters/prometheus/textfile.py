"""Writes metrics to a file for node_exporter's textfile collector, for clusters where jobs may not open ports."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import field_validator

from ess_monitor import validation
from ess_monitor.errors import ExporterError, format_error
from ess_monitor.exporters.base import final_snapshot
from ess_monitor.exporters.prometheus.base import new_collector, new_registry
from ess_monitor.exporters.prometheus.identity import IdentifiedConfig, RunIdentity, identify
from ess_monitor.records import Measurement, RunInfo, RunStatus, Snapshot
from ess_monitor.runtime.files import replace_file


class TextfileConfig(IdentifiedConfig):
    """Settings of the textfile."""

    kind: Literal["textfile"] = "textfile"
    """Which exporter this is."""
    path: Path = Path("runs/ess_monitor-{rank}.prom")
    """The file, in the folder of `--collector.textfile.directory`. `{run_id}` and `{rank}` are filled in; missing
    folders are created. The default has no `{run_id}`, so that the next run replaces the file instead of adding one."""

    @field_validator("path")
    @classmethod
    def _has_the_suffix(cls, path: Path) -> Path:
        if path.suffix != ".prom":
            raise ValueError("must end in .prom: node_exporter reads no other files")
        return path


class TextfileExporter:
    """Writes all metrics at the start, after every measurement and at the end, each time as a whole.

    The series themselves carry `run_id` and `rank`: the target of the scrape is node_exporter, which knows neither, and
    it drops series that two files have in common.

    Args:
        config: where to write.
        identity: run and rank, where the caller knows better than `identify`.
    """

    name = "textfile"
    inline = False

    def __init__(self, config: TextfileConfig | None = None, identity: RunIdentity | None = None) -> None:
        self.config = validation.optional("config", config, TextfileConfig) or TextfileConfig()
        self.identity = self._given_identity = validation.optional("identity", identity, RunIdentity)
        """Run and rank; None before the start."""
        self.path: Path | None = None
        """The file, with run and rank filled in; None before the start."""
        self._snapshot: Callable[[], Snapshot] | None = None
        self._run: RunInfo | None = None

    def start(self, run: RunInfo, snapshot: Callable[[], Snapshot]) -> None:
        """Write the file for the first time.

        Raises:
            ExporterError: prometheus_client is missing, the path cannot be written, or the ranks share no run_id.
        """
        self.identity = self._given_identity or identify(self.config, run)
        if not self.identity.takes_part(self.config.ranks):
            return
        path = str(self.config.path)
        for label, value in self.identity.labels.items():
            path = path.replace(f"{{{label}}}", value)
        self.path, self._run = Path(path), run
        try:
            self._write(snapshot)
        except OSError as error:
            raise ExporterError(
                f"textfile.path={path!r} cannot be written ({format_error(error)}). Give a path in a folder this "
                "process may write to, or leave `textfile` out of `exporters`."
            ) from error
        self._snapshot = snapshot

    def export(self, measurement: Measurement) -> None:
        """Write the current counters. Raises OSError when they cannot be written."""
        if self._snapshot is not None:
            self._write(self._snapshot)

    def close(self, status: RunStatus) -> None:
        """Write the last state, which stays. Raises OSError when it cannot be written."""
        snapshot, self._snapshot = self._snapshot, None
        if snapshot is not None:
            self._write(partial(final_snapshot, snapshot, status))

    def _write(self, snapshot: Callable[[], Snapshot]) -> None:
        from prometheus_client import generate_latest

        assert self.path is not None
        assert self._run is not None
        assert self.identity is not None
        collector = new_collector(self.name, self._run, snapshot, self.identity.labels)
        replace_file(self.path, generate_latest(new_registry(collector)))
