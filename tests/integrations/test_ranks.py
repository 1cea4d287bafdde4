"""Several processes: all measure, all act alike, one reports."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from tests.exporters.helpers import free_port
from tests.integrations.helpers import EAGER, LanguageModel, callback, measurements, train
from tests.ranks import saved_by_ranks

LOOPS = ("accelerate", "transformers")


def one_rank(rank: int, place: str, world: int, port: int) -> None:
    folder = Path(place)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world)
    )
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["OMP_NUM_THREADS"] = "1"  # otherwise accelerate gives each process all cores
    torch.set_num_threads(1)
    results = {}
    for loop in LOOPS:
        log = folder / f"{loop}-{rank}.jsonl"
        ess = callback(loop, **EAGER, exporters=[{"kind": "event_log", "path": str(log)}])
        run = train(loop, folder / loop, ess, steps=6, model=LanguageModel("wla"))
        actions = [(a.step, a.layer, a.action, a.strength, a.outcome) for a in ess.monitor.actions]
        sizes = [r.effective_size for r in ess.monitor.readings]
        results[loop] = {"model": run.model.state_dict(), "actions": actions, "sizes": sizes}
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_all_ranks_act_alike_and_one_reports(world: int, tmp_path: Path) -> None:
    ranks = saved_by_ranks(one_rank, tmp_path, world, world, free_port())
    for loop in LOOPS:
        a, *others = (results[loop] for results in ranks)
        assert a["actions"], f"{loop}: nothing was done, so nothing was compared"
        for b in others:
            assert a["actions"] == b["actions"]
            assert a["sizes"] == b["sizes"]
            for name, value in a["model"].items():
                assert torch.equal(value, b["model"][name]), (loop, name)
        assert [m.step for m in measurements(tmp_path / f"{loop}-0.jsonl")] == [0, 4]
        assert not any((tmp_path / f"{loop}-{rank}.jsonl").exists() for rank in range(1, world))
