"""Call the model with random tokens, to see what its memory could hold whatever the data.

A rank cannot exceed what the data ask for: on sequences with few distinct tokens the ESS of a healthy memory is low
too. Random tokens lift that cap. The probe learns from one training forward pass which module takes the tokens. Later
it calls that module with random ones, in eval mode and without gradients, from a random generator of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from ess_monitor import validation
from ess_monitor.capture.hooks.call_site import ModuleHook
from ess_monitor.capture.layers import check_model, evaluating
from ess_monitor.errors import CaptureError


class TokenProbe:
    """Calls a model with random tokens.

    Args:
        model: must have a token embedding (`torch.nn.Embedding`) below a module that is called with integer tokens of
            shape (batch, length) as its only tensor argument.
        samples: sequences per probe.
        seed: of the tokens.
        inside: the block in which a module is called: in eval mode, without gradients. What else it puts back after the
            call is up to it.

    Raises:
        CaptureError: the model has no embedding.
        ConfigError: `model` is not a module, or a number is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: int,
        *,
        seed: int = 0,
        inside: Callable[[nn.Module], AbstractContextManager[object]] = evaluating,
    ) -> None:
        check_model(model)
        self._inside = validation.function("inside", inside)
        self._samples = validation.whole("samples", samples, 1)
        self._seed = validation.whole("seed", seed, -(2**62), 2**62)
        embeddings = {name: m for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
        if not embeddings:
            raise CaptureError(
                f"capture.source: {type(model).__name__} has no torch.nn.Embedding, so random tokens mean nothing to "
                "it; use the source 'train' or 'validation'"
            )
        self._vocabulary = max(m.num_embeddings for m in embeddings.values())
        prefixes = {name.rsplit(".", k)[0] for name in embeddings for k in range(1, name.count(".") + 1)} | {""}
        self._candidates = [
            m
            for name, m in model.named_modules()
            # One rank probes alone: in a call through DDP it would send buffers that no other rank receives.
            if name in prefixes and name not in embeddings and not _contains_ddp(m)
        ]
        self._handles: list[RemovableHandle] = []
        self._call: Callable[[int], None] | None = None

    def watch(self) -> None:
        """Learn from the next forward pass how the model is called."""
        if not self._handles and self._call is None:
            self._handles = [
                m.register_forward_pre_hook(ModuleHook(self._learn), with_kwargs=True) for m in self._candidates
            ]

    def unwatch(self) -> None:
        """Remove the hooks of `watch`."""
        while self._handles:
            self._handles.pop().remove()

    def run(self, turn: int) -> bool:
        """Call the model with random tokens. Return False where it is not known yet how the model is called.

        Args:
            turn: number of the probe; the same turn draws the same tokens.
        """
        self.unwatch()
        if self._call is None:
            return False
        self._call(turn)
        return True

    def _learn(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._call is not None:
            return
        given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        tensors = {key: value for key, value in given.items() if isinstance(value, torch.Tensor)}
        if len(tensors) != 1:
            return  # a batch of several tensors: a module further down takes the tokens alone
        [(slot, tokens)] = tensors.items()
        if tokens.dim() != 2 or tokens.is_floating_point():
            return
        length, device, dtype = tokens.shape[1], tokens.device, tokens.dtype
        # The closure must not keep the batch in memory.
        given[slot], positions, names = None, range(len(args)), tuple(kwargs)

        def call(turn: int) -> None:
            generator = torch.Generator().manual_seed(self._seed + turn)
            shape = (self._samples, length)
            random = torch.randint(self._vocabulary, shape, generator=generator, dtype=torch.int64)
            filled = {**given, slot: random.to(device, dtype, non_blocking=True)}
            with self._inside(module):
                module(*(filled[k] for k in positions), **{name: filled[name] for name in names})

        self._call = call


def _contains_ddp(module: nn.Module) -> bool:
    return any(isinstance(part, DistributedDataParallel) for part in module.modules())
