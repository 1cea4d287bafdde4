"""Mamba's selective scan: transformers (Mamba, FalconMamba, Jamba, Zamba), mamba_ssm, and whatever calls the same ops.

Per channel e: Delta = softplus(dt + bias), A_t[n] = exp(Delta_t A[n]), input Delta_t B_t[n], read C_t[n]; TSS is the
state size n. The convolution in front and the gate behind the scan are outside of T; D u lies on T's diagonal, which
no H_i contains.

Three places. The scan's own op has dt, B and C among its arguments. The fused op (`mamba_inner_fn`) is given what is in
front of the convolution, with the weights of all that follows, and returns the layer's output: dt, B and C are computed
again, for the part that is taken. Zamba scans once for every one of its heads: it is read as a whole at `in_proj`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ess_monitor.capture.adapters.layer_attributes import (
    alpha_of_a_log,
    attribute,
    is_decoding,
    is_placeholder,
    real_tokens,
    shifted,
    short_conv,
    why_without_kernels,
)
from ess_monitor.capture.handles import DecayHandle, DecayInputs, Transition
from ess_monitor.capture.hooks.call_site import Arguments, Call, CallSite, Op
from ess_monitor.capture.hooks.global_names import names_used
from ess_monitor.capture.layer_adapter import FAMILIES, LayerAdapter
from ess_monitor.capture.spec import LazyOperator
from ess_monitor.ess import DiagonalRecurrence, Operator
from ess_monitor.ess.linalg import index_tensor
from ess_monitor.ess.operators.fields import take


def step_size(dt: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    """Delta, (batch, channels, length)."""
    if bias is not None:
        dt = dt + bias[:, None]
    return F.softplus(dt) if softplus else dt


def scan(call: Call) -> LazyOperator | None:
    """`mamba_selective_scan(hidden_states, dt, A, B, C, ...)`, `selective_scan_fn(u, delta, A, B, C, ...)`."""
    u, dt, A, B, C = (call.kwargs[name] for name in _scan_names(call))
    batch, channels, length = u.shape
    if is_decoding(call) or length == 1:
        return None
    bias, softplus = call.kwargs["delta_bias"], bool(call.kwargs["delta_softplus"])
    real = real_tokens(call, batch, length)

    def form(samples: slice, heads: Sequence[int], length: int) -> Operator:
        few = dt[samples, :, :length]
        kept = None if real is None else real[samples, :length]
        b, c = (_by_state(t, samples, heads, length, channels) for t in (B, C))
        return _recurrence(take(few, 1, heads), take(A, 0, heads), b, c, _few(bias, heads), softplus, kept)

    return LazyOperator(batch, channels, length, form)


def fused(call: Call) -> LazyOperator | None:
    """`mamba_inner_fn(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, ...)`."""
    xz, A, bias = (call.kwargs[name] for name in ("xz", "A", "delta_bias"))
    batch, channels, length = xz.shape[0], xz.shape[1] // 2, xz.shape[2]
    if call.output is None or length == 1:  # None: not a kernel, the scan follows
        return None
    softplus = bool(call.kwargs["delta_softplus"])

    def form(samples: slice, heads: Sequence[int], length: int) -> Operator:
        exact = {
            name: value.double() if isinstance(value, Tensor) and name not in _OTHERS else value
            for name, value in call.kwargs.items()
        }
        taps = shifted(xz[samples, :channels, :length].double(), exact["conv1d_weight"].shape[-1])
        dt, B, C = _inner(taps, exact)
        everything = slice(None)
        # Fixed B and C come as arguments, one for all samples.
        b = _by_state(B, everything if exact["B"] is None else samples, heads, length, channels)
        c = _by_state(C, everything if exact["C"] is None else samples, heads, length, channels)
        return _recurrence(take(dt, 1, heads), take(A, 0, heads), b, c, _few(bias, heads), softplus, None)

    return LazyOperator(batch, channels, length, form)


_OTHERS = ("xz", "out_proj_weight", "out_proj_bias", "D")
"""Arguments of the fused op that T does not depend on, apart from xz itself."""


def _inner(taps: Sequence[Tensor], given: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """dt, B and C as the fused op computes them from the part of xz that is scanned, as its convolution meets it."""
    x = F.silu(short_conv(taps, given["conv1d_weight"], given["conv1d_bias"])).to(given["x_proj_weight"].dtype)
    rank = given["delta_proj_weight"].shape[1]
    low, B, C = (given["x_proj_weight"] @ x).tensor_split((rank, rank + given["A"].shape[1]), 1)
    dt = given["delta_proj_weight"] @ low
    B = _plus(B, given.get("B_proj_bias")) if given["B"] is None else given["B"]
    C = _plus(C, given.get("C_proj_bias")) if given["C"] is None else given["C"]
    eps = given.get("b_c_dt_rms_eps", 1e-6)
    # dt is normed over the channels, behind its projection.
    dt, B, C = (
        tensor if given.get(name) is None else _rms(tensor, given[name], eps)
        for tensor, name in ((dt, "dt_rms_weight"), (B, "b_rms_weight"), (C, "c_rms_weight"))
    )
    return dt, B, C


def _plus(tensor: Tensor, bias: Tensor | None) -> Tensor:
    return tensor if bias is None else tensor + bias[:, None]


def _rms(tensor: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over dimension 1."""
    precise = tensor if tensor.dtype == torch.float64 else tensor.float()
    return precise * (precise.square().mean(1, keepdim=True) + eps).rsqrt() * weight[:, None]


