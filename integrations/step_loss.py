"""The loss of one step, taken from what the model returns, for loops that do not tell their callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ess_monitor.capture.hooks.forward_errors import when_raised


class StepLoss:
    """Listens to a model's training passes from its construction until `take`, or until one of them raises.

    The Trainer of transformers takes the loss from the model's output, `output["loss"]` or `output[0]`, and hands it to
    no callback. What is kept here are the same tensors; nothing waits for the device.

    Example:
        >>> class Model(nn.Module):
        ...     def forward(self, x):
        ...         return {"loss": x.mean()}
        >>> model = Model()
        >>> loss = StepLoss(model)
        >>> _ = model(torch.ones(2)), model(torch.zeros(2))
        >>> loss.take()
        tensor(0.5000)
    """

    def __init__(self, model: nn.Module) -> None:
        self._losses: list[torch.Tensor] = []
        self._shared_count = False
        self._handle = model.register_forward_hook(self._listen, with_kwargs=True)
        self._forget = when_raised(model, self._leave)

    def take(self) -> torch.Tensor | None:
        """Stop listening. The loss of the step; None when the model did not return one.

        Micro-batches are averaged, unless the model was told how many tokens the whole step has: then each loss is a
        share, and the step's is their sum.
        """
        self._leave()
        if not self._losses:
            return None
        losses = torch.stack([loss.reshape(()) for loss in self._losses])
        return losses.sum() if self._shared_count else losses.mean()

    def _leave(self) -> None:
        self._handle.remove()
        self._forget()

    def _listen(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        loss = _loss_of(output)
        if loss is not None:
            # An alias, not a copy: where the Trainer rescales the loss in place (several processes), this one follows.
            self._losses.append(loss.detach())
            self._shared_count = kwargs.get("num_items_in_batch") is not None


def _loss_of(output: Any) -> torch.Tensor | None:
    if isinstance(output, Mapping):
        loss = output.get("loss")
    elif isinstance(output, (tuple, list)):
        loss = output[0] if output else None
    else:
        loss = getattr(output, "loss", None)
    return loss if isinstance(loss, torch.Tensor) and loss.numel() == 1 else None
