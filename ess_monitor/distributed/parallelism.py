"""Detects how a model is split over processes, and refuses what cannot be measured.

Data parallelism is fine, sharded or not: every process runs whole layers. With tensor parallelism a process runs some
heads of a layer; those are measured. With pipeline parallelism it runs some of the layers, and with context parallelism
some of the tokens: the state of a layer is then spread over processes, and a number of one of them would mean nothing.

Libraries are recognized by names and never imported. Two cases leave no trace in the model. PyTorch's
`context_parallel` is a block around the step, which the sampler detects. A stage of `torch.distributed.pipelining` can
be any module, and is not detected.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from ess_monitor.errors import ConfigError
from ess_monitor.runtime.guard import logger

Kind = str
"""pipeline, context or tensor."""

_KIND_OF_DIM: Mapping[str, Kind] = {
    **dict.fromkeys(("pp", "pipe", "pipeline", "pipeline_parallel"), "pipeline"),
    **dict.fromkeys(("cp", "sp", "context", "context_parallel", "ulysses", "ring"), "context"),
    **dict.fromkeys(("tp", "tensor", "tensor_parallel"), "tensor"),
}
"""Names that libraries give the dimensions of a device mesh."""

_PIPELINES = {"Pipe", "PipelineModule", "PipelineEngine"}
"""Classes of modules that hold a pipeline: torch.distributed.pipelining, DeepSpeed."""

_SIZES: Mapping[str, Kind] = {"pp_size": "pipeline", "cp_size": "context", "sp_size": "context", "tp_size": "tensor"}
"""Fields of accelerate's `ParallelismConfig`."""


def sizes_of_config(config: Any) -> dict[Kind, int]:
    """Return the sizes in accelerate's `ParallelismConfig`, or in any object with its fields; empty for None."""
    return _largest((kind, int(getattr(config, field, None) or 1)) for field, kind in _SIZES.items())


def sizes_of_mesh(mesh: Any) -> dict[Kind, int]:
    """Return the sizes of a `DeviceMesh` and of the one it was cut from; empty for None."""
    found: list[tuple[Kind, int]] = []
    for each in _with_root(mesh):
        named = zip(each.mesh_dim_names or (), getattr(each, "shape", ()), strict=False)
        found += [(_KIND_OF_DIM[str(name)], int(size)) for name, size in named if str(name) in _KIND_OF_DIM]
    return _largest(found)


def sizes_of_model(model: nn.Module) -> dict[Kind, int]:
    """Return the sizes of the meshes of its parameters; 2 for a module that is known to hold a pipeline."""
    found: list[tuple[Kind, int]] = []
    for module in model.modules():
        bases = [c for c in type(module).__mro__ if c.__module__.split(".")[0] in ("torch", "deepspeed")]
        if _PIPELINES & {c.__name__ for c in bases}:
            found.append(("pipeline", 2))
    seen: set[int] = set()
    for parameter, sharded_by_fsdp in _parameters(model):
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is None or id(mesh) in seen:
            continue
        seen.add(id(mesh))
        if not sharded_by_fsdp and not mesh.mesh_dim_names and mesh.size() > 1:
            found.append(("tensor", int(mesh.size())))  # nothing gathers the parameter
        else:
            found += sizes_of_mesh(mesh).items()
    return _largest(found)


def require_data_parallel(
    model: nn.Module, sizes: Mapping[Kind, int] | None = None, *, acts: bool, source: str
) -> None:
    """Refuse what cannot be measured; under tensor parallelism log once which heads are measured.

    Args:
        model: as the training loop has it.
        sizes: what the loop's own settings say, where they are known.
        acts: whether the autopilot may act.
        source: `capture.source`.

    Raises:
        ConfigError: pipeline or context parallelism; mode auto under tensor parallelism; a probe of random tokens
            through a sharded model.
    """
    found = _largest([*sizes_of_model(model).items(), *(sizes or {}).items()])
    for kind, what in (("pipeline", "layers"), ("context", "tokens")):
        if kind in found:
            raise ConfigError(
                f"model: {kind} parallelism over {found[kind]} or more processes; each runs some of the {what}. "
                "Layers can be measured under data parallelism (DDP, FSDP) and tensor parallelism only. Train without "
                "it, or without the monitor"
            )
    if source == "random_tokens" and any(_is_fsdp(module) for module in model.modules()):
        raise ConfigError(
            'capture.source: "random_tokens" needs a forward pass of its own, in which a sharded model (FSDP) would '
            'wait for the other ranks; use "train" or "validation"'
        )
    if "tensor" in found:
        if acts:
            raise ConfigError(
                'autopilot: mode "auto" is not possible under tensor parallelism: a process sees the decay of some '
                'heads only, and would pull them with the wrong strength; use "advise"'
            )
        logger.info(
            "ess_monitor: tensor parallelism over %d processes: readings are those of the heads on the measuring "
            'ranks; distributed={"ranks": "all"} measures them all',
            found["tensor"],
        )


def _largest(sizes: Iterable[tuple[Kind, int]]) -> dict[Kind, int]:
    """Return the largest size of each kind, without those of one process."""
    found: dict[Kind, int] = {}
    for kind, size in sizes:
        if size > found.get(kind, 1):
            found[kind] = size
    return found


def _with_root(mesh: Any) -> Iterator[Any]:
    if mesh is None or not hasattr(mesh, "mesh_dim_names"):
        return
    yield mesh
    try:
        root = mesh._get_root_mesh()
    except Exception:  # private, and different in each release
        return
    if root is not None and root is not mesh:
        yield root


def _parameters(module: nn.Module, sharded: bool = False) -> Iterator[tuple[nn.Parameter, bool]]:
    """Yield every parameter, and whether FSDP gathers it for the forward pass."""
    sharded = sharded or _is_fsdp(module)
    yield from ((parameter, sharded) for parameter in module.parameters(recurse=False))
    for child in module.children():
        yield from _parameters(child, sharded)


def _is_fsdp(module: nn.Module) -> bool:
    return any(c.__name__ in ("FSDPModule", "FullyShardedDataParallel") for c in type(module).__mro__)
