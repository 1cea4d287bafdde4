"""Builds the parts that mixers share: features per head, the gate, the readout, the norm, rotary positions.

Shapes: B batch, H heads, L length, D width, N state per head, V = D / H value dimensions per head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ess_monitor import validation
from ess_monitor.errors import ConfigError, OperatorError

LARGEST_SIZE = 2**20
"""Largest width, state or number of heads: far above any layer, and products of two still fit into 64 bits."""


def state_per_head(width: int, num_heads: int, expand_k: float) -> int:
    """Return expand_k width / num_heads: the state dimensions of a head, which is also its TSS per channel.

    Raises:
        ConfigError: A value is not a positive number, heads do not divide the width, or the state is not whole.

    Examples:
        >>> state_per_head(width=32, num_heads=2, expand_k=0.5)
        8
    """
    width = validation.whole("width", width, 1, LARGEST_SIZE)
    num_heads = validation.whole("num_heads", num_heads, 1, LARGEST_SIZE)
    expand_k = validation.real("expand_k", expand_k, above=0, high=LARGEST_SIZE)
    if width % num_heads:
        raise ConfigError(f"num_heads={num_heads} must divide width={width}; take a divisor of {width}.")
    state = expand_k * width / num_heads
    if abs(state - round(state)) > 1e-6 or not 1 <= round(state) <= LARGEST_SIZE:
        raise ConfigError(
            f"expand_k={expand_k} gives {state:g} state dimensions per head (expand_k width / num_heads = "
            f"{expand_k} * {width} / {num_heads}); it must be a whole number of at least 1. "
            "`build_mixer` takes the state size itself."
        )
    return round(state)


class HeadFeatures(nn.Module):
    """Computes q = (W_C u + b) scale, k = W_B u + b, v = W_u u, cut into heads.

    The biases are not in the paper. Without them WLA and GLA do not find the previous-token features that recall needs
    within a few thousand steps; a `bias_std` above 0 breaks the symmetry at the start.
    """

    def __init__(self, width: int, num_heads: int, state: int, *, query_scale: float, bias_std: float) -> None:
        super().__init__()
        bias_std = validation.real("qk_bias_std", bias_std, low=0, hint="0 starts the biases at zero")
        self.num_heads = num_heads
        self.state = state
        self.query_scale = query_scale
        self.q = nn.Linear(width, num_heads * state)
        self.k = nn.Linear(width, num_heads * state)
        self.v = nn.Linear(width, width, bias=False)
        for projection in (self.q, self.k):
            nn.init.normal_(projection.bias, std=bias_std)

    def forward(self, u_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q and k, (B, H, L, N), and v, (B, H, L, V)."""
        check_features(u_BLD, self.v.in_features)
        q, k, v = (split_heads(project(u_BLD), self.num_heads) for project in (self.q, self.k, self.v))
        return q * self.query_scale, k, v


class LowRankGate(nn.Module):
    """Computes W_A2 W_A1 u + b per head: the gate before its nonlinearity. W_A1 is shared by the heads.

    The bias is not in the paper. It lets a head set its decay without using up a direction of the low rank; drawn with
    `bias_std`, state dimensions start with different decays.
    """

    def __init__(self, width: int, num_heads: int, state: int, *, rank: int, bias_std: float) -> None:
        super().__init__()
        rank = validation.whole("gate_rank", rank, 1, LARGEST_SIZE, hint="the paper uses 16")
        bias_std = validation.real("gate_bias_std", bias_std, low=0, hint="0 starts the bias at zero")
        self.num_heads = num_heads
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, num_heads * state)
        nn.init.zeros_(self.up.bias)
        if bias_std > 0:
            nn.init.normal_(self.up.bias, std=bias_std)

    def forward(self, u_BLD: Tensor) -> Tensor:
        """Return (B, H, L, N)."""
        return split_heads(self.up(self.down(u_BLD)), self.num_heads)


class HeadReadout(nn.Module):
    """Applies RMSNorm to every head's output, then W_o over all heads.

    The norm is not in the paper. It takes the scale of the memory (a sum over the sequence) out of the output, so that
    layers with much and with little decay train at one learning rate.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width // num_heads)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, y_BHLV: Tensor) -> Tensor:
        """Return (B, L, D)."""
        merged: Tensor = self.out(self.norm(y_BHLV).transpose(1, 2).flatten(2))
        return merged


class RMSNorm(nn.Module):
    """Computes x / sqrt(mean x^2 + 1e-5) * weight over the last dimension (Zhang and Sennrich, 2019).

    Equals `torch.nn.RMSNorm`, but accepts another dtype than its weight's without the warning that torch gives.

    Examples:
        >>> RMSNorm(4)(torch.tensor([1.0, -1.0, 1.0, -1.0]).bfloat16()).dtype
        torch.bfloat16
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the same shape and dtype."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), eps=1e-5)


def check_features(u: Tensor, width: int) -> None:
    """Raise `OperatorError` unless `u` is a floating (batch, length, width).

    Dtype and device are left to torch: autocast and FSDP may still change them before they meet the parameters.
    """
    if not isinstance(u, Tensor) or not u.is_floating_point() or u.dim() != 3 or u.shape[2] != width or 0 in u.shape:
        raise OperatorError(
            f"u is {validation.shown(u)}; pass floating features of shape (batch, length, {width}), none of them empty."
        )


def split_heads(x_BLD: Tensor, num_heads: int) -> Tensor:
    """Cut (B, L, H N) into (B, H, L, N)."""
    return torch.unflatten(x_BLD, -1, (num_heads, -1)).transpose(1, 2)


class Rotary(nn.Module):
    """Rotates dimension pairs by position / base^(2 pair / N): rotary position embedding (Su et al., 2023).

    Only differences of positions then enter q^T k. A small `base` keeps all pairs fast, which short sequences need to
    tell neighboring positions apart.

    Examples:
        >>> turn = Rotary(4, base=100.0)
        >>> q, k = turn(torch.ones(1, 1, 6, 4)), turn(torch.ones(1, 1, 6, 4))
        >>> products = q @ k.mT
        >>> torch.allclose(products[0, 0, 1, 0], products[0, 0, 5, 4])
        True
    """

    def __init__(self, state: int, *, base: float) -> None:
        super().__init__()
        if state % 2:
            raise ConfigError(
                f"expand_k: the state size per head is {state}; rotary positions turn pairs, so it must be even."
            )
        self.base = validation.real("rope_base", base, above=1, hint="10 suits tens of tokens, 10000 thousands")

    def forward(self, x_BHLN: Tensor) -> Tensor:
        """Return the same shape and dtype."""
        length, state = x_BHLN.shape[2:]
        # Computed anew in float32: `.bfloat16()` would round a buffer, which shifts late positions by whole turns.
        speed = torch.exp(torch.arange(0, state, 2, device=x_BHLN.device) * (-math.log(self.base) / state))
        angle = torch.arange(length, device=x_BHLN.device)[:, None] * speed
        cos, sin = angle.cos().to(x_BHLN.dtype), angle.sin().to(x_BHLN.dtype)
        first, second = x_BHLN.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
