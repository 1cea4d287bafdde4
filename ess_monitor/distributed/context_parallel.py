"""Tokens that a block around the forward pass spreads over processes, which leaves no trace in the model."""

from __future__ import annotations

import sys

from torch.nn import functional

_CONTEXT_PARALLEL = (
    "torch.distributed.tensor.experimental._context_parallel._attention",
    "torch.distributed.tensor.experimental._attention",
)
"""Where PyTorch keeps it, in newer and older versions. Looked at only where it has been imported."""


def tokens_are_spread() -> bool:
    """Whether this code runs inside PyTorch's `context_parallel`.

    The block puts a function of its own in the place of torch's softmax attention, behind a tap of ours or over it.

    Example:
        >>> tokens_are_spread()
        False
    """
    present = functional.scaled_dot_product_attention
    candidates = (present, getattr(present, "__wrapped__", None))
    for name in _CONTEXT_PARALLEL:
        replaced = getattr(sys.modules.get(name), "_replaced_functions", None) or {}
        if any(function in replaced for function in candidates):
            return True
    return False
