"""Rescale the decay as a whole: A = exp(-(arange / alpha) softplus(.)) with a larger alpha (section 4.1, Finding 5).

Multiplying alpha by f divides log A by f, whatever the input decides: A moves towards the identity by one factor for
all states. On a trained layer the optimizer's memory of the changed parameter belongs to another scale and is cleared;
a copy of both is kept, so that the change can be undone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn

from ess_monitor import validation
from ess_monitor.capture import AlphaHandle, find_layers
from ess_monitor.capture.layers import check_model
from ess_monitor.errors import CaptureError, ConfigError

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None
"""The optimizer of a run, or all of them."""


@dataclass(frozen=True)
class AlphaCopy:
    """Holds what `rescale_alpha` changed, as it was before."""

    tensor: torch.Tensor
    moments: dict[str, Any]
    """The optimizer's state of that parameter; empty for a buffer, or before the first step."""


def rescale_alpha(
    layer: nn.Module,
    factor: float,
    *,
    optimizer: Optimizers = None,
    handle: AlphaHandle | None = None,
) -> AlphaCopy:
    """Multiply a layer's alpha by `factor`, in place: log A is divided by it, exactly in exact arithmetic.

    Before training this is the initialization of section 4.1; in mid-training also pass the optimizer, whose moments of
    exactly this parameter are reset (Adam's averages and step count, SGD's momentum).

    In fla's GLA and simple GLA alpha is a plain number, `gate_logit_normalizer`. It is in no state_dict: rescale again
    after the layer is built anew and its weights are loaded.

    Args:
        layer: a layer with an alpha handle: GLA-S6, S6.
        factor: above 1 pulls A towards I, below 1 away from it.
        optimizer: the optimizer that trains the parameter, or all of the run.
        handle: where alpha is; looked up for a layer that `describe` knows.

    Returns:
        A copy for `restore_alpha`.

    Raises:
        ConfigError: the factor is not a finite number above 0.
        CaptureError: the layer has nothing that scales its decay, or no parameter or buffer for it.

    Examples:
        >>> from ess_monitor.featurizers import GLAS6
        >>> layer = GLAS6(16, 2, alpha=1.0)
        >>> _ = rescale_alpha(layer, 100.0)
        >>> round(layer.log_alpha.exp().item(), 3)
        100.0
    """
    factor = validation.real("factor", factor, above=0, hint="for example 100")
    handle = _handle_for(layer, handle)
    tensor = handle.of(layer)
    if not (handle.is_number or is_persistent(layer, tensor)):
        raise CaptureError(
            f"layer: {handle.tensor} of {type(layer).__name__} is not a parameter or buffer, so a change would be lost "
            "(flattened by FSDP, or computed from others); with FSDP set use_orig_params=True, or call fully_shard"
        )
    state = optimizer_state_of(tensor, optimizer)
    copy = AlphaCopy(tensor.detach().clone(), copy_of_state(state))
    with torch.no_grad():
        handle.put(layer, handle.divided(tensor, factor))
    _forget(state, tensor)
    return copy


def restore_alpha(
    layer: nn.Module,
    copy: AlphaCopy,
    *,
    optimizer: Optimizers = None,
    handle: AlphaHandle | None = None,
) -> None:
    """Undo `rescale_alpha` bit for bit: the tensor, and the optimizer's state of it.

    State that did not exist yet when the copy was taken starts anew. A copy can be restored more than once.

    Raises:
        CaptureError: the layer has nothing that scales its decay.
    """
    validation.instance("copy", copy, AlphaCopy, hint="what rescale_alpha returned")
    handle = _handle_for(layer, handle)
    tensor = handle.of(layer)
    state = optimizer_state_of(tensor, optimizer)
    with torch.no_grad():
        handle.put(layer, copy.tensor)
        if not copy.moments:
            _forget(state, tensor)
        for name, value in copy.moments.items():
            if isinstance(value, torch.Tensor) and isinstance(state.get(name), torch.Tensor):
                state[name].copy_(value)  # in place: the optimizer keeps its tensors, and their device
            elif name in state:
                state[name] = value


def is_persistent(layer: nn.Module, tensor: torch.Tensor) -> bool:
    """Return whether the tensor is a parameter or buffer. FSDP puts a view into freed memory in the place of one."""
    return any(tensor is own for own in chain(layer.parameters(), layer.buffers()))


def is_sharded(tensor: torch.Tensor) -> bool:
    """Return whether a rank holds only its shard: a DTensor (FSDP2), or a piece of FSDP's flat parameter."""
    return hasattr(tensor, "device_mesh") or hasattr(tensor, "_fsdp_flattened")


def _forget(state: dict[str, Any], tensor: torch.Tensor) -> None:
    """Zero the moments and the step count, and nothing else: optimizers also keep tables here that parameters share."""
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            if name == "step" or (value.shape == tensor.shape and value.is_floating_point()):
                value.zero_()
        elif name == "step":
            state[name] = 0


def optimizer_state_of(tensor: torch.Tensor, optimizer: Optimizers) -> dict[str, Any]:
    """Return the state of `tensor` in the optimizer that trains it; empty for a buffer or before the first step."""
    for candidate in check_optimizers(optimizer):
        if tensor in candidate.state:
            state: dict[str, Any] = candidate.state[tensor]
            return state
    return {}


def copy_of_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the optimizer's state of one tensor, with tensors that the next steps do not write to."""
    return {k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}


def check_optimizers(optimizer: Optimizers) -> tuple[torch.optim.Optimizer, ...]:
    """Return the optimizers of a run as a tuple, or raise `ConfigError` where one is something else.

    Wrappers (Accelerate's, Fabric's) are not subclasses of torch's; they are recognized by their `state`.
    """
    if optimizer is None:
        return ()
    given = (optimizer,) if hasattr(optimizer, "state") else validation.listed("optimizer", optimizer)
    for candidate in given:
        if isinstance(candidate, type) or not isinstance(getattr(candidate, "state", None), Mapping):
            raise ConfigError(
                f"optimizer: {validation.shown(candidate)} is not a torch optimizer; pass the run's, or None"
            )
    return given


def _handle_for(layer: nn.Module, handle: AlphaHandle | None) -> AlphaHandle:
    check_model(layer, "layer")
    given = validation.optional("handle", handle, AlphaHandle)
    if given is not None:
        return given
    found = find_layers(layer)
    if len(found) == 1 and found[0].module is layer and found[0].spec.alpha is not None:
        return found[0].spec.alpha
    raise CaptureError(
        f"layer: {type(layer).__name__} has no tensor that scales its decay as a whole; "
        "ess_monitor.describe(model) lists the layers with an alpha handle"
    )
