"""What the capture room knows about a kind of layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ess_monitor.capture.handles import AlphaHandle, DecayHandle
from ess_monitor.ess import Operator

Build = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Operator]
"""`(module, args, kwargs, output) -> Operator`, called in a forward hook with gradients off. It should only wrap
tensors that the layer used, so that it costs nothing: the sampler narrows the operator before anything is copied."""


def _no_capacity(module: nn.Module) -> int | None:
    return None


def _no_channels(module: nn.Module) -> int:
    return 0


@dataclass(frozen=True)
class CaptureSpec:
    """How one class of layer is read.

    The operator is built from what the sub-module at `point` is called with: the very tensors the layer applied, not a
    second computation of them.
    """

    operator: str
    """Class name of the operator that `build` returns; shown by `describe`."""
    build: Build
    point: str = ""
    """Sub-module (dotted path below the layer) whose call is observed; empty for the layer itself."""
    state_capacity: Callable[[nn.Module], int | None] = field(default=_no_capacity)
    """TSS per channel, None where it grows with the position."""
    channels: Callable[[nn.Module], int] = field(default=_no_channels)
    """Independent operators (heads or channels) of the layer; 0 when not known before a forward pass."""
    decay: DecayHandle | None = None
    """Where the decay can be pulled; None where the layer has none, or a fixed one."""
    alpha: AlphaHandle | None = None
    """Where the decay can be rescaled as a whole."""

    @property
    def handles(self) -> tuple[str, ...]:
        """What interventions may act on, as `knob: names below the layer`."""
        decay = () if self.decay is None else (f"decay: {', '.join(self.decay.parameters)}",)
        alpha = () if self.alpha is None else (f"alpha: {self.alpha.tensor}",)
        return decay + alpha
