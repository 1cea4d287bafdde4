"""Random tokens through the model: a probe of what its memory could hold, whatever the data.

A rank cannot exceed what the data ask for: on sequences with few distinct tokens the ESS of a healthy memory is low
too. Random tokens lift that cap. The probe learns from one training forward pass which module takes the tokens, and
later calls that module with random ones, in eval mode and without gradients; it draws from a generator of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from ess_monitor import validation
from ess_monitor.capture.capture_pass import evaluating
from ess_monitor.capture.layers import check_model
from ess_monitor.errors import CaptureError


class TokenProbe:
    """Calls a model with random tokens.

    Args:
        model: must have a token embedding (`torch.nn.Embedding`) below a module that is called with integer tokens of
            shape (batch, length) as its only tensor argument.
        samples: sequences per probe.
        seed: of the tokens.

    Raises:
        CaptureError: the model has no embedding.
        ConfigError: `model` is none, or a number is out of range.
    """

    def __init__(self, model: nn.Module, samples: int, *, seed: int = 0) -> None:
        check_model(model)
        samples = validation.whole("samples", samples, 1)
        seed = validation.whole("seed", seed, -(2**62), 2**62)
        embeddings = {name: m for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
        if not embeddings:
            raise CaptureError(
                f"capture.source: {type(model).__name__} has no torch.nn.Embedding, so random tokens mean nothing to "
                "it; use the source 'train' or 'validation'"
            )
        self._vocabulary = max(m.num_embeddings for m in embeddings.values())
        prefixes = {name.rsplit(".", k)[0] for name in embeddings for k in range(1, name.count(".") + 1)} | {""}
        self._above = [
            m
            for name, m in model.named_modules()
            # One rank probes alone: in a call through DDP it would send buffers that no other rank takes.
            if name in prefixes and name not in embeddings and not _distributes(m)
        ]
        self._samples = samples
        self._seed = seed
        self._handles: list[RemovableHandle] = []
        self._call: Callable[[torch.Tensor], Any] | None = None
        self._like: torch.Tensor | None = None
        self._entry: nn.Module | None = None

    def watch(self) -> None:
        """Learn from the next forward pass how the model is called."""
        if not self._handles and self._call is None:
            self._handles = [m.register_forward_pre_hook(self._learn, with_kwargs=True) for m in self._above]

    def unwatch(self) -> None:
        """Leave the model."""
        while self._handles:
            self._handles.pop().remove()

    def run(self, turn: int) -> bool:
        """Call the model with random tokens; False while it is not known how.

        Args:
            turn: number of the probe; the same turn draws the same tokens.
        """
        self.unwatch()
        if self._call is None or self._like is None or self._entry is None:
            return False
        generator = torch.Generator().manual_seed(self._seed + turn)
        shape = (self._samples, *self._like.shape[1:])
        tokens = torch.randint(self._vocabulary, shape, generator=generator, dtype=torch.int64)
        with evaluating(self._entry):
            self._call(tokens.to(self._like.device, self._like.dtype, non_blocking=True))
        return True

    def _learn(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._call is not None:
            return
        slots = [k for k, value in enumerate(args) if isinstance(value, torch.Tensor)]
        names = [name for name, value in kwargs.items() if isinstance(value, torch.Tensor)]
        tensors = [args[k] for k in slots] + [kwargs[name] for name in names]
        if len(tensors) != 1 or tensors[0].dim() != 2 or tensors[0].is_floating_point():
            return  # a batch of several tensors: a module further down takes the tokens alone
        self._like = tensors[0].new_empty((1, tensors[0].shape[1]))
        self._entry = module

        def call(tokens: torch.Tensor) -> Any:
            if slots:
                return module(*args[: slots[0]], tokens, *args[slots[0] + 1 :], **kwargs)
            return module(*args, **{**kwargs, names[0]: tokens})

        if slots:
            args = (*args[: slots[0]], None, *args[slots[0] + 1 :])  # do not keep the batch alive
        else:
            kwargs = {**kwargs, names[0]: None}
        self._call = call


def _distributes(module: nn.Module) -> bool:
    return any(isinstance(part, DistributedDataParallel) for part in module.modules())
