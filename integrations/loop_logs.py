"""What the monitor writes beside the logs of a training loop: to its loggers, and as an event log in their folder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ess_monitor.errors import format_error
from ess_monitor.exporters import (
    EventLogConfig,
    EventLogExporter,
    Exporter,
    LoggerExporter,
    TensorBoardExporter,
    WandbExporter,
)
from ess_monitor.exporters.config import ConfigT
from ess_monitor.runtime.files import require_regular
from ess_monitor.runtime.guard import logger

EVENT_LOG_NAME = EventLogConfig().path.name


def logger_exporters(loggers: Iterable[Any]) -> list[Exporter]:
    """Return a sink for every logger of Lightning or Fabric; TensorBoard's also gets charts and heat maps."""
    sinks: list[Exporter] = []
    for each in loggers:
        kinds = {cls.__name__ for cls in type(each).__mro__}
        if "TensorBoardLogger" in kinds:
            sinks.append(TensorBoardExporter(writer=each.experiment))
        elif "WandbLogger" in kinds:
            sinks.append(WandbExporter(each.experiment, own_rows=True))
        else:
            # Fabric's users have to call finalize themselves, and CSVLogger keeps up to 100 rows until then.
            flush = getattr(each, "save", None)
            sinks.append(LoggerExporter(type(each).__name__, each.log_metrics, flush=flush))
    return sinks


def log_folder(loggers: Sequence[Any]) -> Path | None:
    """Return where the first logger of Lightning or Fabric writes about this run; None without one, or elsewhere.

    TensorBoard's and the CSV logger's have a folder of their own. Of others it is `save_dir/name/version`, where
    Lightning puts checkpoints too.
    """
    if not loggers:
        return None
    first, folder = loggers[0], None
    if isinstance(own := getattr(first, "log_dir", None), (str, Path)):
        _ = first.experiment  # the CSV logger takes files that are there before it for those of another run
        folder = str(own)
    elif isinstance(root := getattr(first, "save_dir", None), (str, Path)):
        version = first.version
        folder = os.path.join(root, str(first.name), version if isinstance(version, str) else f"version_{version}")
    return None if folder is None or "://" in folder else Path(folder)


def in_log_folder(config: ConfigT, folder: str | Path) -> ConfigT:
    """Return an event log's settings with a path in that folder where none was given; others as they are."""
    if isinstance(config, EventLogConfig) and config.path == EventLogConfig().path:
        return config.model_copy(update={"path": Path(folder, EVENT_LOG_NAME)})
    return config


def is_event_log(item: Any) -> bool:
    """Return whether an exporter, or its settings, writes an event log."""
    return isinstance(item, (EventLogConfig, EventLogExporter))


def default_event_log(folder: Path) -> list[Exporter]:
    """Return an event log in that folder; none, with a warning, where it cannot be written: nobody has asked for it."""
    path = folder / EVENT_LOG_NAME
    try:
        require_regular(path)
        folder.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        logger.warning("ess_monitor: no event log is written to %s (%s)", path, format_error(error))
        return []
    return [EventLogExporter(EventLogConfig(path=path))]
