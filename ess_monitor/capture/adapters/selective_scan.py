"""Compute a selective scan's operator and transition, for Mamba and Mamba-2."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ess_monitor.capture.handles import AlphaHandle, DecayHandle, DecayInputs, Transition, named_inputs
from ess_monitor.capture.hooks.call_site import Arguments, Call, CallSite, Op
from ess_monitor.capture.hooks.global_names import names_used
from ess_monitor.ess import DiagonalRecurrence, Operator
from ess_monitor.ess.operators.fields import take


def step_size(dt: Tensor, bias: Tensor | None, softplus: bool, limits: tuple[float, float] | None) -> Tensor:
    """Compute Delta, (batch, heads, length, 1), from dt (batch, heads, length)."""
    if bias is not None:
        dt = dt + bias[:, None]
    delta = F.softplus(dt) if softplus else dt
    return (delta if limits is None else delta.clamp(*limits))[..., None]


def _log_decay(delta: Tensor, A: Tensor, starts: Tensor | None) -> Tensor:
    """Compute log A_t, (batch, heads, length, state|1); -inf at the first token of a packed sequence."""
    log_decay = delta * A.reshape(len(A), 1, -1)
    return log_decay if starts is None else log_decay.masked_fill(starts[:, None, :, None], -torch.inf)


def scan_operator(
    heads: Sequence[int],
    dt: Tensor,
    A: Tensor,
    bias: Tensor | None,
    b: Tensor,
    c: Tensor,
    *,
    softplus: bool = True,
    limits: tuple[float, float] | None = None,
    segments: Tensor | None = None,
) -> Operator:
    """Build the operator of some heads (Mamba-2) or channels (Mamba) of a selective scan, in float64.

    dt (batch, heads, length), A (heads,) or (heads, state) and the bias of dt (heads,) are those of all heads; b and c
    (batch, heads|1, length, state) those of the selected ones. `limits` are the bounds of Delta, and `segments` (batch,
    length) the number of a token's packed sequence, at whose begin the op forgets everything.
    """
    few_bias = None if bias is None else take(bias, 0, heads).double()
    delta = step_size(take(dt, 1, heads).double(), few_bias, softplus, limits)
    b = b * delta
    starts = None if segments is None else segment_starts(segments)
    return DiagonalRecurrence(_log_decay(delta, take(A, 0, heads).double(), starts), b, c)


def scan_transition(
    dt: Tensor,
    A: Tensor,
    bias: Tensor | None,
    starts: Tensor | None = None,
    *,
    softplus: bool = True,
    limits: tuple[float, float] | None = None,
    state_size: int | None = None,
) -> Transition:
    """Compute A_t of a selective scan in float32, with its graph. Shapes as in `scan_operator`."""
    delta = step_size(dt.float(), None if bias is None else bias.float(), softplus, limits)
    return Transition(_log_decay(delta, A.float(), starts), state_size=state_size)


def shifted(x: Tensor, width: int, segments: Tensor | None = None) -> tuple[Tensor, ...]:
    """Return the input of each tap of a causal convolution: `width` tensors of x's shape, the last of them x itself.

    Unlike the convolution of x, (batch, channels, length), they can be cut along the sequence. Packed sequences, by
    their numbers in `segments`, do not see each other. Without segments the graph of the copies saves no tensor, so
    that it may be built inside any activation checkpoint.
    """
    length, before = x.shape[2], F.pad(x, (width - 1, 0))
    taps = [before[..., k : k + length] for k in range(width - 1)]
    if segments is not None:
        numbers = F.pad(segments, (width - 1, 0), value=-1)
        taps = [tap * (numbers[:, k : k + length] == segments)[:, None] for k, tap in enumerate(taps)]
    return (*taps, x)


def short_conv(taps: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute a depthwise causal convolution, (batch, channels, length), from `shifted(x, width)`.

    The weight is (channels, width) or (channels, 1, width); its last tap meets the current token.
    """
    weight = weight.reshape(weight.shape[0], -1, 1)
    y = taps[0] * weight[:, 0]
    for k, tap in enumerate(taps[1:], 1):
        y = y + tap * weight[:, k]
    return y if bias is None else y + bias[:, None]


def segment_starts(segments: Tensor) -> Tensor:
    """Return where packed sequences other than the first begin, (batch, length): there the state starts anew."""
    return F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=False)


def without_placeholders(site: CallSite, *names: str) -> CallSite:
    """Return the site without those ops of `names` that are placeholders."""
    return CallSite(ops=tuple(op for op in site.ops if op.name not in names or not _is_placeholder(op)))


