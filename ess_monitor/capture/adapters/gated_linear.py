"""Linear attention with a decay, by the ops of flash-linear-attention.

GLA, HGRN2, simple GLA, retention, linear attention, RWKV-6, and every other layer that calls the same ops. Per head:
A_t = diag(exp g_t), input k_t, read scale q_t; TSS is the size of a key. Convolutions in front, and the output gate and
norm after the op, are outside of T. Tensors of these ops are (batch, length, heads, size).

Layers pack padded batches before the op: one row of `cu_seqlens`, in which no state passes from one sequence to the
next. There A is 0 at every first token, so that T is block-diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ess_monitor.capture.adapters.layer_attributes import existing, int_attribute, is_decoding_step
from ess_monitor.capture.adapters.state_weights import of_gated_linear
from ess_monitor.capture.handles import (
    AlphaHandle,
    Axes,
    DecayHandle,
    DecayInputs,
    StateHandle,
    Transition,
    raise_arguments,
    raised_log_decay,
    reduce_arguments,
    write_arguments,
)
from ess_monitor.capture.hooks.call_site import Call, CallSite
from ess_monitor.capture.hooks.global_names import names_used
from ess_monitor.capture.layer_adapter import LayerAdapter
from ess_monitor.capture.spec import Build, LazyOperator, unread
from ess_monitor.errors import CaptureError
from ess_monitor.ess import DiagonalRecurrence, Operator, ReadFirstRecurrence
from ess_monitor.ess.operators.fields import take

Select = Callable[[Tensor], Tensor]
"""Cuts (batch, length, heads, ...) down to the wanted (samples, heads, tokens, ...)."""

_NORMALIZER_EPSILON = 1e-10


def refuse_options(call: Call, *names: str) -> None:
    """Raise `CaptureError` for a call with an option of the op that makes it another operator."""
    for name in names:
        value = call.kwargs.get(name)
        if value is not None and value is not False:
            raise CaptureError(f"{call.op}: called with {name}, which changes the operator in a way that is not known")


def scale_of(call: Call, query: Tensor) -> float:
    """Return the factor that the op multiplies queries with."""
    scale = call.kwargs.get("scale")
    return float(query.shape[-1] ** -0.5 if scale is None else scale)


def selection(samples: slice, heads: Sequence[int], length: int, total: int) -> Select:
    """Build the function that selects a part; tensors with fewer heads than `total` serve several heads each."""

    def select(tensor: Tensor) -> Tensor:
        group = total // tensor.shape[2]
        return take(tensor[samples, :length], 2, [head // group for head in heads]).transpose(1, 2)

    return select


def precise(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def no_decay(like: Tensor) -> Tensor:
    """Return the log decay of A = I, (1, 1, 1, 1)."""
    return precise(like).new_zeros((1, 1, 1, 1))


def first_tokens(call: Call, length: int) -> Tensor | None:
    """Return which tokens begin a new sequence inside a packed row, (length,); None for a row that is one sequence.

    Found on the device: the host does not know where the sequences begin.
    """
    ends = call.kwargs.get("cu_seqlens")
    if ends is None:
        return None
    marks = torch.zeros(int(call.kwargs["v"].shape[1]) + 1, dtype=torch.bool, device=ends.device)
    marks.scatter_(0, ends.long(), True)
    marks[0] = False
    return marks[:length]


def forget_at(first: Tensor | None, log_decay: Tensor) -> Tensor:
    """Return the log decay, -inf where a new sequence begins."""
    return log_decay if first is None else torch.where(first[:, None], -math.inf, log_decay)


def _recurrence(
    call: Call,
    log_decay: Callable[[Select, Sequence[int]], Tensor],
    *,
    query: str = "q",
    kind: type[DiagonalRecurrence] = DiagonalRecurrence,
) -> LazyOperator | None:
    q, k, v = call.kwargs[query], call.kwargs["k"], call.kwargs["v"]
    batch, total, heads = v.shape[:3]
    if is_decoding_step(call, total):
        return None
    refuse_options(call, "gv", "reverse")
    scale, normalized = scale_of(call, q), bool(call.kwargs.get("normalize"))

    def form(samples: slice, chosen: Sequence[int], length: int) -> Operator:
        select = selection(samples, chosen, length, heads)
        first = first_tokens(call, length)
        b, c = select(k), precise(select(q)) * scale
        if normalized:
            c = c / (_row_sums(b, c, first) + _NORMALIZER_EPSILON)
        return kind(forget_at(first, log_decay(select, chosen)), b, c)

    return LazyOperator(batch, heads, total, form)


def _row_sums(b: Tensor, c: Tensor, first: Tensor | None) -> Tensor:
    """Return sum_j T_ij of linear attention, each row from the beginning of its own sequence."""
    sums, shift = b.double(), 1
    while shift < sums.shape[2]:  # torch's cumsum raises on CUDA where deterministic algorithms are asked for
        sums, shift = sums + F.pad(sums[:, :, :-shift], (0, 0, shift, 0)), 2 * shift
    if first is not None:
        tokens = torch.arange(len(first), device=first.device)
        begins = torch.where(first, tokens, 0).cummax(0).values
        sums = sums - (sums - b).index_select(2, begins)
    return (c * sums).sum(-1, keepdim=True).to(c.dtype)


def gla(call: Call) -> LazyOperator | None:
    """Read `chunk_gla(q, k, v, g, ...)`, `fused_recurrent_gla(q, k, v, gk, ...)`: a decay per state dimension."""
    gate = call.kwargs[_GATES[call.op]]
    return _recurrence(call, lambda select, heads: no_decay(call.kwargs["k"]) if gate is None else select(gate))


def simple_gla(call: Call) -> LazyOperator | None:
    """Read `*_simple_gla(q, k, v, g, g_gamma, ...)`: a decay per head, from the input, constant, or both."""
    gate, constant = call.kwargs.get("g"), call.kwargs.get("g_gamma")

    def log_decay(select: Select, heads: Sequence[int]) -> Tensor:
        if constant is None:
            fixed = no_decay(call.kwargs["k"])
        else:
            fixed = take(constant.reshape(1, -1, 1, 1), 1, heads)
        return fixed if gate is None else fixed + select(gate)[..., None]

    return _recurrence(call, log_decay)


def retention(call: Call) -> LazyOperator | None:
    """Read `*_retention(q, k, v, ...)`: a constant decay of head h, 1 - 2^-(5 + h), that is part of the op."""

    def log_decay(select: Select, heads: Sequence[int]) -> Tensor:
        lost = torch.tensor([2.0 ** -(5 + head) for head in heads], device="cpu")
        device = call.kwargs["k"].device
        return torch.log1p(-lost).reshape(1, -1, 1, 1).to(device, non_blocking=True)

    return _recurrence(call, log_decay)


def linear_attention(call: Call) -> LazyOperator | None:
    """Read `*_linear_attn(q, k, v, normalize=, ...)`: A = I; normalized, every row of T is divided by its sum."""
    return _recurrence(call, lambda select, heads: no_decay(call.kwargs["k"]))


def rwkv6(call: Call) -> LazyOperator | None:
    """Read `*_rwkv6(r, k, v, w, u, ...)`: read before the update; the bonus u lies on T's diagonal."""
    return _recurrence(call, lambda select, heads: select(call.kwargs["w"]), query="r", kind=ReadFirstRecurrence)


