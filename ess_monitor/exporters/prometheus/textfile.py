"""A file in the text format, for node_exporter's textfile collector: for clusters where jobs may not open ports."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import field_validator

from ess_monitor import validation
from ess_monitor.errors import ExporterError
from ess_monitor.exporters.prometheus.atomic_file import replace_file
from ess_monitor.exporters.prometheus.base import new_registry, snapshot_collector
from ess_monitor.exporters.prometheus.identity import IdentifiedConfig, RunIdentity, identify
from ess_monitor.records import Measurement, RunInfo, RunStatus, Snapshot

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

    from ess_monitor.exporters.prometheus.collector import SnapshotCollector


class TextfileConfig(IdentifiedConfig):
    """Settings of the textfile."""

    kind: Literal["textfile"] = "textfile"
    """Which exporter this is."""
    path: Path = Path("runs/ess_monitor-{rank}.prom")
    """The file, in the folder of `--collector.textfile.directory`; `{run_id}` and `{rank}` are filled in, folders made.
    The default is taken over by the next run: with `{run_id}` in it every run would leave a file for ever."""

    @field_validator("path")
    @classmethod
    def _is_looked_at(cls, path: Path) -> Path:
        if path.suffix != ".prom":
            raise ValueError("path must end in .prom: node_exporter reads no other files")
        return path


class TextfileExporter:
    """Writes all metrics at the start, after every measurement and at the end, each time as a whole.

    The series carry `run_id` and `rank` themselves, as node_exporter is the target of the scrape and knows neither: two
    files with the same series would make it drop both.

    Args:
        config: where to write.
        identity: run and rank, where the caller knows better than `identify`.
    """

    inline = False

    def __init__(self, config: TextfileConfig | None = None, identity: RunIdentity | None = None) -> None:
        self.name = "textfile"
        self.config = validation.optional("config", config, TextfileConfig) or TextfileConfig()
        self.identity = validation.optional("identity", identity, RunIdentity)
        """Run and rank; known once the exporter has started."""
        self.path: Path | None = None
        """The file, with run and rank filled in; None before the start."""
        self._snapshot: Callable[[], Snapshot] | None = None
        self._registry: CollectorRegistry | None = None

    def start(self, run: RunInfo, snapshot: Callable[[], Snapshot]) -> None:
        """Write the file for the first time.

        Raises:
            ExporterError: prometheus_client is missing, the path cannot be written, or the ranks share no run_id.
        """
        self.identity = self.identity or identify(self.config, run)
        if not self.identity.takes_part(self.config.ranks):
            return
        collector = snapshot_collector(self.name, run, self._current)
        name = str(self.config.path)
        for label, value in self.identity.labels.items():
            name = name.replace(f"{{{label}}}", value)
        registry = new_registry()
        registry.register(_Labeled(collector, self.identity.labels))
        self.path, self._snapshot, self._registry = Path(name), snapshot, registry
        try:
            self._write()
        except OSError as error:
            self._snapshot = None
            raise ExporterError(
                f"textfile.path={name!r} cannot be written ({type(error).__name__}: {error}). Give a path in a folder "
                "this process may write to, or leave `textfile` out of `exporters`."
            ) from error

    def export(self, measurement: Measurement) -> None:
        """Write the counters as they are now. Raises OSError when the disk does not take them."""
        if self._snapshot is not None:
            self._write()

    def close(self, status: RunStatus) -> None:
        """Write the last state, which stays. Raises OSError when the disk does not take it."""
        snapshot = self._snapshot
        if snapshot is None:
            return
        try:
            last = snapshot().model_copy(update={"status": status})
            self._snapshot = lambda: last
            self._write()
        finally:
            self._snapshot = None

    def _current(self) -> Snapshot:
        assert self._snapshot is not None
        return self._snapshot()

    def _write(self) -> None:
        from prometheus_client import generate_latest

        assert self.path is not None
        assert self._registry is not None
        replace_file(self.path, generate_latest(self._registry))


class _Labeled:
    """A collector whose series carry further labels."""

    def __init__(self, collector: SnapshotCollector, labels: dict[str, str]) -> None:
        self._collector = collector
        self._labels = labels

    def collect(self) -> Iterator[Metric]:
        for family in self._collector.collect():
            family.samples = [sample._replace(labels={**sample.labels, **self._labels}) for sample in family.samples]
            yield family
