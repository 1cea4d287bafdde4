"""Run a batch again with something else in a layer, and compare: what if it remembered more, or had room for less?

A^0.5 and A^0.1 remember more, A = 0 nothing. A smaller state has room for less. A gate from before a treatment
remembers as it did. All forward passes of a batch begin with the same random generators and buffers, so that dropout
and batch statistics are the same in each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from ess_monitor.capture import Layer
from ess_monitor.capture.decay_power import decay_raised
from ess_monitor.capture.hooks.changed_calls import ChangedCalls
from ess_monitor.errors import CaptureError
from ess_monitor.evidence.outputs import kl_divergence, logits_of, loss_of
from ess_monitor.evidence.state_reduction import state_reduced
from ess_monitor.evidence.undisturbed import Undisturbed
from ess_monitor.records import ChangeKind, Changes

POWERS = (0.5, 0.1, math.inf)
"""Of A in the passes that are compared with the present one: those of `m50`, `m90` and `cut`."""
SHARES = (0.25, 0.5, 1.0)
"""Of the state dimensions that are left out: those of `quarter`, `half` and `whole`."""

Replay = Callable[[], Any]
"""Runs a batch again: returns its loss, or the model's output."""
Alternative = Callable[[], AbstractContextManager[object]]
"""Puts something else into a layer, for the time of a with-block."""


class Counterfactual(NamedTuple):
    """What is put into a layer in the passes that are compared with the present one."""

    kind: Literal["decay", "state", "trial"]
    """trial: the gate from before a treatment."""
    alternatives: tuple[Alternative, ...]

    def changes(self, *, by_outputs: bool = False) -> Changes:
        """Return sums over no batches yet."""
        kinds: dict[str, tuple[ChangeKind, ChangeKind]] = {
            "decay": ("loss", "outputs"),
            "state": ("state_loss", "state_outputs"),
            "trial": ("trial", "outputs"),
        }
        return Changes(kind=kinds[self.kind][by_outputs])


def other_decays(layer: Layer) -> Counterfactual:
    """Return what puts each of `POWERS` of A in the place of A."""
    return Counterfactual("decay", tuple(partial(_with_power, layer, power) for power in POWERS))


def smaller_states(layer: Layer) -> Counterfactual:
    """Return what leaves out each of `SHARES` of the layer's state dimensions."""
    return Counterfactual("state", tuple(partial(_with_smaller_state, layer, share) for share in SHARES))


def changes_of_batch(
    model: nn.Module,
    counterfactuals: Mapping[str, Counterfactual],
    replay: Replay,
    *,
    gives_loss: bool,
    alone: bool = False,
) -> Iterator[tuple[str, Changes]]:
    """Run one batch again, as it is and with something else in each layer. The training is left as it was bit for bit.

    Args:
        model: the watched model.
        counterfactuals: by layer.
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
        for name, counterfactual in counterfactuals.items():
            moved = []
            for other in counterfactual.alternatives:
                state.rewind()
                try:
                    with other():
                        given = replay()
                    moved.append(base.change_to(_Outcome(given, gives_loss)))
                except CaptureError as error:
                    failures.append(error)
            if len(moved) < len(counterfactual.alternatives):
                continue
            first, second, third = (*torch.stack(moved).tolist(), 0.0, 0.0)[:3]
            level = 0.0 if base.loss is None else float(base.loss)
            if not all(map(math.isfinite, (level, first, second, third))):
                failures.append(CaptureError(f"layer {name}: the loss of a batch that was run again is not finite"))
                continue
            kind = counterfactual.changes(by_outputs=base.loss is None).kind
            yield name, Changes(1, level, first, second, third, first * first, kind)
    if failures:
        raise failures[0]


@contextmanager
def _with_power(layer: Layer, power: float) -> Iterator[None]:
    with decay_raised(layer, power) as raised:
        yield
    _check(raised, layer, "another decay")


@contextmanager
def _with_smaller_state(layer: Layer, share: float) -> Iterator[None]:
    with state_reduced(layer, share) as reduced:
        yield
    _check(reduced, layer, "a smaller state")


def _check(changed: ChangedCalls, layer: Layer, what: str) -> None:
    if changed.calls == 0 or changed.unchanged:
        raise CaptureError(f"layer {layer.name}: a batch that was run again did not call it with {what}")


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