def _is_placeholder(op: Op) -> bool:
    """Return whether a function stands under this name only until a kernel is installed.

    It then returns None, and the layer calls its next op. Tried with None for every argument, which a kernel refuses
    before it computes anything.
    """
    for namespace in op.namespaces:
        function = namespace[op.name]
        try:
            required = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
            nothing = [None for p in required if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
            with torch.no_grad():
                if function(*nothing) is not None:
                    return False
        except Exception:
            return False
    return True


def why_without_kernels(layer: nn.Module, *ops: str) -> str | None:
    """Return why this layer does not call the ops that its code names; None when it does.

    Older layers call them only where a package with kernels is installed and the model is on an accelerator. Elsewhere
    they compute in code of their own.
    """
    used = names_used(type(layer))
    is_there = any(space.get(name) is not None for name in ops for space in used.get(name, ()))
    switches = [space.get("is_fast_path_available", True) for space in used.get("is_fast_path_available", ())]
    has_own_code = bool(switches) or hasattr(type(layer), "cuda_kernels_forward")
    on_device = all(p.device.type == "cuda" for p in layer.parameters())
    if is_there and (not has_own_code or (all(switches) and on_device)):
        return None
    return (
        f"{type(layer).__name__} calls its scan ({', '.join(name for name in ops if name in used)}) only with the "
        "kernels of mamba_ssm installed and the model on an accelerator; elsewhere no operator can be read"
    )


def alpha_of_a_log(layer: nn.Module) -> AlphaHandle | None:
    """Return the alpha of a layer whose decay is -exp(A_log) times a function of the input; None without an A_log."""
    return AlphaHandle("A_log", 1.0) if hasattr(layer, "A_log") else None


def own_norms(layer: Any) -> dict[str, Any]:
    """Return the norms that a layer applies to dt, B and C, by the names of the fused op's arguments."""
    names, state = ("dt", "b", "c"), layer.A_log.shape[1]
    if hasattr(layer, "rms_eps"):  # FalconMamba: without weights
        sizes = (layer.x_proj.out_features - 2 * state, state, state)
        ones = {f"{name}_rms_weight": layer.A_log.new_ones(size) for name, size in zip(names, sizes, strict=True)}
        return {**ones, "b_c_dt_rms_eps": layer.rms_eps}
    if not hasattr(layer, "dt_layernorm"):
        return {}
    norms = {name: getattr(layer, f"{name}_layernorm") for name in names}  # Jamba
    weights = {f"{name}_rms_weight": norm.weight for name, norm in norms.items()}
    return {**weights, "b_c_dt_rms_eps": layer.dt_layernorm.variance_epsilon}


def has_own_loop(layer: nn.Module) -> bool:
    return all(hasattr(layer, name) for name in ("slow_forward", "x_proj", "dt_proj", "A_log"))


def own_decay(layer: nn.Module, site: CallSite) -> DecayHandle:
    """Build the handle of the input of `dt_proj`, its parameters, and A."""
    own: Any = layer

    def parameters() -> dict[str, Tensor | None]:
        return {"weight": own.dt_proj.weight, "bias": own.dt_proj.bias, "A_log": own.A_log}

    def transition(given: dict[str, Tensor]) -> Transition:
        dt = F.linear(given["x"].float(), given["weight"].float()).mT
        return scan_transition(dt, -given["A_log"].float().exp(), given.get("bias"))

    return projected_decay(("x_proj", "dt_proj", "A_log"), CallSite("dt_proj"), parameters, transition)


def projected_decay(
    names: tuple[str, ...],
    site: CallSite,
    parameters: Callable[[], dict[str, Tensor | None]],
    transition: Callable[[dict[str, Tensor]], Transition],
) -> DecayHandle:
    """Build the handle of the input "x" of a projection and of the layer's parameters.

    Only the input is an argument of a call and is written back. The parameters' gradients are added all the same. A is
    raised by A_log, which is the layer's alpha.
    """

    def read(call: Call) -> DecayInputs | None:
        x = call.args[0]
        if x.shape[1] == 1:
            return None
        own = {name: (parameter, None) for name, parameter in parameters().items()}
        return named_inputs({"x": (x, 1), **own}, transition)

    def write(call: Call, tensors: tuple[Tensor, ...]) -> Arguments:
        return (tensors[0], *call.args[1:]), call.kwargs

    return DecayHandle(names, site, read, write)
