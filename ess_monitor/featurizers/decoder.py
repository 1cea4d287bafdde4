"""The decoder of the compression task (MAD; Poli et al., 2024): everything back from the last position."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ess_monitor.featurizers.norm import RMSNorm


class LastTokenDecoder(nn.Module):
    """Features of every position from those of the last one: last token + where to look, through two layers.

    The only way from an earlier token to its reconstruction leads through the memory at the last position. Positions
    are sines and cosines of fixed speeds, so that any length can be decoded.

    Example:
        >>> decoder = LastTokenDecoder(32)
        >>> features = torch.randn(1, 5, 32)
        >>> changed = features.clone()
        >>> changed[:, :-1] = 0
        >>> torch.equal(decoder(features), decoder(changed))
        True
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.layers = nn.Sequential(
            RMSNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU()
        )

    def forward(self, x_BLD: Tensor) -> Tensor:
        """(batch, length, width)."""
        where_LD = _sinusoids(x_BLD.shape[1], self.width, x_BLD.device).to(x_BLD.dtype)
        y: Tensor = self.layers(x_BLD[:, -1:] + where_LD)
        return y


def _sinusoids(length: int, width: int, device: torch.device) -> Tensor:
    """(length, width): sines and cosines of speeds from 1 down to 1/10000."""
    half = (width + 1) // 2
    speed = torch.exp(torch.arange(half, device=device) * (-math.log(10000.0) / max(half - 1, 1)))
    angle = torch.arange(length, device=device)[:, None] * speed
    return torch.cat([angle.sin(), angle.cos()], dim=-1)[:, :width]
