"""Decides which processes of a run measure, and lets all of them act on the same numbers."""

from ess_monitor.distributed.config import DistributedConfig, measuring_ranks
from ess_monitor.distributed.consensus import ConsensusResult, StoreConsensus
from ess_monitor.distributed.ranks import RankInfo
from ess_monitor.distributed.reduction import RankReduction

__all__ = [
    "ConsensusResult",
    "DistributedConfig",
    "RankInfo",
    "RankReduction",
    "StoreConsensus",
    "measuring_ranks",
]
