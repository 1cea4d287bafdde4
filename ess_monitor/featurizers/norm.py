"""RMSNorm that also runs where features and parameters differ in dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + 1e-5) * weight over the last dimension (Zhang and Sennrich, 2019).

    Equals `torch.nn.RMSNorm`, which under autocast warns at every layer that gets half-precision features.

    Example:
        >>> RMSNorm(4)(torch.tensor([1.0, -1.0, 1.0, -1.0]).bfloat16()).dtype
        torch.bfloat16
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), eps=1e-5)
