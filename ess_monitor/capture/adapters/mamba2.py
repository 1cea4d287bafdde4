"""Mamba-2's scalar recurrence: transformers (Mamba2, Bamba, GraniteMoeHybrid, Zamba2, FalconH1, NemotronH), mamba_ssm,
fla, and whatever calls the same ops.

Per head h: Delta = clamp(softplus(dt + bias), limits), A_t = exp(Delta_t A) times the identity, input Delta_t B_t, read
C_t, with B and C shared by groups of heads; TSS is the state size n. All channels of a head have one T. Convolution,
gate and norm are outside of T; D u lies on its diagonal.

Three places. The scan's own op has all of it among its arguments. The fused op is given what is in front of the
convolution, and B and C are computed again, for the part that is taken. fla's layer calls an op on an accelerator only;
elsewhere it is read at `in_proj`, whose output everything is computed from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ess_monitor.capture.adapters.layer_attributes import (
    alpha_of_a_log,
    attribute,
    is_decoding,
    is_placeholder,
    real_tokens,
    segment_starts,
    shifted,
    short_conv,
    why_without_kernels,
)
from ess_monitor.capture.handles import DecayHandle, DecayInputs, Transition
from ess_monitor.capture.hooks.call_site import Arguments, Call, CallSite
from ess_monitor.capture.layer_adapter import FAMILIES, LayerAdapter
from ess_monitor.capture.spec import LazyOperator
from ess_monitor.ess import DiagonalRecurrence, Operator
from ess_monitor.ess.linalg import index_tensor
from ess_monitor.ess.operators.fields import take

Limits = tuple[float, float]


class _Split(NamedTuple):
    """Where the last dimension of the projected input is cut: [feed-forward | gate | x, B, C | dt]."""

    inner: int
    """Channels of x: heads times their width."""
    groups: int
    state: int
    heads: int

    def convolved(self, projected: Tensor) -> Tensor:
        """x, B and C, in front of the convolution."""
        stop = projected.shape[-1] - self.heads
        return projected[..., stop - self.inner - 2 * self.groups * self.state : stop]

    def dt(self, projected: Tensor) -> Tensor:
        return projected[..., projected.shape[-1] - self.heads :]

    def b_and_c(self, convolved: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, length, groups, n) each, from the output of the convolution, (batch, channels, length)."""
        both = convolved[:, self.inner :].mT
        both = both.reshape(*both.shape[:2], 2 * self.groups, self.state)
        return both[:, :, : self.groups], both[:, :, self.groups :]


def step_size(dt: Tensor, bias: Tensor | None, softplus: bool, limits: Limits) -> Tensor:
    """Delta, in dt's shape: heads last."""
    if bias is not None:
        dt = dt + bias
    return (F.softplus(dt) if softplus else dt).clamp(*limits)


def chunk_scan(call: Call) -> LazyOperator | None:
    """`mamba2_chunk_scan(hidden_states, dt, A, B, C, ...)`, `mamba_chunk_scan_combined(x, dt, A, B, C, ...)`."""
    dt, A, B, C, bias = (call.kwargs[name] for name in ("dt", "A", "B", "C", "dt_bias"))
    if is_decoding(call) or dt.shape[1] == 1:
        return None
    batch, length, channels = dt.shape
    softplus, limits = bool(call.kwargs["dt_softplus"]), call.kwargs["dt_limit"]
    real, segments = real_tokens(call, batch, length), call.kwargs.get("seq_idx")

    def form(samples: slice, heads: Sequence[int], length: int) -> Operator:
        delta = step_size(take(dt[samples, :length], 2, heads).double(), _few(bias, heads), softplus, limits)
        return _recurrence(
            delta,
            take(A, 0, heads),
            *(_by_head(tensor[samples, :length], heads, channels) for tensor in (B, C)),
            real=None if real is None else real[samples, :length],
            segments=None if segments is None else segments[samples, :length],
        )

    return LazyOperator(batch, channels, length, form)


