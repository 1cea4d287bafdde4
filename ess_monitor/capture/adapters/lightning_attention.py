"""Lightning attention of MiniMax (arXiv 2501.08313): linear attention with a constant decay per head.

S_t = exp(-slope_h) S_{t-1} + k_t v_t^T,  y_t = q_t S_t. The slopes are buffers, so that there is nothing to train.
Three more buffers are derived from them, so that there is nothing to rescale on its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ess_monitor.capture.adapters.layer_attributes import int_attribute, zeroed_by_mask
from ess_monitor.capture.handles import Axes, StateHandle, least_used
from ess_monitor.capture.hooks.call_site import Arguments, Call, CallSite
from ess_monitor.capture.layer_adapter import LayerAdapter
from ess_monitor.capture.spec import LazyOperator
from ess_monitor.ess import DiagonalRecurrence, Operator
from ess_monitor.ess.operators.fields import take

_heads = int_attribute("num_attention_heads", "num_heads")


def masked_qkv(call: Call) -> LazyOperator | None:
    """Read `apply_mask_to_padding_states(qkv, attention_mask)`: it returns q, k and v of each head, 0 for padding."""
    return _operator(call, None)


def _operator(call: Call, real: Tensor | None) -> LazyOperator | None:
    """Read the projections of each head; keys of tokens outside `real` (batch, length) enter no state."""
    qkv, slope = call.output, cast(Tensor, call.layer.slope_rate)
    if qkv.shape[1] == 1:
        return None
    heads = _heads(call.layer) or 1
    by_head = qkv.reshape(*qkv.shape[:2], heads, -1).transpose(1, 2)
    size = by_head.shape[-1] // 3

    def form(samples: slice, chosen: Sequence[int], length: int) -> Operator:
        few = take(by_head[samples], 1, chosen)[..., :length, :]
        log_decay, keys = -take(slope.reshape(1, heads, 1, 1), 1, chosen), few[..., size : 2 * size]
        if real is not None:
            keys = keys * real[samples, None, :length, None]
        return DiagonalRecurrence(log_decay, keys, few[..., :size])

    return LazyOperator(qkv.shape[0], heads, qkv.shape[1], form)


def _state(layer: nn.Module, site: CallSite) -> StateHandle:
    """Build the handle on the keys, before padding is masked."""
    axes = Axes(state=3, heads=2)

    def reduced(call: Call, share: float) -> Arguments | None:
        name, qkv = next(iter(call.kwargs.items()))
        if qkv.shape[1] == 1:
            return None
        q, k, v = qkv.reshape(*qkv.shape[:2], _heads(layer) or 1, 3, -1).unbind(3)
        k = axes.without(k, least_used(axes.usage(k), axes.usage(q), share))
        return call.args, {**call.kwargs, name: torch.stack((q, k, v), 3).reshape(qkv.shape)}

    return StateHandle(site, reduced)


def activated_qkv(call: Call) -> LazyOperator | None:
    """Read `act_fn`, whose output a layer without that function splits into q, k and v, and masks after."""
    return _operator(call, zeroed_by_mask(call, *call.output.shape[:2]))


ADAPTERS = (
    LayerAdapter(
        operator="DiagonalRecurrence",
        ops={"apply_mask_to_padding_states": masked_qkv},
        is_member=lambda layer: hasattr(layer, "slope_rate") and hasattr(layer, "qkv_proj"),
        state_capacity=int_attribute("head_dim"),
        channels=_heads,
        state=_state,
    ),
    LayerAdapter(
        operator="DiagonalRecurrence",
        classes=r"transformers\w*\..*\.\w*LightningAttention",
        path="act_fn",
        build=activated_qkv,
        is_member=lambda layer: all(hasattr(layer, name) for name in ("slope_rate", "qkv_proj", "act_fn")),
        state_capacity=int_attribute("head_dim"),
        channels=_heads,
    ),
)