def _recurrence(
    dt: Tensor, A: Tensor, b: Tensor, c: Tensor, bias: Tensor | None, softplus: bool, real: Tensor | None
) -> Operator:
    delta = step_size(dt.double(), bias, softplus)[..., None]
    b = b * delta
    if real is not None:
        b = b * real[:, None, :, None]
    return DiagonalRecurrence(delta * A[:, None].double(), b, c)


def _few(bias: Tensor | None, heads: Sequence[int]) -> Tensor | None:
    return None if bias is None else take(bias, 0, heads).double()


def _by_state(tensor: Tensor, samples: slice, heads: Sequence[int], length: int, channels: int) -> Tensor:
    """(batch, n, length), with groups of channels (batch, groups, n, length), or fixed (channels, n), to
    (batch, heads|1, length, n)."""
    if tensor.dim() == 2:
        return take(tensor, 0, heads)[None, :, None].double().expand(-1, -1, length, -1)
    tensor = tensor[samples]
    if tensor.dim() == 3:
        tensor = tensor[:, None]
    elif tensor.shape[1] > 1:
        groups = index_tensor([head * tensor.shape[1] // channels for head in heads], tensor.device)
        tensor = tensor.index_select(1, groups)
    return tensor[..., :length].mT.double()


def _scan_names(call: Call) -> tuple[str, ...]:
    return (*list(call.kwargs)[:2], "A", "B", "C")


def _log_decay(dt: Tensor, A: Tensor, bias: Tensor | None, softplus: bool) -> Transition:
    delta = step_size(dt.float(), None if bias is None else bias.float(), softplus)
    return Transition(delta[..., None] * A[:, None].float())


def _decay(layer: nn.Module, site: CallSite) -> DecayHandle | None:
    """dt, A and the bias of dt are all that A_t depends on."""
    names = tuple(name for name in ("x_proj", "dt_proj", "A_log") if hasattr(layer, name))

    def read(call: Call) -> DecayInputs | None:
        if call.op == "mamba_inner_fn":
            return _behind_fused(call)
        dt, A, bias = (call.kwargs[name] for name in (_scan_names(call)[1], "A", "delta_bias"))
        if is_decoding(call) or dt.shape[2] == 1:
            return None
        softplus = bool(call.kwargs["delta_softplus"])

        def transition(tensors: tuple[Tensor, ...]) -> Transition:
            dt, A, *bias = tensors
            return _log_decay(dt, A, bias[0] if bias else None, softplus)

        return DecayInputs(
            (dt, A) if bias is None else (dt, A, bias), transition, (2, None, None)[: 2 + (bias is not None)]
        )

    def write(call: Call, tensors: tuple[Tensor, ...]) -> Arguments:
        names = _behind_names(call) if call.op == "mamba_inner_fn" else (_scan_names(call)[1], "A", "delta_bias")
        return call.args, {**call.kwargs, **dict(zip(names, tensors, strict=False))}

    ops = tuple(op for op in site.ops if op.name != "mamba_inner_fn" or not is_placeholder(op))
    return DecayHandle(names, CallSite(ops=ops), read, write)


_BEHIND = ("A", "delta_bias", "conv1d_weight", "conv1d_bias", "x_proj_weight", "delta_proj_weight", "dt_rms_weight")
"""Arguments of the fused op that A_t depends on, apart from xz."""


def _behind_names(call: Call) -> list[str]:
    return [name for name in _BEHIND if call.kwargs.get(name) is not None]


def _behind_fused(call: Call) -> DecayInputs | None:
    """The fused op's arguments carry the identity function into it; xz, which is convolved, is given as the taps of the
    convolution meet it and stays as it is in the call: its gradient gains what theirs do."""
    k, names = call.kwargs, _behind_names(call)
    channels, softplus, eps = k["A"].shape[0], bool(k["delta_softplus"]), k.get("b_c_dt_rms_eps", 1e-6)
    if k["xz"].shape[2] == 1:
        return None
    taps = shifted(k["xz"][:, :channels], k["conv1d_weight"].shape[-1])

    def transition(tensors: tuple[Tensor, ...]) -> Transition:
        given = {name: tensor.float() for name, tensor in zip(names, tensors, strict=False)}
        x = F.silu(
            short_conv([tap.float() for tap in tensors[len(names) :]], given["conv1d_weight"], given.get("conv1d_bias"))
        )
        down = given["delta_proj_weight"]
        dt = down @ (given["x_proj_weight"][: down.shape[1]] @ x)
        if "dt_rms_weight" in given:
            dt = _rms(dt, given["dt_rms_weight"], eps)
        return _log_decay(dt, given["A"], given.get("delta_bias"), softplus)

    dims = (None,) * len(names) + (2,) * len(taps)
    return DecayInputs((*(k[name] for name in names), *taps), transition, dims)


def zamba(call: Call) -> LazyOperator | None:
    """The output of Zamba's `in_proj`, (batch, length, 2 channels): x and gate of every channel side by side."""
    layer, projected = call.layer, call.output
    batch, length, channels = projected.shape[0], projected.shape[1], projected.shape[2] // 2
    if length == 1:
        return None
    tokens = real_tokens(call, batch, length)

    def form(samples: slice, heads: Sequence[int], length: int) -> Operator:
        x = projected[samples, :length, ::2].mT
        real = None if tokens is None else tokens[samples, :length]
        exact = {
            name: tensor.double()
            for name, tensor in layer.named_parameters()
            if not name.startswith(("in_proj", "out_proj"))
        }
        taps = shifted(x.double(), exact["conv1d.weight"].shape[-1])
        x = _activation(layer)(short_conv(taps, exact["conv1d.weight"], exact.get("conv1d.bias")))
        dt, B, C = _zamba_inner(x if real is None else x * real[:, None], exact)
        A, bias = (-exact["A_log"].exp()).flatten(0, 1), exact["dt_proj_bias"].flatten()
        b, c = (_by_state(t, slice(None), heads, length, channels) for t in (B, C))
        return _recurrence(take(dt, 1, heads), take(A, 0, heads), b, c, _few(bias, heads), True, real)

    return LazyOperator(batch, channels, length, form)


def _zamba_inner(x: Tensor, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """dt (batch, channels, length), B and C (batch, heads, n, length): every head of Zamba has weights of its own."""
    up, down = weights["x_proj_weight"], weights["dt_proj_weight"]
    by_head = x.reshape(x.shape[0], up.shape[0], -1, x.shape[2]).to(up.dtype)
    rank = down.shape[2]
    low, B, C = (up @ by_head).tensor_split((rank, (rank + up.shape[1]) // 2), 2)
    return (down @ low).flatten(1, 2), B, C


def _activation(layer: nn.Module) -> Any:
    return F.silu if getattr(layer, "activation", "silu") in ("silu", "swish") else layer.act


def _zamba_decay(layer: nn.Module, site: CallSite) -> DecayHandle | None:
    """The input of the convolution carries the identity function, for the parameters as well: they are no arguments."""
    spaces = tuple(s for s in names_used(type(layer)).get("causal_conv1d_fn", ()) if "causal_conv1d_fn" in s)
    if not spaces:
        return None

    def read(call: Call) -> DecayInputs | None:
        name, *_ = call.kwargs
        x, weight, bias = call.kwargs[name], call.kwargs["weight"], call.kwargs["bias"]
        if x.shape[2] == 1:
            return None
        own, real = dict(layer.named_parameters()), real_tokens(call, x.shape[0], x.shape[2])
        *earlier, now = shifted(x, weight.shape[-1])
        weights = [own[name] for name in _ZAMBA] + [weight] + ([] if bias is None else [bias])
        masks = [] if real is None else [real]

        def transition(tensors: tuple[Tensor, ...]) -> Transition:
            taps, rest = tensors[: 1 + len(earlier)], tensors[1 + len(earlier) :]
            given = dict(zip(_ZAMBA, rest, strict=False))
            of_conv = rest[len(_ZAMBA) : len(weights)]
            conv = _activation(layer)(short_conv((*taps[1:], taps[0]), of_conv[0], of_conv[1] if of_conv[1:] else None))
            for mask in rest[len(weights) :]:
                conv = conv * mask[:, None]
            A = -given["A_log"].float().exp()
            dt = _zamba_inner(conv, given)[0]
            return _log_decay(dt, A.flatten(0, 1), given["dt_proj_bias"].flatten(), True)

        dims = (2,) * (1 + len(earlier)) + (None,) * len(weights) + (1,) * len(masks)
        return DecayInputs((now, *earlier, *weights, *masks), transition, dims)

    def write(call: Call, tensors: tuple[Tensor, ...]) -> Arguments:
        name, *_ = call.kwargs
        return call.args, {**call.kwargs, name: tensors[0]}

    return DecayHandle(_ZAMBA, CallSite(ops=(Op("causal_conv1d_fn", spaces),)), read, write)


_ZAMBA = ("x_proj_weight", "dt_proj_weight", "dt_proj_bias", "A_log")


_OPS = {"mamba_inner_fn": fused, "mamba_selective_scan": scan, "selective_scan_fn": scan}


def _capacity(layer: nn.Module) -> int | None:
    return attribute(layer, "ssm_state_size", "d_state", "state_size")


def _channels(layer: nn.Module) -> int | None:
    return attribute(layer, "intermediate_size", "d_inner")


FAMILIES.append(
    LayerAdapter(
        operator="DiagonalRecurrence",
        classes=r"transformers\..*\.ZambaMambaMixer",
        path="in_proj",
        build=zamba,
        state_capacity=_capacity,
        channels=_channels,
        decay=_zamba_decay,
        alpha=alpha_of_a_log,
    )
)
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
