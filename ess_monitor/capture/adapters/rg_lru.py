"""The real-gated linear recurrent unit of Griffin and RecurrentGemma (arXiv 2402.19427), one state per channel.

    r_t, i_t = sigmoid(gates(x_t)),  log a_t = -8 r_t softplus(Lambda)
    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t)

The gates are linear in blocks of channels. Where a document begins (position 0) a_t is 0 and the input enters whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ess_monitor.capture.adapters.layer_attributes import by_channel
from ess_monitor.capture.handles import AlphaHandle, DecayHandle, DecayInputs, Transition
from ess_monitor.capture.hooks.call_site import Arguments, Call, CallSite
from ess_monitor.capture.layer_adapter import LayerAdapter
from ess_monitor.capture.spec import LazyOperator
from ess_monitor.ess import DiagonalRecurrence, Operator
from ess_monitor.ess.operators.fields import take

_STRENGTH = -8.0
"""The paper's c, with its sign."""

_PARAMETERS = ("recurrent_gate_weight", "recurrent_gate_bias", "recurrent_param")


def gate(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute sigmoid(x W + b) in blocks: (batch, length, blocks, width) and (blocks, width, width) -> as x."""
    return torch.sigmoid(torch.einsum("blhi,hij->blhj", x, weight) + bias)


def log_decay(recurrence_gate: Tensor, recurrent_param: Tensor, reset: Tensor) -> Tensor:
    """Compute log a, (batch, length, channels); -inf where a document begins."""
    return (_STRENGTH * recurrence_gate * F.softplus(recurrent_param)).masked_fill(reset, -math.inf)


def rg_lru(call: Call) -> LazyOperator | None:
    """Read `RecurrentGemmaRglru.forward(activations, position_ids)`."""
    x, positions = _arguments(call)
    if x.shape[1] == 1:
        return None
    layer = call.layer
    width = cast(Tensor, layer.recurrent_gate_weight).shape[-1]

    def form(samples: slice, channels: Sequence[int], length: int) -> Operator:
        blocks = sorted({channel // width for channel in channels})
        within = [blocks.index(channel // width) * width + channel % width for channel in channels]
        in_blocks = take(_in_blocks(x[samples, :length], width), 2, blocks).float()

        def of(name: str) -> Tensor:
            weight, bias = (take(getattr(layer, f"{name}_gate_{kind}"), 0, blocks) for kind in ("weight", "bias"))
            return take(gate(in_blocks, weight.float(), bias.float()).flatten(2), 2, within).double()

        parameter = take(cast(Tensor, layer.recurrent_param), 0, channels).double()
        log_a = log_decay(of("recurrent"), parameter, _resets(positions, samples, length))
        b = of("input") * (-torch.expm1(2 * log_a)).sqrt()
        return DiagonalRecurrence(by_channel(log_a), by_channel(b), torch.ones_like(by_channel(b[:1, :, :1])))

    return LazyOperator(x.shape[0], x.shape[2], x.shape[1], form)


def _arguments(call: Call) -> tuple[Tensor, Tensor]:
    named = dict(zip(("activations", "position_ids"), call.args, strict=False)) | call.kwargs
    return named["activations"], named["position_ids"]


def _in_blocks(x: Tensor, width: int) -> Tensor:
    return x.reshape(*x.shape[:2], -1, width)


def _resets(positions: Tensor, samples: slice, length: int) -> Tensor:
    few = positions if positions.shape[0] == 1 else positions[samples]
    return few[:, :length, None] == 0


def _decay(layer: nn.Module, site: CallSite) -> DecayHandle:
    """Build the handle of the layer's input and three parameters, from which it computes A.

    Only the input is an argument of the call and is written back. The parameters' gradients are added all the same. A
    is raised by the layer's alpha, which also changes the factor of the input, sqrt(1 - a^2): it is computed from A.
    """

    def read(call: Call) -> DecayInputs | None:
        x, positions = _arguments(call)
        if x.shape[1] == 1:
            return None
        parameters: tuple[Tensor, ...] = tuple(getattr(layer, name) for name in _PARAMETERS)
        width = parameters[0].shape[-1]

        def transition(tensors: tuple[Tensor, ...]) -> Transition:
            x, positions, weight, bias, recurrent = tensors
            gates = gate(_in_blocks(x.float(), width), weight.float(), bias.float()).flatten(2)
            return Transition(by_channel(log_decay(gates, recurrent.float(), positions[..., None] == 0)))

        return DecayInputs((x, positions, *parameters), transition, (1, 1, None, None, None))

    def write(call: Call, tensors: tuple[Tensor, ...]) -> Arguments:
        if call.args:
            return (tensors[0], *call.args[1:]), call.kwargs
        return call.args, {**call.kwargs, "activations": tensors[0]}

    return DecayHandle(_PARAMETERS, site, read, write)


ADAPTERS = (
    LayerAdapter(
        operator="DiagonalRecurrence",
        classes=r".*\.RecurrentGemmaRglru",
        build=rg_lru,
        state_capacity=lambda layer: 1,
        channels=lambda layer: len(layer.recurrent_param),
        decay=_decay,
        alpha=lambda layer: AlphaHandle("recurrent_param", form="softplus"),
        uninformative=lambda layer: "a channel's state has one dimension, so that its ESS can only be 0 or 1",
    ),
)
