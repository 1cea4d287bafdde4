"""Run a batch again with something else in a layer, and compare: what would the loss be if it remembered more?

A^0.5 and A^0.1 remember more, A = 0 nothing; a gate from before a treatment remembers as it did. All forward passes of
a batch begin with the same random generators and buffers, so that dropout and batch statistics are the same in each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ess_monitor.capture import Layer
from ess_monitor.capture.decay_power import decay_raised
from ess_monitor.errors import CaptureError
from ess_monitor.evidence.outputs import kl_divergence, logits_of, loss_of
from ess_monitor.evidence.undisturbed import Undisturbed
from ess_monitor.records import ChangeKind, Changes

POWERS = (0.5, 0.1, math.inf)
"""Of A in the passes that are compared with the present one: those of `m50`, `m90` and `cut`."""

Replay = Callable[[], Any]
"""Runs a batch again: returns its loss, or the model's output."""
Alternative = Callable[[], AbstractContextManager[object]]
"""Puts something else into a layer, for the time of a with-block."""


def other_decays(layer: Layer) -> tuple[Alternative, ...]:
    """Return what puts each of `POWERS` of A in the place of A."""
    return tuple(partial(_with_power, layer, power) for power in POWERS)


def changes_of_batch(
    model: nn.Module,
    alternatives: Mapping[str, Sequence[Alternative]],
    replay: Replay,
    *,
    gives_loss: bool,
    alone: bool = False,
) -> Iterator[tuple[str, Changes]]:
    """Run one batch again, as it is and with each of the alternatives. The training is left as it was, bit for bit.

    Args:
        model: the watched model.
        alternatives: by layer, those of `other_decays`, or a single one (of a trial).
        replay: runs the batch.
        gives_loss: whether it returns the loss. Otherwise the loss is looked for in the model's output, and outputs
            are compared where they have none.
        alone: whether the other ranks of the run do not replay; collectives of wrappers are then left out.

    Yields:
        Each layer's name, and the changes of this batch. A layer without usable numbers is left out, after as many
        passes as the others get: other ranks may have numbers for it, and their passes need partners.

    Raises:
        CaptureError: after all passes: the replay gives neither a loss nor outputs, gives numbers that are not finite,
            or does not call a layer.
    """
    failures: list[CaptureError] = []
    with Undisturbed(model, alone=alone) as state:
        state.rewind()
        base = _Outcome(replay(), gives_loss)
        for name, others in alternatives.items():
            moved = []
            for other in others:
                state.rewind()
                try:
                    with other():
                        given = replay()
                    moved.append(base.change_to(_Outcome(given, gives_loss)))
                except CaptureError as error:
                    failures.append(error)
            if len(moved) < len(others):
                continue
            m50, m90, cut = (*torch.stack(moved).tolist(), 0.0, 0.0)[:3]
            level = 0.0 if base.loss is None else float(base.loss)
            if not all(map(math.isfinite, (level, m50, m90, cut))):
                failures.append(CaptureError(f"layer {name}: the loss of a batch that was run again is not finite"))
                continue
            kind: ChangeKind = "outputs" if base.loss is None else "trial" if len(others) == 1 else "loss"
            yield name, Changes(1, level, m50, m90, cut, m50 * m50, kind)
    if failures:
        raise failures[0]


@contextmanager
def _with_power(layer: Layer, power: float) -> Iterator[None]:
    with decay_raised(layer, power) as raised:
        yield
    if raised.calls == 0 or raised.unchanged:
        raise CaptureError(f"layer {layer.name}: a batch that was run again did not call it with another decay")


class _Outcome:
    """Holds what one pass gave."""

    def __init__(self, given: Any, gives_loss: bool) -> None:
        self.loss = _scalar(given) if gives_loss else loss_of(given)
        self.logits = None
        if self.loss is None:
            self.logits = logits_of(given)
            if self.logits is None:
                raise CaptureError(f"replay: {type(given).__name__} is neither a loss nor the model's outputs")
            self.logits = self.logits.detach()

    def change_to(self, other: _Outcome) -> torch.Tensor:
        if self.loss is not None and other.loss is not None:
            return (other.loss.detach().double() - self.loss.detach().double()).reshape(())
        if self.logits is None or other.logits is None:
            raise CaptureError("replay: it gave a loss once and outputs another time")
        return kl_divergence(self.logits, other.logits).double().reshape(())


def _scalar(given: Any) -> torch.Tensor:
    if isinstance(given, (int, float)) and not isinstance(given, bool):
        return torch.tensor(float(given), dtype=torch.float64)
    if isinstance(given, torch.Tensor) and given.numel() == 1 and not given.is_complex():
        return given
    raise CaptureError(
        f"replay: it returned {type(given).__name__}; a closure returns the loss of the batch, one real number"
    )
