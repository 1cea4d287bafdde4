"""Causal convolutions: torch's Conv1d in anybody's code, and the gated short convolutions of LFM2.

A Conv1d is causal when it is padded by all that its kernel reaches back and the caller drops the tail, or not at all
and the caller pads on the left. It is a filter for every channel (depthwise) or one for every group of channels; then T
is block Toeplitz, and no longer than needed: H_i of a filter with K taps is 0 but for K - 1 tokens to either side of i,
so that 2 (K - 1) tokens say all about it.

Short filters hold their last K - 1 inputs by construction: they are measured, and not diagnosed. What a long one
holds is learnt.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

from torch import Tensor, nn

from ess_monitor.capture.hooks.call_site import Call
from ess_monitor.capture.layer_adapter import FAMILIES, LayerAdapter
from ess_monitor.capture.spec import LazyOperator
from ess_monitor.ess import Convolution, DenseOperator, GatedConvolution, Operator
from ess_monitor.ess.operators.fields import take

_CONV1D = r"torch\.nn\.modules\.conv\.Conv1d"

_LARGEST_BLOCK = 1024
"""Rows of H_i of a filter across channels, (K - 1) * channels: its singular values cost the third power."""

_LONG = 64
"""Tokens back. A filter that reaches that far is somebody's memory, and what it holds depends on what it has learnt."""

_SHORT = "a short filter holds as many inputs as it has taps, whatever it has learnt"


def reach(conv: nn.Conv1d) -> int:
    """How many tokens back the last tap is."""
    return (conv.kernel_size[0] - 1) * conv.dilation[0]


def impulse_response(conv: nn.Conv1d) -> Tensor:
    """(out channels, in channels of a group, reach + 1): what follows an input, current token first.

    >>> conv = nn.Conv1d(1, 1, 2, dilation=2, bias=False)
    >>> _ = conv.weight.data.copy_(nn.Parameter(conv.weight.new_tensor([[[5.0, 7.0]]])))
    >>> impulse_response(conv)  # the last weight meets the current token
    tensor([[[7., 0., 5.]]])
    """
    taps = conv.weight.detach().flip(2)
    response = taps.new_zeros((*taps.shape[:2], reach(conv) + 1))
    response[..., :: conv.dilation[0]] = taps
    return response


def depthwise(call: Call) -> Operator | None:
    """T_ij = kernel[i - j] for every channel."""
    conv, length = _called(call)
    return None if length < 2 else Convolution(impulse_response(conv).transpose(0, 1), length)


def across_channels(call: Call) -> LazyOperator | None:
    """Block (i, j) of T is the matrix that the kernel has for i - j."""
    conv, length = _called(call)
    if length < 2:
        return None
    tokens, groups, size = min(length, 2 * reach(conv)), conv.groups, conv.in_channels // conv.groups

    def form(samples: slice, chosen: Sequence[int], length: int) -> Operator:
        response = take(impulse_response(conv).reshape(groups, -1, size, reach(conv) + 1), 0, chosen)
        T = response.new_zeros((len(chosen), length, size, length, size))
        for lag in range(min(length, response.shape[3])):
            T.diagonal(-lag, 1, 3).copy_(response[..., lag, None])
        return DenseOperator(T.flatten(3, 4).flatten(1, 2), size)

    return LazyOperator(1, groups, tokens, form)


def _called(call: Call) -> tuple[nn.Conv1d, int]:
    """The layer and the number of its outputs that belong to tokens."""
    conv = cast(nn.Conv1d, call.module)
    return conv, call.output.shape[-1] - _padding(conv)


def _padding(conv: nn.Conv1d) -> int:
    """On either side; -1 for a padding that keeps the length."""
    if isinstance(conv.padding, str):
        return 0 if conv.padding == "valid" else -1
    return conv.padding[0]


def _is_filter(layer: nn.Module, *, depthwise: bool, long: bool) -> bool:
    """More than one tap, and torch's own way to apply them: a sub-class may take its input in another layout."""
    if not isinstance(layer, nn.Conv1d) or type(layer).forward is not nn.Conv1d.forward:
        return False
    if layer.kernel_size[0] == 1:
        return False
    return (layer.groups == layer.in_channels) == depthwise and (reach(layer) >= _LONG) == long


def _refuses(layer: nn.Module) -> str | None:
    conv = cast(nn.Conv1d, layer)
    back = reach(conv)
    if conv.stride[0] != 1:
        return f"stride {conv.stride[0]}: its outputs are fewer than its inputs, so T is not square"
    if conv.padding_mode != "zeros" and _padding(conv) != 0:
        return f"padding_mode {conv.padding_mode!r} lets tokens to come, or the first one many times, into an output"
    if _padding(conv) not in (0, back):
        return (
            f"padding {conv.padding if isinstance(conv.padding, str) else conv.padding[0]}: it looks at tokens to "
            f"come; a causal filter that reaches {back} tokens back is padded by {back} and cropped, or by 0 behind "
            "a padding on the left"
        )
    if conv.groups != conv.in_channels:
        if conv.in_channels != conv.out_channels:
            return f"{conv.in_channels} channels become {conv.out_channels}, so T has no square blocks"
        rows = back * conv.in_channels // conv.groups
        if rows > _LARGEST_BLOCK:
            return (
                f"its H_i has {rows} rows, (taps - 1) * channels of a group; the singular values of more than "
                f"{_LARGEST_BLOCK} would cost too much"
            )
    return None


def short_conv(call: Call) -> Operator | None:
    """`in_proj` of an LFM2 short convolution: y = C (kernel * (B x)) with B, C and x side by side in its output."""
    if call.output.shape[1] == 1:
        return None
    b, c, _ = call.output.transpose(1, 2).chunk(3, 1)
    return GatedConvolution(b, impulse_response(_conv(call.layer)).transpose(0, 1), c)


def _conv(layer: nn.Module) -> nn.Conv1d:
    return cast(nn.Conv1d, layer.conv)


FAMILIES.append(
    LayerAdapter(
        operator="GatedConvolution",
        classes=r".*\.Lfm\w*ShortConv",
        path="in_proj",
        build=short_conv,
        state_capacity=lambda layer: reach(_conv(layer)),
        channels=lambda layer: _conv(layer).out_channels,
        uninformative=_SHORT,
    )
)
for _long in (False, True):
    FAMILIES.append(
        LayerAdapter(
            operator="Convolution",
            classes=_CONV1D,
            build=depthwise,
            only=partial(_is_filter, depthwise=True, long=_long),
            state_capacity=lambda layer: reach(cast(nn.Conv1d, layer)),
            channels=lambda layer: cast(nn.Conv1d, layer).out_channels,
            refuses=_refuses,
            uninformative="" if _long else _SHORT,
        )
    )
    FAMILIES.append(
        LayerAdapter(
            operator="DenseOperator",
            classes=_CONV1D,
            build=across_channels,
            only=partial(_is_filter, depthwise=False, long=_long),
            capacity_grows=True,
            channels=lambda layer: cast(nn.Conv1d, layer).groups,
            refuses=_refuses,
            uninformative="" if _long else _SHORT,
        )
    )
