"""Replays under DDP, FSDP and FSDP2, of all ranks and of one of them alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from ess_monitor.evidence.data_parallel import why_not_alone
from tests.evidence.ranks import WAYS, reasons, under_ddp, under_fsdp
from tests.ranks import saved_by_ranks


@pytest.mark.parametrize("count", [1, 2])
def test_under_ddp_all_ranks_or_one_alone_leave_no_trace(tmp_path: Path, count: int) -> None:
    for found in saved_by_ranks(under_ddp, tmp_path, count, count):
        assert found.pop("control")
        assert (found.pop("sent"), found.pop("sent alone")) == (3, 1)
        assert len(found) == 5
        assert {name: paths for name, paths in found.items() if paths} == {}


@pytest.mark.parametrize("way", WAYS)
def test_a_sharded_training_goes_on_bit_by_bit(tmp_path: Path, way: str) -> None:
    for found in saved_by_ranks(under_fsdp, tmp_path, 2, way, 2):
        assert found.pop("control")
        assert found.pop("control written"), "what the calls leave whole would hide what is written to the shards"
        assert len(found) == 7
        assert {name: paths for name, paths in found.items() if paths} == {}


def test_it_is_said_why_one_rank_cannot_run_a_model(tmp_path: Path) -> None:
    for found in saved_by_ranks(reasons, tmp_path, 2, 2):
        free = ("plain", "ddp", "norm in eval mode")
        assert {name: found.pop(name) for name in free} == dict.fromkeys(free, "")
        assert "FullyShardedDataParallel" in found.pop("fsdp1")
        assert "FullyShardedDataParallel" in found.pop("fsdp1 inside")
        assert "fully_shard" in found.pop("fsdp2")
        assert "DTensor" in found.pop("tensor")
        assert found.pop("norm") == "SyncBatchNorm averages over the ranks in training"
        assert "join" in found.pop("join")
        assert "let every rank run it, with alone=False" in found.pop("refused")
        assert found == {}


@pytest.mark.parametrize(("attribute", "word"), [("ds_tensor", "ZeRO-3"), ("tensor_model_parallel", "Megatron")])
def test_libraries_that_spread_parameters_are_recognized(attribute: str, word: str) -> None:
    model = nn.Linear(2, 2)
    setattr(model.weight, attribute, True)
    assert word in why_not_alone(model)


def test_one_process_can_run_a_synchronized_norm() -> None:
    assert why_not_alone(nn.SyncBatchNorm(4)) == ""
