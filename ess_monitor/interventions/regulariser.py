"""Pulling the transition matrices towards the identity: lambda * ||A - I||_F (section 4.2, Finding 6).

The norm. A_t = diag(a_t) is taken per position: R = mean over batch and positions of
sqrt(sum over heads and state of (1 - a_t)^2), the Frobenius norm of the layer's block-diagonal A_t - I. The mean makes
R independent of batch size and length, so one lambda serves a run whatever its shapes. A decay that is the same at
every position (WLA) has one A, and R is its norm.

Two ways to use it. `identity_penalty(log_decay)` is a term for a loss of your own. `IdentityPull` needs no access to
the loss: inside the forward pass an identity function stands where the layer's log-decay enters the recurrence, and
adds lambda * dR / d(log-decay) to the gradient on its way back. From there it flows into everything that determines A:
gate weights and biases, A_log, step-size projections.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ess_monitor.capture import DecayHandle
from ess_monitor.errors import ConfigError

_SMALLEST = 1e-12
"""Below this squared distance A is the identity: R has no direction there, and its gradient is taken as 0."""


def identity_penalty(log_decay: torch.Tensor) -> torch.Tensor:
    """R = mean over batch and positions of ||A_t - I||_F.

    Args:
        log_decay: log of A's diagonal, (batch, heads, length, state) or broadcasting to it, as in
            `ess_monitor.ess.DiagonalRecurrence`.

    Returns:
        A scalar, in float32 at least, 0 for A = I. Its gradient there is 0.

    Example:
        >>> identity_penalty(torch.full((2, 1, 8, 4), 0.5).log()).item()
        1.0
    """
    if log_decay.dim() != 4:
        raise ConfigError(
            f"log_decay: shape {tuple(log_decay.shape)}; it must be (batch, heads, length, state), with size 1 where "
            "it broadcasts"
        )
    return _norm(log_decay).mean()


def _norm(log_decay: torch.Tensor) -> torch.Tensor:
    """||A_t - I||_F, (batch, length)."""
    squared = torch.expm1(_precise(log_decay)).square().sum((1, 3))
    return torch.where(squared > _SMALLEST, squared, 1.0).sqrt() * (squared > _SMALLEST)


def _precise(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


class _AddPenaltyGradient(torch.autograd.Function):
    """Identity; the gradient gains strength * dR / d(log_decay)."""

    @staticmethod
    def forward(ctx: Any, log_decay: torch.Tensor, strength: Callable[[], float | torch.Tensor]) -> torch.Tensor:
        ctx.save_for_backward(log_decay)
        ctx.strength = strength
        return log_decay.view_as(log_decay)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (log_decay,) = ctx.saved_tensors
        distance = torch.expm1(_precise(log_decay))
        norm = _norm(log_decay)
        inverse = torch.where(norm > 0, 1.0 / norm.clamp_min(_SMALLEST**0.5), 0.0) / norm.numel()
        pull = distance * (distance + 1) * inverse[:, None, :, None]
        return grad + (ctx.strength() * pull).to(grad.dtype), None


def add_penalty_gradient(
    log_decay: torch.Tensor, strength: float | torch.Tensor | Callable[[], float | torch.Tensor]
) -> torch.Tensor:
    """`log_decay`, unchanged, whose gradient also carries that of strength * identity_penalty(log_decay).

    Args:
        log_decay: as in `identity_penalty`. Without `requires_grad` it is returned as it is.
        strength: lambda times whatever the loss is multiplied with before backward (loss scale, 1 / accumulation
            steps); a callable is asked during backward.
    """
    if not log_decay.requires_grad:
        return log_decay
    ask = strength if callable(strength) else lambda: strength
    result: torch.Tensor = _AddPenaltyGradient.apply(log_decay, ask)  # type: ignore[no-untyped-call]
    return result


class _Injection:
    """The hook of an `IdentityPull`. A pickled or deep-copied model gets one that does nothing: the copy is not the
    model in training, and what the pull refers to (the loss scale) cannot be pickled."""

    def __init__(self, inject: Callable[..., Any] | None) -> None:
        self._inject = inject

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._inject(module, args, kwargs) if self._inject is not None else None

    def __reduce__(self) -> tuple[Any, ...]:
        return _Injection, (None,)


class IdentityPull:
    """The regulariser on one layer, attached to its forward pass. Attach and detach at any step boundary.

    Outputs stay what they are, bit for bit. Nothing is injected in evaluation mode or without gradients. Every backward
    pass through a forward pass injects once, so run one backward pass per forward pass, as a training step does.

    Args:
        layer: the module.
        handle: where its log-decay passes (found by the capture room).
        strength: lambda.
        grad_scale: what the loss is multiplied with before backward. 1 unless a loss scaler or gradient accumulation
            (1 / N) is at work.

    Raises:
        ConfigError: the strength is not a finite number above 0.

    Example:
        >>> from ess_monitor.capture import find_layers
        >>> from ess_monitor.featurizers import WLA
        >>> [layer] = find_layers(WLA(16, 2, beta=1.0))
        >>> pull = IdentityPull(layer.module, layer.spec.decay, strength=0.5)
        >>> pull.attach()
        >>> layer.module(torch.randn(4, 8, 16)).mean().backward()
        >>> (layer.module.decay_logit.grad < 0).all().item()  # a step against the gradient raises every A
        True
    """

    def __init__(
        self,
        layer: nn.Module,
        handle: DecayHandle,
        strength: float,
        *,
        grad_scale: Callable[[], float | torch.Tensor] = lambda: 1.0,
    ) -> None:
        if not (math.isfinite(strength) and strength > 0):
            raise ConfigError(f"strength: {strength} given; lambda must be finite and above 0, for example 0.5")
        self.strength = strength
        self._point = layer.get_submodule(handle.point)
        self._handle = handle
        self._grad_scale = grad_scale
        self._hook: RemovableHandle | None = None

    @property
    def attached(self) -> bool:
        """True between `attach` and `detach`."""
        return self._hook is not None

    def attach(self) -> None:
        """Stand in the forward pass. A second call does nothing."""
        if self._hook is None:
            self._hook = self._point.register_forward_pre_hook(_Injection(self._inject), with_kwargs=True)

    def detach(self) -> None:
        """Leave the forward pass. A second call does nothing."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _inject(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not module.training:
            return None
        log_decay = self._handle.read(args, kwargs)
        return self._handle.write(args, kwargs, add_penalty_gradient(log_decay, self._scaled))

    def _scaled(self) -> float | torch.Tensor:
        return self.strength * self._grad_scale()
