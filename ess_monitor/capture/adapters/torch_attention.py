"""Softmax attention of torch itself: `nn.MultiheadAttention`, and `F.scaled_dot_product_attention` in a layer's code.

A call of the function is causal with `is_causal`, or with a mask that hides later tokens. A call of the module needs
such a mask: its `is_causal` is a hint. Any other call has no lower triangular T and is skipped with a reason. Keys of
another length are a step of cached decoding for the function, which is ignored, and cross attention for the module,
which has no cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ess_monitor.capture.adapters.layer_attributes import int_attribute
from ess_monitor.capture.adapters.transformers_attention import (
    NOT_CAUSAL,
    causal_attention,
    part,
    why_not_causal,
)
from ess_monitor.capture.causality.claims import require
from ess_monitor.capture.hooks.call_site import Call, named_arguments
from ess_monitor.capture.hooks.function_patch import function_stand_in
from ess_monitor.capture.layer_adapter import LayerAdapter
from ess_monitor.capture.spec import LazyOperator, unread
from ess_monitor.errors import CaptureError, NotCausalError
from ess_monitor.ess import Operator
from ess_monitor.ess.operators.fields import take
from ess_monitor.ess.segments import HIDDEN_LOGIT

_SIGNATURE = inspect.signature(
    lambda query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False, **more: None
)
"""The arguments of `scaled_dot_product_attention`, as torch documents them."""


def with_signature(original: Any, called: Callable[..., Any]) -> Any:
    """Build a stand-in for torch's function, which is compiled and shows no signature."""
    signed = function_stand_in(original, lambda function, args, kwargs: function(*args, **kwargs))
    try:
        inspect.signature(original)
    except ValueError:
        signed.__signature__ = _SIGNATURE
    return function_stand_in(signed, called)


def read_function(call: Call) -> LazyOperator | None:
    """Read `scaled_dot_product_attention(query, key, value, attn_mask, is_causal=, scale=, enable_gqa=)`."""
    given = call.kwargs
    if "attn_mask" not in given:
        raise CaptureError("the layer calls its own function of this name, not torch's")
    q, k = (_by_head(given[name]) for name in ("query", "key"))
    mask = given["attn_mask"]
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
    if q.shape[2] != k.shape[2] or q.shape[2] == 1:
        return None

    def form(samples: slice, heads: Sequence[int], length: int) -> Operator:
        operator = causal_attention(
            part(q, samples, length),
            part(k, samples, length),
            None if mask is None else part(mask, samples, length),
            causal=bool(given["is_causal"]),
            scale=given["scale"],
        )
        return operator.select(heads=heads)

    return LazyOperator(max(q.shape[0], k.shape[0]), q.shape[1], q.shape[2], form)


def _by_head(tensor: Tensor) -> Tensor:
    """(batch, heads, length, dim); (batch, length, dim) is one head."""
    if tensor.is_nested or tensor.dim() not in (3, 4):
        raise CaptureError("query and key must be dense tensors of shape (batch, heads, length, dim) to be read")
    return tensor[:, None] if tensor.dim() == 3 else tensor


def _refusal(layer: nn.Module) -> str | None:
    if getattr(getattr(layer, "config", None), "_attn_implementation", "sdpa") == "sdpa":
        return why_not_causal(layer)
    return why_not_causal(layer) or (
        "with this attn_implementation the layer does not call scaled_dot_product_attention; "
        "load the model with attn_implementation='sdpa' to measure it"
    )


def read_module(call: Call) -> LazyOperator | None:
    """Read the call of an `nn.MultiheadAttention`.

    q and k are computed again from the input and the weights, for the selected part: it calls no sub-module, and on
    its fast path no function either.
    """
    module = call.module
    assert isinstance(module, nn.MultiheadAttention)
    given = named_arguments(inspect.signature(module.forward), call.args, call.kwargs)
    query, key = given["query"], given["key"]
    if query.is_nested:
        raise NotCausalError("nested tensors hold no mask, so the call is not causal and has no lower triangular T")
    first_batch = module.batch_first
    query, key = (x[None] if x.dim() == 2 else x if first_batch else x.transpose(0, 1) for x in (query, key))
    batch, length = query.shape[:2]
    if key.shape[1] != length:
        raise NotCausalError(
            f"the call is cross attention ({length} queries, {key.shape[1]} keys): rows and columns of T are different "
            "sequences; leave the layer out with `layers`"
        )
    if length == 1:
        return None
    if given["attn_mask"] is None:  # without it the hint is refused, or ignored on the fast path
        raise NotCausalError(f"the call was made without an attn_mask: {NOT_CAUSAL}")

    def form(samples: slice, heads: Sequence[int], length: int) -> Operator:
        (q_weight, q_bias), (k_weight, k_bias) = _projections(module)
        q = _project(query[samples, :length], q_weight, q_bias, module.num_heads, heads)
        k = _project(key[samples, :length], k_weight, k_bias, module.num_heads, heads)
        mask = _additive_mask(given, batch, module.num_heads, q.dtype)
        if mask is not None:
            mask = take(part(mask, samples, length), 1, heads)
            if given["is_causal"] and given["key_padding_mask"] is None and not given["need_weights"]:
                _require_hint(mask[..., :length])
        return causal_attention(q, k, mask, causal=False)

    return LazyOperator(batch, module.num_heads, length, form)


