"""The delta rule, by the ops of flash-linear-attention and transformers.

In flash-linear-attention: DeltaNet, Gated DeltaNet, KDA, RWKV-7. Per value head:
A_t = (I - beta_t k_t k_t^T) diag(exp g_t), input beta_t k_t, read scale q_t. DeltaNet has no g, Gated DeltaNet one per
head, KDA one per state dimension. RWKV-7: A_t = diag(exp w_t) + b_t a_t^T, input k_t, read r_t. TSS is the size of a
key. Flags of an op say whether it is given raw gates and keys, and applies their activations itself.

In transformers: Qwen3-Next, Qwen3.5, OLMo-Hybrid (one decay per head), Kimi Linear (one per state dimension). Their ops
have other names for the same arguments, with the activations of decay and beta applied. Older layers keep the op, or
fla's, as an attribute.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ess_monitor.capture.adapters.gated_linear import (
    AXES,
    Select,
    first_tokens,
    forget_at,
    is_whole_sequence,
    no_decay,
    precise,
    refuse_options,
    scale_of,
    selection,
    state_of,
)
from ess_monitor.capture.adapters.layer_attributes import existing, int_attribute, is_decoding_step
from ess_monitor.capture.handles import (
    AlphaHandle,
    DecayHandle,
    DecayInputs,
    StateHandle,
    Transition,
    named_inputs,
    raise_arguments,
    raised_log_decay,
    reduce_arguments,
    write_arguments,
)
from ess_monitor.capture.hooks.call_site import Arguments, Call, CallSite
from ess_monitor.capture.hooks.global_names import names_used
from ess_monitor.capture.layer_adapter import LayerAdapter
from ess_monitor.capture.spec import LazyOperator, unread
from ess_monitor.errors import CaptureError
from ess_monitor.ess import DeltaRecurrence, Operator
from ess_monitor.ess.operators.fields import take

Named = Mapping[str, Any]
"""Arguments of an op by their names."""

_GATED = ("gated_delta_rule", "gdn", "kda")
"""Ends of the names of fla's ops with a gate."""

_NORM_EPSILON = 1e-6
"""In the norm that the kernels apply to queries and keys."""


def delta_rule(call: Call) -> LazyOperator | None:
    """Read `*_delta_rule(q, k, v, beta, ...)`; with `g` after `v`: `*_gated_delta_rule` and `*_kda`."""
    q, k, v = (call.kwargs[name] for name in ("q", "k", "v"))
    batch, total, heads = v.shape[:3]
    if is_decoding_step(call, total):
        return None
    _check_known(call)
    scale, normalized = scale_of(call, q), bool(call.kwargs.get("use_qk_l2norm_in_kernel"))

    def form(samples: slice, chosen: Sequence[int], length: int) -> Operator:
        select = selection(samples, chosen, length, heads)
        keys, queries = (_unit(select(tensor), normalized) for tensor in (k, q))
        log_decay = forget_at(first_tokens(call, length), _log_decay(call.kwargs, select, chosen))
        return DeltaRecurrence(log_decay, _beta(call.kwargs, select), keys, queries * scale)

    return LazyOperator(batch, heads, total, form)


def rwkv7(call: Call) -> LazyOperator | None:
    """Read `chunk_rwkv7(r, w, k, v, a, b, ...)`, `fused_mul_recurrent_rwkv7(r, w, k, v, kk, a, ...)`."""
    r, w, k, v = (call.kwargs[name] for name in ("r", "w", "k", "v"))
    batch, total, heads = v.shape[:3]
    if is_decoding_step(call, total):
        return None
    refuse_options(call, "reverse", "cp_context")
    scale = scale_of(call, r)

    def form(samples: slice, chosen: Sequence[int], length: int) -> Operator:
        select = selection(samples, chosen, length, heads)
        first = first_tokens(call, length)
        left, right = _rank_one(call.op, *(select(call.kwargs[name]) for name in _RANK_ONE[call.op]))
        if first is not None:
            right = right.masked_fill(first[:, None], 0.0)
        c = precise(select(r)) * scale
        return DeltaRecurrence.diagonal_plus_rank_one(forget_at(first, select(w)), left, right, select(k), c)

    return LazyOperator(batch, heads, total, form)


