"""Computes loss and accuracy on the positions that are asked."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ess_monitor import validation
from ess_monitor.errors import OperatorError
from ess_monitor.tasks.base import IGNORED


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats over the positions whose target is not -100.

    Args:
        logits: (..., vocab_size).
        targets: (...) int64.

    Returns:
        A scalar tensor on the logits' device; NaN when no position is asked.

    Raises:
        OperatorError: The shapes do not go together, or a dtype or device is wrong.

    Example:
        >>> import torch
        >>> loss(torch.zeros(1, 2, 4), torch.tensor([[3, -100]]))
        tensor(1.3863)
    """
    _check(logits, targets)
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED)


def accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the share of positions with a target other than -100 whose largest logit is the target's.

    Args, returns and errors as in `loss`.

    Example:
        >>> import torch
        >>> accuracy(torch.eye(4)[None], torch.tensor([[0, 1, 0, -100]]))
        tensor(0.6667)
    """
    _check(logits, targets)
    asked = targets != IGNORED
    return ((logits.argmax(-1) == targets) & asked).sum() / asked.sum()


def _check(logits: Tensor, targets: Tensor) -> None:
    validation.tensor("logits", logits, "(..., vocab_size)", range(2, 65), error=OperatorError)
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64:
        raise OperatorError(f"targets is {validation.shown(targets)}; pass token ids of dtype torch.int64.")
    if targets.device != logits.device:
        raise OperatorError(f"targets is on {targets.device} and logits on {logits.device}; move them to one device.")
    if not logits.shape[-1]:
        raise OperatorError(f"logits has shape {tuple(logits.shape)}; the vocabulary is empty.")
    if logits.shape[:-1] != targets.shape:
        raise OperatorError(
            f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} do not go together; expected "
            "(..., vocab_size) and (...) with the same leading sizes."
        )
