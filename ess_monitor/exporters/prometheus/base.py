"""Makes collectors, registries and files for the exporters of Prometheus metrics.

`prometheus_client` is imported when an exporter starts, not before.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
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


def replace_file(path: Path, data: bytes) -> None:
    """Replace a file as a whole, so that its readers see the old content or the new one, never a part.

    Missing folders are created. The permissions are those of the process's umask: the standard library's temporary
    files are readable by their owner only, and the readers (Prometheus, node_exporter) run as other users.

    Raises:
        OSError: the file cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # neither `*.json` nor `*.prom` matches it
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
