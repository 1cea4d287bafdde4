"""When and where the work runs: cadence and overhead budget, worker and side stream, failure guards."""

from ess_monitor.runtime.agreement import Agreement, agreed_mean
from ess_monitor.runtime.cadence import Cadence
from ess_monitor.runtime.executor import Executor, Job, RuntimeConfig, Task
from ess_monitor.runtime.guard import Guard
from ess_monitor.runtime.lanes import HostLane, Lane, Launched, StreamLane, Streams, TorchStreams, lane_for

__all__ = [
    "Agreement",
    "Cadence",
    "Executor",
    "Guard",
    "HostLane",
    "Job",
    "Lane",
    "Launched",
    "RuntimeConfig",
    "StreamLane",
    "Streams",
    "Task",
    "TorchStreams",
    "agreed_mean",
    "lane_for",
]
