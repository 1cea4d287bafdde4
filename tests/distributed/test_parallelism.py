"""How a model is split over processes: what is refused, and what is said."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ess_monitor import ConfigError, Monitor, MonitorConfig
from ess_monitor.distributed.parallelism import require_data_parallel, sizes_of_config, sizes_of_mesh, sizes_of_model
from ess_monitor.featurizers import GLA, Backbone, BackboneConfig
from ess_monitor.integrations.common import CallbackBase, LoopFacts
from tests.ranks import saved_by_ranks


class Mesh:
    """What is asked of a DeviceMesh."""

    def __init__(self, root: Mesh | None = None, **dims: int) -> None:
        self.mesh_dim_names, self.shape = tuple(dims) or None, tuple(dims.values())
        self._root = root

    def size(self) -> int:
        return int(torch.tensor(self.shape).prod())

    def _get_root_mesh(self) -> Mesh:
        return self._root or self


def on(mesh: Any) -> GLA:
    model = GLA(16, 2)
    for parameter in model.parameters():
        parameter.device_mesh = mesh
    return model


@pytest.mark.parametrize(
    ("dims", "kinds"),
    [
        ({"dp": 8}, {}),
        ({"dp_replicate": 2, "dp_shard": 4}, {}),
        ({"data_parallel": 2, "tensor_parallel": 2}, {"tensor": 2}),
        ({"data_parallel": 4, "tensor_parallel": 1}, {}),
        ({"dp": 2, "cp": 4}, {"context": 4}),
        ({"pp": 2, "dp": 2, "tp": 3}, {"pipeline": 2, "tensor": 3}),
    ],
)
def test_the_dimensions_of_a_mesh_say_what_is_split(dims: dict[str, int], kinds: dict[str, int]) -> None:
    assert sizes_of_mesh(Mesh(**dims)) == kinds
    assert sizes_of_model(on(Mesh(**dims))) == kinds
    # A part of a mesh, as the data-parallel library is given it, knows the whole.
    assert sizes_of_model(on(Mesh(root=Mesh(**dims), dp=2))) == kinds


@pytest.mark.parametrize(("field", "kind"), [("cp_size", "context"), ("sp_size", "context"), ("tp_size", "tensor")])
def test_the_parallelism_of_accelerate_is_read(field: str, kind: str) -> None:
    from accelerate.parallelism_config import ParallelismConfig

    assert sizes_of_config(None) == sizes_of_config(ParallelismConfig()) == {}
    assert hasattr(ParallelismConfig(), field)
    assert sizes_of_config(SimpleNamespace(**{field: 2})) == {kind: 2}


@pytest.mark.parametrize(("kind", "what"), [("pipeline", "layers"), ("context", "tokens")])
@pytest.mark.parametrize("rank", [0, 1])
def test_layers_or_tokens_that_are_spread_are_refused_at_the_start_on_every_rank(
    kind: str, what: str, rank: int
) -> None:
    facts = LoopFacts(rank, rank, 2, "s", "32", lambda: 1.0, parallel={kind: 2})
    with pytest.raises(ConfigError, match=f"{kind} parallelism over 2 or more processes; each runs some of the {what}"):
        CallbackBase()._open(GLA(16, 2), facts, tuple)
    dim = {"pipeline": "pp", "context": "cp"}[kind]
    with pytest.raises(ConfigError, match=f"{kind} parallelism"):
        Monitor(on(Mesh(**{dim: 2})))


class PipelineModule(nn.Sequential):
    """Stands for DeepSpeed's."""


PipelineModule.__module__ = "deepspeed.runtime.pipe.module"


def test_a_module_that_is_a_pipeline_is_refused() -> None:
    with pytest.raises(ConfigError, match="pipeline parallelism"):
        Monitor(PipelineModule(GLA(16, 2)))


def test_under_tensor_parallelism_it_is_said_whose_heads_are_measured_and_nothing_is_acted_upon(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = on(Mesh(tp=2))
    with caplog.at_level(logging.INFO, "ess_monitor"):
        Monitor(model)
    assert "readings are those of the heads on the measuring ranks" in caplog.text
    with pytest.raises(ConfigError, match=r'mode "auto" is not possible under tensor parallelism'):
        Monitor(model, MonitorConfig(autopilot="auto"))


class FSDPModule:
    """Stands for torch's, which is mixed into the classes of a sharded model."""


class Sharded(FSDPModule, Backbone):
    pass


def test_a_probe_through_a_sharded_model_is_refused() -> None:
    model = Sharded(BackboneConfig(vocab_size=16, width=16))
    require_data_parallel(model, acts=True, source="train")
    with pytest.raises(ConfigError, match="would wait for the other ranks"):
        Monitor(model, MonitorConfig(capture={"source": "random_tokens"}))


def real_meshes(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=Path(folder, "meet").as_uri(), rank=rank, world_size=2)

    def linear() -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 4))

    found = {
        "plain": sizes_of_model(linear()),
        "fsdp": sizes_of_model(fully_shard(linear(), mesh=init_device_mesh("cpu", (2,)))),
        "named": sizes_of_model(
            parallelize_module(
                linear(), init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), {"0": ColwiseParallel()}
            )
        ),
        "unnamed": sizes_of_model(
            parallelize_module(linear(), init_device_mesh("cpu", (2,)), {"0": ColwiseParallel()})
        ),
        "stage": sizes_of_model(
            fully_shard(linear(), mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("pp", "dp"))["dp"])
        ),
    }
    torch.save(found, Path(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


def test_models_that_torch_has_split_are_seen_for_what_they_are(tmp_path: Path) -> None:
    for found in saved_by_ranks(real_meshes, tmp_path, 2):
        assert found == {
            "plain": {},
            "fsdp": {},
            "named": {"tensor": 2},
            "unnamed": {"tensor": 2},
            "stage": {"pipeline": 2},
        }
