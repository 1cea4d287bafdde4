"""The parameters that decide a layer's decay: copied before a treatment, put back for a comparison or for good."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch

from ess_monitor.capture import Layer
from ess_monitor.interventions.alpha import Optimizers, copy_of_state, is_sharded, optimizer_state_of


def gate_tensors(layer: Layer) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers that the layer's decay follows from, by their names below the layer.

    Where a projection gives the decay beside other things (Mamba's `x_proj`), it counts as a whole.

    Example:
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
    """Holds a layer's gate as it was: parameters, and the optimizer's state of each.

    Of sharded parameters it holds this rank's shards. They are good for this process only, and are not saved.

    Args:
        layer: the layer whose gate is copied.
        optimizer: the optimizers that train it.
    """

    def __init__(self, layer: Layer, optimizer: Optimizers) -> None:
        self._layer = layer
        own = gate_tensors(layer)
        self._tensors = {name: tensor.detach().clone() for name, tensor in own.items()}
        self._moments = {name: copy_of_state(optimizer_state_of(tensor, optimizer)) for name, tensor in own.items()}
        self._number = self._present_number()

    @property
    def is_empty(self) -> bool:
        """True where the decay follows from nothing that can be put back."""
        return not self._tensors and self._number is None

    @property
    def is_sharded(self) -> bool:
        """Whether the copy cannot be saved with a checkpoint."""
        return any(is_sharded(parameter) for parameter in gate_tensors(self._layer).values())

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the copied parameters in the place of the present ones inside the block; afterwards all bits are back."""
        present = {name: tensor.detach().clone() for name, tensor in gate_tensors(self._layer).items()}
        number = self._present_number()
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
                    with torch.no_grad():
                        state[key].copy_(before[key])
                else:
                    state[key] = before[key]

    def state_dict(self) -> dict[str, Any] | None:
        """Return tensors by name, for a checkpoint; None where they are sharded."""
        if self.is_sharded:
            return None
        number = None if self._number is None else self._number.item()
        return {"tensors": dict(self._tensors), "moments": dict(self._moments), "number": number}

    @classmethod
    def from_state(cls, layer: Layer, state: Mapping[str, Any] | None) -> GateCopy | None:
        """Return the copy as it was; None where it was not saved, or does not fit the layer."""
        own = gate_tensors(layer)
        if state is None or {n: p.shape for n, p in own.items()} != {n: t.shape for n, t in state["tensors"].items()}:
            return None
        copy = cls(layer, None)
        if copy.is_sharded:
            return None
        for name, tensor in state["tensors"].items():
            copy._tensors[name] = tensor.detach().clone().to(own[name].device, own[name].dtype)
            copy._moments[name] = dict(state["moments"].get(name, {}))
        if copy._number is not None and state["number"] is not None:
            copy._number = copy._number.new_tensor(state["number"])
        return copy

    def _present_number(self) -> torch.Tensor | None:
        alpha = self._layer.spec.alpha
        return alpha.of(self._layer.module) if alpha is not None and alpha.is_number else None

    def _put(self, tensors: Mapping[str, torch.Tensor], number: torch.Tensor | None) -> None:
        with torch.no_grad():
            for name, parameter in gate_tensors(self._layer).items():
                parameter.copy_(tensors[name])
        if number is not None and self._layer.spec.alpha is not None:
            self._layer.spec.alpha.put(self._layer.module, number)
