"""Detects PyTorch's `context_parallel`, a block around the forward pass that leaves no trace in the model."""

from __future__ import annotations

import sys

from torch.nn import functional

_CONTEXT_PARALLEL = (
    "torch.distributed.tensor.experimental._context_parallel._attention",
    "torch.distributed.tensor.experimental._attention",
)
"""Modules that hold it, in newer and older versions of PyTorch. They are never imported here."""


def tokens_are_spread() -> bool:
    """Return whether this code runs inside PyTorch's `context_parallel`, which spreads tokens over processes.

    The block replaces torch's softmax attention by a function of its own, which may lie under or over our hook.

    Examples:
        >>> tokens_are_spread()
        False
    """
    candidates = [functional.scaled_dot_product_attention]
    while (wrapped := getattr(candidates[-1], "__wrapped__", None)) is not None:
        candidates.append(wrapped)
    for name in _CONTEXT_PARALLEL:
        replaced = getattr(sys.modules.get(name), "_replaced_functions", None) or {}
        if any(function in replaced for function in candidates):
            return True
    return False
