"""PyTorch's `context_parallel` leaves no trace in a model, and is noticed where a layer runs inside it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch.distributed as dist
from torch.nn import functional

from ess_monitor.capture.adapters.torch_attention import with_signature
from ess_monitor.distributed.context_parallel import tokens_are_spread
from tests.programs import run_program

PROGRAM = """
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from ess_monitor import Monitor, MonitorConfig
from ess_monitor.featurizers import GLA

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
model, x = GLA(16, 2), torch.randn(2, 8, 16)
config = MonitorConfig(every_n_steps=1, overhead_budget_ratio=None, runtime={"queue_length": 64})
with Monitor(model, config) as monitor:
    for _ in range(2):
        with context_parallel(mesh, buffers=[x], buffer_seq_dims=[1]):
            model(x).sum().backward()
            monitor.step()
        for reading in monitor.flush():
            print(reading.status, reading.message)
    model(x).sum().backward()
    monitor.step()
    for reading in monitor.flush():
        print(reading.status, reading.message)
dist.destroy_process_group()
"""


@pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
def test_a_layer_inside_the_block_fails_with_the_reason_and_is_read_again_outside_of_it(tmp_path: Path) -> None:
    run = run_program(["-c", PROGRAM], tmp_path)
    assert run.returncode == 0, run.stderr
    *inside, outside = run.stdout.splitlines()
    assert len(inside) == 2
    assert all("context_parallel" in line and line.startswith("failed") for line in inside)
    assert outside.startswith("ok")


@pytest.mark.parametrize("ours_lies_over_it", [True, False])
def test_it_is_noticed_under_and_over_a_patch_of_ours(ours_lies_over_it: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for the block's own patch, which needs devices to run attention on."""
    original = functional.scaled_dot_product_attention

    def spread(*args: object, **kwargs: object) -> object:
        return original(*args, **kwargs)

    module = ModuleType("torch.distributed.tensor.experimental._attention")
    module._replaced_functions = {spread: original}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    ours = with_signature(spread, lambda function, args, kwargs: function(*args, **kwargs))
    monkeypatch.setattr(functional, "scaled_dot_product_attention", ours if ours_lies_over_it else spread)
    assert tokens_are_spread()
    monkeypatch.setattr(functional, "scaled_dot_product_attention", original)
    assert not tokens_are_spread()
