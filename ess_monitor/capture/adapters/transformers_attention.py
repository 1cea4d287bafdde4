"""Softmax attention of transformers: every layer that fetches its kernel from the global `ALL_ATTENTION_FUNCTIONS`.

The kernels of that interface (eager, sdpa, flash, flex, a user's own) are all called as
`kernel(module, q, k, v, mask, **options)` with q after rotary embeddings and norms and with grouped k, so one adapter
reads them all: T = softmax(cap(scale q k^T) + mask), one T per query head. Dropout is not part of T. Older layers call
the eager kernel by a global name of its own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ess_monitor.capture.adapters.layer_attributes import int_attribute
from ess_monitor.capture.causality.claims import require
from ess_monitor.capture.hooks.call_site import Call
from ess_monitor.capture.hooks.function_patch import function_stand_in
from ess_monitor.capture.hooks.global_names import names_used
from ess_monitor.capture.layer_adapter import LayerAdapter
from ess_monitor.capture.spec import LazyOperator, unread
from ess_monitor.errors import CaptureError, NotCausalError
from ess_monitor.ess import Operator, SoftmaxAttention, segments
from ess_monitor.ess.operators.fields import first

_KEYS_FROM_ELSEWHERE = ("key_value_states", "encoder_hidden_states", "cross_attention_states")
_DENSE_KERNELS = ("eager", "sdpa", "flex_attention")
"""Kernels whose mask is complete. The others (flash) take padding, window and packing as options."""


_EAGER = "eager_attention_forward"


class WatchedInterface:
    """Replaces an `AttentionInterface`: passes everything on, and watches the kernels that it returns."""

    def __init__(self, original: Any, called: Callable[..., Any]) -> None:
        self._original, self._called = original, called

    def _watched(self, kernel: Any) -> Any:
        return function_stand_in(kernel, self._called) if callable(kernel) else kernel

    def get_interface(self, *args: Any, **kwargs: Any) -> Any:
        """Return the kernel that the original returns, watched."""
        return self._watched(self._original.get_interface(*args, **kwargs))

    def get(self, *args: Any, **kwargs: Any) -> Any:
        """Return the same by the mapping's own method."""
        return self._watched(self._original.get(*args, **kwargs))

    def __getitem__(self, name: str) -> Any:
        return self._watched(self._original[name])

    def __setitem__(self, name: str, kernel: Any) -> None:
        self._original[name] = kernel

    def __contains__(self, name: object) -> bool:
        return name in self._original

    def __iter__(self) -> Iterator[Any]:
        return iter(self._original)

    def __len__(self) -> int:
        return len(self._original)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


def _stand_in(original: Any, called: Callable[..., Any]) -> Any:
    return function_stand_in(original, called) if inspect.isfunction(original) else WatchedInterface(original, called)


