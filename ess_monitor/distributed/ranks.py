"""Tells which rank this process has, and builds the exchange with the other ranks."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch.distributed as dist

from ess_monitor.distributed.config import DistributedConfig, measuring_ranks
from ess_monitor.distributed.consensus import StoreConsensus
from ess_monitor.errors import ConfigError


@dataclass(frozen=True)
class RankInfo:
    """Identifies one process of a run."""

    rank: int = 0
    local_rank: int = 0
    """Rank on its machine."""
    world_size: int = 1


def rank_info() -> RankInfo:
    """Return the ranks given by `torch.distributed` and the launcher; rank 0 of 1 without a process group.

    >>> rank_info()
    RankInfo(rank=0, local_rank=0, world_size=1)
    """
    if not (dist.is_available() and dist.is_initialized()):
        return RankInfo()
    rank = dist.get_rank()
    local = next((os.environ[name] for name in ("LOCAL_RANK", "SLURM_LOCALID") if name in os.environ), "")
    return RankInfo(rank, int(local) if local.isdecimal() else rank, dist.get_world_size())


def measure_together(config: DistributedConfig, world_size: int, *, acts: bool) -> bool:
    """Return whether all ranks take part in every sample: several measure, or the autopilot may act.

    >>> [measure_together(DistributedConfig(ranks=ranks), 8, acts=False) for ranks in (None, "all")]
    [False, True]
    """
    return world_size > 1 and (acts or len(measuring_ranks(config.ranks, world_size, acts=acts)) > 1)


def consensus_of_the_run(config: DistributedConfig, world_size: int, *, acts: bool) -> StoreConsensus | None:
    """Build the exchange that these settings need; None where this process decides alone.

    Raises:
        ConfigError: there are several ranks, but no process group of that size.
    """
    if not measure_together(config, world_size, acts=acts):
        return None
    here = rank_info()
    if here.world_size != world_size:
        raise ConfigError(
            f"distributed: {world_size} ranks are to agree, but torch.distributed knows {here.world_size}; call "
            'init_process_group before the monitor is built, or set autopilot="advise" and '
            'distributed={"ranks": "zero"}'
        )
    measuring = measuring_ranks(config.ranks, world_size, acts=acts)
    return StoreConsensus.of_the_run(measuring, limit_seconds=config.limit_seconds)
