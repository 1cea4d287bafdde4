"""Builds copies of layers and models with smaller states: the same classes, with weights cut out of those they have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from ess_monitor.analysis.layer_operators import NotAnalyzed
from ess_monitor.capture.handles import StateRows, StateWeights
from ess_monitor.capture.layers import Layer
from ess_monitor.errors import CaptureError, format_error
from ess_monitor.ess import DiagonalRecurrence, Operator
from ess_monitor.ess.realization.projection import (
    StateProjection,
    balanced_directions,
    best_dimensions,
    first_dimensions,
)

_WHY = {
    "SoftmaxAttention": "attention keeps every token and has no state dimensions to leave out; see `hybrid-advice` for "
    "where a recurrence may do",
    "Delta": "the delta rule subtracts what its keys find in the state: without a dimension they would find something "
    "else, at every later token",
    "Convolution": "a filter has no state of its own",
}
"""Begin of an operator's name -> why its state cannot be made smaller in the weights."""


def state_weights(layer: Layer) -> StateWeights | str:
    """Return the weights that a layer's state size sets, or why it cannot be made smaller."""
    found = layer.spec.weights(layer.module)
    if found is not None:
        return found
    for begin, reason in _WHY.items():
        if begin in layer.spec.operator:
            return reason
    return f"it is not known which weights of {type(layer.module).__name__} are those of its state dimensions"


def recurrences_of(operator: Operator, weights: StateWeights) -> list[DiagonalRecurrence]:
    """Return the operator as recurrences with the state that the weights have.

    Raises:
        NotAnalyzed: it is none, or not finite.
    """
    parts = [part for part in operator.longest_segments() if isinstance(part, DiagonalRecurrence)]
    if not parts or parts[0].state_size != weights.size:
        raise NotAnalyzed("failed", "its operator is no recurrence with the state that its weights have")
    if not all(bool(part.finite().all()) for part in parts):
        raise NotAnalyzed("nonfinite", "an input of its operator is NaN or infinite")
    return parts


def require_own_weights(model: nn.Module, module: nn.Module, weights: StateWeights) -> None:
    """Check that none of a layer's weights that become smaller has another place in the model.

    Each place would keep other dimensions of it, and the class, which ties them again, loads one of the two into both.

    Raises:
        NotAnalyzed: one has.
    """
    places = Counter(
        id(tensor) for each in model.modules() for tensor in (*each._parameters.values(), *each._buffers.values())
    )
    paths = {rows.tensor for rows in weights.rows}
    uses = Counter(id(_tensor_at(module, path)) for path in paths)
    for path in sorted(paths):
        tensor = _tensor_at(module, path)
        if max(places[id(tensor)], uses[id(tensor)]) > 1:
            raise NotAnalyzed("skipped", f"its {path} is tied to another weight, and would have to fit both")


def _tensor_at(module: nn.Module, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name)


def projection_of(parts: Sequence[DiagonalRecurrence], weights: StateWeights, state: int) -> StateProjection:
    """Return what stays of a layer's state, as far as its weights allow a choice."""
    if weights.keeps == "directions":
        return balanced_directions(parts, weights.groups, state)
    if weights.keeps == "first":
        return first_dimensions(parts, weights.groups, state)
    return best_dimensions(parts, weights.groups, state, scales=weights.reads_linearly)


@dataclass(frozen=True, eq=False)
class SmallerState:
    """What becomes of one layer."""

    module: nn.Module
    """The layer, in the model that is copied."""
    weights: StateWeights
    projection: StateProjection
    size: int


@torch.no_grad()
def smaller_layer(layer: SmallerState, name: str) -> nn.Module:
    """Return a copy of one layer, called `name`, with a smaller state.

    Raises:
        CaptureError: as `smaller_model`.
    """
    smaller = _copied(layer.module)
    _make_smaller(smaller, layer, name)
    return smaller


@torch.no_grad()
def smaller_model(model: nn.Module, layers: Sequence[SmallerState], *, are_all: bool) -> nn.Module:
    """Return a copy of the model in which these layers have smaller states.

    Where these `are_all` layers with a state, and had one size, it changes in the configurations of the modules too.

    Raises:
        CaptureError: the model cannot be copied, or a weight is not a plain tensor of floating numbers.
    """
    names = {id(module): name for name, module in model.named_modules()}
    smaller = _copied(model)
    for layer in layers:
        module = smaller.get_submodule(names[id(layer.module)])
        _make_smaller(module, layer, names[id(layer.module)])
    before: dict[str, int | float] = {}
    after: dict[str, int | float] = {}
    for layer in layers:
        before |= layer.weights.settings(layer.weights.size)
        after |= layer.weights.settings(layer.size)
    if are_all and len({layer.weights.size for layer in layers}) == 1:
        for module in smaller.modules():
            _update_config(module, before, after)
    return smaller


