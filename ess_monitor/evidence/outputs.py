"""Read the loss and the logits off a model's output, and compare two of the latter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ess_monitor import validation
from ess_monitor.errors import ConfigError

ELEMENTS_OF_A_CHUNK = 2**23
"""Of each of two tensors that are compared at a time. A handful of float32 tensors of this size are then in memory."""


def loss_of(output: Any) -> torch.Tensor | None:
    """Return the loss in a model's output: `output.loss`, `output["loss"]`, or an output that is a scalar itself.

    None for anything else, and for a loss that is not one real number.

    Examples:
        >>> loss_of({"loss": torch.tensor(2.0), "logits": torch.ones(1, 4)}), loss_of(torch.ones(1, 4))
        (tensor(2.), None)
    """
    found = output if isinstance(output, torch.Tensor) and output.dim() == 0 else _named(output, "loss")
    if isinstance(found, torch.Tensor) and found.numel() == 1 and found.is_floating_point():
        return found.reshape(())
    return None


def logits_of(output: Any) -> torch.Tensor | None:
    """Return the first floating-point tensor of at least two dimensions that may be logits; None without one.

    Looked at are the output itself, `output.logits`, `output["logits"]`, and the items of a tuple or list.

    Examples:
        >>> logits_of((torch.tensor(2.0), torch.ones(1, 4))).shape
        torch.Size([1, 4])
    """
    items = output if isinstance(output, (tuple, list)) else ()
    for found in (output, _named(output, "logits"), *items):
        if isinstance(found, torch.Tensor) and found.is_floating_point() and found.dim() >= 2:
            return found
    return None


def _named(output: Any, name: str) -> Any:
    if isinstance(output, Mapping):
        return output.get(name)
    return None if isinstance(output, torch.Tensor) else getattr(output, name, None)


def kl_divergence(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return KL(softmax(a) || softmax(b)) in nats over the last dimension, averaged over all others.

    Computed in float32, a number of rows at a time: with a vocabulary of 100 000 no copy of the logits is made.

    Args:
        a: logits, (..., classes).
        b: of the same shape.

    Returns:
        A scalar on the device of `a`. Nothing waits for it.

    Raises:
        ConfigError: they are not floating-point tensors of one shape, or are empty.

    Examples:
        >>> kl_divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
        tensor(0.1201)
    """
    for name, value in (("a", a), ("b", b)):
        validation.instance(name, value, torch.Tensor)
        if not value.is_floating_point():
            raise ConfigError(f"{name} is {validation.shown(value)}; it must be of a floating-point dtype.")
    if a.shape != b.shape or a.dim() == 0 or a.numel() == 0:
        raise ConfigError(
            f"a is {validation.shown(a)} and b {validation.shown(b)}; both must be (..., classes), of one shape and "
            "with at least one element"
        )
    total = torch.zeros((), device=a.device)
    for one, other in zip(_chunks(a), _chunks(b), strict=True):
        log_p, log_q = one.float().log_softmax(-1), other.float().log_softmax(-1)
        p = log_p.exp()
        # Of a class that is masked out in both, 0 * (-inf + inf) would be NaN.
        total = total + torch.where(p > 0, p * (log_p - log_q), 0).sum()
    return total / (a.numel() // a.shape[-1])


def _chunks(logits: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield all rows, (rows, classes), a number at a time."""
    if logits.dim() > 2:
        for part in logits.unbind(0):
            yield from _chunks(part)
        return
    rows = logits.reshape(-1, logits.shape[-1])
    yield from torch.split(rows, max(1, ELEMENTS_OF_A_CHUNK // rows.shape[-1]))
