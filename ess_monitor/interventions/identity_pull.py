"""Pull the transition matrices towards the identity: lambda * ||A - I||_F (section 4.2, Finding 6).

The norm. A_t is taken per position: R = mean over batch and positions of ||A_t - I||_F, the Frobenius norm over all
heads (and channels) of the layer, whose A is block-diagonal. For a diagonal A_t = diag(a_t) that is
sqrt(sum over heads and state of (1 - a_t)^2). The mean makes R independent of batch size and length, so one lambda
serves a run whatever its shapes. A decay that is the same at every position (WLA) has one A, and R is its norm.

The delta rule's A_t = (I - beta_t k_t k_t^T) diag(a_t) is taken as it stands: R pulls the decay to 1 *and* beta to 0.

There are two ways to use it. `identity_penalty(log_decay)` is a term for a loss of your own. `IdentityPull` needs no
access to the loss: it passes the tensors that determine A through an identity function, just before they enter the
recurrence. In the backward pass that function adds lambda * dR to the gradient of each of these tensors. From there it
flows into gate weights and biases, A_log and step-size projections.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ess_monitor import validation
from ess_monitor.capture import DecayHandle, Transition
from ess_monitor.capture.handles import DecayInputs
from ess_monitor.capture.hooks.call_site import Arguments, Call, HookHandle
from ess_monitor.capture.hooks.compiler import compile_with, compile_without
from ess_monitor.capture.layers import check_model
from ess_monitor.errors import ConfigError

OnError = Callable[[Exception], None]
"""Receives an error of a pass."""

_SMALLEST = 1e-12
"""Below this squared distance A is the identity: R has no direction there, and its gradient is taken as 0."""

_ELEMENTS_AT_ONCE = 2**20
"""Of the largest tensor that determines A: longer sequences are worked through in chunks."""


def identity_penalty(log_decay: torch.Tensor) -> torch.Tensor:
    """Return R = mean over batch and positions of ||A_t - I||_F, for a diagonal A.

    Args:
        log_decay: log of A's diagonal, (batch, heads, length, state) or broadcasting to it, as in
            `ess_monitor.ess.DiagonalRecurrence`.

    Returns:
        A scalar, in float32 at least, 0 for A = I. Its gradient there is 0.

    Examples:
        >>> identity_penalty(torch.full((2, 1, 8, 4), 0.5).log()).item()
        1.0
    """
    _check_log_decay(log_decay)
    return transition_penalty(Transition(log_decay))


def transition_penalty(transition: Transition) -> torch.Tensor:
    """Return R = mean over batch and positions of ||A_t - I||_F, for any A that a `DecayHandle` gives."""
    return _norm(transition).mean()


def _norm(transition: Transition) -> torch.Tensor:
    """Return ||A_t - I||_F, (batch, length)."""
    distance = torch.expm1(_precise(transition.log_decay))
    repeats = 1 if transition.state_size is None else transition.state_size / distance.shape[3]
    squared = distance.square().sum((1, 3)) * repeats
    if transition.left is not None and transition.right is not None:
        left, right = _precise(transition.left), _precise(transition.right)
        crossed = 2 * (distance * left * right).sum(3) + left.square().sum(3) * right.square().sum(3)
        squared = squared + crossed.sum(1)
    # A sum of three terms can round to just below 0, where the root has no gradient.
    return torch.where(squared > _SMALLEST, squared, 1.0).sqrt() * (squared > _SMALLEST)


def _precise(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


class _AddPenaltyGradient(torch.autograd.Function):
    """Passes the tensors that determine A through, and adds the gradients of strength * R to theirs."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: DecayInputs,
        strength: Callable[[], float | torch.Tensor | None],
        on_error: OnError | None,
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(*tensors)
        # Without the tensors, which would be kept outside of saved_tensors, past the end of backward.
        ctx.inputs, ctx.strength, ctx.on_error = dataclasses.replace(inputs, tensors=()), strength, on_error
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needed = ctx.needs_input_grad[3:]
        try:
            total = _with_penalty(ctx, grads, needed)
        except Exception as error:  # nothing of ours may stop a backward pass
            if ctx.on_error is None:
                raise
            ctx.on_error(error)
            total = _where_needed(grads, needed)
        return (None, None, None, *total)


