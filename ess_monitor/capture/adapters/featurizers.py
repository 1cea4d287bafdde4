"""How the package's own featurizers are read. Imported only once `ess_monitor.featurizers` is."""

from __future__ import annotations

import torch
from torch import nn

from ess_monitor.capture.adapters.layer_attributes import int_attribute
from ess_monitor.capture.handles import (
    AlphaHandle,
    Axes,
    DecayHandle,
    DecayInputs,
    StateHandle,
    Transition,
    least_used,
    raised_log_decay,
)
from ess_monitor.capture.hooks.call_site import Arguments, Call, CallSite
from ess_monitor.capture.spec import CaptureSpec
from ess_monitor.ess import DiagonalRecurrence, Operator, SoftmaxAttention
from ess_monitor.featurizers import GLA, GLAS6, LA, S6, SA, WLA

_CORE = CallSite("core")


def _scan(call: Call) -> Operator:
    """Read `core(q, k, v, log_decay)`: T_ij = sum_n q_i[n] exp(sum log_decay) k_j[n]; without a decay A = I."""
    q, k, _, log_decay = call.args
    if log_decay is None:
        log_decay = torch.zeros((1, 1, 1, 1), dtype=k.dtype, device=k.device)
    return DiagonalRecurrence(log_decay, k, q)


def _softmax(call: Call) -> Operator:
    """Read `core(q, k, v, scale)`: T = softmax(scale q k^T), causal."""
    q, k, _, scale = call.args
    return SoftmaxAttention(q, k, scale=scale)


def _decay(*parameters: str) -> DecayHandle:
    """Build the handle of the last argument of `core(q, k, v, log_decay)`."""

    def read(call: Call) -> DecayInputs:
        return DecayInputs((call.args[3],), lambda tensors: Transition(tensors[0]))

    def write(call: Call, tensors: tuple[torch.Tensor, ...]) -> Arguments:
        return (*call.args[:3], tensors[0]), call.kwargs

    def raised(call: Call, power: float) -> Arguments:
        return write(call, (raised_log_decay(call.args[3], power),))

    return DecayHandle(parameters, _CORE, read, write, raised)


_AXES = Axes(state=3, heads=1)


def _reduced(call: Call, share: float) -> Arguments:
    """Return the arguments of `core(q, k, v, log_decay)` without the least used state dimensions of k."""
    q, k, *others = call.args
    return (q, _AXES.without(k, least_used(_AXES.usage(k), _AXES.usage(q), share)), *others), call.kwargs


_HANDLES: dict[type[nn.Module], tuple[DecayHandle | None, AlphaHandle | None]] = {
    LA: (None, None),
    SA: (None, None),
    WLA: (_decay("decay_logit"), None),
    GLA: (_decay("gate"), None),
    GLAS6: (_decay("gate"), AlphaHandle("log_alpha", -1.0)),
    S6: (_decay("delta", "A_log"), AlphaHandle("A_log", 1.0)),
}

SPECS: dict[type[nn.Module], CaptureSpec] = {
    layer: CaptureSpec(
        operator="SoftmaxAttention" if layer is SA else "DiagonalRecurrence",
        build=_softmax if layer is SA else _scan,
        site=_CORE,
        capacity_grows=layer is SA,
        state_capacity=int_attribute("state_capacity"),
        channels=int_attribute("num_heads"),
        decay=decay,
        alpha=alpha,
        state=None if layer is SA else StateHandle(_CORE, _reduced),
    )
    for layer, (decay, alpha) in _HANDLES.items()
}
