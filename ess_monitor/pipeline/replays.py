"""From a suspicion to evidence: run the batches of the next steps again, on the training thread.

Nothing is kept from one step to the next but sums: the batch of a step is run again at the end of the step. All ranks
that decide together examine the same layers at the same steps, whatever fails on one of them, so that a forward pass
with collectives finds its partners.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ess_monitor.capture.decay_power import can_raise
from ess_monitor.errors import CaptureError
from ess_monitor.evidence import add_changes
from ess_monitor.evidence.call_recorder import CallRecorder
from ess_monitor.evidence.counterfactual import Replay, changes_of_batch
from ess_monitor.evidence.undisturbed import why_not_alone
from ess_monitor.pipeline.checkpoint import changes_from_state, changes_state
from ess_monitor.pipeline.context import RunContext
from ess_monitor.records import Changes


class Replays:
    """Collects what batches that are run again say of the suspected layers.

    Args:
        model: the watched model.
        context: of the run.
        alone: whether the other ranks of the run take no part: collectives would wait for them without end.
    """

    def __init__(self, model: nn.Module, context: RunContext, *, alone: Callable[[], bool]) -> None:
        self._model, self._context, self._alone = model, context, alone
        self._layers = {layer.name: layer for layer in context.layers}
        self._recorder = CallRecorder(model)
        self._sums: dict[str, Changes] = {}
        self._left = 0
        """Steps whose batch is still to be run again."""
        hindered = why_not_alone(model) if alone() else ""
        reasons = {name: hindered or can_raise(layer) for name, layer in self._layers.items()}
        self.obstacles = {name: reason for name, reason in reasons.items() if reason}
        """Why there can be no evidence, for layers that cannot be examined at all."""

    @property
    def due(self) -> bool:
        """Whether the batch of the present step is to be run again."""
        return self._left > 0 and self._context.guards["replay"].open

    def ask(self, layers: Iterable[str]) -> None:
        """Begin to examine these layers, and end it for all others."""
        wanted = [name for name in layers if name in self._layers]
        if set(wanted) - self._sums.keys():  # all of them share their batches
            self._sums, self._left = {}, self._context.config.evidence.batches
        self._sums = {name: self._sums.get(name, Changes()) for name in wanted}
        if not wanted:
            self._left = 0
        self._watch()

    def collect(self, replay: Replay | None) -> None:
        """Run the batch of this step again.

        A failure is counted and never raised. After some in a row no more batches are run again.

        Args:
            replay: returns its loss. Without one the model is called as it was called last.
        """
        self._left -= 1
        started = self._context.clock()
        with self._context.guards["replay"]:
            self._collect(replay)
        self._context.charge("replay", self._context.clock() - started)
        self._watch()

    def take(self) -> dict[str, Changes]:
        """Return what was found once all batches are done, and forget it. Without batches nothing could be found."""
        if self.due:
            return {}
        done, self._sums = self._sums, {}
        return done

    def stop(self) -> None:
        """Leave the model."""
        self._recorder.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the sums so far, for a checkpoint."""
        return {"replays": {"left": self._left, "sums": changes_state(self._sums)}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        saved = state["replays"]
        sums = changes_from_state(saved["sums"])
        self._sums = {name: changes for name, changes in sums.items() if name in self._layers}
        self._left = saved["left"] if self._sums else 0
        self._watch()

    def _collect(self, replay: Replay | None) -> None:
        call = self._recorder.take()
        if replay is None and call is None:
            raise CaptureError(
                "no batch could be run again: the model itself was not called in this step; give Monitor.step a "
                "replay=, a function that returns the loss of the batch"
            )
        run = replay if replay is not None else call.run  # type: ignore[union-attr]
        layers = [self._layers[name] for name in self._sums]
        gives_loss, alone = replay is not None, self._alone()
        for name, changes in changes_of_batch(self._model, layers, run, gives_loss=gives_loss, alone=alone):
            sums = self._sums[name]
            if not sums.batches or sums.by_kl == changes.by_kl:
                self._sums[name] = add_changes(sums, changes)
            elif sums.by_kl:  # a loop that gives a loss at some steps only: outputs do not count beside it
                self._sums[name] = changes

    def _watch(self) -> None:
        if self.due:
            self._recorder.attach()
        else:
            self._recorder.detach()
