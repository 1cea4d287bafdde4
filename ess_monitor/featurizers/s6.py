"""Defines S6, the selective state-space layer of Mamba, without its short convolution.

Shapes: B batch, L length, E channels (the width), N state per channel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ess_monitor import validation
from ess_monitor.featurizers.cores import DiagonalScan
from ess_monitor.featurizers.parts import LARGEST_SIZE, RMSNorm, check_features


class S6(nn.Module):
    """Selects what its state keeps: A = exp(-A_hat Delta), B = Delta W_B u, C = W_C u (Eq. C.2.9; Gu & Dao, 2024).

    Delta = softplus(W_Delta u + b). Every channel is an operator of its own: Delta is per channel; W_B, W_C and A_hat
    are shared. The convolution, the gate and the skip of the Mamba block around it are left out; the output goes
    through RMSNorm over the channels and a linear map. b starts at 0: with Mamba's own start of b (Delta from 0.001 to
    0.1) most of the poor scaling of ESS with the state size (Finding 4) disappears.

    Args:
        width: d, channels in and out.
        state_size: n, state dimensions of a channel; 16 in table 3 of the paper.

    Attributes:
        delta: linear layer that gives Delta before softplus, (batch, length, width).
        A_log: ln A_hat, (state_size,); A_hat starts at [1 .. n].
        core: `DiagonalScan`, called with q = C and k = B of shape (batch, width, length, state), v = u of
            (batch, width, length, 1) and the log-decay -A_hat Delta.
        num_heads: independent operators, which is the width.
        state_capacity: TSS per channel, n.

    Raises:
        ConfigError: A size is not a whole number from 1 up.

    Examples:
        >>> S6(32, state_size=8)(torch.randn(4, 20, 32)).shape
        torch.Size([4, 20, 32])
    """

    def __init__(self, width: int, *, state_size: int = 16) -> None:
        super().__init__()
        width = validation.whole("width", width, 1, LARGEST_SIZE)
        state_size = validation.whole("state_size", state_size, 1, LARGEST_SIZE)
        self.num_heads = width
        self.state_capacity = state_size
        self.b = nn.Linear(width, state_size, bias=False)
        self.c = nn.Linear(width, state_size, bias=False)
        self.delta = nn.Linear(width, width)
        nn.init.zeros_(self.delta.bias)
        self.A_log = nn.Parameter(torch.arange(1.0, state_size + 1).log())
        self.core = DiagonalScan()
        self.norm = RMSNorm(width)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, u_BLE: Tensor) -> Tensor:
        """Map (batch, length, width) to the same shape."""
        check_features(u_BLE, self.delta.in_features)
        delta_BEL1 = F.softplus(self.delta(u_BLE)).mT[..., None]
        b_BELN = delta_BEL1 * self.b(u_BLE)[:, None]
        c_BELN = self.c(u_BLE)[:, None].expand_as(b_BELN)
        log_decay_BELN = -self.A_log.exp() * delta_BEL1
        y_BEL1 = self.core(c_BELN, b_BELN, u_BLE.mT[..., None], log_decay_BELN)
        y: Tensor = self.out(self.norm(y_BEL1.squeeze(-1).mT))
        return y
