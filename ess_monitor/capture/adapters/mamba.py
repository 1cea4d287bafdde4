"""Mamba's selective scan, in transformers and mamba_ssm, and in every other layer that calls the same ops.

In transformers: Mamba, FalconMamba, Jamba, Zamba. Per channel e: Delta = softplus(dt + bias),
A_t[n] = exp(Delta_t A[n]), input Delta_t B_t[n], read C_t[n]; TSS is the state size n. The convolution in front of the
scan and the gate after it are outside of T; D u lies on T's diagonal, which no H_i contains.

The scan's own op has dt, B and C among its arguments. The fused op (`mamba_inner_fn`) gets the input of the convolution
and the weights of all that follows, and returns the layer's output: dt, B and C are computed again, for the selected
part. Zamba scans once for each of its heads: it is read as a whole at `in_proj`. Before transformers 5.15 layers
without kernels compute in code of their own, which is read at `x_proj`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ess_monitor.capture.adapters.layer_attributes import existing, int_attribute, is_decoding_step, zeroed_by_mask
from ess_monitor.capture.adapters.selective_scan import (
    alpha_of_a_log,
    has_own_loop,
    own_decay,
    own_norms,
    scan_operator,
    scan_transition,
    shifted,
    short_conv,
    why_without_kernels,
    without_placeholders,
)
from ess_monitor.capture.adapters.state_weights import of_mamba
from ess_monitor.capture.handles import (
    Axes,
    DecayHandle,
    DecayInputs,
    StateHandle,
    Transition,
    least_used,
    named_inputs,
    raise_arguments,
    raised_rate,
    write_arguments,
)
from ess_monitor.capture.hooks.call_site import Arguments, Call, CallSite, Op
from ess_monitor.capture.hooks.global_names import names_used
from ess_monitor.capture.layer_adapter import LayerAdapter
from ess_monitor.capture.spec import LazyOperator
from ess_monitor.ess import Operator
from ess_monitor.ess.linalg import index_tensor
from ess_monitor.ess.operators.fields import take

_FUSED = "mamba_inner_fn"


def scan(call: Call) -> LazyOperator | None:
    """Read `mamba_selective_scan(hidden_states, dt, A, B, C, ...)`, `selective_scan_fn(u, delta, A, B, C, ...)`."""
    dt, A, B, C = (call.kwargs[name] for name in (_name_of_dt(call), "A", "B", "C"))
    batch, channels, length = dt.shape
    if is_decoding_step(call, length):
        return None
    bias, softplus = call.kwargs["delta_bias"], bool(call.kwargs["delta_softplus"])

    def form(samples: slice, heads: Sequence[int], length: int) -> Operator:
        b, c = (_by_state(t, samples, heads, length, channels) for t in (B, C))
        return scan_operator(heads, dt[samples, :, :length], A, bias, b, c, softplus=softplus)

    return LazyOperator(batch, channels, length, form)


def _name_of_dt(call: Call) -> str:
    return list(call.kwargs)[1]


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


def fused(call: Call) -> LazyOperator | None:
    """Read `mamba_inner_fn(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, ...)`."""
    xz = call.kwargs["xz"]
    batch, channels, length = xz.shape[0], xz.shape[1] // 2, xz.shape[2]
    if call.output is None or length == 1:  # None: a placeholder of the kernel; the layer calls the scan next
        return None

    def form(samples: slice, heads: Sequence[int], length: int) -> Operator:
        given = {
            name: value.double() if isinstance(value, Tensor) and name not in _NOT_IN_T else value
            for name, value in call.kwargs.items()
        }
        taps = shifted(xz[samples, :channels, :length].double(), given["conv1d_weight"].shape[-1])
        x = _convolved(taps, given)
        b, c = (
            # x has the selected samples only; a fixed B or C has all.
            _by_state(tensor, slice(None) if given[name] is None else samples, heads, length, channels)
            for name, tensor in _fused_b_and_c(x, given).items()
        )
        dt, softplus = _fused_dt(x, given), bool(given["delta_softplus"])
        return scan_operator(heads, dt, given["A"], given["delta_bias"], b, c, softplus=softplus)

    return LazyOperator(batch, channels, length, form, forming_bytes=_CONVOLVED_BYTES * channels)


_CONVOLVED_BYTES = 6 * 8
"""For each token and channel, where B and C are computed from the convolved input of all channels: some copies of it in
float64."""

_NOT_IN_T = ("xz", "out_proj_weight", "out_proj_bias", "D")
"""Arguments of the fused op that need no conversion: T does not depend on them, and xz is cut first."""


def _convolved(taps: Sequence[Tensor], given: Mapping[str, Any]) -> Tensor:
    """Compute the input of the scan from the part of xz that is scanned, as the fused op does."""
    return F.silu(short_conv(taps, given["conv1d_weight"], given.get("conv1d_bias")))


def _fused_dt(x: Tensor, given: Mapping[str, Any]) -> Tensor:
    up: Tensor = given["delta_proj_weight"]
    return _normalized(up @ (given["x_proj_weight"][: up.shape[1]] @ x), "dt", given)


def _fused_b_and_c(x: Tensor, given: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return B and C: arguments of the fused op where they are fixed, otherwise computed from x."""
    rank, state = given["delta_proj_weight"].shape[1], given["A"].shape[1]
    projected = given["x_proj_weight"][rank:] @ x
    found = {}
    for name, tensor in (("B", projected[:, :state]), ("C", projected[:, -state:])):
        bias, fixed = given.get(f"{name}_proj_bias"), given[name]
        computed = tensor if bias is None else tensor + bias[:, None]
        found[name] = _normalized(computed if fixed is None else fixed, name.lower(), given)
    return found