def _with_penalty(
    ctx: Any, grads: tuple[torch.Tensor, ...], needed: tuple[bool, ...]
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients with those of strength * R added; unchanged where the strength is None."""
    strength = ctx.strength()
    if strength is None:
        return _where_needed(grads, needed)
    pulls = _penalty_gradients(ctx.inputs, ctx.saved_tensors, needed)
    return tuple(
        grad + (strength * pull).to(grad.dtype) if pull is not None else None
        for grad, pull in zip(grads, pulls, strict=True)
    )


def _where_needed(grads: tuple[torch.Tensor, ...], needed: tuple[bool, ...]) -> tuple[torch.Tensor | None, ...]:
    return tuple(grad if need else None for grad, need in zip(grads, needed, strict=True))


def _penalty_gradients(
    inputs: DecayInputs, tensors: tuple[torch.Tensor, ...], needed: tuple[bool, ...]
) -> list[torch.Tensor | None]:
    """Return dR / d(tensor) for every tensor that needs it, computed chunk by chunk along the sequence."""
    dims = inputs.length_dims
    lengths = [tensor.shape[dim] for tensor, dim in zip(tensors, dims, strict=True) if dim is not None]
    length = max(lengths, default=1)
    per_token = max(tensor.numel() // length for tensor in tensors)
    chunk = max(1, _ELEMENTS_AT_ONCE // max(1, per_token))
    sums = [
        torch.zeros_like(t, dtype=_precise(t).dtype) if need else None for t, need in zip(tensors, needed, strict=True)
    ]
    wanted = tuple(k for k, need in enumerate(needed) if need)
    positions = 0
    for start in range(0, length, chunk):
        pieces = [_tokens(tensor, dim, start, chunk) for tensor, dim in zip(tensors, dims, strict=True)]
        with torch.autocast(tensors[0].device.type, enabled=False):
            # Not autograd.grad: not every version of the compiler traces that inside a backward pass.
            gradients, norm = torch.func.grad(_summed_norm(inputs), wanted, has_aux=True)(*pieces)
        found = iter(gradients)
        positions += norm.numel()
        for total, dim, need in zip(sums, dims, needed, strict=True):
            gradient = next(found) if need else None
            if total is not None and gradient is not None:
                _tokens(total, dim, start, chunk).add_(gradient)
    return [None if total is None else total / positions for total in sums]


def _summed_norm(inputs: DecayInputs) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Return a function of the tensors that determine A, which returns the sum of ||A_t - I||_F, and each of them."""

    def summed(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        norm = _norm(inputs.transition(tensors))
        return norm.sum(), norm

    return summed


def _tokens(tensor: torch.Tensor, dim: int | None, start: int, count: int) -> torch.Tensor:
    """Return `count` tokens from `start` on; all of a tensor without a length, or with one entry for all tokens."""
    if dim is None or tensor.shape[dim] == 1:
        return tensor
    return tensor.narrow(dim, start, min(count, tensor.shape[dim] - start))


def add_penalty_gradient(
    log_decay: torch.Tensor, strength: float | torch.Tensor | Callable[[], float | torch.Tensor]
) -> torch.Tensor:
    """Return `log_decay` unchanged, and add the gradient of strength * identity_penalty(log_decay) to its gradient.

    Args:
        log_decay: as in `identity_penalty`. Without `requires_grad` it is returned as it is.
        strength: lambda times whatever the loss is multiplied with before backward (loss scale, 1 / accumulation
            steps); a callable is called during backward.
    """
    _check_log_decay(log_decay)
    ask = validation.function("strength", strength) if callable(strength) else _constant(strength)
    return _with_gradient(DecayInputs((log_decay,), lambda tensors: Transition(tensors[0])), ask)[0]


def _check_log_decay(log_decay: torch.Tensor) -> None:
    shape = "(batch, heads, length, state), with size 1 where it broadcasts"
    validation.tensor("log_decay", log_decay, shape, (4,), error=ConfigError)


def _constant(strength: float | torch.Tensor) -> Callable[[], float | torch.Tensor]:
    if isinstance(strength, torch.Tensor):
        if strength.numel() != 1 or strength.is_complex() or strength.is_meta:
            raise ConfigError(f"strength is {validation.shown(strength)}; pass one real number")
        return lambda: strength.reshape(())
    number = validation.real("strength", strength)
    return lambda: number


def _with_gradient(
    inputs: DecayInputs, strength: Callable[[], float | torch.Tensor | None], on_error: OnError | None = None
) -> tuple[torch.Tensor, ...]:
    if not any(tensor.requires_grad for tensor in inputs.tensors):
        return inputs.tensors
    result: tuple[torch.Tensor, ...] = _AddPenaltyGradient.apply(  # type: ignore[no-untyped-call]
        inputs, strength, on_error, *inputs.tensors
    )
    return result


class IdentityPull:
    """Regularizes one layer from inside its forward pass. Attach and detach at any step boundary.

    Outputs stay what they are, bit for bit. Nothing is injected in evaluation mode or without gradients. Every backward
    pass through a forward pass injects once, so run one backward pass per forward pass, as a training step does.

    Args:
        layer: the module.
        handle: where its log-decay passes; `find_layers(model)[i].spec.decay`.
        strength: lambda.
        grad_scale: what the loss is multiplied with before backward. 1 unless a loss scaler or gradient accumulation
            (1 / N) is at work.
        on_failure: called with the first error in a forward or backward pass, in the thread of the pass. The pass goes
            on as if nothing were attached: activations and gradients are those of the training.

    Raises:
        ConfigError: the strength is not a finite number above 0.

    Examples:
        >>> from ess_monitor.capture import find_layers
        >>> from ess_monitor.featurizers import WLA
        >>> [layer] = find_layers(WLA(16, 2, beta=1.0))
        >>> pull = IdentityPull(layer.module, layer.spec.decay, strength=0.5)
        >>> pull.attach()
        >>> layer.module(torch.randn(4, 8, 16)).mean().backward()
        >>> (layer.module.decay_logit.grad < 0).all().item()  # a step against the gradient raises every A
        True
        >>> pull.detach()
    """

    def __init__(
        self,
        layer: nn.Module,
        handle: DecayHandle,
        strength: float,
        *,
        grad_scale: Callable[[], float | torch.Tensor] = lambda: 1.0,
        on_failure: OnError = lambda error: None,
    ) -> None:
        check_model(layer, "layer")
        validation.instance("handle", handle, DecayHandle, hint="find_layers(model)[i].spec.decay")
        validation.function("grad_scale", grad_scale)
        validation.function("on_failure", on_failure)
        self.strength = validation.real("strength", strength, above=0, hint="lambda, for example 0.5")
        self._layer = layer
        self._handle = handle
        self._grad_scale = grad_scale
        self._on_failure = on_failure
        self._failure: Exception | None = None
        self._watch = HookHandle()

    @property
    def attached(self) -> bool:
        """True between `attach` and `detach`."""
        return self._watch.active

    @property
    def failure(self) -> Exception | None:
        """The first error of a pass, without its traceback. From then on nothing is added to gradients."""
        return self._failure

    def attach(self) -> None:
        """Enter the forward pass. A second call does nothing."""
        if not self._watch.active:
            self._watch = self._handle.site.watch(self._layer, before=self._inject)
            compile_with(self)

    def detach(self) -> None:
        """Leave the forward pass. A second call does nothing."""
        self._watch.remove()
        compile_without(self)

    def _inject(self, call: Call) -> Arguments | None:
        if not self._layer.training:
            return None
        try:
            inputs = self._handle.read(call)
            if inputs is None:
                return None
            # After a failure too, until it is detached: a checkpointed forward pass must be the same when repeated.
            return self._handle.write(call, _with_gradient(inputs, self._scaled, self._fail))
        except Exception as error:  # nothing of ours may stop a forward pass
            self._fail(error)
            return None

    def _fail(self, error: Exception) -> None:
        if self._failure is None:
            self._failure = error.with_traceback(None)
            self._on_failure(error)

    def _scaled(self) -> float | torch.Tensor | None:
        return None if self._failure is not None else self.strength * self._grad_scale()
