"""Defines the mixers with one operator per head: LA, WLA, GLA, GLA-S6 and SA.

Shapes: B batch, H heads, L length, D width, N state per head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ess_monitor import validation
from ess_monitor.featurizers.cores import CausalSoftmax, DiagonalScan
from ess_monitor.featurizers.parts import HeadFeatures, HeadReadout, LowRankGate, Rotary, state_per_head


class HeadMixer(nn.Module):
    """Mixes positions by one operator per head: features, then `core`, then the readout.

    Subclasses give the last argument of `core`: the log-decay of a scan, or the scale of a softmax.
    """

    def __init__(
        self,
        core: nn.Module,
        width: int,
        num_heads: int,
        expand_k: float,
        qk_bias_std: float,
        *,
        scales_queries: bool = True,
        make_gate: Callable[[int], LowRankGate] | None = None,
        make_rotary: Callable[[int], Rotary] | None = None,
    ) -> None:
        super().__init__()
        state = state_per_head(width, num_heads, expand_k)
        self.num_heads = num_heads
        self.state_capacity: int | None = state
        query_scale = state**-0.5 if scales_queries else 1.0
        self.features = HeadFeatures(width, num_heads, state, query_scale=query_scale, bias_std=qk_bias_std)
        if make_gate is not None:  # between features and readout: the order decides which random numbers each draws
            self.gate = make_gate(state)
        self.rotary = None if make_rotary is None else make_rotary(state)
        self.core = core
        self.readout = HeadReadout(width, num_heads)

    def forward(self, u_BLD: Tensor) -> Tensor:
        """Map (batch, length, width) to the same shape."""
        q, k, v = self.features(u_BLD)
        if self.rotary is not None:
            q, k = self.rotary(q), self.rotary(k)
        y: Tensor = self.readout(self.core(q, k, v, self._decay_or_scale(u_BLD)))
        return y

    def _decay_or_scale(self, u_BLD: Tensor) -> Tensor | float | None:
        raise NotImplementedError


class LA(HeadMixer):
    """Mixes by linear attention: A = I, B = RoPE(W_B u), C = RoPE(W_C u) (Eq. C.2.7).

    Args:
        width: d, channels in and out.
        num_heads: h, operators; the channels of a head share one.
        expand_k: state dimensions per head as a multiple of d / h.
        rope_base: base of the rotary positions. With 10000 LA does not learn recall in 32-64 tokens; 10 suits these.
        qk_bias_std: standard deviation at which the biases of q and k start.

    Attributes:
        core: `DiagonalScan`, called with q, k, v and no decay.
        num_heads: independent operators.
        state_capacity: TSS per channel.

    Raises:
        ConfigError: The state per head is not a whole, even number, or an option is out of range.

    Examples:
        >>> LA(32, 2, rope_base=10.0)(torch.randn(4, 20, 32)).shape
        torch.Size([4, 20, 32])
    """

    def __init__(
        self, width: int, num_heads: int, *, expand_k: float = 1, rope_base: float = 10000.0, qk_bias_std: float = 0.5
    ) -> None:
        make_rotary = partial(Rotary, base=rope_base)
        super().__init__(DiagonalScan(), width, num_heads, expand_k, qk_bias_std, make_rotary=make_rotary)

    def _decay_or_scale(self, u_BLD: Tensor) -> None:
        return None


class WLA(HeadMixer):
    """Weights linear attention: A = sigmoid(A_hat)^(1/beta), a learned constant per head and state (Eq. C.2.6).

    Args:
        width: as in `LA`.
        num_heads: as in `LA`.
        expand_k: as in `LA`.
        qk_bias_std: as in `LA`.
        beta: normalization of the logit. A starts at 2^(-1/beta): 0.96 with the paper's 16, which keeps half of a token
            for 16 steps; 1/2 with 1, which forgets within a few.

    Attributes:
        decay_logit: A_hat, (num_heads, state), starts at 0.
        core: `DiagonalScan`, called with q, k, v and log A of shape (1, num_heads, 1, state).
        num_heads, state_capacity: as in `LA`.

    Raises:
        ConfigError: The state per head is not a whole number, or an option is out of range.

    Examples:
        >>> WLA(32, 2, beta=1.0)(torch.randn(4, 20, 32)).shape
        torch.Size([4, 20, 32])
    """

    def __init__(
        self, width: int, num_heads: int, *, expand_k: float = 1, beta: float = 16.0, qk_bias_std: float = 0.5
    ) -> None:
        beta = validation.real("beta", beta, above=0, hint="the paper uses 16")
        super().__init__(DiagonalScan(), width, num_heads, expand_k, qk_bias_std)
        self.beta = beta
        self.decay_logit = nn.Parameter(torch.zeros(num_heads, self.features.state))

    def _decay_or_scale(self, u_BLD: Tensor) -> Tensor:
        return F.logsigmoid(self.decay_logit)[None, :, None] / self.beta


class GLA(HeadMixer):
    """Gates linear attention: A = sigmoid(W_A2 W_A1 u)^(1/beta) per head and state (Eq. C.2.5; Yang et al., 2024).

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
        ConfigError: The state per head is not a whole number, or an option is out of range.

    Examples:
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
        beta = validation.real("beta", beta, above=0, hint="the paper uses 16")
        make_gate = partial(LowRankGate, width, num_heads, rank=gate_rank, bias_std=gate_bias_std)
        super().__init__(DiagonalScan(), width, num_heads, expand_k, qk_bias_std, make_gate=make_gate)
        self.beta = beta

    def _decay_or_scale(self, u_BLD: Tensor) -> Tensor:
        return F.logsigmoid(self.gate(u_BLD)) / self.beta


