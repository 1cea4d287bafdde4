"""Train a few steps from one seed, and do something between them."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ess_monitor.evidence.call_recorder import CallRecorder
from ess_monitor.evidence.undisturbed import Undisturbed
from tests.evidence.dump import everything
from tests.evidence.models import WIDTH

STEPS = 5
Between = Callable[[Any, Tensor], None]
"""What happens before each step and after the last one, with the model and a batch."""


def vectors(step: int) -> Tensor:
    """A batch for the models of vectors, larger between the steps."""
    return torch.randn(4 if step < 100 else 6, WIDTH, generator=torch.Generator().manual_seed(step))


def tokens(step: int) -> Tensor:
    """A batch for the models of tokens."""
    return torch.randint(0, 32, (2, 12), generator=torch.Generator().manual_seed(step))


def trained(
    build: Callable[[], nn.Module],
    between: Between | None = None,
    *,
    batch: Callable[[int], Tensor] = vectors,
    wrap: Callable[[nn.Module], Any] = lambda model: model,
    region: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, Any]:
    """Everything that is left of a training, its losses too."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    model = build().train()
    called = wrap(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for step in range(STEPS):
        if between is not None:
            between(called, batch(100 + step))
        with region():
            loss = called(batch(step)).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if between is not None:
        between(called, batch(200))  # so that a later step hides nothing
    return {**everything(model, optimizer), "losses": losses}


class Raised(Exception):
    """By a forward pass, on purpose."""


def call(model: Any, batch: Tensor, *, fails: bool = False) -> Any:
    """Call a model, and raise where its forward pass ends if asked to."""
    if not fails:
        return model(batch)

    def fail(*_: object) -> None:
        raise Raised

    handle = model.register_forward_hook(fail)
    try:
        return model(batch)
    except Raised:
        return None
    finally:
        handle.remove()


def replayed(model: Any, batch: Tensor, *, alone: bool = False) -> None:
    """Call a model three times in a block; the second call raises, and the third is in eval mode."""
    with Undisturbed(model, alone=alone) as block:
        first = call(model, batch)
        block.rewind()
        call(model, batch, fails=True)
        block.rewind()
        assert torch.equal(first, call(model, batch))
        block.rewind()
        model.eval()
        call(model, batch)


class Recorded:
    """Makes the last call of the training again, three times in a block, and checks that the outputs are equal."""

    def __init__(self, *, alone: bool = False) -> None:
        self.alone = alone
        self.count = 0
        self._recorder: CallRecorder | None = None

    def __call__(self, model: Any, batch: Tensor) -> None:
        if self._recorder is None:
            self._recorder = CallRecorder(model)
            self._recorder.attach()
            return
        call = self._recorder.take()
        assert call is not None
        with Undisturbed(model, alone=self.alone) as block:
            outputs = []
            for _ in range(3):
                block.rewind()
                outputs.append(call.run())
        assert torch.equal(outputs[0], outputs[2])
        assert self._recorder.recorded is None, "a replay is no call of the training"
        self.count += 1
        if self.count == STEPS:
            self._recorder.detach()


def left_by_an_error(model: Any, batch: Tensor) -> None:
    """Leave a block by an exception of a forward pass."""

    def fail(*_: object) -> None:
        raise Raised

    handle = model.register_forward_hook(fail)
    try:
        with Undisturbed(model):
            model(batch)
    except Raised:
        return
    finally:
        handle.remove()
    raise AssertionError("the block has swallowed an exception")


def called_as_it_is(model: Any, batch: Tensor) -> None:
    """Call a model without gradients and nothing else: what the block is there to prevent."""
    with torch.no_grad():
        model(batch)