def _require_hint(mask: Tensor) -> None:
    """Require that an additive mask is the causal one, as is_causal=True says of it.

    Without weights to return, torch applies the hint in place of the mask, and on its fast path the mask.
    """
    hidden = mask < HIDDEN_LOGIT
    later = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).triu(1)
    require(
        ((hidden == later) & (hidden | (mask == 0))).all(),
        "is_causal=True says that attn_mask is the causal mask, and it is another one, so that torch applies the one "
        "or the other; pass is_causal=False with this mask",
    )


def _projections(module: Any) -> list[tuple[Tensor, Tensor | None]]:
    """Return weight and bias of q, and of k."""
    weights = (module.q_proj_weight, module.k_proj_weight)  # None unless keys are of another width
    if module.in_proj_weight is not None:
        weights = module.in_proj_weight.chunk(3)[:2]
    biases = (None, None) if module.in_proj_bias is None else module.in_proj_bias.chunk(3)[:2]
    return list(zip(weights, biases, strict=True))


def _project(x: Tensor, weight: Tensor, bias: Tensor | None, total: int, heads: Sequence[int]) -> Tensor:
    """Compute q or k of some heads: (batch, length, width) -> (batch, heads, length, dim)."""
    dtype = torch.promote_types(x.dtype, weight.dtype)  # under autocast they differ
    few = take(weight.reshape(total, -1, weight.shape[1]), 0, heads).flatten(0, 1).to(dtype)
    few_bias = None if bias is None else take(bias.reshape(total, -1), 0, heads).flatten().to(dtype)
    projected = F.linear(x.to(dtype), few, few_bias)
    return projected.reshape(*x.shape[:2], len(heads), -1).transpose(1, 2)


def _additive_mask(given: dict[str, Any], batch: int, heads: int, dtype: torch.dtype) -> Tensor | None:
    """Return attn_mask and key_padding_mask as one additive mask.

    attn_mask is (L, L) or (batch * heads, L, L), key_padding_mask (batch, L) or (L,). In bool masks True means hidden,
    the opposite of the function's.
    """
    mask, padding = given["attn_mask"], given["key_padding_mask"]
    parts = []
    if mask is not None:
        parts.append(mask.reshape(batch, heads, *mask.shape[1:]) if mask.dim() == 3 else mask[None, None])
    if padding is not None:
        parts.append(padding.reshape(batch, 1, 1, -1))
    added = [torch.zeros_like(p, dtype=dtype).masked_fill(p, -torch.inf) if p.dtype == torch.bool else p for p in parts]
    return sum(added[1:], added[0]) if added else None


def _module_refusal(layer: nn.Module) -> str | None:
    if getattr(layer, "bias_k", None) is not None or getattr(layer, "add_zero_attn", False):
        return unread(layer, "add_bias_kv and add_zero_attn add a key that is no token, so y is not T u")
    return None


ADAPTERS = (
    LayerAdapter(
        operator="SoftmaxAttention",
        classes=r"torch\.nn\.modules\.activation\.MultiheadAttention",
        build=read_module,
        capacity_grows=True,
        channels=int_attribute("num_heads", or_config=True),
        refusal=_module_refusal,
    ),
    LayerAdapter(
        operator="SoftmaxAttention",
        ops={"scaled_dot_product_attention": read_function},
        stand_in=with_signature,
        namespaces=(vars(F),),
        capacity_grows=True,
        channels=int_attribute("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", or_config=True),
        refusal=_refusal,
    ),
)
