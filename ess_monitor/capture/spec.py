"""What the capture room knows about a kind of layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import nn

from ess_monitor.capture.handles import AlphaHandle, DecayHandle
from ess_monitor.capture.hooks.call_site import Call, CallSite
from ess_monitor.ess import Operator

Build = Callable[[Call], "Operator | LazyOperator | None"]
"""The operator of a call, built with gradients off; None for a call that is not the one meant (a fused op that fell
through, a step of cached decoding). It should only wrap tensors that the layer used, so that it costs nothing: the
sampler narrows the operator before anything is copied."""


def _no_capacity(module: nn.Module) -> int | None:
    return None


def _no_channels(module: nn.Module) -> int:
    return 0


@dataclass(frozen=True)
class CaptureSpec:
    """How one layer is read.

    The operator is built from what the call at `site` is made with: the very tensors the layer applied, not a second
    computation of them.
    """

    operator: str
    """Class name of the operator that `build` returns; shown by `describe`."""
    build: Build
    site: CallSite = field(default_factory=CallSite)
    """The call that is observed; by default that of the layer itself."""
    state_capacity: Callable[[nn.Module], int | None] = field(default=_no_capacity)
    """TSS per channel; None where it grows with the position, or is not known before a forward pass."""
    capacity_grows: bool = False
    """True where TSS grows with the position (softmax attention)."""
    channels: Callable[[nn.Module], int] = field(default=_no_channels)
    """Independent operators (heads or channels) of the layer; 0 when not known before a forward pass."""
    decay: DecayHandle | None = None
    """Where the decay can be pulled; None where the layer has none, or a fixed one."""
    alpha: AlphaHandle | None = None
    """Where the decay can be rescaled as a whole."""
    uninformative: str = ""
    """Why ESS says little of this kind of layer (a state of one dimension, a short filter): described and measured, not
    diagnosed. Empty where it is informative."""

    @property
    def handles(self) -> tuple[str, ...]:
        """What interventions may act on, as `knob: names below the layer`."""
        decay = () if self.decay is None else (f"decay: {', '.join(self.decay.parameters)}",)
        alpha = () if self.alpha is None else (f"alpha: {self.alpha.tensor}",)
        return decay + alpha


@dataclass(frozen=True)
class LazyOperator:
    """What a layer applied, before the few samples and heads that are wanted have been cut out.

    For layers whose A is computed from smaller tensors (Mamba: log A = Delta A, of state size times the numbers of
    Delta): A is formed for the part that is taken only.
    """

    batch: int
    heads: int
    length: int
    form: Callable[[slice, Sequence[int], int], Operator]
    """`(samples, heads, length) -> Operator` of that part."""

    def select(self, *, samples: slice, heads: Sequence[int], length: int) -> Operator:
        """The operator of some samples and heads, on the first `length` tokens."""
        return self.form(samples, heads, length)