_KERNELS = ("chunk", "fused_chunk", "fused_recurrent", "parallel")
_OPS: dict[str, Build] = {
    "chunk_gla": gla,
    "fused_recurrent_gla": gla,
    **{f"{kernel}_simple_gla": simple_gla for kernel in _KERNELS},
    **{f"{kernel}_retention": retention for kernel in _KERNELS},
    **{f"{kernel}_linear_attn": linear_attention for kernel in _KERNELS[:3]},
}
_RWKV6_OPS = dict.fromkeys(("chunk_rwkv6", "fused_recurrent_rwkv6"), rwkv6)

_GATES = {
    "chunk_gla": "g",
    "fused_recurrent_gla": "gk",
    **{f"{kernel}_simple_gla": "g" for kernel in _KERNELS},
    **dict.fromkeys(_RWKV6_OPS, "w"),
}
"""Op -> its argument with the log decay. Retention has a fixed one, linear attention none."""

_GATE_LAYERS = ("gk_proj", "f_proj", "f_conv1d", "w_proj", "g_gate_proj", "tau_gate_proj")

_WIDENED: dict[str, Callable[[Any], int]] = {
    **dict.fromkeys(
        ("NoneType", "function", "Identity", "ReLU", "HadamardFeatureMap", "T2RFeatureMap"), lambda feature_map: 1
    ),
    "HedgehogFeatureMap": lambda feature_map: 2,
    "DPFPFeatureMap": lambda feature_map: 2 * int(feature_map.nu),
}
"""Class of a feature map -> by how much it widens keys. Others (Taylor) are not known before a forward pass."""