def fused(call: Call) -> LazyOperator | None:
    """`mamba2_split_conv1d_scan_combined(zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, ...)` and its original."""
    k = call.kwargs
    projected, weight, conv_bias, bias, A, D = (k[name] for name in list(k)[:6])
    if call.output is None or is_decoding(call) or projected.shape[1] == 1:  # None: not a kernel, the scan follows
        return None
    batch, length, channels = projected.shape[0], projected.shape[1], A.shape[0]
    inner = channels * (D.shape[1] if D.dim() == 2 else k["headdim"])
    split = _Split(inner, k["ngroups"], (weight.shape[0] - inner) // (2 * k["ngroups"]), channels)
    segments, limits, activation = k.get("seq_idx"), k["dt_limit"], k["activation"]

    def form(samples: slice, heads: Sequence[int], length: int) -> Operator:
        few, kept = projected[samples, :length], None if segments is None else segments[samples, :length]
        taps = shifted(split.convolved(few).mT.double(), weight.shape[-1], kept)
        conv = short_conv(taps, weight.double(), None if conv_bias is None else conv_bias.double())
        B, C = split.b_and_c(conv if activation is None else F.silu(conv))
        delta = step_size(take(split.dt(few), 2, heads).double(), _few(bias, heads), True, limits)
        b, c = (_by_head(tensor, heads, channels) for tensor in (B, C))
        return _recurrence(delta, take(A, 0, heads), b, c, real=None, segments=kept)

    return LazyOperator(batch, channels, length, form)


def _recurrence(
    delta: Tensor, A: Tensor, b: Tensor, c: Tensor, *, real: Tensor | None, segments: Tensor | None
) -> Operator:
    log_decay = (delta * A.double()).mT
    if segments is not None:
        log_decay = log_decay.masked_fill(segment_starts(segments)[:, None], -torch.inf)
    b = b * delta.mT[..., None]
    if real is not None:
        b = b * real[:, None, :, None]
    return DiagonalRecurrence(log_decay[..., None], b, c)


def _few(bias: Tensor | None, heads: Sequence[int]) -> Tensor | None:
    return None if bias is None else take(bias, 0, heads).double()


def _by_head(tensor: Tensor, heads: Sequence[int], channels: int, *, tiled: bool = False) -> Tensor:
    """(batch, length, groups, n) to (batch, heads|1, length, n): neighboring heads share a group, or if `tiled` those
    that are `groups` apart."""
    groups, tensor = tensor.shape[2], tensor.transpose(1, 2)
    if groups > 1:
        of_heads = [head % groups if tiled else head * groups // channels for head in heads]
        tensor = tensor.index_select(1, index_tensor(of_heads, tensor.device))
    return tensor.double()


def _penalized(softplus: bool, limits: Limits, state: int, channels: int) -> Callable[..., Transition]:
    """A_t from (dt in its last `channels`, A[, bias of dt][, where segments start])."""

    def transition(tensors: tuple[Tensor, ...]) -> Transition:
        projected, A, *others = tensors
        bias = next((tensor.float() for tensor in others if tensor.dtype != torch.bool), None)
        delta = step_size(projected[..., projected.shape[-1] - channels :].float(), bias, softplus, limits)
        log_decay = delta * A.float()
        for starts in (tensor for tensor in others if tensor.dtype == torch.bool):
            log_decay = log_decay.masked_fill(starts[..., None], -torch.inf)
        return Transition(log_decay.mT[..., None], state_size=state)

    return transition


def _decay(layer: nn.Module, site: CallSite) -> DecayHandle | None:
    """dt, A and the bias of dt are all that A_t depends on; dt is not convolved."""
    names = tuple(name for name in ("in_proj", "dt_bias", "A_log") if hasattr(layer, name))

    def read(call: Call) -> DecayInputs | None:
        k = call.kwargs
        source, A, bias, segments = k[_source(call)], k["A"], k["dt_bias"], k.get("seq_idx")
        if is_decoding(call) or source.shape[1] == 1:
            return None
        if call.op in _FUSED:
            channels = A.shape[0]
            inner = channels * (k["D"].shape[1] if k["D"].dim() == 2 else k["headdim"])
            state, softplus = (k["conv1d_weight"].shape[0] - inner) // (2 * k["ngroups"]), True
        else:
            channels, state, softplus = source.shape[2], k["B"].shape[3], bool(k["dt_softplus"])
        starts = None if segments is None else segment_starts(segments)
        given = [(source, 1), (A, None), (bias, None), (starts, 1)]
        tensors, dims = zip(*((tensor, dim) for tensor, dim in given if tensor is not None), strict=True)
        return DecayInputs(tensors, _penalized(softplus, k["dt_limit"], state, channels), dims)

    def write(call: Call, tensors: tuple[Tensor, ...]) -> Arguments:
        given = [name for name in (_source(call), "A", "dt_bias") if call.kwargs[name] is not None]
        return call.args, {**call.kwargs, **dict(zip(given, tensors, strict=False))}

    ops = tuple(op for op in site.ops if op.name not in _FUSED or not is_placeholder(op))
    return DecayHandle(names, CallSite(ops=ops), read, write)


def _source(call: Call) -> str:
    """The argument that dt is, or is the last part of."""
    return next(iter(call.kwargs)) if call.op in _FUSED else "dt"


def fla_projection(call: Call) -> LazyOperator | None:
    """The output of fla's `in_proj`, (batch, length, [feed-forward | gate | x, B, C | dt])."""
    layer: Any = call.layer
    projected: Tensor = call.output
    if projected.shape[1] == 1:
        return None
    split = _Split(layer.intermediate_size, layer.n_groups, layer.ssm_state_size, layer.num_heads)
    activation = F.silu if layer.activation in ("silu", "swish") else layer.act
    tokens = real_tokens(call, *projected.shape[:2])

    def form(samples: slice, heads: Sequence[int], length: int) -> Operator:
        few = projected[samples, :length]
        real = None if tokens is None else tokens[samples, :length]
        x, bias = split.convolved(few).mT.double(), layer.conv1d.bias
        taps = shifted(x if real is None else x * real[:, None], layer.conv1d.weight.shape[-1])
        conv = short_conv(taps, layer.conv1d.weight.double(), None if bias is None else bias.double())
        B, C = split.b_and_c(activation(conv))
        delta = step_size(take(split.dt(few), 2, heads).double(), _few(layer.dt_bias, heads), True, layer.dt_limit)
        # This code of fla's gives neighboring heads different groups; its kernels give them the same.
        b, c = (_by_head(tensor, heads, split.heads, tiled=True) for tensor in (B, C))
        return _recurrence(delta, take(-layer.A_log.double().exp(), 0, heads), b, c, real=real, segments=None)

    return LazyOperator(projected.shape[0], split.heads, projected.shape[1], form)


def _fla_decay(layer: nn.Module, site: CallSite) -> DecayHandle:
    """The input of `in_proj` carries the identity function for the parameters, which are no arguments of a call."""

    own: Any = layer

    def read(call: Call) -> DecayInputs | None:
        x, projection = call.args[0], own.in_proj
        if x.shape[1] == 1:
            return None
        tensors: tuple[Tensor, ...] = (x, projection.weight, own.A_log, own.dt_bias)
        if projection.bias is not None:
            tensors = (*tensors, projection.bias)
        last, state = slice(-own.num_heads, None), own.ssm_state_size

        def transition(tensors: tuple[Tensor, ...]) -> Transition:
            x, weight, A_log, dt_bias, *bias = tensors
            dt = F.linear(x.float(), weight[last].float(), bias[0][last].float() if bias else None)
            delta = step_size(dt, dt_bias.float(), True, own.dt_limit)
            return Transition((delta * -A_log.float().exp()).mT[..., None], state_size=state)

        return DecayInputs(tensors, transition, (1, None, None, None, None)[: len(tensors)])

    def write(call: Call, tensors: tuple[Tensor, ...]) -> Arguments:
        return (tensors[0], *call.args[1:]), call.kwargs

    return DecayHandle(("in_proj", "dt_bias", "A_log"), site, read, write)


_FUSED = ("mamba2_split_conv1d_scan_combined", "mamba_split_conv1d_scan_combined")
_OPS = {
    **dict.fromkeys(_FUSED, fused),
    "mamba2_chunk_scan": chunk_scan,
    "mamba_chunk_scan_combined": chunk_scan,
}


def _capacity(layer: nn.Module) -> int | None:
    return attribute(layer, "ssm_state_size", "d_state")


def _channels(layer: nn.Module) -> int | None:
    return attribute(layer, "num_heads", "nheads")


FAMILIES.append(
    LayerAdapter(
        operator="DiagonalRecurrence",
        ops=_OPS,
        state_capacity=_capacity,
        channels=_channels,
        decay=_decay,
        alpha=alpha_of_a_log,
        refuses=lambda layer: why_without_kernels(layer, *_OPS),
    )
)
FAMILIES.append(
    LayerAdapter(
        operator="DiagonalRecurrence",
        classes=r"fla\.layers\.mamba2\.Mamba2",
        path="in_proj",
        build=fla_projection,
        state_capacity=_capacity,
        channels=_channels,
        decay=_fla_decay,
        alpha=alpha_of_a_log,
    )
)
