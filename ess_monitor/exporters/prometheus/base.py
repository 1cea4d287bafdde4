"""A run's metrics as `prometheus_client` knows them. The client is imported when an exporter starts, not before."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ess_monitor.errors import ExporterError
from ess_monitor.records import RunInfo, Snapshot

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from ess_monitor.exporters.prometheus.collector import SnapshotCollector


def snapshot_collector(exporter: str, run: RunInfo, snapshot: Callable[[], Snapshot]) -> SnapshotCollector:
    """The collector of a run.

    Raises:
        ExporterError: `prometheus_client` is missing.
    """
    try:
        from ess_monitor.exporters.prometheus.collector import SnapshotCollector
    except ImportError as error:
        raise ExporterError(
            f"the exporter {exporter!r} needs prometheus_client ({error}). Install it with "
            f"`pip install prometheus-client`, or leave {exporter!r} out of `exporters`."
        ) from error
    return SnapshotCollector(run, snapshot)


def new_registry() -> CollectorRegistry:
    """A registry of its own: in the client's global one a second run in this process would clash with the first."""
    from prometheus_client import CollectorRegistry

    return CollectorRegistry()
