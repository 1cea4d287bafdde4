"""Read a layer's attributes and the circumstances of a call, for several adapters."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ess_monitor.capture.handles import AlphaHandle
from ess_monitor.capture.hooks.call_site import Call, CallSite, Op
from ess_monitor.capture.hooks.global_names import names_used

_STATES = ("initial_state", "recurrent_state", "initial_states")


def attribute(layer: object, *names: str) -> int | None:
    """Return the first of these attributes that the layer has as an int; None without any."""
    values = (getattr(layer, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def configured(layer: nn.Module, *names: str) -> int | None:
    """Return the first of these attributes that the layer, or else its `config`, has as an int; None without any."""
    found = attribute(layer, *names)
    return attribute(getattr(layer, "config", None), *names) if found is None else found


def existing(layer: nn.Module, *names: str) -> tuple[str, ...]:
    """Return those of `names` that the layer has as attributes."""
    return tuple(name for name in names if hasattr(layer, name))


def is_decoding_step(call: Call, length: int) -> bool:
    """Return whether the call continues from a cached state: its operator is not that of a whole sequence."""
    return length == 1 or any(call.kwargs.get(name) is not None for name in _STATES)


def real_tokens(call: Call, batch: int, length: int) -> Tensor | None:
    """Return the mask that the layer was given, (batch, length), False for padding; None without one.

    Layers set the input of padding to 0. Leaving it out of T as well changes no output, and keeps tokens that carry
    nothing from counting as memory.
    """
    mask = call.layer_kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == (batch, length):
        return mask != 0
    return None


def by_channel(tensor: Tensor) -> Tensor:
    """(batch, length, channels) -> (batch, channels, length, 1)."""
    return tensor.transpose(1, 2)[..., None]


def shifted(x: Tensor, width: int, segments: Tensor | None = None) -> tuple[Tensor, ...]:
    """Return the input of each tap of a causal convolution: `width` tensors of x's shape, the last of them x itself.

    Unlike the convolution they can be cut along the sequence. Without segments their graph saves no tensor, so that it
    may be built inside any activation checkpoint.

    Args:
        x: (batch, channels, length).
        width: of the convolution.
        segments: (batch, length), the number of a token's packed sequence. No sequence sees another one's tokens.
    """
    length, before = x.shape[2], F.pad(x, (width - 1, 0))
    taps = [before[..., k : k + length] for k in range(width - 1)]
    if segments is not None:
        numbers = F.pad(segments, (width - 1, 0), value=-1)
        taps = [tap * (numbers[:, k : k + length] == segments)[:, None] for k, tap in enumerate(taps)]
    return (*taps, x)


def short_conv(taps: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the depthwise causal convolution in front of a recurrence, (batch, channels, length).

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
    on_device = all(p.device.type == "cuda" for p in layer.parameters())
    if is_there and (not switches or (all(switches) and on_device)):
        return None
    return (
        f"{type(layer).__name__} calls its scan ({', '.join(name for name in ops if name in used)}) only with the "
        "kernels of mamba_ssm installed and the model on an accelerator; elsewhere no operator can be read"
    )


def alpha_of_a_log(layer: nn.Module) -> AlphaHandle | None:
    """Return the alpha of a layer whose decay is -exp(A_log) times a function of the input; None without an A_log."""
    return AlphaHandle("A_log", 1.0) if hasattr(layer, "A_log") else None
