"""How a layer is read: the call to observe, and the operator that is built from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from ess_monitor.capture.handles import AlphaHandle, DecayHandle, StateHandle, StateWeights
from ess_monitor.capture.hooks.call_site import Call, CallSite
from ess_monitor.ess import Operator


@dataclass(frozen=True)
class LazyOperator:
    """An operator that is formed only for the samples, heads and tokens that are selected from it.

    For layers whose A is computed from smaller tensors. Mamba's log A = Delta A, for example, is larger than Delta by
    the state size.
    """

    batch: int
    heads: int
    length: int
    form: Callable[[slice, Sequence[int], int], Operator]
    """`(samples, heads, length) -> Operator` of that part."""
    shift_invariant: bool = False
    """Whether T_ij depends on i - j alone, for all samples alike. `form` may then leave out tokens beyond its reach."""
    forming_bytes: int = 0
    """Bytes that `form` needs for each token of a sample beside its result, where that is of the size of the layer."""
    is_indivisible: bool = False
    """Whether `form` gives all samples and tokens, whatever is selected."""
    state: int = 0
    """Size that its cost depends on, where its layer does not have it as state capacity (`ess.cost`); 0: not known."""

    def select(self, *, samples: slice, heads: Sequence[int], length: int) -> Operator:
        """Return the operator of some samples and heads, on the first `length` tokens."""
        return self.form(samples, heads, length)


Build = Callable[[Call], "Operator | LazyOperator | None"]
"""Builds the operator of a call, with gradients off. None for a call that is not the one meant (a fused op that fell
through, a step of cached decoding). It should only wrap tensors that the layer used, and so cost nothing: the sampler
narrows the operator before it copies anything."""


BY_JACOBIAN = "capture.unknown: jacobian measures its linearization"
"""Ends the reason for which a layer is skipped, where this is true: `find_layers` looks for it there."""


def unread(layer: nn.Module, problem: str) -> str:
    """Return why a causal layer is skipped that nobody can read here, and what can be done.

    >>> unread(nn.GRU(1, 1), "T has no class here")
    'T has no class here; teach it with @ess_monitor.register_capture(GRU), or capture.unknown: jacobian measures its \
linearization'
    """
    return f"{problem}; teach it with @ess_monitor.register_capture({type(layer).__name__}), or {BY_JACOBIAN}"


def unknown(module: nn.Module) -> None:
    """Return None, for a size that is not known before a forward pass."""


@dataclass(frozen=True)
class CaptureSpec:
    """Says how one layer is read.

    The operator is built from the arguments of the call at `site`: the very tensors that the layer applied, not a
    second computation of them.
    """

    operator: str
    """Class name of the operator that `build` returns; shown by `describe`."""
    build: Build
    site: CallSite = field(default_factory=CallSite)
    """The call that is observed; by default that of the layer itself."""
    state_capacity: Callable[[nn.Module], int | None] = unknown
    """TSS per channel; None where it grows with the position, or is not known before a forward pass."""
    capacity_grows: bool = False
    """True where TSS grows with the position (softmax attention)."""
    channels: Callable[[nn.Module], int | None] = unknown
    """Independent operators (heads or channels) of the layer; 0 or None when not known before a forward pass."""
    decay: DecayHandle | None = None
    """Where the decay can be pulled; None where the layer has none, or a fixed one."""
    alpha: AlphaHandle | None = None
    """Where the decay can be rescaled as a whole."""
    state: StateHandle | None = None
    """Where the state can be made smaller; None where no argument of a call has its dimensions, or there is one."""
    weights: Callable[[nn.Module], StateWeights | str | None] = unknown
    """Returns which weights the state size sets, or why a smaller state cannot be cut out of them; None where nothing
    is known."""
    mixed: Callable[[Call], tuple[Tensor, Tensor]] | None = None
    """Returns u and y of a call, both (batch, heads, length, channels), for `check_capture`."""
    is_taught: bool = False
    """True where the user registered it: the first sample is then compared with the layer's output."""
    uninformative: str = ""
    """Why ESS says little about this kind of layer (a state of one dimension, a short filter). Such a layer is measured
    and not diagnosed. Empty where ESS is informative."""

    @property
    def handles(self) -> tuple[str, ...]:
        """What interventions may act on, as `knob: names below the layer`."""
        decay = () if self.decay is None else (f"decay: {', '.join(self.decay.parameters)}",)
        alpha = () if self.alpha is None else (f"alpha: {self.alpha.tensor}",)
        return decay + alpha
