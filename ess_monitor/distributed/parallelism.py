"""How a model is split over processes, as far as its parameters and class names tell, and what of that can be measured.

Data parallelism is fine, sharded or not: every process runs whole layers. With tensor parallelism a process runs some
heads of a layer; those are measured. With pipeline parallelism it runs some of the layers, and with context parallelism
some of the tokens: the state of a layer is then spread over processes, and a number of one of them would mean nothing.

Libraries are known by names, never imported. What leaves no trace in the model cannot be seen here: PyTorch's
`context_parallel` is a block around the step (the sampler notices it), and a stage of `torch.distributed.pipelining`
can be any module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
"""Modules that hold a pipeline: torch.distributed.pipelining, DeepSpeed."""

_SIZES: Mapping[str, Kind] = {"pp_size": "pipeline", "cp_size": "context", "sp_size": "context", "tp_size": "tensor"}
"""Fields of accelerate's `ParallelismConfig`."""


def sizes_of_config(config: Any) -> dict[Kind, int]:
    """Of accelerate's `ParallelismConfig`, or of anything with its fields; empty for None."""
    found = dict.fromkeys(_SIZES.values(), 1)
    for field, kind in _SIZES.items():
        found[kind] = max(found[kind], int(getattr(config, field, None) or 1))
    return {kind: size for kind, size in found.items() if size > 1}


def sizes_of_mesh(mesh: Any) -> dict[Kind, int]:
    """Of a `DeviceMesh` and of the one it was cut from; empty for None."""
    found: dict[Kind, int] = {}
    for each in _with_roots(mesh):
        shape = tuple(each.shape) if hasattr(each, "shape") else ()
        for name, size in zip(each.mesh_dim_names or (), shape, strict=False):
            kind = _KIND_OF_DIM.get(str(name))
            if kind is not None and size > 1:
                found[kind] = max(found.get(kind, 1), int(size))
    return found


def sizes_of_model(model: nn.Module) -> dict[Kind, int]:
    """Of the meshes of its parameters, and of modules that are known to hold a pipeline."""
    found: dict[Kind, int] = {}
    for module in model.modules():
        if _PIPELINES & {
            c.__name__ for c in type(module).__mro__ if c.__module__.split(".")[0] in ("torch", "deepspeed")
        }:
            found["pipeline"] = max(found.get("pipeline", 1), 2)
    seen: set[int] = set()
    for parameter, sharded_by_fsdp in _parameters(model):
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is None or id(mesh) in seen:
            continue
        seen.add(id(mesh))
        sizes = sizes_of_mesh(mesh)
        if not sharded_by_fsdp and not mesh.mesh_dim_names and mesh.size() > 1:
            sizes = {"tensor": int(mesh.size())}  # a mesh without names, and nobody gathers the parameter
        for kind, size in sizes.items():
            found[kind] = max(found.get(kind, 1), size)
    return found


def require_data_parallel(
    model: nn.Module, sizes: Mapping[Kind, int] | None = None, *, acts: bool, source: str
) -> None:
    """Refuse what cannot be measured, and say once what of a layer is measured where it is only a part.

    Args:
        model: as the training loop has it.
        sizes: what the loop's own settings say, where they are known.
        acts: whether the autopilot may act.
        source: `capture.source`.

    Raises:
        ConfigError: pipeline or context parallelism; mode auto under tensor parallelism; a probe of random tokens
            through a sharded model.
    """
    found = sizes_of_model(model)
    for kind, size in (sizes or {}).items():
        found[kind] = max(found.get(kind, 1), size)
    for kind, what in (("pipeline", "layers"), ("context", "tokens")):
        if found.get(kind, 1) > 1:
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
    if found.get("tensor", 1) > 1:
        if acts:
            raise ConfigError(
                'autopilot: mode "auto" is not possible under tensor parallelism, where a process sees the decay of '
                'some heads only and would pull them with another strength; use "advise"'
            )
        logger.info(
            "ess_monitor: tensor parallelism over %d processes: readings are those of the heads on the measuring "
            'ranks; distributed={"ranks": "all"} measures them all',
            found["tensor"],
        )


def _with_roots(mesh: Any) -> Iterator[Any]:
    if mesh is None or not hasattr(mesh, "mesh_dim_names"):
        return
    yield mesh
    root = getattr(mesh, "_get_root_mesh", None)
    try:
        above = root() if root is not None else None
    except Exception:  # private, and different in each release
        return
    if above is not None and above is not mesh:
        yield above


def _parameters(model: nn.Module) -> Iterator[tuple[nn.Parameter, bool]]:
    """Every parameter, and whether FSDP gathers it for the forward pass."""

    def below(module: nn.Module, sharded: bool) -> Iterator[tuple[nn.Parameter, bool]]:
        sharded = sharded or _is_fsdp(module)
        yield from ((parameter, sharded) for parameter in module.parameters(recurse=False))
        for child in module.children():
            yield from below(child, sharded)

    yield from below(model, False)


def _is_fsdp(module: nn.Module) -> bool:
    return any(c.__name__ in ("FSDPModule", "FullyShardedDataParallel") for c in type(module).__mro__)
