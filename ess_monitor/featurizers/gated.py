"""Gated linear attention (GLA) and its cousin with S6's decay (GLA-S6): the input decides what is kept.

Shapes: B batch, H heads, L length, D width, N state per head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ess_monitor import validation
from ess_monitor.featurizers.cores import DiagonalScan
from ess_monitor.featurizers.heads import LARGEST_SIZE, HeadFeatures, HeadReadout, split_heads, state_per_head


class LowRankGate(nn.Module):
    """W_A2 W_A1 u + b per head: the gate before its nonlinearity. W_A1 is shared by the heads.

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
        """(B, H, L, N)."""
        return split_heads(self.up(self.down(u_BLD)), self.num_heads)


class GLA(nn.Module):
    """Gated linear attention: A = sigmoid(W_A2 W_A1 u)^(1/beta) per head and state (Eq. C.2.5; Yang et al., 2024).

    Args:
        width: d, channels in and out.
        num_heads: h, operators; the channels of a head share one.
        expand_k: state dimensions per head as a multiple of d / h.
        beta: normalization of the logit; 16 in the paper. With 1 the ESS at initialization hardly grows with the state.
        gate_rank: rows of W_A1; 16 in the paper.
        qk_bias_std: standard deviation at which the biases of q and k start.
        gate_bias_std: the same of the gate's bias.

    Attributes:
        gate: module that gives the logits, (batch, num_heads, length, state).
        core: `DiagonalScan`, called with q, k, v and log A of that shape.
        num_heads: independent operators.
        state_capacity: TSS per channel.

    Raises:
        ConfigError: the state per head is not a whole number, or an option is out of range.

    Example:
        >>> GLA(32, 2)(torch.randn(4, 20, 32)).shape
        torch.Size([4, 20, 32])
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        expand_k: float = 1,
        beta: float = 16.0,
        gate_rank: int = 16,
        qk_bias_std: float = 0.5,
        gate_bias_std: float = 0.5,
    ) -> None:
        super().__init__()
        beta = validation.real("beta", beta, above=0, hint="the paper uses 16")
        state = state_per_head(width, num_heads, expand_k)
        self.num_heads = num_heads
        self.state_capacity = state
        self.beta = beta
        self.features = HeadFeatures(width, num_heads, state, query_scale=state**-0.5, bias_std=qk_bias_std)
        self.gate = LowRankGate(width, num_heads, state, rank=gate_rank, bias_std=gate_bias_std)
        self.core = DiagonalScan()
        self.readout = HeadReadout(width, num_heads)

    def forward(self, u_BLD: Tensor) -> Tensor:
        """(batch, length, width) to the same shape."""
        q, k, v = self.features(u_BLD)
        log_decay_BHLN = F.logsigmoid(self.gate(u_BLD)) / self.beta
        y: Tensor = self.readout(self.core(q, k, v, log_decay_BHLN))
        return y


class GLAS6(nn.Module):
    """GLA-S6: GLA with A = exp(-([1 .. n] / alpha) softplus(W_A2 W_A1 u)) (Eq. C.2.10).

    With alpha = 1 every further state decays faster than the one before, so that a larger state adds no memory (Finding
    4); a large alpha keeps A near I (Finding 5).

    Args:
        width: d, channels in and out.
        num_heads: h, operators; the channels of a head share one.
        expand_k: state dimensions per head as a multiple of d / h.
        alpha: normalization of the arange; 1000 in table 2 of the paper.
        gate_rank: rows of W_A1; 16 in the paper.
        qk_bias_std: standard deviation at which the biases of q and k start.
        gate_bias_std: the same of the gate's bias.

    Attributes:
        gate: module that gives the pre-activations, (batch, num_heads, length, state).
        log_alpha: ln alpha, a scalar buffer: not trained, but kept in checkpoints, where a changed alpha must survive.
        core: `DiagonalScan`, called with q, k, v and log A of that shape.
        num_heads: independent operators.
        state_capacity: TSS per channel.

    Raises:
        ConfigError: the state per head is not a whole number, or an option is out of range.

    Example:
        >>> GLAS6(32, 2, alpha=1.0)(torch.randn(4, 20, 32)).shape
        torch.Size([4, 20, 32])
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        expand_k: float = 1,
        alpha: float = 1000.0,
        gate_rank: int = 16,
        qk_bias_std: float = 0.5,
        gate_bias_std: float = 0.5,
    ) -> None:
        super().__init__()
        alpha = validation.real("alpha", alpha, above=0, hint="1 is S6's own decay, the paper uses 1000")
        state = state_per_head(width, num_heads, expand_k)
        self.num_heads = num_heads
        self.state_capacity = state
        self.features = HeadFeatures(width, num_heads, state, query_scale=state**-0.5, bias_std=qk_bias_std)
        self.gate = LowRankGate(width, num_heads, state, rank=gate_rank, bias_std=gate_bias_std)
        self.log_alpha: Tensor
        self.register_buffer("log_alpha", torch.tensor(math.log(alpha)))
        self.register_buffer("arange", torch.arange(1.0, state + 1), persistent=False)
        self.core = DiagonalScan()
        self.readout = HeadReadout(width, num_heads)

    def forward(self, u_BLD: Tensor) -> Tensor:
        """(batch, length, width) to the same shape."""
        q, k, v = self.features(u_BLD)
        rate_N = self.get_buffer("arange") * torch.exp(-self.log_alpha)
        log_decay_BHLN = -rate_N * F.softplus(self.gate(u_BLD))
        y: Tensor = self.readout(self.core(q, k, v, log_decay_BHLN))
        return y
