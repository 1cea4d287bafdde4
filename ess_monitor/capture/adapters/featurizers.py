"""How the package's own featurizers are read. Imported only once `ess_monitor.featurizers` is."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ess_monitor.capture.adapters.layer_attributes import int_attribute
from ess_monitor.capture.handles import (
    AlphaHandle,
    Axes,
    DecayHandle,
    DecayInputs,
    Role,
    StateHandle,
    StateRows,
    StateWeights,
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

_ROTARY = (
    "its rotary positions turn pairs of state dimensions at speeds that follow from the state size: fewer dimensions "
    "would turn at other speeds"
)


def _weights(layer: Any) -> StateWeights | str | None:
    """Return the rows of q, k and the decay; b and c are linear in theirs."""
    kind = next(cls for cls in type(layer).__mro__ if cls in _HANDLES)
    if kind in (LA, SA):
        return _ROTARY if kind is LA else None
    if kind is S6:
        rows = (StateRows("b.weight", "writes"), StateRows("c.weight", "reads"), StateRows("A_log", "decays"))
        return StateWeights(
            layer.state_capacity, 1, rows, lambda state: {"state_capacity": state}, lambda state: {"state_size": state}
        )
    heads, width = layer.num_heads, layer.features.v.in_features
    places: dict[str, Role] = {"features.q": "reads", "features.k": "writes"}
    if kind is not WLA:
        places["gate.up"] = "decays"
    found = [StateRows(f"{name}.{part}", role, heads) for name, role in places.items() for part in ("weight", "bias")]
    if kind is WLA:
        found.append(StateRows("decay_logit", "decays", heads, has_head_dim=True))
    if kind is GLAS6:
        found.append(StateRows("arange", "decays"))

    def attributes(state: int) -> dict[str, Any]:
        return {"features.state": state, "features.query_scale": state**-0.5, "state_capacity": state}

    return StateWeights(
        layer.features.state,
        heads,
        tuple(found),
        attributes,
        lambda state: {"expand_k": state * heads / width, "state_size": state},
        "first" if kind is GLAS6 else "dimensions",
        query_scale=lambda state: float(state**-0.5),
    )


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
        weights=_weights,
    )
    for layer, (decay, alpha) in _HANDLES.items()
}
