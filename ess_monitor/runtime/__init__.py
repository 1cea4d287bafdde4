"""Decides when and where measurements run: cadence and budget, worker, transfer to the host, failure guards.

Names are imported at their first use: exporters and reports use `guard` and `shutdown`, and must not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ess_monitor.runtime.backends import (
        ComputeBackend,
        HostBackend,
        StreamBackend,
        Streams,
        Task,
        TorchStreams,
        backend_for,
    )
    from ess_monitor.runtime.backoff import SampleSizeBackoff, is_out_of_memory
    from ess_monitor.runtime.cadence import Cadence
    from ess_monitor.runtime.executor import Executor, Job, RuntimeConfig
    from ess_monitor.runtime.guard import Breaker, Guard
    from ess_monitor.runtime.metrics import MetricReader

__all__ = [
    "Breaker",
    "Cadence",
    "ComputeBackend",
    "Executor",
    "Guard",
    "HostBackend",
    "Job",
    "MetricReader",
    "RuntimeConfig",
    "SampleSizeBackoff",
    "StreamBackend",
    "Streams",
    "Task",
    "TorchStreams",
    "backend_for",
    "is_out_of_memory",
]

_MODULES = ("guard", "cadence", "backends", "backoff", "executor", "metrics")


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in _MODULES:
            value = getattr(import_module(f"{__name__}.{module}"), name, None)
            if value is not None:
                return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
