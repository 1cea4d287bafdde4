"""When and where the work runs: cadence and overhead budget, worker and side stream, failure guards."""

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