def _renamed(call: Call) -> Call:
    """Return a call of a transformers op with its arguments under the names of flash-linear-attention as well."""
    if "query" not in call.kwargs:
        return call
    q, k, v = (call.kwargs[name] for name in ("query", "key", "value"))
    return dataclasses.replace(call, kwargs={**call.kwargs, "q": q, "k": k, "v": v})


def transformers_delta_rule(call: Call) -> LazyOperator | None:
    """Read `*_gated_delta_rule(query, key, value, g, beta, ...)` and `*_kimi_delta_attention` of transformers."""
    return delta_rule(_renamed(call))


def _check_known(call: Call) -> None:
    refuse_options(call, "gk", "gv", "cp_context")
    beta = call.kwargs.get("beta")
    if beta is not None and beta.dim() != 3:
        raise CaptureError(
            f"{call.op}: beta has shape {tuple(beta.shape)}; only one beta per head is known, with which all channels "
            "of a head share one operator"
        )


def _unit(tensor: Tensor, normalized: bool) -> Tensor:
    tensor = precise(tensor)
    return tensor * (tensor.square().sum(-1, keepdim=True) + _NORM_EPSILON).rsqrt() if normalized else tensor


def _beta(given: Named, select: Select) -> Tensor:
    """(batch, heads, length), or (1, 1, 1) where every input replaces the old value completely."""
    if given.get("beta") is None:
        return precise(given["k"]).new_ones((1, 1, 1))
    beta = precise(select(given["beta"]))
    if not given.get("use_beta_sigmoid_in_kernel"):
        return beta
    return beta.sigmoid() * (2.0 if given.get("allow_neg_eigval") else 1.0)


def _log_decay(given: Named, select: Select, heads: Sequence[int]) -> Tensor:
    """(batch, heads, length, state), any of them 1."""
    if given.get("g") is None:
        return no_decay(given["k"])
    gate = precise(select(given["g"]))
    gate = gate if gate.dim() == 4 else gate[..., None]
    if not given.get("use_gate_in_kernel"):
        return gate
    A_log, bias = (_per_head(given.get(name), given["g"].shape[2], heads) for name in ("A_log", "dt_bias"))
    if bias is not None:
        gate = gate + bias
    rate = 1.0 if A_log is None else A_log.exp()
    lower_bound = given.get("lower_bound")
    return -rate * F.softplus(gate) if lower_bound is None else lower_bound * (rate * gate).sigmoid()


def _per_head(parameter: Tensor | None, total: int, heads: Sequence[int]) -> Tensor | None:
    """(heads,) or (heads * state,) to (heads, 1, 1|state)."""
    return None if parameter is None else precise(take(parameter.reshape(total, 1, -1), 0, heads))


_RANK_ONE = {"chunk_rwkv7": ("a", "b"), "fused_mul_recurrent_rwkv7": ("kk", "a")}
"""Op -> its arguments that make the rank-one part of A_t."""


