"""Where this process stands in a distributed run, and with whom it measures."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch.distributed as dist

from ess_monitor.config import MonitorConfig
from ess_monitor.errors import ConfigError
from ess_monitor.runtime import Agreement, measuring_ranks


@dataclass(frozen=True)
class Place:
    """One process of a run."""

    rank: int = 0
    local_rank: int = 0
    """Rank on its machine."""
    world_size: int = 1


def place() -> Place:
    """As `torch.distributed` and the launcher say; alone where no process group is initialised.

    >>> place()
    Place(rank=0, local_rank=0, world_size=1)
    """
    if not (dist.is_available() and dist.is_initialized()):
        return Place()
    rank = dist.get_rank()
    local = next((os.environ[name] for name in ("LOCAL_RANK", "SLURM_LOCALID") if name in os.environ), "")
    return Place(rank, int(local) if local.isdecimal() else rank, dist.get_world_size())


def together(config: MonitorConfig, world_size: int) -> bool:
    """True where all ranks take part in every sample: several measure, or the autopilot may act.

    >>> together(MonitorConfig(), 8), together(MonitorConfig(distributed={"ranks": "all"}), 8)
    (False, True)
    """
    acts = config.autopilot.mode == "auto"
    return world_size > 1 and (acts or len(measuring_ranks(config.distributed.ranks, world_size, acts=acts)) > 1)


def agreement_of_the_run(config: MonitorConfig, world_size: int) -> Agreement | None:
    """The exchange that these settings ask for; None where this process decides alone.

    Raises:
        ConfigError: there are several ranks, but no process group whose store they could meet at.
    """
    if not together(config, world_size):
        return None
    here = place()
    if here.world_size != world_size:
        raise ConfigError(
            f"distributed: {world_size} ranks are to agree, but torch.distributed knows {here.world_size}; call "
            'init_process_group before the monitor is built, or set autopilot="advise" and '
            'distributed={"ranks": "zero"}'
        )
    acts = config.autopilot.mode == "auto"
    measuring = measuring_ranks(config.distributed.ranks, world_size, acts=acts)
    return Agreement.of_the_run(measuring, limit_seconds=config.distributed.limit_seconds)
