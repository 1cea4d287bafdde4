"""Causal convolutions: torch's Conv1d in any layer's code, and the gated short convolutions of LFM2.

A Conv1d is causal in two cases: it is padded by all that its kernel reaches back and the caller drops the tail, or it
is not padded and the caller pads on the left; its input shows the second. It is a filter per channel (depthwise) or per
group of channels. In a group T is block Toeplitz, and is built no longer than needed: H_i of a filter with K taps is 0
except for K - 1 tokens to either side of i, so that 2 (K - 1) tokens determine it.

Short filters hold their last K - 1 inputs by construction: they are measured, and not diagnosed. What a long filter
holds is learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from ess_monitor.capture.causality.claims import require, unproven
from ess_monitor.capture.hooks.call_site import Call
from ess_monitor.capture.layer_adapter import LayerAdapter
from ess_monitor.capture.spec import LazyOperator
from ess_monitor.ess import Convolution, DenseOperator, GatedConvolution, Operator
from ess_monitor.ess.operators.fields import take

_CONV1D = r"torch\.nn\.modules\.conv\.Conv1d"

_LARGEST_BLOCK = 1024
"""Rows of H_i of a filter across channels, (K - 1) * channels. Its singular values cost the third power of them."""

_LONG_TOKENS = 64
"""A filter that reaches that far back is used as a memory, and what it holds depends on what it has learned."""

_SHORT = "a short filter holds as many inputs as it has taps, whatever it has learned"


def reach(conv: nn.Conv1d) -> int:
    """Return how many tokens back the last tap is."""
    return (conv.kernel_size[0] - 1) * conv.dilation[0]


def impulse_response(conv: nn.Conv1d) -> Tensor:
    """Return the response to one input, (out channels, in channels of a group, reach + 1), current token first.

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
    """Read a depthwise convolution: T_ij = kernel[i - j] for every channel."""
    conv, length = _called(call)
    return None if length < 2 else Convolution(impulse_response(conv).transpose(0, 1), length)


def across_channels(call: Call) -> LazyOperator | None:
    """Read a convolution in groups: block (i, j) of T is the matrix that the kernel has for i - j."""
    conv, length = _called(call)
    if length < 2:
        return None
    groups, size = conv.groups, conv.in_channels // conv.groups

    def form(samples: slice, chosen: Sequence[int], length: int) -> Operator:
        length = min(length, 2 * reach(conv))
        response = take(impulse_response(conv).reshape(groups, -1, size, reach(conv) + 1), 0, chosen)
        T = response.new_zeros((len(chosen), length, size, length, size))
        for lag in range(min(length, response.shape[3])):
            T.diagonal(-lag, 1, 3).copy_(response[..., lag, None])
        return DenseOperator(T.flatten(3, 4).flatten(1, 2), size)

    return LazyOperator(1, groups, length, form, shift_invariant=True)


def _called(call: Call) -> tuple[nn.Conv1d, int]:
    """Return the layer and the number of its outputs that belong to tokens.

    Raises:
        NotCausalError: the caller has not padded the input on the left, and on the left alone.
    """
    conv = cast(nn.Conv1d, call.module)
    back, length = reach(conv), call.output.shape[-1] - _padding(conv)
    if _padding(conv) == 0 and length > 1:
        given = (*call.args, *call.kwargs.values())[0]
        begins, ends = given[..., :back] == 0, given[..., -1] != 0
        require(
            begins.all() & ends.any(),
            f"its input does not begin with {back} zeros and end with a token, so that outputs may depend on later "
            f"tokens; pad a causal filter that reaches {back} tokens back by F.pad(x, ({back}, 0))",
        )
    elif length > 1:
        unproven(
            f"it is padded by {back} on both sides, and its call does not show whether the tail is dropped, or the "
            f"beginning; use F.pad(x, ({back}, 0)) before a convolution without padding"
        )
    return conv, length


