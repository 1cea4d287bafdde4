"""Softmax attention (SA): the memory is all tokens so far."""

from __future__ import annotations

from torch import Tensor, nn

from ess_monitor.featurizers.cores import CausalSoftmax
from ess_monitor.featurizers.heads import HeadFeatures, HeadReadout, Rotary, state_per_head


class SA(nn.Module):
    """Causal softmax attention: T = softmax(RoPE(W_C u) RoPE(W_B u)^T / sqrt(n)) (Eq. C.2.8; Vaswani et al., 2017).

    Args:
        width: d, channels in and out.
        num_heads: h, operators; the channels of a head share one.
        expand_k: dimensions n of q and k per head as a multiple of d / h.
        rope_base: base of the rotary positions.
        qk_bias_std: standard deviation at which the biases of q and k start.

    Attributes:
        core: `CausalSoftmax`, called with q, k, v and the scale n^(-1/2).
        num_heads: independent operators.
        state_capacity: None: TSS grows with the position, it is not a property of the layer.

    Raises:
        ConfigError: n is not a whole, even number, or an option is out of range.

    Example:
        >>> import torch
        >>> SA(32, 2)(torch.randn(4, 20, 32)).shape
        torch.Size([4, 20, 32])
    """

    def __init__(
        self, width: int, num_heads: int, *, expand_k: float = 1, rope_base: float = 10000.0, qk_bias_std: float = 0.5
    ) -> None:
        super().__init__()
        size = state_per_head(width, num_heads, expand_k)
        self.num_heads = num_heads
        self.state_capacity: int | None = None
        self.scale = size**-0.5
        # The scale goes to the core, which is where softmax attention is defined with one.
        self.features = HeadFeatures(width, num_heads, size, query_scale=1.0, bias_std=qk_bias_std)
        self.rotary = Rotary(size, base=rope_base)
        self.core = CausalSoftmax()
        self.readout = HeadReadout(width, num_heads)

    def forward(self, u_BLD: Tensor) -> Tensor:
        """(batch, length, width) to the same shape."""
        q, k, v = self.features(u_BLD)
        y: Tensor = self.readout(self.core(self.rotary(q), self.rotary(k), v, self.scale))
        return y