class GLAS6(HeadMixer):
    """Gates linear attention by S6's decay: A = exp(-([1 .. n] / alpha) softplus(W_A2 W_A1 u)) (Eq. C.2.10).

    With alpha = 1 every further state decays faster than the one before, so that a larger state adds no memory (Finding
    4); a large alpha keeps A near I (Finding 5).

    Args:
        width: as in `GLA`.
        num_heads: as in `GLA`.
        expand_k: as in `GLA`.
        gate_rank: as in `GLA`.
        qk_bias_std: as in `GLA`.
        gate_bias_std: as in `GLA`.
        alpha: normalization of the arange; 1000 in table 2 of the paper.

    Attributes:
        gate: module that gives the pre-activations, (batch, num_heads, length, state).
        log_alpha: ln alpha, a scalar buffer: not trained, but kept in checkpoints, where a changed alpha must survive.
        core, num_heads, state_capacity: as in `GLA`.

    Raises:
        ConfigError: The state per head is not a whole number, or an option is out of range.

    Examples:
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
        alpha = validation.real("alpha", alpha, above=0, hint="1 is S6's own decay, the paper uses 1000")
        make_gate = partial(LowRankGate, width, num_heads, rank=gate_rank, bias_std=gate_bias_std)
        super().__init__(DiagonalScan(), width, num_heads, expand_k, qk_bias_std, make_gate=make_gate)
        self.log_alpha: Tensor
        self.register_buffer("log_alpha", torch.tensor(math.log(alpha)))
        self.register_buffer("arange", torch.arange(1.0, self.features.state + 1), persistent=False)

    def _decay_or_scale(self, u_BLD: Tensor) -> Tensor:
        rate_N = self.get_buffer("arange") * torch.exp(-self.log_alpha)
        return -rate_N * F.softplus(self.gate(u_BLD))


class SA(HeadMixer):
    """Mixes by causal attention: T = softmax(RoPE(W_C u) RoPE(W_B u)^T / sqrt(n)) (Eq. C.2.8; Vaswani et al., 2017).

    Args:
        width: as in `LA`.
        num_heads: as in `LA`.
        qk_bias_std: as in `LA`.
        expand_k: dimensions n of q and k per head as a multiple of d / h.
        rope_base: base of the rotary positions.

    Attributes:
        core: `CausalSoftmax`, called with q, k, v and the scale n^(-1/2).
        num_heads: independent operators.
        state_capacity: None: TSS grows with the position and is not a property of the layer.

    Raises:
        ConfigError: n is not a whole, even number, or an option is out of range.

    Examples:
        >>> SA(32, 2)(torch.randn(4, 20, 32)).shape
        torch.Size([4, 20, 32])
    """

    def __init__(
        self, width: int, num_heads: int, *, expand_k: float = 1, rope_base: float = 10000.0, qk_bias_std: float = 0.5
    ) -> None:
        # The queries stay unscaled, because softmax attention is defined with a scale of its own.
        make_rotary = partial(Rotary, base=rope_base)
        super().__init__(
            CausalSoftmax(), width, num_heads, expand_k, qk_bias_std, scales_queries=False, make_rotary=make_rotary
        )
        self.state_capacity = None
        self.scale: float = self.features.state**-0.5

    def _decay_or_scale(self, u_BLD: Tensor) -> float:
        return self.scale