def causal_attention(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    *,
    causal: bool,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> SoftmaxAttention:
    """Build the operator of a call, or of a part of it, after a check that it is causal.

    Args:
        q: (batch, heads, length, dim).
        k: (batch, key heads, length, dim).
        mask: (batch|1, heads|1, length|1, keys) with keys >= length: bool (True keeps) or floating (added), or None.
            Keys beyond `length` belong to tokens that were cut off.
        causal: whether the kernel hides later tokens by itself. Otherwise the mask has to, and is checked.
        scale: factor on q k^T.
        softcap: bound of the logits.
        sinks: (batch|1, heads, length|1).

    Raises:
        NotCausalError: a token attends to later ones; see `claims` for masks on an accelerator.
    """
    length = q.shape[2]
    if mask is not None and mask.is_floating_point():
        # Libraries hide a token with the smallest number of the dtype, which is not the smallest of another one.
        mask = mask.masked_fill(mask <= torch.finfo(mask.dtype).min, -torch.inf)
    if not causal:
        if mask is None:
            raise NotCausalError(f"the call was made without a mask and without is_causal=True: {NOT_CAUSAL}")
        keep = segments.kept_by(mask)
        later = keep.expand(*keep.shape[:2], length, keep.shape[3]).triu(1).any()
        require(~later, f"the mask lets tokens attend to later ones: {NOT_CAUSAL}")
    return SoftmaxAttention(q, k, scale, first(mask, 3, length) if mask is not None else None, softcap, sinks)


NOT_CAUSAL = (
    "its T is not lower triangular, so there is no state that carries the past and ESS is not defined; "
    "leave the layer out with `layers`"
)


def part(tensor: Tensor, samples: slice, length: int) -> Tensor:
    """Return some samples and the first tokens of (batch|1, heads, length|1, ...), as a view."""
    few = tensor if tensor.shape[0] == 1 else tensor[samples]
    return first(few, 2, length)


def read_interface(call: Call) -> LazyOperator | None:
    """Read `kernel(module, q, k, v, mask, scaling=, softcap=, s_aux=, sliding_window=, position_bias=, ...)`."""
    options = call.kwargs
    _, q, k, _, mask = list(options.values())[:5]
    if any(call.layer_kwargs.get(name) is not None for name in _KEYS_FROM_ELSEWHERE):
        raise CaptureError(f"the call is cross attention: {_CROSS}")
    if options.get("head_mask") is not None:
        raise CaptureError("head_mask scales each head's T after the softmax; call the model without it to measure it")
    if options.get("indices") is not None:
        raise CaptureError("a sparse kernel chose the keys; use attn_implementation='sdpa' or 'eager' to measure it")
    if q.shape[2] != k.shape[2] or q.shape[2] == 1:
        return None
    kernel = _kernel(call.layer)
    by_itself = mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)
    is_causal = options.get("is_causal")
    is_causal = getattr(call.layer, "is_causal", True) if is_causal is None else is_causal
    sinks = _sinks(options)

    def form(samples: slice, heads: Sequence[int], length: int) -> Operator:
        if by_itself and kernel not in _DENSE_KERNELS:
            keep = _flash_mask(mask, options, q, samples, length)
        else:
            keep = _dense_mask(mask, options.get("position_bias"), q, samples, length)
        operator = causal_attention(
            part(q, samples, length),
            part(k, samples, length),
            keep,
            causal=by_itself and bool(is_causal) and kernel != "eager",
            scale=_scale(call, q),
            softcap=options.get("softcap"),
            sinks=None if sinks is None else part(sinks, samples, length),
        )
        return operator.select(heads=heads)

    return LazyOperator(max(q.shape[0], k.shape[0]), q.shape[1], q.shape[2], form)


def _scale(call: Call, q: Tensor) -> float | None:
    """Return the factor on q k^T; None for the usual one. GPT-2's older eager kernel takes it from the layer."""
    layer: Any = call.layer
    if call.op != _EAGER or "scaling" in call.kwargs or not hasattr(layer, "scale_attn_weights"):
        return call.kwargs.get("scaling")
    scale = float(q.shape[-1]) ** -0.5 if layer.scale_attn_weights else 1.0
    return scale / (layer.layer_idx + 1) if layer.scale_attn_by_inverse_layer_idx else scale


def _kernel(layer: nn.Module) -> str:
    """Return the kernel's name; a layer without a configuration gets its own eager one."""
    return getattr(getattr(layer, "config", None), "_attn_implementation", None) or "eager"


def _sinks(options: dict[str, Any]) -> Tensor | None:
    """Return the sinks as (batch|1, heads, length|1), from (heads,) or (batch, heads, length, 1)."""
    given = options.get("s_aux", options.get("sinks"))
    if not isinstance(given, Tensor):
        return None
    return given[None, :, None] if given.dim() == 1 else given[..., 0]


def _dense_mask(mask: Any, bias: Tensor | None, q: Tensor, samples: slice, length: int) -> Tensor | None:
    """Return the mask of an eager, sdpa or flex kernel, with a position bias where there is one."""
    keys = q.shape[2]
    if hasattr(mask, "mask_mod"):  # of flex attention: a function of indices
        from torch.nn.attention.flex_attention import create_mask

        mask = create_mask(mask.mask_mod, q.shape[0], 1, length, keys, device=q.device)
    few = None if mask is None else part(mask, samples, length)[..., :keys]
    if bias is None:
        return few
    few_bias = part(bias, samples, length)[..., :keys]
    if few is None:
        return few_bias
    return few_bias.masked_fill(~few, -torch.inf) if few.dtype == torch.bool else few_bias + few