def _refusal(layer: nn.Module) -> str | None:
    if not getattr(layer, "causal", True):
        return "it is not causal here (causal=False), so y = T u has no state that passes from token to token"
    inside = {"parallel_based", "parallel_rebased"} & names_used(type(layer)).keys()
    if inside and getattr(layer, "mode", None) == "parallel":
        problem = f"in mode 'parallel' its feature map is computed inside of {inside.pop()}, and not in mode 'chunk'"
        return unread(layer, problem)
    return None


def _state_capacity(layer: nn.Module) -> int | None:
    size = int_attribute("head_k_dim", "head_f_dim", "mem_size", "head_dim")(layer)
    feature_map = getattr(layer, "feature_map_q", getattr(layer, "feature_map", None))
    widened = _WIDENED.get(type(feature_map).__name__)
    return None if size is None or widened is None else size * widened(feature_map)


def _decay(layer: nn.Module, site: CallSite) -> DecayHandle | None:
    """Build the handle of a log decay that is an argument of the op and determines A alone."""
    gated = CallSite(ops=tuple(op for op in site.ops if op.name in _GATES))
    parameters = existing(layer, *_GATE_LAYERS)

    def read(call: Call) -> DecayInputs | None:
        gate, constant = call.kwargs.get(_GATES[call.op]), call.kwargs.get("g_gamma")
        if gate is None or is_decoding_step(call, call.kwargs["v"].shape[1]):
            return None
        state_size = call.kwargs["k"].shape[-1]

        def transition(tensors: tuple[Tensor, ...]) -> Transition:
            log_decay = tensors[0].transpose(1, 2)
            if log_decay.dim() == 3:
                log_decay = log_decay[..., None]
            if constant is not None:
                log_decay = log_decay + constant.reshape(1, -1, 1, 1)
            return Transition(log_decay, state_size=state_size)

        return DecayInputs((gate,), transition, (1,))

    if not (gated.ops and parameters):
        return None
    raised = raise_arguments(read, dict.fromkeys((*_GATES.values(), "g_gamma"), raised_log_decay))
    return DecayHandle(parameters, gated, read, write_arguments(lambda call: (_GATES[call.op],)), raised)


AXES = Axes(state=3, heads=2)
"""Of keys and queries."""


def is_whole_sequence(call: Call) -> bool:
    """Return whether an operator is read of a call of these ops."""
    values = call.kwargs["v"] if "v" in call.kwargs else call.kwargs["value"]
    return not is_decoding_step(call, values.shape[1])


def state_of(key: str, query: str) -> Callable[[nn.Module, CallSite], StateHandle]:
    """Build the handle on the state of ops with these names for keys and queries."""
    return lambda layer, site: StateHandle(site, reduce_arguments(is_whole_sequence, {key: AXES}, query, AXES))


def _last_bias(layer: nn.Module) -> AlphaHandle | None:
    """Return the alpha of log A = -exp(w): the last bias of w shifts it as a whole."""
    bias = "w_proj.linear.lora.2.bias"
    return AlphaHandle(bias, 1.0) if bias in dict(layer.named_parameters()) else None


def _normalizer(layer: nn.Module) -> AlphaHandle | None:
    """Return the alpha of log A = logsigmoid(gate) / a number of the layer (GLA, simple GLA).

    None with a clamp after the division, which does not scale with the number.
    """
    number = getattr(layer, "gate_logit_normalizer", None)
    divides = isinstance(number, (int, float)) and getattr(layer, "clamp_min", None) is None
    return AlphaHandle("gate_logit_normalizer", form="divisor") if divides else None


ADAPTERS = (
    LayerAdapter(
        operator="DiagonalRecurrence",
        ops=_OPS,
        state_capacity=_state_capacity,
        channels=int_attribute("num_heads"),
        decay=_decay,
        alpha=_normalizer,
        state=state_of("k", "q"),
        weights=of_gated_linear,
        refusal=_refusal,
    ),
    LayerAdapter(
        operator="ReadFirstRecurrence",
        ops=_RWKV6_OPS,
        state_capacity=_state_capacity,
        channels=int_attribute("num_heads"),
        decay=_decay,
        alpha=_last_bias,
        state=state_of("k", "r"),
    ),
)