def _normalized(tensor: Tensor, name: str, given: Mapping[str, Any]) -> Tensor:
    """Apply the RMSNorm over dimension 1 that some fused ops apply to dt, B and C."""
    weight: Tensor | None = given.get(f"{name}_rms_weight")
    if weight is None:
        return tensor
    eps: float = given.get("b_c_dt_rms_eps", 1e-6)
    return tensor * (tensor.square().mean(1, keepdim=True) + eps).rsqrt() * weight[:, None]


def _decay(layer: nn.Module, site: CallSite) -> DecayHandle | None:
    """Build the handle of dt, A and the bias of dt, which determine A_t."""

    def names(call: Call) -> tuple[str, ...]:
        return _FUSED_INPUTS if call.op == _FUSED else (_name_of_dt(call), "A", "delta_bias")

    def read(call: Call) -> DecayInputs | None:
        if call.op == _FUSED:
            return _fused_inputs(call)
        dt, A, bias = (call.kwargs[name] for name in names(call))
        if is_decoding_step(call, dt.shape[2]):
            return None
        softplus = bool(call.kwargs["delta_softplus"])
        return named_inputs(
            {"dt": (dt, 2), "A": (A, None), "bias": (bias, None)},
            lambda given: scan_transition(given["dt"], given["A"], given.get("bias"), softplus=softplus),
        )

    parameters = existing(layer, "x_proj", "dt_proj", "A_log")
    raised = raise_arguments(read, {"A": raised_rate})  # not dt, which the input is multiplied with as well
    return DecayHandle(parameters, without_placeholders(site, _FUSED), read, write_arguments(names), raised)


_FUSED_INPUTS = (
    *("A", "delta_bias", "conv1d_weight", "conv1d_bias"),
    *("x_proj_weight", "delta_proj_weight", "dt_rms_weight"),
)
"""Arguments of the fused op that A_t depends on, apart from xz."""


def _fused_inputs(call: Call) -> DecayInputs | None:
    """Return the inputs of A_t in a call of the fused op.

    Instead of xz, which the op convolves, they have the shifted copies that the taps meet. These are not written back:
    gradients added to them reach xz through their own graph.
    """
    k = call.kwargs
    if k["xz"].shape[2] == 1:
        return None
    taps = {f"tap {i}": t for i, t in enumerate(shifted(k["xz"][:, : k["A"].shape[0]], k["conv1d_weight"].shape[-1]))}
    tap_names = tuple(taps)
    softplus, options = bool(k["delta_softplus"]), {n: k[n] for n in ("b_c_dt_rms_eps",) if n in k}

    def transition(tensors: dict[str, Tensor]) -> Transition:
        exact = {name: tensor.float() for name, tensor in tensors.items()}
        dt = _fused_dt(_convolved([exact[name] for name in tap_names], exact), {**exact, **options})
        return scan_transition(dt, exact["A"], exact.get("delta_bias"), softplus=softplus)

    weights = {name: (k.get(name), None) for name in _FUSED_INPUTS}
    return named_inputs({**weights, **{name: (tap, 2) for name, tap in taps.items()}}, transition)


_FEW = 4
"""Sequences of which B and C are computed to see how much a state dimension is used."""


def _axes(tensor: Tensor) -> Axes:
    """Return the axes of B or C, in the shapes of `_by_state`."""
    return Axes(state=-1) if tensor.dim() == 2 else Axes(state=-2, heads=1 if tensor.dim() == 4 else None)


