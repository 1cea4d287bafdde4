"""What the adapters share: reading a layer's attributes and the circumstances of a call."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ess_monitor.capture.handles import AlphaHandle
from ess_monitor.capture.hooks.call_site import Call, Op
from ess_monitor.capture.hooks.global_names import names_used

_STATES = ("initial_state", "recurrent_state", "initial_states")


def attribute(layer: nn.Module, *names: str) -> int | None:
    """The first of these attributes that the layer has, as an int; None without any."""
    for name in names:
        value = getattr(layer, name, None)
        if isinstance(value, int):
            return value
    return None


def configured(layer: nn.Module, *names: str) -> int | None:
    """The first of these attributes that the layer has, else that its `config` has, as an int; None without any."""
    found = attribute(layer, *names)
    if found is None:
        values = (getattr(getattr(layer, "config", None), name, None) for name in names)
        found = next((value for value in values if isinstance(value, int)), None)
    return found


def is_decoding(call: Call) -> bool:
    """Whether the call goes on from a cached state: its operator is not that of a whole sequence."""
    return any(call.kwargs.get(name) is not None for name in _STATES)


def real_tokens(call: Call, batch: int, length: int) -> Tensor | None:
    """(batch, length), 1 for a token and 0 for padding, where the layer was given such a mask; else None.

    Layers set the input of padding to 0. Leaving it out of T as well changes no output, and keeps tokens that carry
    nothing from counting as memory.
    """
    mask = call.layer_kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == (batch, length):
        return mask != 0
    return None


def shifted(x: Tensor, width: int, segments: Tensor | None = None) -> tuple[Tensor, ...]:
    """What each tap of a causal convolution meets: `width` tensors of x's shape, the last of them x itself.

    Unlike the convolution they can be cut along the sequence. Without segments their graph saves no tensor, so that it
    may be built inside an activation checkpoint that knows nothing of it.

    Args:
        x: (batch, channels, length).
        width: of the convolution.
        segments: (batch, length), the number of the packed sequence that a token belongs to: none sees another's.
    """
    length, before = x.shape[2], F.pad(x, (width - 1, 0))
    taps = [before[..., k : k + length] for k in range(width - 1)]
    if segments is not None:
        numbers = F.pad(segments, (width - 1, 0), value=-1)
        taps = [tap * (numbers[:, k : k + length] == segments)[:, None] for k, tap in enumerate(taps)]
    return (*taps, x)


def short_conv(taps: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    """The depthwise causal convolution in front of a recurrence, (batch, channels, length), before its activation.

    Args:
        taps: `shifted(x, width)`.
        weight: (channels, width) or (channels, 1, width); the last tap meets the current token.
        bias: (channels,) or None.
    """
    weight = weight.reshape(weight.shape[0], -1, 1)
    y = taps[0] * weight[:, 0]
    for k, tap in enumerate(taps[1:], 1):
        y = y + tap * weight[:, k]
    return y if bias is None else y + bias[:, None]


def segment_starts(segments: Tensor) -> Tensor:
    """(batch, length), True where a packed sequence other than the first begins: there the state starts anew."""
    return F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=False)


def is_placeholder(op: Op) -> bool:
    """Whether a function stands under this name only until a kernel is installed: it answers None, and the layer goes
    on to its next op. Asked with None for every argument, which a kernel refuses before it computes anything."""
    for namespace in op.namespaces:
        function = namespace[op.name]
        try:
            wanted = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
            nothing = [None for p in wanted if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
            with torch.no_grad():
                answer = function(*nothing)
        except Exception:
            return False
        if answer is not None:
            return False
    return True


def why_without_kernels(layer: nn.Module, *ops: str) -> str | None:
    """Why this layer does not call the ops that its code names: older layers call them only where a package with
    kernels is installed and the model is on an accelerator, and compute in code of their own elsewhere."""
    used = names_used(type(layer))
    there = any(space.get(name) is not None for name in ops for space in used.get(name, ()))
    switches = [space.get("is_fast_path_available", True) for space in used.get("is_fast_path_available", ())]
    on_device = all(p.device.type == "cuda" for p in layer.parameters())
    if there and (not switches or (all(switches) and on_device)):
        return None
    return (
        f"{type(layer).__name__} calls its scan ({', '.join(name for name in ops if name in used)}) only with the "
        "kernels of mamba_ssm installed and the model on an accelerator; elsewhere no operator can be read"
    )


def alpha_of_a_log(layer: nn.Module) -> AlphaHandle | None:
    """The alpha of a layer whose decay is -exp(A_log) times what the input decides; None without an A_log."""
    return AlphaHandle("A_log", 1.0) if hasattr(layer, "A_log") else None