def _padding(conv: nn.Conv1d) -> int:
    """Return the padding on either side; -1 for one that keeps the length."""
    if isinstance(conv.padding, str):
        return 0 if conv.padding == "valid" else -1
    return conv.padding[0]


def _is_filter(conv: nn.Conv1d, *, depthwise: bool) -> bool:
    """Return whether the layer has several taps and torch's own forward: a sub-class may take another layout."""
    has_taps = type(conv).forward is nn.Conv1d.forward and conv.kernel_size[0] > 1
    return has_taps and (conv.groups == conv.in_channels) == depthwise


def _uninformative(conv: nn.Conv1d) -> str:
    return _SHORT if reach(conv) < _LONG_TOKENS else ""


_AROUND = "teach the module around it with @ess_monitor.register_capture, or leave it out with `layers`"


def _refusal(conv: nn.Conv1d) -> str | None:
    back = reach(conv)
    if conv.stride[0] != 1:
        return f"stride {conv.stride[0]}: its outputs are fewer than its inputs, so T is not square"
    if conv.padding_mode != "zeros" and _padding(conv) != 0:
        return f"padding_mode {conv.padding_mode!r} lets later tokens, or the first one many times, into an output"
    if _padding(conv) not in (0, back):
        return (
            f"padding {conv.padding if isinstance(conv.padding, str) else conv.padding[0]}: it looks at later tokens; "
            f"a causal filter that reaches {back} tokens back is padded by {back} and cropped, or by 0 after a padding "
            "on the left"
        )
    if conv.groups != conv.in_channels:
        if conv.in_channels != conv.out_channels:
            return f"{conv.in_channels} channels become {conv.out_channels}, so T has no square blocks; {_AROUND}"
        rows = back * conv.in_channels // conv.groups
        if rows > _LARGEST_BLOCK:
            return (
                f"its H_i has {rows} rows, (taps - 1) * channels of a group; the singular values of more than "
                f"{_LARGEST_BLOCK} would cost too much; {_AROUND}"
            )
    return None


def short_conv(call: Call) -> Operator | None:
    """Read `in_proj` of LFM2: its output has B, C and x side by side, and y = C (kernel * (B x))."""
    if call.output.shape[1] == 1:
        return None
    mask = call.layer_kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 4:  # of attention: older models hand it to these layers, too
        first_key = mask[..., -1, 0]
        hidden = ~first_key if first_key.dtype == torch.bool else first_key < 0
        require(
            ~hidden.any(),
            f"this version of {type(call.layer).__name__} does not hide padding on the left from its convolution; pad "
            "on the right, or use transformers>=5.15",
        )
    b, c, _ = call.output.transpose(1, 2).chunk(3, 1)
    return GatedConvolution(b, impulse_response(cast(nn.Conv1d, call.layer.conv)).transpose(0, 1), c)


def _of_an_image(layer: nn.Module) -> str | None:
    if isinstance(getattr(layer, "conv", None), nn.Conv1d):
        return None
    return "its convolution is not one along the sequence: it looks at later tokens, so that T is not lower triangular"


ADAPTERS = (
    LayerAdapter(
        operator="GatedConvolution",
        classes=r".*\.Lfm\w*ShortConv",
        path="in_proj",
        build=short_conv,
        refusal=_of_an_image,
        state_capacity=lambda layer: reach(layer.conv),
        channels=lambda layer: layer.conv.out_channels,
        uninformative=lambda layer: _SHORT,
    ),
    LayerAdapter(
        operator="Convolution",
        classes=_CONV1D,
        build=depthwise,
        is_member=partial(_is_filter, depthwise=True),
        state_capacity=reach,
        channels=lambda conv: conv.out_channels,
        refusal=_refusal,
        uninformative=_uninformative,
    ),
    LayerAdapter(
        operator="DenseOperator",
        classes=_CONV1D,
        build=across_channels,
        is_member=partial(_is_filter, depthwise=False),
        capacity_grows=True,
        channels=lambda conv: conv.groups,
        refusal=_refusal,
        uninformative=_uninformative,
    ),
)