def _least_used(B: Tensor, C: Tensor, share: float) -> Tensor:
    return least_used(_axes(B).usage(B), _axes(C).usage(C), share)


def _state(layer: nn.Module, site: CallSite) -> StateHandle:
    """Build the handle on B, which writes to the state; the fused op gets the weights that give no B."""

    def reduced(call: Call, share: float) -> Arguments | None:
        k = call.kwargs
        if call.op == _FUSED:
            return None if k["xz"].shape[2] == 1 else (call.args, {**k, **_fused_without_b(k, share)})
        B, C = k["B"], k["C"]
        if is_decoding_step(call, k[_name_of_dt(call)].shape[2]):
            return None
        return call.args, {**k, "B": _axes(B).without(B, _least_used(B, C, share))}

    return StateHandle(without_placeholders(site, _FUSED), reduced)


def _fused_without_b(k: Mapping[str, Any], share: float) -> dict[str, Tensor]:
    """Return the arguments of the fused op that decide on B, with 0 where a state dimension is left out."""
    given = {name: value.float() if isinstance(value, Tensor) else value for name, value in k.items() if name != "xz"}
    channels, state = k["A"].shape
    x = _convolved(shifted(k["xz"][:_FEW, :channels].float(), k["conv1d_weight"].shape[-1]), given)
    B, C = _fused_b_and_c(x, given).values()
    left_out = _least_used(B, C, share)
    last = Axes(state=-1)
    if k["B"] is not None:
        return {"B": _axes(k["B"]).without(k["B"], left_out)}
    if k.get("b_rms_weight") is not None:
        return {"b_rms_weight": last.without(k["b_rms_weight"], left_out)}
    weight, rank = k["x_proj_weight"], k["delta_proj_weight"].shape[1]
    rows = F.pad(left_out[0], (rank, weight.shape[0] - rank - state), value=False)
    changed = {"x_proj_weight": weight.masked_fill(rows[:, None], 0.0)}
    if k.get("B_proj_bias") is not None:
        changed["B_proj_bias"] = last.without(k["B_proj_bias"], left_out)
    return changed


def own_code(call: Call) -> LazyOperator | None:
    """Read `x_proj`, whose output (batch, length, [dt | B | C]) a layer without an op scans in a loop."""
    layer: Any = call.layer
    batch, length = call.output.shape[:2]
    channels, state = layer.A_log.shape
    if length == 1:
        return None

    def form(samples: slice, heads: Sequence[int], length: int) -> Operator:
        given = {
            name: value.double() if isinstance(value, Tensor) else value for name, value in own_norms(layer).items()
        }
        low, *others = call.output[samples, :length].mT.double().tensor_split((-2 * state, -state), 1)
        dt = layer.dt_proj.weight.double() @ _normalized(low, "dt", given)
        named = zip(others, ("b", "c"), strict=True)
        b, c = (_by_state(_normalized(t, name, given), slice(None), heads, length, channels) for t, name in named)
        return scan_operator(heads, dt, -layer.A_log.double().exp(), layer.dt_proj.bias, b, c)

    return LazyOperator(batch, channels, length, form, forming_bytes=8 * channels)


def zamba(call: Call) -> LazyOperator | None:
    """Read Zamba's `in_proj`, whose output (batch, length, 2 channels) has x and gate of every channel side by side."""
    layer, projected = call.layer, call.output
    batch, length, channels = projected.shape[0], projected.shape[1], projected.shape[2] // 2
    if length == 1:
        return None
    mask = zeroed_by_mask(call, batch, length)

    def form(samples: slice, heads: Sequence[int], length: int) -> Operator:
        real = None if mask is None else mask[samples, :length]
        exact = {
            name: tensor.double()
            for name, tensor in layer.named_parameters()
            if not name.startswith(("in_proj", "out_proj"))
        }
        taps = shifted(projected[samples, :length, ::2].mT.double(), exact["conv1d.weight"].shape[-1])
        x = _activation(layer)(short_conv(taps, exact["conv1d.weight"], exact.get("conv1d.bias")))
        dt, *others = _zamba_inner(x if real is None else x * real[:, None], exact)
        b, c = (_by_state(t, slice(None), heads, length, channels) for t in others)
        A, bias = (-exact["A_log"].exp()).flatten(0, 1), exact["dt_proj_bias"].flatten()
        return scan_operator(heads, dt, A, bias, b, c)

    return LazyOperator(batch, channels, length, form, forming_bytes=_CONVOLVED_BYTES * channels)