def _flash_mask(real: Tensor | None, options: dict[str, Any], q: Tensor, samples: slice, length: int) -> Tensor | None:
    """Return which tokens a flash kernel keeps, apart from later ones; None for all.

    It hides padding (rows as well), tokens before the window, and the other sequences of a packed batch.
    """
    position = torch.arange(length, device=q.device)
    window, segment = options.get("sliding_window"), _segments(options, q.shape[0], position)
    keeps = []
    if isinstance(window, int):
        keeps.append(((position[:, None] - position) < window)[None, None])
    if segment is not None:
        keeps.append((segment[:, :, None] == segment[:, None, :])[:, None])
    if real is not None:
        token = first(real if real.shape[0] == 1 else real[samples], 1, length) != 0
        keeps.append((token[:, :, None] & token[:, None, :])[:, None])
    return functools.reduce(torch.logical_and, keeps) if keeps else None


def _segments(options: dict[str, Any], batch: int, position: Tensor) -> Tensor | None:
    """Return the packed sequence of each token, (1, length). Packed batches have one row; the host reads no value."""
    ends, position_ids = options.get("cu_seq_lens_q"), options.get("position_ids")
    if isinstance(ends, Tensor):
        return segments.of_ends(ends, len(position))
    if isinstance(position_ids, Tensor) and batch == 1 and position_ids.dim() == 2:
        return segments.of_positions(position_ids[:1, : len(position)])
    return None


_CROSS = "rows and columns of T are different sequences, so the past has no state; leave the layer out with `layers`"


def why_not_causal(layer: nn.Module) -> str | None:
    """Return why a layer that declares not to be causal self-attention cannot be read; None for other layers."""
    if getattr(layer, "is_cross_attention", False) or "CrossAttention" in type(layer).__name__:
        return "cross attention: rows and columns of T are different sequences, so there is no y = T u of one sequence"
    for holder, name in ((layer, "is_causal"), (getattr(layer, "config", None), "config.is_causal")):
        if getattr(holder, "is_causal", None) is False:
            return f"not causal ({name}=False): T is not lower triangular, so ESS is not defined for it"
    return None


def _refusal(layer: nn.Module) -> str | None:
    reason = why_not_causal(layer)
    if reason is not None:
        return reason
    if not hasattr(layer, "is_causal"):
        return "does not say whether it is causal; set `is_causal = True` on the layer if it is"
    if hasattr(layer, "lambda_q1"):
        return unread(layer, "differential attention: T is a difference of two softmax maps")
    if getattr(layer, "reorder_and_upcast_attn", False) and _kernel(layer) == "eager":
        return "reorder_and_upcast_attn bypasses the attention interface; use attn_implementation='sdpa'"
    return None


def _is_member(layer: nn.Module) -> bool:
    """Return whether the layer fetches a kernel. The models' base class asks the same interface which ones exist."""
    used = names_used(type(layer))
    return "ALL_ATTENTION_FUNCTIONS" in used and not hasattr(type(layer), "get_input_embeddings")


def _fetches_eager(layer: nn.Module) -> bool:
    """Return whether the eager kernel comes from the interface too, as one of its answers."""
    return "get_interface" in names_used(type(layer))


ADAPTERS = tuple(
    LayerAdapter(
        operator="SoftmaxAttention",
        ops=dict.fromkeys(ops, read_interface),
        stand_in=_stand_in,
        capacity_grows=True,
        channels=int_attribute("num_heads", "num_attention_heads", "n_heads", "n_head", or_config=True),
        is_member=is_member,
        refusal=_refusal,
    )
    for ops, is_member in (
        (("ALL_ATTENTION_FUNCTIONS",), lambda layer: _is_member(layer) and _fetches_eager(layer)),
        (("ALL_ATTENTION_FUNCTIONS", _EAGER), lambda layer: _is_member(layer) and not _fetches_eager(layer)),
    )
)
