"""The parameters that decide a layer's decay: copied before a treatment, put back for a comparison or for good."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch

from ess_monitor.capture import Layer
from ess_monitor.interventions.alpha import Optimizers, optimizer_state_of


def gate_tensors(layer: Layer) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers that the layer's decay follows from, by their names below the layer.

    Where a projection gives the decay beside other things (Mamba's `x_proj`), it counts as a whole.

    Examples:
        >>> from ess_monitor.capture import find_layers
        >>> from ess_monitor.featurizers import WLA
        >>> [layer] = find_layers(WLA(16, 2))
        >>> list(gate_tensors(layer))
        ['decay_logit']
    """
    spec = layer.spec
    names = () if spec.decay is None else spec.decay.parameters
    names += () if spec.alpha is None else (spec.alpha.tensor,)
    return {
        name: tensor
        for name, tensor in chain(layer.module.named_parameters(), layer.module.named_buffers())
        if any(name == given or name.startswith(f"{given}.") for given in names)
    }


class GateCopy:
    """Holds a layer's gate as it was: parameters, and the optimizer's state of each, by their names below the layer.

    Tensors are whole, also where each rank has a part of the parameter. A part of `FullyShardedDataParallel`'s flat
    parameter cannot be gathered: it is good for this process only, and is not saved.
    """

    def __init__(
        self,
        layer: Layer,
        tensors: Mapping[str, torch.Tensor],
        moments: Mapping[str, Mapping[str, Any]],
        number: torch.Tensor | None,
    ) -> None:
        self._layer, self._tensors, self._moments, self._number = layer, tensors, moments, number

    @classmethod
    def take(cls, layer: Layer, optimizer: Optimizers) -> GateCopy:
        """Copy the layer's gate as it is.

        Parameters that `fully_shard` has split are gathered, so that rank 0 can save them alone. All ranks of their
        mesh have to be here at the same step, as in a forward pass; a treatment begins on all of them at once.

        Args:
            layer: the layer whose gate is copied.
            optimizer: the optimizers that train it.
        """
        own = gate_tensors(layer)
        moments = {name: optimizer_state_of(tensor, optimizer) for name, tensor in own.items()}
        return cls(
            layer,
            {name: _whole(tensor) for name, tensor in own.items()},
            {name: {key: _whole(value) for key, value in state.items()} for name, state in moments.items()},
            _present_number(layer),
        )

    @property
    def is_empty(self) -> bool:
        """True where the decay follows from nothing that can be put back."""
        return not self._tensors and self._number is None

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the copied parameters in the place of the present ones inside the block; afterwards all bits are back."""
        present = {
            name: tensor.detach().clone() for name, tensor in gate_tensors(self._layer).items()
        }  # parts stay parts
        number = _present_number(self._layer)
        try:
            self._put(self._tensors, self._number)
            yield
        finally:
            self._put(present, number)

    def restore(self, optimizer: Optimizers) -> None:
        """Put the copied parameters back, and the optimizer's state of each, bit for bit."""
        self._put(self._tensors, self._number)
        for name, parameter in gate_tensors(self._layer).items():
            state, before = optimizer_state_of(parameter, optimizer), self._moments.get(name, {})
            for key in list(state):
                if key not in before:
                    del state[key]  # it begins anew, as it did after the copy was taken
                elif isinstance(before[key], torch.Tensor) and isinstance(state[key], torch.Tensor):
                    _put(state[key], before[key])
                else:
                    state[key] = before[key]

    def state_dict(self) -> dict[str, Any] | None:
        """Return tensors by name, for a checkpoint; None where this process has parts of them."""
        if any(map(_is_part, self._tensors.values())):
            return None
        number = None if self._number is None else self._number.item()
        return {"tensors": dict(self._tensors), "moments": dict(self._moments), "number": number}

    @classmethod
    def from_state(cls, layer: Layer, state: Mapping[str, Any] | None) -> GateCopy | None:
        """Return the copy as it was; None where it was not saved, or does not fit the layer. Nothing is gathered."""
        own = gate_tensors(layer)
        if state is None or {n: p.shape for n, p in own.items()} != {n: t.shape for n, t in state["tensors"].items()}:
            return None
        if any(map(_is_part, own.values())):
            return None
        tensors = {n: t.detach().to(own[n].device, own[n].dtype, copy=True) for n, t in state["tensors"].items()}
        moments = {name: dict(state["moments"].get(name, {})) for name in own}
        number = _present_number(layer)
        if number is not None and state["number"] is not None:
            number = number.new_tensor(state["number"])
        return cls(layer, tensors, moments, number)

    def _put(self, tensors: Mapping[str, torch.Tensor], number: torch.Tensor | None) -> None:
        for name, parameter in gate_tensors(self._layer).items():
            _put(parameter, tensors[name])
        if number is not None and self._layer.spec.alpha is not None:
            self._layer.spec.alpha.put(self._layer.module, number)


def _present_number(layer: Layer) -> torch.Tensor | None:
    alpha = layer.spec.alpha
    return alpha.of(layer.module) if alpha is not None and alpha.is_number else None


def _is_part(tensor: torch.Tensor) -> bool:
    """Return whether nothing here can gather the tensor: a piece of a flat parameter, or shards of another kind."""
    placements = getattr(tensor, "placements", ())
    return hasattr(tensor, "_fsdp_flattened") or any(type(p).__name__ not in ("Replicate", "Shard") for p in placements)


def _whole(value: Any) -> Any:
    """Return a copy of a tensor, gathered where it is a DTensor; anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    held: Any = value.detach()  # DTensor's methods are not torch.Tensor's
    if not hasattr(held, "full_tensor") or _is_part(held):
        return held.clone()
    on_mesh = held.to(held.device_mesh.device_type)  # offloaded parameters wait on the CPU, which NCCL cannot reach
    gathered: torch.Tensor = on_mesh.full_tensor()
    return gathered.to(held.device, copy=True)


@torch.no_grad()
def _put(target: Any, value: torch.Tensor) -> None:
    """Write `value` to `target` in place; of a whole tensor, where `target` is a DTensor, the part of this rank."""
    if hasattr(target, "placements") and not hasattr(value, "placements"):
        coordinate = target.device_mesh.get_coordinate()
        for dim, (index, placement) in enumerate(zip(coordinate, target.placements, strict=True)):
            if placement.is_shard():
                chunks = value.chunk(target.device_mesh.size(dim), placement.dim)
                value = chunks[index] if index < len(chunks) else value.narrow(placement.dim, 0, 0)
        target = target.to_local()
    target.copy_(value)
