"""Reads the loss of one step from the model's output, for loops that do not pass it to their callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ess_monitor.capture.hooks.call_site import ModuleHook
from ess_monitor.capture.hooks.forward_errors import when_raised


class StepLoss:
    """Collects the losses of a model's training passes from its construction until `take`, or until a pass raises.

    The Trainer of transformers reads the loss from the model's output, `output["loss"]` or `output[0]`, and passes it
    to no callback. The same tensors are kept here; nothing waits for the device.

    Examples:
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
        self._are_shares = False
        self._handle = model.register_forward_hook(ModuleHook(self._collect), with_kwargs=True)
        self._stop_watching = when_raised(model, self._detach)

    def take(self) -> torch.Tensor | None:
        """Detach from the model and return the loss of the step; None when the model returned none.

        The losses of micro-batches are averaged. Where the model was given the number of tokens of the whole step, each
        loss is a share, and they are summed.
        """
        self._detach()
        if not self._losses:
            return None
        losses = torch.stack([loss.reshape(()) for loss in self._losses])
        return losses.sum() if self._are_shares else losses.mean()

    def _detach(self) -> None:
        self._handle.remove()
        self._stop_watching()

    def _collect(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        loss = _loss_of(output)
        if loss is not None:
            # An alias, not a copy: with several processes the Trainer rescales the loss in place afterwards.
            self._losses.append(loss.detach())
            self._are_shares = kwargs.get("num_items_in_batch") is not None


def _loss_of(output: Any) -> torch.Tensor | None:
    if isinstance(output, Mapping):
        loss = output.get("loss")
    elif isinstance(output, (tuple, list)):
        loss = output[0] if output else None
    else:
        loss = getattr(output, "loss", None)
    return loss if isinstance(loss, torch.Tensor) and loss.numel() == 1 else None
