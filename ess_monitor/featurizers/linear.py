"""Linear attention (LA) and weighted linear attention (WLA): the decay does not depend on the input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ess_monitor import validation
from ess_monitor.featurizers.cores import DiagonalScan
from ess_monitor.featurizers.heads import HeadFeatures, HeadReadout, Rotary, state_per_head


class LA(nn.Module):
    """Linear attention: A = I, B = RoPE(W_B u), C = RoPE(W_C u) (Eq. C.2.7).

    Args:
        width: d, channels in and out.
        num_heads: h, operators; the channels of a head share one.
        expand_k: state dimensions per head as a multiple of d / h.
        rope_base: base of the rotary positions. With 10000 LA does not learn recall in 32-64 tokens; take 10 there.
        qk_bias_std: standard deviation at which the biases of q and k start.

    Attributes:
        core: `DiagonalScan`, called with q, k, v and no decay.
        num_heads: independent operators.
        state_capacity: TSS per channel.

    Raises:
        ConfigError: the state per head is not a whole, even number, or an option is out of range.

    Example:
        >>> LA(32, 2, rope_base=10.0)(torch.randn(4, 20, 32)).shape
        torch.Size([4, 20, 32])
    """

    def __init__(
        self, width: int, num_heads: int, *, expand_k: float = 1, rope_base: float = 10000.0, qk_bias_std: float = 0.5
    ) -> None:
        super().__init__()
        state = state_per_head(width, num_heads, expand_k)
        self.num_heads = num_heads
        self.state_capacity = state
        self.features = HeadFeatures(width, num_heads, state, query_scale=state**-0.5, bias_std=qk_bias_std)
        self.rotary = Rotary(state, base=rope_base)
        self.core = DiagonalScan()
        self.readout = HeadReadout(width, num_heads)

    def forward(self, u_BLD: Tensor) -> Tensor:
        """(batch, length, width) to the same shape."""
        q, k, v = self.features(u_BLD)
        y: Tensor = self.readout(self.core(self.rotary(q), self.rotary(k), v, None))
        return y


class WLA(nn.Module):
    """Weighted linear attention: A = sigmoid(A_hat)^(1/beta), a learned constant per head and state (Eq. C.2.6).

    Args:
        width: d, channels in and out.
        num_heads: h, operators; the channels of a head share one.
        expand_k: state dimensions per head as a multiple of d / h.
        beta: normalization of the logit. A starts at 2^(-1/beta): 0.96 with the paper's 16, which keeps half of a token
            for 16 steps; 1/2 with 1, which forgets within a few.
        qk_bias_std: standard deviation at which the biases of q and k start.

    Attributes:
        decay_logit: A_hat, (num_heads, state), starts at 0.
        core: `DiagonalScan`, called with q, k, v and log A of shape (1, num_heads, 1, state).
        num_heads: independent operators.
        state_capacity: TSS per channel.

    Raises:
        ConfigError: the state per head is not a whole number, or an option is out of range.

    Example:
        >>> WLA(32, 2, beta=1.0)(torch.randn(4, 20, 32)).shape
        torch.Size([4, 20, 32])
    """

    def __init__(
        self, width: int, num_heads: int, *, expand_k: float = 1, beta: float = 16.0, qk_bias_std: float = 0.5
    ) -> None:
        super().__init__()
        beta = validation.real("beta", beta, above=0, hint="the paper uses 16")
        state = state_per_head(width, num_heads, expand_k)
        self.num_heads = num_heads
        self.state_capacity = state
        self.beta = beta
        self.features = HeadFeatures(width, num_heads, state, query_scale=state**-0.5, bias_std=qk_bias_std)
        self.decay_logit = nn.Parameter(torch.zeros(num_heads, state))
        self.core = DiagonalScan()
        self.readout = HeadReadout(width, num_heads)

    def forward(self, u_BLD: Tensor) -> Tensor:
        """(batch, length, width) to the same shape."""
        q, k, v = self.features(u_BLD)
        log_decay_1H1N = F.logsigmoid(self.decay_logit)[None, :, None] / self.beta
        y: Tensor = self.readout(self.core(q, k, v, log_decay_1H1N))
        return y
