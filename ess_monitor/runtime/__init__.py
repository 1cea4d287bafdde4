"""When and where the work runs: cadence and overhead budget, worker and side stream, failure guards."""

from ess_monitor.runtime.agreement import Agreement, DistributedConfig, Verdict, measuring_ranks
from ess_monitor.runtime.breaker import Breaker
from ess_monitor.runtime.cadence import Cadence
from ess_monitor.runtime.executor import Executor, Job, RuntimeConfig, Task
from ess_monitor.runtime.guard import Guard
from ess_monitor.runtime.lanes import HostLane, Lane, Launched, StreamLane, Streams, TorchStreams, lane_for
from ess_monitor.runtime.portion import Portion, is_out_of_memory

__all__ = [
    "Agreement",
    "Breaker",
    "Cadence",
    "DistributedConfig",
    "Executor",
    "Guard",
    "HostLane",
    "Job",
    "Lane",
    "Launched",
    "Portion",
    "RuntimeConfig",
    "StreamLane",
    "Streams",
    "Task",
    "TorchStreams",
    "Verdict",
    "is_out_of_memory",
    "lane_for",
    "measuring_ranks",
]