def _zamba_inner(x: Tensor, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dt (batch, channels, length), and B and C (batch, heads, n, length). Every head has its own weights."""
    up, down = weights["x_proj_weight"], weights["dt_proj_weight"]
    by_head = x.reshape(x.shape[0], up.shape[0], -1, x.shape[2]).to(up.dtype)
    rank = down.shape[2]
    low, B, C = (up @ by_head).tensor_split((rank, (rank + up.shape[1]) // 2), 2)
    return (down @ low).flatten(1, 2), B, C


def _activation(layer: nn.Module) -> Any:
    return F.silu if getattr(layer, "activation", "silu") in ("silu", "swish") else layer.act


_ZAMBA_PARAMETERS = ("x_proj_weight", "dt_proj_weight", "dt_proj_bias", "A_log")


def _zamba_decay(layer: nn.Module, site: CallSite) -> DecayHandle | None:
    """Build the handle of the convolution's input and the parameters after it.

    Only the input is an argument of a call and is written back. The parameters' gradients are added all the same. A is
    raised by A_log, which is the layer's alpha.
    """
    spaces = tuple(s for s in names_used(type(layer)).get("causal_conv1d_fn", ()) if s.get("causal_conv1d_fn"))
    in_own_code = not spaces or why_without_kernels(layer, "causal_conv1d_fn") is not None
    convolution = CallSite("conv1d") if in_own_code else CallSite(ops=(Op("causal_conv1d_fn", spaces),))

    def read(call: Call) -> DecayInputs | None:
        if call.op:
            x, weight, bias = (call.kwargs[name] for name in (next(iter(call.kwargs)), "weight", "bias"))
        else:
            (x,), weight, bias = call.args, call.module.weight, call.module.bias
        if x.shape[2] == 1:
            return None
        *earlier, now = shifted(x, weight.shape[-1])
        taps = {"now": now} | {f"tap {i}": tap for i, tap in enumerate(earlier)}
        tap_names = (*tuple(taps)[1:], "now")

        def transition(given: dict[str, Tensor]) -> Transition:
            x = _activation(layer)(short_conv([given[n] for n in tap_names], given["weight"], given.get("bias")))
            dt, _, _ = _zamba_inner(x * given["real"][:, None] if "real" in given else x, given)
            A = -given["A_log"].float().exp()
            return scan_transition(dt, A.flatten(0, 1), given["dt_proj_bias"].flatten())

        own = dict(layer.named_parameters())
        inputs: dict[str, tuple[Tensor | None, int | None]] = {name: (tap, 2) for name, tap in taps.items()}
        inputs |= {name: (own[name], None) for name in _ZAMBA_PARAMETERS}
        inputs |= {
            "weight": (weight, None),
            "bias": (bias, None),
            "real": (zeroed_by_mask(call, x.shape[0], x.shape[2]), 1),
        }
        return named_inputs(inputs, transition)

    def write(call: Call, tensors: tuple[Tensor, ...]) -> Arguments:
        if not call.op:
            return tensors[:1], call.kwargs
        return call.args, {**call.kwargs, next(iter(call.kwargs)): tensors[0]}

    return DecayHandle(_ZAMBA_PARAMETERS, convolution, read, write)


_OPS = {_FUSED: fused, "mamba_selective_scan": scan, "selective_scan_fn": scan}
_CAPACITY = int_attribute("ssm_state_size", "d_state", "state_size")
_CHANNELS = int_attribute("intermediate_size", "d_inner")

ADAPTERS = (
    LayerAdapter(
        operator="DiagonalRecurrence",
        classes=r"transformers\..*\.ZambaMambaMixer",
        path="in_proj",
        build=zamba,
        state_capacity=_CAPACITY,
        channels=_CHANNELS,
        decay=_zamba_decay,
        alpha=alpha_of_a_log,
    ),
    LayerAdapter(
        operator="DiagonalRecurrence",
        ops=_OPS,
        state_capacity=_CAPACITY,
        channels=_CHANNELS,
        decay=_decay,
        alpha=alpha_of_a_log,
        state=_state,
        weights=of_mamba,
        refusal=lambda layer: why_without_kernels(layer, *_OPS),
    ),
    LayerAdapter(
        operator="DiagonalRecurrence",
        classes=r"transformers\w*\..*\.\w*MambaMixer",
        path="x_proj",
        build=own_code,
        is_member=has_own_loop,
        state_capacity=_CAPACITY,
        channels=_CHANNELS,
        decay=own_decay,
        alpha=alpha_of_a_log,
        weights=of_mamba,
    ),
)
