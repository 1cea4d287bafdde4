"""When and where the work runs: cadence and overhead budget, worker and side stream, failure guards.

Its names are imported when they are first used: exporters and reports need the guard and the shutdown, and no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ess_monitor.runtime.backends import (
        ComputeBackend,
        HostBackend,
        Launched,
        StreamBackend,
        Streams,
        TorchStreams,
        backend_for,
    )
    from ess_monitor.runtime.backoff import SampleSizeBackoff, is_out_of_memory
    from ess_monitor.runtime.cadence import Cadence
    from ess_monitor.runtime.executor import Executor, Job, RuntimeConfig, Task
    from ess_monitor.runtime.guard import Breaker, Guard

__all__ = [
    "Breaker",
    "Cadence",
    "ComputeBackend",
    "Executor",
    "Guard",
    "HostBackend",
    "Job",
    "Launched",
    "RuntimeConfig",
    "SampleSizeBackoff",
    "StreamBackend",
    "Streams",
    "Task",
    "TorchStreams",
    "backend_for",
    "is_out_of_memory",
]

_MODULES = ("backends", "backoff", "cadence", "executor", "guard")


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in map(import_module, (f"{__name__}.{module}" for module in _MODULES)):
            if getattr(getattr(module, name, None), "__module__", None) == module.__name__:
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
