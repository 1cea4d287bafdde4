"""Forward passes of one rank, or of all, that DDP and FSDP must not notice.

Libraries other than torch are recognized by the names in their code.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ess_monitor.evidence.snapshot import Contents


def why_not_alone(model: nn.Module) -> str:
    """Return why one rank cannot run the model while the others do not; empty where it can.

    A forward pass in which the ranks exchange something would wait for them forever. DDP exchanges buffers only, which
    `Undisturbed(alone=True)` switches off. Exchanges in a layer's own code cannot be known.

    Examples:
        >>> why_not_alone(nn.Linear(2, 2))
        ''
    """
    reasons = (_reason_of_module(module) or _reason_of_tensors(module) for module in model.modules())
    return next(filter(None, reasons), "")


def _reason_of_module(module: nn.Module) -> str:
    names = _class_names(module)
    if "FullyShardedDataParallel" in names and getattr(module, "world_size", 2) > 1:
        return "its parameters are sharded (FullyShardedDataParallel)"
    if "FSDPModule" in names and any(_ranks(group) > 1 for group in _param_groups(module)):
        return "its parameters are sharded (fully_shard)"
    if module.training and any("SyncBatchNorm" in name for name in names) and _group_size(module) > 1:
        return f"{type(module).__name__} averages over the ranks in training"
    if isinstance(module, DistributedDataParallel) and module._join_config.enable:
        return "it trains inside DistributedDataParallel.join()"
    if any(base.__module__.startswith("torch.distributed._composable.replicate") for base in type(module).__mro__):
        return "its buffers are sent to all ranks (replicate)"
    if getattr(module, "dist_sync_on_step", False) is True:
        return f"{type(module).__name__} averages over the ranks at every call"
    return ""


def _class_names(module: nn.Module) -> set[str]:
    return {base.__name__ for base in type(module).__mro__}


def _reason_of_tensors(module: nn.Module) -> str:
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is None:
            continue
        mesh = getattr(tensor, "device_mesh", None)
        if mesh is not None and mesh.size() > 1:
            return "its tensors are spread over the ranks (DTensor: tensor parallelism or fully_shard)"
        if hasattr(tensor, "_fsdp_flattened"):
            return "its parameters are sharded (FullyShardedDataParallel)"
        if hasattr(tensor, "ds_tensor"):
            return "its parameters are sharded (DeepSpeed ZeRO-3)"
        if getattr(tensor, "tensor_model_parallel", False) is True:
            return "its parameters are spread over the ranks (Megatron tensor parallelism)"
    return ""


def _group_size(module: nn.Module) -> int:
    """Return the number of ranks that a SyncBatchNorm averages over."""
    from torch import distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return 1
    group: Any = getattr(module, "process_group", None)
    return dist.get_world_size() if group is None else int(group.size())


@contextmanager
def without_buffer_broadcasts(model: nn.Module) -> Iterator[None]:
    """Let no DDP wrapper in the model send buffers to the other ranks."""
    wrappers = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    before = [wrapper.require_forward_param_sync for wrapper in wrappers]
    for wrapper in wrappers:
        wrapper.require_forward_param_sync = False
    try:
        yield
    finally:
        for wrapper, value in zip(wrappers, before, strict=True):
            wrapper.require_forward_param_sync = value


class ShardedParameters:
    """Which parameters FSDP holds sharded now, to shard them again after forward passes without gradients.

    After such a pass the root module stays whole until the next backward. A parameter that is changed in between would
    change in the shard alone, and the next forward pass would not see it.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._units: list[_Fsdp1Unit | _Fsdp2Unit] = []
        unit_of: dict[type, type[_Fsdp1Unit | _Fsdp2Unit] | None] = {}
        for module in modules:
            kind = type(module)
            if kind not in unit_of:
                names = _class_names(module)
                unit_of[kind] = (
                    _Fsdp2Unit if "FSDPModule" in names else _Fsdp1Unit if "FullyShardedDataParallel" in names else None
                )
            unit = unit_of[kind]
            if unit is not None:
                self._units.append(unit(module))

    def settle(self) -> None:
        """End forward passes that an exception has left."""
        for unit in self._units:
            unit.settle()

    def restore(self) -> None:
        """Shard what was sharded."""
        self.settle()
        for unit in self._units:
            unit.reshard()


class _Fsdp1Unit:
    """A module in `FullyShardedDataParallel`."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._handle = module._handle
        """None where all its parameters belong to others."""
        self._state = None if self._handle is None else self._handle._training_state
        self._was_sharded = self._handle is not None and self._handle.needs_unshard()

    def settle(self) -> None:
        if self._handle is not None and self._handle._training_state is not self._state:
            self._handle._training_state = self._state
            self._shard()

    def reshard(self) -> None:
        if self._was_sharded and not self._handle.needs_unshard():
            self._shard()

    def _shard(self) -> None:
        from torch.distributed.fsdp._runtime_utils import _reshard

        _reshard(self._module, self._handle, True)


class _Fsdp2Unit:
    """A module that was given to `fully_shard`."""

    def __init__(self, module: Any) -> None:
        state = module._get_fsdp_state()
        groups = _param_groups(module)
        self._sharded = [group for group in groups if group.is_sharded]
        values = [(state, "_training_state"), (getattr(state, "_state_ctx", None), "iter_forward_root")]
        values += [(group, "_training_state") for group in groups]
        self._values = [(owner, name, getattr(owner, name)) for owner, name in values if hasattr(owner, name)]
        lists = [getattr(state, "_modules_to_run_forward", None)]
        lists += [getattr(group, "_post_forward_indices", None) for group in groups]
        lists += [getattr(getattr(group, "comm_ctx", None), "post_forward_order", None) for group in groups]
        self._contents = [Contents(each) for each in lists if each is not None]

    def settle(self) -> None:
        for owner, name, value in self._values:
            if getattr(owner, name) is not value:
                setattr(owner, name, value)
        for contents in self._contents:
            contents.restore()

    def reshard(self) -> None:
        for group in self._sharded:
            if getattr(group, "_all_gather_result", None) is not None:
                group.wait_for_unshard()
            group.reshard()


def _param_groups(module: Any) -> list[Any]:
    """Return the groups of parameters of a module that was given to `fully_shard`; older versions of torch have one."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def _ranks(group: Any) -> int:
    return int(group.mesh_info.mesh.size())
