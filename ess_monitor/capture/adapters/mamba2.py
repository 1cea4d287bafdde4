"""Mamba-2's scalar recurrence, in transformers, mamba_ssm and fla, and in every other layer that calls the same ops.

In transformers: Mamba2, Bamba, GraniteMoeHybrid, Zamba2, FalconH1, NemotronH. Per head h:
Delta = clamp(softplus(dt + bias), limits), A_t = exp(Delta_t A) times the identity, input Delta_t B_t, read C_t. Groups
of heads share B and C; TSS is the state size n. All channels of a head have one T. Convolution, gate and norm are
outside of T; D u lies on its diagonal.

The scan's own op has all of this among its arguments. The fused op gets the input of the convolution, and B and C are
computed again, for the selected part. fla's layer, and those of transformers before 5.15, call an op on an
accelerator only; elsewhere they are read at `in_proj`, from whose output everything is computed.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ess_monitor.capture.adapters.layer_attributes import existing, int_attribute, is_decoding_step, zeroed_by_mask
from ess_monitor.capture.adapters.selective_scan import (
    alpha_of_a_log,
    projected_decay,
    scan_operator,
    scan_transition,
    segment_starts,
    shifted,
    short_conv,
    step_size,
    why_without_kernels,
    without_placeholders,
)
from ess_monitor.capture.adapters.state_weights import of_mamba2
from ess_monitor.capture.handles import (
    STRONGEST_RATE,
    Axes,
    DecayHandle,
    DecayInputs,
    StateHandle,
    Transition,
    least_used,
    named_inputs,
    raised_rate,
    write_arguments,
)
from ess_monitor.capture.hooks.call_site import Arguments, Call, CallSite
from ess_monitor.capture.layer_adapter import LayerAdapter
from ess_monitor.capture.spec import LazyOperator
from ess_monitor.errors import CaptureError
from ess_monitor.ess import Operator
from ess_monitor.ess.linalg import index_tensor


class _Projection(NamedTuple):
    """Splits the last dimension of the projected input: [feed-forward | gate | x, B, C | dt]."""

    inner: int
    """Channels of x: heads times their width."""
    groups: int
    state: int
    heads: int

    def dt(self, projected: Tensor) -> Tensor:
        """(batch, heads, length)."""
        return projected[..., projected.shape[-1] - self.heads :].mT

    def b_and_c(
        self,
        projected: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: Callable[[Tensor], Tensor] | None,
        *,
        real: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute B and C, (batch, length, groups, n) each, by the convolution of x, B and C, in float64."""
        stop = projected.shape[-1] - self.heads
        size = 2 * self.groups * self.state
        few = projected[..., stop - size : stop].mT.double()  # each channel has a convolution of its own
        if real is not None:
            few = few * real[:, None]
        taps = shifted(few, weight.shape[-1], segments)
        convolved = short_conv(taps, weight[-size:].double(), None if bias is None else bias[-size:].double())
        if activation is not None:
            convolved = activation(convolved)
        both = convolved.mT
        both = both.reshape(*both.shape[:2], 2 * self.groups, self.state)
        return both[:, :, : self.groups], both[:, :, self.groups :]


def chunk_scan(call: Call) -> LazyOperator | None:
    """Read `mamba2_chunk_scan(hidden_states, dt, A, B, C, ...)`, `mamba_chunk_scan_combined(x, dt, A, B, C, ...)`."""
    dt, A, B, C, bias = (call.kwargs[name] for name in ("dt", "A", "B", "C", "dt_bias"))
    batch, length, channels = dt.shape
    if is_decoding_step(call, length):
        return None
    softplus, limits = bool(call.kwargs["dt_softplus"]), call.kwargs["dt_limit"]
    sequences = call.kwargs.get("seq_idx")

    def form(samples: slice, heads: Sequence[int], length: int) -> Operator:
        b, c = (_by_head(tensor[samples, :length], heads, channels) for tensor in (B, C))
        segments = None if sequences is None else sequences[samples, :length]
        few = dt[samples, :length].mT
        return scan_operator(heads, few, A, bias, b, c, softplus=softplus, limits=limits, segments=segments)

    return LazyOperator(batch, channels, length, form)


