"""Describes a run when it starts."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import nn

from ess_monitor.capture import layer_infos
from ess_monitor.config import MonitorConfig
from ess_monitor.diagnosis import thresholds
from ess_monitor.records import RunInfo


def run_info(model: nn.Module, config: MonitorConfig, started_seconds: float, facts: Mapping[str, Any]) -> RunInfo:
    """Build the record that exporters are given at the start.

    Args:
        model: the watched model.
        config: settings of its monitor.
        started_seconds: since the epoch.
        facts: strategy, world size, precision and first step.
    """
    return RunInfo(
        run_name=config.run_name or f"{type(model).__name__}-{time.strftime('%Y%m%d-%H%M%S')}",
        model=type(model).__name__,
        layers=tuple(
            info for info in layer_infos(model, config.layers, unknown=config.capture.unknown) if info.supported
        ),
        versions=installed_versions(),
        thresholds=thresholds(config.diagnosis),
        diagnosis=config.diagnosis.model_dump(),
        modulation_separators=() if config.modulation is None else config.modulation.separators,
        hyperparameters=dict(config.hyperparameters),
        start_timestamp_seconds=started_seconds,
        overhead_budget_ratio=config.overhead_budget_ratio or 1.0,
        every_n_steps=config.every_n_steps,
        **facts,
    )


def installed_versions() -> dict[str, str]:
    """Return the versions of this package, torch and Python; "unknown" for a package that is not installed."""
    versions = {"python": platform.python_version()}
    for name, distribution in (("ess_monitor", "ess-monitor"), ("torch", "torch")):
        try:
            versions[name] = version(distribution)
        except PackageNotFoundError:
            versions[name] = "unknown"
    return versions
