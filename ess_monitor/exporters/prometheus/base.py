"""Makes collectors and registries for the exporters of Prometheus metrics.

`prometheus_client` is imported when an exporter starts, not before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ess_monitor.errors import ExporterError
from ess_monitor.records import RunInfo, Snapshot

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from ess_monitor.exporters.prometheus.collector import SnapshotCollector


def new_collector(
    exporter: str, run: RunInfo, snapshot: Callable[[], Snapshot], labels: Mapping[str, str] | None = None
) -> SnapshotCollector:
    """Make the collector of a run; `labels` are further labels of every series.

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
    return SnapshotCollector(run, snapshot, labels)


def new_registry(collector: SnapshotCollector | None = None) -> CollectorRegistry:
    """Make a new registry: in the client's global one, two runs in one process would clash."""
    from prometheus_client import CollectorRegistry

    registry = CollectorRegistry()
    if collector is not None:
        registry.register(collector)
    return registry