def _rank_one(op: str, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return the left and the right factor of the rank-one part, from the arguments in `_RANK_ONE`."""
    return (second, first) if op == "chunk_rwkv7" else (first * second, -first)


def _decay(layer: nn.Module, site: CallSite) -> DecayHandle:
    """Build the handle of the gate, beta and the keys, before the activations that the kernel applies to them.

    The power raises diag(exp g_t) alone: beta and the keys decide what is replaced, and stay. With A = 0 they have no
    effect on the past. DeltaNet has no g, and no beta makes its I - beta_t k_t k_t^T zero: it cannot be raised.
    """

    def names(call: Call) -> tuple[str, ...]:
        return ("g", "A_log", "dt_bias", "beta", "k") if call.kwargs.get("use_gate_in_kernel") else ("g", "beta", "k")

    def read(call: Call) -> DecayInputs | None:
        length, heads = call.kwargs["v"].shape[1:3]
        if is_decoding_step(call, length):
            return None
        _check_known(call)
        state_size = call.kwargs["k"].shape[-1]
        flags = {name: value for name, value in call.kwargs.items() if not isinstance(value, Tensor)}

        def transition(tensors: dict[str, Tensor]) -> Transition:
            given = {**flags, **tensors}
            select = selection(slice(None), range(heads), length, heads)
            k = _unit(select(given["k"]), bool(flags.get("use_qk_l2norm_in_kernel")))
            log_decay = _log_decay(given, select, range(heads))
            return Transition(log_decay, -_beta(given, select)[..., None] * k, log_decay.exp() * k, state_size)

        parameters = ("A_log", "dt_bias")
        inputs = {name: (call.kwargs.get(name), None if name in parameters else 1) for name in names(call)}
        return named_inputs(inputs, transition)

    parameters = existing(layer, "a_proj", "f_proj", "A_log", "dt_bias", "b_proj", "k_proj", "k_conv1d")
    gated = any(op.name.endswith(_GATED) for op in site.ops)
    raised = (lambda call, power: None if read(call) is None else _raised(call, power)) if gated else None
    return DecayHandle(parameters, site, read, write_arguments(names), raised)


def _raised(call: Call, power: float) -> Arguments | None:
    """Return the arguments with another g. Where the kernel would compute log A from it, it gets log A instead."""
    k, g = call.kwargs, call.kwargs.get("g")
    if g is None:
        return None
    changed: dict[str, Any] = {}
    if k.get("use_gate_in_kernel"):
        length, heads = k["v"].shape[1:3]
        log_decay = _log_decay(k, selection(slice(None), range(heads), length, heads), range(heads))
        g = log_decay.transpose(1, 2).reshape(g.shape)
        changed |= {name: None for name in ("A_log", "dt_bias", "lower_bound") if name in k}
        changed["use_gate_in_kernel"] = False
    if power > 1 and "safe_gate" in k:
        changed["safe_gate"] = False  # it promises that log A is above -5
    return call.args, {**k, **changed, "g": raised_log_decay(g, power)}


def _transformers_decay(layer: nn.Module, site: CallSite) -> DecayHandle:
    def names(call: Call) -> tuple[str, ...]:
        return "g", "beta", "key" if "query" in call.kwargs else "k"

    read, write = _decay(layer, site).read, write_arguments(names)

    def read_renamed(call: Call) -> DecayInputs | None:
        return read(_renamed(call))

    raised = raise_arguments(read_renamed, {"g": raised_log_decay})
    return DecayHandle(existing(layer, *_TRANSFORMERS_PARAMETERS), site, read_renamed, write, raised)


_TRANSFORMERS_PARAMETERS = (
    *("forget_gate", "in_proj_a", "in_proj_ba", "a_proj", "A_log", "dt_bias"),  # decay
    *("in_proj_b", "b_proj"),  # beta
    *("in_proj_qkv", "in_proj_qkvz", "k_proj", "conv1d"),  # keys
)


def _rwkv7_decay(layer: nn.Module, site: CallSite) -> DecayHandle:
    """Build the handle of the decay and of both factors of the rank-one part.

    A power raises diag(exp w_t) alone. A = 0 is without the rank-one part, too.
    """

    def names(call: Call) -> tuple[str, ...]:
        return ("w", *_RANK_ONE[call.op])

    def read(call: Call) -> DecayInputs | None:
        if is_decoding_step(call, call.kwargs["v"].shape[1]):
            return None
        op = call.op

        def transition(tensors: tuple[Tensor, ...]) -> Transition:
            log_decay, *others = (tensor.transpose(1, 2) for tensor in tensors)
            return Transition(log_decay, *_rank_one(op, *others))

        return DecayInputs(tuple(call.kwargs[name] for name in names(call)), transition, (1, 1, 1))

    def raised(call: Call, power: float) -> Arguments | None:
        if read(call) is None:
            return None
        k = {**call.kwargs, "w": raised_log_decay(call.kwargs["w"], power)}
        if math.isinf(power):
            factor = _RANK_ONE[call.op][0]
            k[factor] = torch.zeros_like(k[factor])
        if power > 1:  # the bounds may no longer hold, and the size of a chunk depends on them
            unbounded = {"safe_gate": False, "lower_bound": None, "chunk_size": None}
            k |= {name: value for name, value in unbounded.items() if name in k}
        return call.args, k

    parameters = existing(layer, "w_lora", "a_lora", "k_proj", "k_k")
    return DecayHandle(parameters, site, read, write_arguments(names), raised)


def _rwkv7_state(layer: nn.Module, site: CallSite) -> StateHandle:
    """Build the handle on the state: k and the left factor of the rank-one part write to it."""
    left = {"chunk_rwkv7": "b", "fused_mul_recurrent_rwkv7": "kk"}
    by_op = {op: reduce_arguments(is_whole_sequence, {"k": AXES, name: AXES}, "r", AXES) for op, name in left.items()}
    return StateHandle(site, lambda call, share: by_op[call.op](call, share))


def _refusal(layer: nn.Module) -> str | None:
    if "chunk_gated_delta_product" in names_used(type(layer)):
        return unread(layer, "it makes several steps of the delta rule per token, so that its op sees other tokens")
    if hasattr(layer, "num_memories"):
        return unread(layer, "it sends every token to some of several memories, so that its op sees other tokens")
    return None


def _alpha(layer: nn.Module) -> AlphaHandle | None:
    """Return the alpha of log A = -exp(A_log) softplus(.); None with a lower bound, where A_log is in a sigmoid."""
    scales = isinstance(getattr(layer, "A_log", None), Tensor) and getattr(layer, "lower_bound", None) is None
    return AlphaHandle("A_log", 1.0) if scales else None


def _transformers_state(layer: nn.Module, site: CallSite) -> StateHandle:
    own, fla = state_of("key", "query")(layer, site), state_of("k", "q")(layer, site)
    return StateHandle(site, lambda call, share: (own if "query" in call.kwargs else fla).reduced(call, share))


def _is_of_transformers(layer: nn.Module) -> bool:
    """Return whether the layer names the op that transformers has of its own beside fla's."""
    return any(name.startswith("torch_") or "_kimi_" in name for name in names_used(type(layer)))


def _transformers_alpha(layer: nn.Module) -> AlphaHandle | None:
    """Return the same alpha, by the names in transformers."""
    gate = getattr(layer, "forget_gate", layer)
    bounded = any(value not in (None, False) for name, value in vars(gate).items() if "safe" in name or "bound" in name)
    if bounded or not isinstance(getattr(gate, "A_log", None), Tensor):
        return None
    return AlphaHandle("A_log" if gate is layer else "forget_gate.A_log", 1.0)


ADAPTERS = (
    LayerAdapter(
        operator="DeltaRecurrence",
        ops={
            "torch_chunk_gated_delta_rule": transformers_delta_rule,
            "torch_recurrent_gated_delta_rule": transformers_delta_rule,
            "chunk_kimi_delta_attention": transformers_delta_rule,
            "recurrent_kimi_delta_attention": transformers_delta_rule,
            "chunk_gated_delta_rule": transformers_delta_rule,
        },
        is_member=_is_of_transformers,
        state_capacity=int_attribute("head_k_dim", "head_dim"),
        channels=int_attribute("num_v_heads", "num_heads"),
        decay=_transformers_decay,
        alpha=_transformers_alpha,
        state=_transformers_state,
    ),
    LayerAdapter(
        operator="DeltaRecurrence",
        ops={f"{kernel}_{op}": delta_rule for op in ("delta_rule", *_GATED) for kernel in ("chunk", "fused_recurrent")},
        state_capacity=int_attribute("head_k_dim", "head_dim"),
        channels=int_attribute("num_v_heads", "num_heads"),
        decay=_decay,
        alpha=_alpha,
        state=state_of("k", "q"),
        refusal=_refusal,
    ),
    LayerAdapter(
        operator="DeltaRecurrence",
        ops={"chunk_rwkv7": rwkv7, "fused_mul_recurrent_rwkv7": rwkv7},
        state_capacity=int_attribute("head_dim"),
        channels=int_attribute("num_heads"),
        decay=_rwkv7_decay,
        state=_rwkv7_state,
    ),
)
