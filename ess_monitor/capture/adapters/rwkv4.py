"""RWKV-4's time mixing (arXiv 2305.13048): an average with decaying weights, one state per channel.

    y_i = (sum_{j<i} exp(-(i-1-j) w + k_j) v_j + exp(u + k_i) v_i) / (the same sum without v),  w = exp(time_decay)

T divides every row by its sum. The bonus u lies on T's diagonal, which no H_i contains. A call may start from a state
(an empty one, in generation). It is part of the rows' sums, and T is that of the call's own tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ess_monitor.capture.adapters.layer_attributes import by_channel
from ess_monitor.capture.handles import (
    AlphaHandle,
    DecayHandle,
    DecayInputs,
    Transition,
    raise_arguments,
    write_arguments,
)
from ess_monitor.capture.hooks.call_site import Call, CallSite
from ess_monitor.capture.layer_adapter import LayerAdapter
from ess_monitor.capture.spec import LazyOperator
from ess_monitor.ess import Operator, ReadFirstRecurrence
from ess_monitor.ess.operators.fields import take

_ALPHA = AlphaHandle("time_decay", 1.0)


def wkv(call: Call) -> LazyOperator | None:
    """Read `rwkv_linear_attention(time_decay, time_first, key, value, state=None, return_state=False)`."""
    key = call.kwargs["key"]
    if key.shape[1] == 1:
        return None

    def form(samples: slice, channels: Sequence[int], length: int) -> Operator:
        k = take(key[samples, :length], 2, channels).double()
        w, bonus = (take(call.kwargs[name], 0, channels).double() for name in ("time_decay", "time_first"))
        w = w.exp()
        sums = _log_row_sums(k, w, bonus, _initial_weight(call, samples, channels))
        largest = k.amax(1, keepdim=True)
        b, c = (k - largest).exp(), (largest - sums).exp()
        return ReadFirstRecurrence(-w[None, :, None, None], by_channel(b), by_channel(c))

    return LazyOperator(key.shape[0], key.shape[2], key.shape[1], form)


def _log_row_sums(k: Tensor, w: Tensor, bonus: Tensor, initial: Tensor | None) -> Tensor:
    """Compute the log of what row i is divided by, (batch, length, channels)."""
    tokens = torch.arange(k.shape[1], device=k.device, dtype=k.dtype)[:, None]
    # sum_{j<i} exp(k_j - (i-1-j) w) = exp(-(i-1) w) sum_{j<i} exp(k_j + j w)
    earlier = torch.logcumsumexp(k + tokens * w, 1)[:, :-1] - tokens[:-1] * w
    earlier = torch.cat((torch.full_like(k[:, :1], -torch.inf), earlier), 1)
    if initial is not None:
        earlier = torch.logaddexp(earlier, initial[:, None] - tokens * w)
    return torch.logaddexp(earlier, k + bonus)


def _initial_weight(call: Call, samples: slice, channels: Sequence[int]) -> Tensor | None:
    """Return the log weight of the initial state for the first token, (batch, channels); None without a state."""
    state = call.kwargs["state"]
    if state is None:
        return None
    weight, exponent = (take(part[samples], 1, channels).double() for part in state[1:])
    return weight.log() + exponent


def _decay(layer: nn.Module, site: CallSite) -> DecayHandle:
    def read(call: Call) -> DecayInputs | None:
        if call.kwargs["key"].shape[1] == 1:
            return None
        return DecayInputs((call.kwargs["time_decay"],), transition, (None,))

    def transition(tensors: tuple[Tensor, ...]) -> Transition:
        return Transition(-tensors[0].float().exp()[None, :, None, None])

    raised = raise_arguments(read, {"time_decay": _ALPHA.raised})
    return DecayHandle(("time_decay",), site, read, write_arguments(lambda call: ("time_decay",)), raised)


ADAPTERS = (
    LayerAdapter(
        operator="ReadFirstRecurrence",
        ops={"rwkv_linear_attention": wkv},
        state_capacity=lambda layer: 1,
        channels=lambda layer: len(layer.time_decay),
        decay=_decay,
        alpha=lambda layer: _ALPHA,
        uninformative=lambda layer: "a channel's state has one dimension, so that its ESS can only be 0 or 1",
    ),
)
