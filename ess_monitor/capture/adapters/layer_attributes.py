"""Read a layer's attributes and the circumstances of a call, for several adapters."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ess_monitor.capture.hooks.call_site import Call

_STATES = ("initial_state", "recurrent_state", "initial_states")


def int_attribute(*names: str, or_config: bool = False) -> Callable[[nn.Module], int | None]:
    """Build the function that returns the first of these attributes that is an int; None without any.

    Those of the layer come first, then with `or_config` those of its `config`.
    """

    def find(layer: nn.Module) -> int | None:
        owners = (layer, getattr(layer, "config", None)) if or_config else (layer,)
        values = (getattr(owner, name, None) for owner in owners for name in names)
        return next((value for value in values if isinstance(value, int)), None)

    return find


def existing(layer: nn.Module, *names: str) -> tuple[str, ...]:
    """Return those of `names` that the layer has as attributes."""
    return tuple(name for name in names if hasattr(layer, name))


def is_decoding_step(call: Call, length: int) -> bool:
    """Return whether the call continues from a cached state: its operator is not that of a whole sequence."""
    return length == 1 or any(call.kwargs.get(name) is not None for name in _STATES)


def zeroed_by_mask(call: Call, batch: int, length: int) -> Tensor | None:
    """Return the mask, (batch, length), by which the layer sets inputs of a convolution to 0; None without one.

    For adapters that compute this convolution again. Which tokens are real is derived in `capture/hooks/given_tokens`.
    """
    mask = call.layer_kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == (batch, length):
        return mask != 0
    return None


def by_channel(tensor: Tensor) -> Tensor:
    """(batch, length, channels) -> (batch, channels, length, 1)."""
    return tensor.transpose(1, 2)[..., None]