def settings_of(model: nn.Module, weights: StateWeights, state: int) -> dict[str, int | float]:
    """Return the arguments that build a smaller layer: those that a configuration in the model has, or all of them."""
    present, wanted = weights.settings(weights.size), weights.settings(state)
    configs = [getattr(module, "config", None) for module in model.modules()]
    known = [name for name, value in present.items() if any(getattr(each, name, None) == value for each in configs)]
    return {name: wanted[name] for name in known or wanted}


def _copied(model: nn.Module) -> nn.Module:
    try:
        return deepcopy(model)
    except Exception as error:
        raise CaptureError(f"model: {type(model).__name__} cannot be copied ({format_error(error)})") from error


def _make_smaller(module: nn.Module, layer: SmallerState, name: str) -> None:
    weights, projection = layer.weights, layer.projection
    scale = weights.query_scale(weights.size) / weights.query_scale(layer.size)
    decays = None if projection.kept is None else nn.functional.one_hot(projection.kept, weights.size).double()
    matrices = {"writes": projection.writes, "reads": projection.reads * scale, "decays": decays}
    by_tensor: dict[str, list[StateRows]] = {}
    for rows in weights.rows:
        by_tensor.setdefault(rows.tensor, []).append(rows)
    for path, found in by_tensor.items():
        owner_path, _, own_name = path.rpartition(".")
        owner = module.get_submodule(owner_path)
        tensor = getattr(owner, own_name)
        if type(tensor) not in (nn.Parameter, Tensor) or not tensor.is_floating_point():
            raise CaptureError(
                f"layer {name}: {path} is a {type(tensor).__name__} of {tensor.dtype}; give the model with plain "
                "weights of floating numbers, neither quantized nor sharded"
            )
        changed = tensor.detach()
        for rows in sorted(found, key=lambda each: -each.start):  # what comes before stays in its place
            changed = _projected(changed, rows, matrices[rows.role], weights.size)
        changed = changed.to(tensor.dtype).contiguous()
        is_parameter = isinstance(tensor, nn.Parameter)
        setattr(owner, own_name, nn.Parameter(changed, tensor.requires_grad) if is_parameter else changed)
        _update_sizes(owner)
    for path, value in weights.attributes(layer.size).items():
        owner_path, _, own_name = path.rpartition(".")
        setattr(module.get_submodule(owner_path), own_name, value)


def _projected(tensor: Tensor, rows: StateRows, matrices: Tensor | None, size: int) -> Tensor:
    """Return the tensor with `matrices`, (G, r, n), applied to each of its blocks of n rows."""
    if matrices is None:  # a decay that the dimensions share
        return tensor
    first = (tensor.flatten(rows.dim, rows.dim + 1) if rows.has_head_dim else tensor).movedim(rows.dim, 0)
    stop = rows.start + rows.heads * size
    before, blocks, after = first[: rows.start], first[rows.start : stop], first[stop:]
    groups = matrices[: rows.heads]  # of one block for all heads any group's: they keep the same
    each = groups.repeat_interleave(rows.heads // groups.shape[0], 0).to(tensor.device)
    new = torch.einsum("hrn,hn...->hr...", each, blocks.reshape(rows.heads, size, *blocks.shape[1:]).double())
    new = new.to(tensor.dtype)
    if rows.has_head_dim:
        return new.movedim((0, 1), (rows.dim, rows.dim + 1))
    return torch.cat([before, new.flatten(0, 1), after]).movedim(0, rows.dim)


def _update_sizes(module: nn.Module) -> None:
    """Set the attributes by which torch's own layers know their sizes."""
    if isinstance(module, nn.Linear):
        module.out_features = module.weight.shape[0]
    elif isinstance(module, nn.Conv1d):
        module.in_channels = module.out_channels = module.groups = module.weight.shape[0]


def _update_config(module: nn.Module, before: Mapping[str, int | float], after: Mapping[str, int | float]) -> None:
    config: Any = getattr(module, "config", None)
    names = [name for name, value in before.items() if getattr(config, name, None) == value]
    changed = {name: after[name] for name in names}
    if not changed:
        return
    if isinstance(config, BaseModel):
        setattr(module, "config", config.model_copy(update=changed))  # noqa: B010
    elif getattr(getattr(config, "__dataclass_params__", None), "frozen", False):
        setattr(module, "config", replace(config, **changed))  # noqa: B010
    elif not isinstance(config, dict):
        for name, value in changed.items():
            setattr(config, name, value)