def fused(call: Call) -> LazyOperator | None:
    """Read `mamba2_split_conv1d_scan_combined(zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, ...)`.

    mamba_ssm has the same op as `mamba_split_conv1d_scan_combined`.
    """
    k = call.kwargs
    projected, weight, conv_bias, bias, A, _ = (k[name] for name in list(k)[:6])
    batch, length = projected.shape[:2]
    if call.output is None or is_decoding_step(
        call, length
    ):  # None: a placeholder of the kernel; the scan is called next
        return None
    projection, sequences, limits = _fused_projection(call), k.get("seq_idx"), k["dt_limit"]
    activation = None if k["activation"] is None else F.silu

    def form(samples: slice, heads: Sequence[int], length: int) -> Operator:
        few, segments = projected[samples, :length], None if sequences is None else sequences[samples, :length]
        both = projection.b_and_c(few, weight, conv_bias, activation, segments=segments)
        b, c = (_by_head(tensor, heads, projection.heads) for tensor in both)
        return scan_operator(heads, projection.dt(few), A, bias, b, c, limits=limits, segments=segments)

    return LazyOperator(batch, projection.heads, length, form)


def _fused_projection(call: Call) -> _Projection:
    _, weight, _, _, A, D = list(call.kwargs.values())[:6]
    heads, groups = A.shape[0], call.kwargs["ngroups"]
    inner = heads * (D.shape[1] if D.dim() == 2 else call.kwargs["headdim"])
    return _Projection(inner, groups, (weight.shape[0] - inner) // (2 * groups), heads)


def _by_head(tensor: Tensor, heads: Sequence[int], channels: int, *, tiled: bool = False) -> Tensor:
    """(batch, length, groups, n) to (batch, heads|1, length, n): neighboring heads share a group, or if `tiled` those
    that are `groups` apart."""
    groups, tensor = tensor.shape[2], tensor.transpose(1, 2)
    if groups > 1:
        of_heads = [head % groups if tiled else head * groups // channels for head in heads]
        tensor = tensor.index_select(1, index_tensor(of_heads, tensor.device))
    return tensor.double()


def _decay(layer: nn.Module, site: CallSite) -> DecayHandle | None:
    """Build the handle of dt, A and the bias of dt, which determine A_t; dt is not convolved."""

    def read(call: Call) -> DecayInputs | None:
        k = call.kwargs
        source, segments = k[_name_of_dt(call)], k.get("seq_idx")
        if is_decoding_step(call, source.shape[1]):
            return None
        if call.op in _FUSED:
            (_, _, state, heads), softplus = _fused_projection(call), True
        else:
            heads, state, softplus = source.shape[2], k["B"].shape[3], bool(k["dt_softplus"])
        limits = k["dt_limit"]

        def transition(given: dict[str, Tensor]) -> Transition:
            dt, A, bias, starts = given["source"][..., -heads:].mT, given["A"], given.get("bias"), given.get("starts")
            return scan_transition(dt, A, bias, starts, softplus=softplus, limits=limits, state_size=state)

        starts = None if segments is None else segment_starts(segments)
        inputs = {"source": (source, 1), "A": (k["A"], None), "bias": (k["dt_bias"], None), "starts": (starts, 1)}
        return named_inputs(inputs, transition)

    return DecayHandle(
        existing(layer, "in_proj", "dt_bias", "A_log"),
        without_placeholders(site, *_FUSED),
        read,
        write_arguments(lambda call: (_name_of_dt(call), "A", "dt_bias")),
        lambda call, power: None if read(call) is None else _raised(call, power),
    )


_LARGEST_SUM = 2.0**22
"""Limit of -log A summed over a chunk, with A = 0. The ops compute exp of differences of such sums, which float32
rounds to 0.5 here; much larger sums would be rounded by so much that exp overflows."""


def _raised(call: Call, power: float) -> Arguments:
    """Return the arguments with another A. dt stays: the input is multiplied with it as well.

    A = 0 is a rate at which tokens with a mean dt have log A = -2^22 / chunk_size, about -16000, and those with a
    thousandth of it still -16.
    """
    k = call.kwargs
    if not math.isinf(power):
        return call.args, {**k, "A": raised_rate(k["A"], power)}
    heads, fused = k["A"].shape[0], call.op in _FUSED
    dt = k[_name_of_dt(call)][..., -heads:].mT.float()
    delta = step_size(dt, k["dt_bias"], True if fused else bool(k["dt_softplus"]), k["dt_limit"])[..., 0]
    by_chunk = F.pad(delta, (0, -delta.shape[2] % k["chunk_size"])).reshape(delta.shape[0], heads, -1, k["chunk_size"])
    sums = by_chunk.sum(3).amax((0, 2))
    rate = (_LARGEST_SUM / sums).clamp(max=STRONGEST_RATE)
    return call.args, {**k, "A": torch.minimum(k["A"], -rate.to(k["A"].dtype))}


def _name_of_dt(call: Call) -> str:
    """Return the argument that dt is, or is the last part of."""
    return next(iter(call.kwargs)) if call.op in _FUSED else "dt"


_AXES = Axes(state=3, heads=2)
_FEW = 4
"""Sequences of which B and C are computed to see how much a state dimension is used."""


def _state(layer: nn.Module, site: CallSite) -> StateHandle:
    """Build the handle on B, which writes to the state; the fused op convolves no B."""

    def reduced(call: Call, share: float) -> Arguments | None:
        k = call.kwargs
        if is_decoding_step(call, k[_name_of_dt(call)].shape[1]):
            return None
        if call.op not in _FUSED:
            left_out = least_used(_AXES.usage(k["B"]), _AXES.usage(k["C"]), share)
            return call.args, {**k, "B": _AXES.without(k["B"], left_out)}
        projected, *names = list(k)[:3]
        weight, bias = (k[name] for name in names)
        projection, activation = _fused_projection(call), None if k["activation"] is None else F.silu
        B, C = projection.b_and_c(k[projected][:_FEW], weight, bias, activation)
        left_out = least_used(_AXES.usage(B), _AXES.usage(C), share).flatten()
        rows = F.pad(left_out, (projection.inner, len(left_out)), value=False)
        changed = {
            name: k[name].masked_fill(rows.reshape(-1, *[1] * (k[name].dim() - 1)), 0.0)
            for name in names
            if k[name] is not None
        }
        return call.args, {**k, **changed}

    return StateHandle(without_placeholders(site, *_FUSED), reduced)


def projection_of_own_code(call: Call) -> LazyOperator | None:
    """Read `in_proj` of a layer without an op: its output is (batch, length, [feed-forward | gate | x, B, C | dt])."""
    layer: Any = call.layer
    batch, length = call.output.shape[:2]
    if length == 1:
        return None
    if length > layer.chunk_size and "states_permuted" in _own_code(layer).co_varnames:
        raise CaptureError(
            f"this version of {type(layer).__name__}, without kernels, passes on another state between chunks of "
            f"{layer.chunk_size} tokens than its recurrence has; use transformers>=5.15, or a chunk_size of at least "
            f"{length}"
        )
    projection = _Projection(layer.intermediate_size, layer.n_groups, layer.ssm_state_size, layer.num_heads)
    activation = F.silu if layer.activation in ("silu", "swish") else layer.act
    is_fla = _is_fla(layer)
    mask = zeroed_by_mask(call, batch, length) if is_fla else None  # elsewhere in_proj does not get padding

    def form(samples: slice, heads: Sequence[int], length: int) -> Operator:
        few, real = call.output[samples, :length], None if mask is None else mask[samples, :length]
        if hasattr(layer, "mup_vector"):  # FalconH1: a factor for each part
            few = few * layer.mup_vector
        both = projection.b_and_c(few, layer.conv1d.weight, layer.conv1d.bias, activation, real=real)
        # This code of fla's gives neighboring heads different groups; its kernels give them the same.
        b, c = (_by_head(tensor, heads, projection.heads, tiled=is_fla) for tensor in both)
        A = -layer.A_log.double().exp()
        return scan_operator(heads, projection.dt(few), A, layer.dt_bias, b, c, limits=_limits_of(layer))

    forming_bytes = 4 * call.output.shape[2] if hasattr(layer, "mup_vector") else 0
    return LazyOperator(batch, projection.heads, length, form, forming_bytes=forming_bytes)


def _is_fla(layer: nn.Module) -> bool:
    return any(cls.__module__.startswith("fla.") for cls in type(layer).__mro__)


def _limits_of(layer: Any) -> tuple[float, float]:
    """Return the bounds of Delta that the layer's own code applies."""
    if hasattr(layer, "dt_limit"):
        return (*layer.dt_limit,)
    is_bounded_above = "time_step_limit" in _own_code(layer).co_names
    return (*layer.time_step_limit,) if is_bounded_above else (layer.time_step_min, math.inf)


def _own_code(layer: Any) -> CodeType:
    code: CodeType = inspect.unwrap(type(layer).torch_forward).__code__
    return code


def _decay_of_own_code(layer: nn.Module, site: CallSite) -> DecayHandle:
    """Build the handle of the input of `in_proj` and the layer's parameters."""
    own: Any = layer

    def parameters() -> dict[str, Tensor | None]:
        projection = own.in_proj
        return {"weight": projection.weight, "A_log": own.A_log, "dt_bias": own.dt_bias, "bias": projection.bias}

    def transition(given: dict[str, Tensor]) -> Transition:
        last = slice(-own.num_heads, None)
        factor = own.mup_vector[..., last] if hasattr(own, "mup_vector") else 1.0
        bias = given["bias"][last].float() if "bias" in given else None
        dt = (F.linear(given["x"].float(), given["weight"][last].float(), bias) * factor).mT
        A = -given["A_log"].float().exp()
        return scan_transition(dt, A, given["dt_bias"], limits=_limits_of(own), state_size=own.ssm_state_size)

    return projected_decay(("in_proj", "dt_bias", "A_log"), site, parameters, transition)


_FUSED = ("mamba2_split_conv1d_scan_combined", "mamba_split_conv1d_scan_combined")
_OPS = {
    **dict.fromkeys(_FUSED, fused),
    "mamba2_chunk_scan": chunk_scan,
    "mamba_chunk_scan_combined": chunk_scan,
}


_CAPACITY = int_attribute("ssm_state_size", "d_state")
_CHANNELS = int_attribute("num_heads", "nheads")

ADAPTERS = (
    LayerAdapter(
        operator="DiagonalRecurrence",
        ops=_OPS,
        state_capacity=_CAPACITY,
        channels=_CHANNELS,
        decay=_decay,
        alpha=alpha_of_a_log,
        state=_state,
        weights=of_mamba2,
        refusal=lambda layer: why_without_kernels(layer, *_OPS),
    ),
    LayerAdapter(
        operator="DiagonalRecurrence",
        classes=r"fla\.layers\.mamba2\.Mamba2|transformers\w*\..*\.(\w*Mamba\w*|Bamba|FalconH1)(Mixer|Layer)",
        path="in_proj",
        build=projection_of_own_code,
        is_member=lambda layer: hasattr(layer, "torch_forward") and hasattr(layer, "dt_bias"),
        state_capacity=_CAPACITY,
        channels=_CHANNELS,
        decay=_decay_of_own_code,
        alpha=alpha_of_a_log,
        weights=of_mamba2,
    ),
)
