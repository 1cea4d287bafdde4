"""From a suspicion to evidence: run the batches of the next steps again, on the training thread.

Nothing is kept from one step to the next but sums: the batch of a step is run again at the end of the step. All ranks
that decide together examine the same layers at the same steps, whatever fails on one of them, so that a forward pass
with collectives finds its partners.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from ess_monitor.capture.decay_power import can_raise
from ess_monitor.errors import CaptureError, format_error
from ess_monitor.evidence.call_recorder import CallRecorder
from ess_monitor.evidence.counterfactual import (
    Alternative,
    Counterfactual,
    Replay,
    changes_of_batch,
    other_decays,
    smaller_states,
)
from ess_monitor.evidence.data_parallel import why_not_alone
from ess_monitor.evidence.state_reduction import can_reduce
from ess_monitor.evidence.verdict import add_changes
from ess_monitor.pipeline.checkpoint import changes_from_state, changes_state, has_settings
from ess_monitor.pipeline.context import RunContext
from ess_monitor.records import Changes


class Replays:
    """Collects what batches that are run again say of layers: of suspected and full ones, and of those under treatment.

    Args:
        model: the watched model.
        context: of the run.
        alone: whether the other ranks of the run take no part: collectives would wait for them without end.
        together: whether they do.
    """

    def __init__(
        self, model: nn.Module, context: RunContext, *, alone: Callable[[], bool], together: Callable[[], bool]
    ) -> None:
        self._model, self._context, self._alone, self._together = model, context, alone, together
        self._layers = {layer.name: layer for layer in context.layers}
        self._recorder = CallRecorder(model)
        self._counterfactuals: dict[str, Counterfactual] = {}
        """What is put into each layer that is examined now."""
        self._sums: dict[str, Changes] = {}
        self._begins_at = self._left = 0
        """From which step on batches are run again, and how many are left."""
        hindered = why_not_alone(model) if alone() else ""
        if context.config.autopilot.mode == "off":
            hindered = 'with autopilot.mode "off" no batch is run again'
        self.obstacles = {name: why for name, layer in self._layers.items() if (why := hindered or can_raise(layer))}
        """Why there can be no evidence on the decay, for layers without."""
        self.state_obstacles = {
            name: why for name, layer in self._layers.items() if (why := hindered or can_reduce(layer))
        }
        """The same of the size of the state."""

    def due(self, step: int) -> bool:
        """Return whether the batch of this optimizer step is to be run again."""
        return self._left > 0 and step >= self._begins_at and self._context.guards["replay"].open

    def ask(
        self, suspects: Iterable[str], full: Iterable[str], trials: Mapping[str, Alternative], begins_at: int
    ) -> None:
        """Set what is examined from a step on. What is under way for the same layers goes on.

        Args:
            suspects: layers whose decay is changed.
            full: layers whose state is made smaller.
            trials: by layer under treatment, what puts the gate from before it in its place.
            begins_at: optimizer steps at the first batch.
        """
        asked = {name: smaller_states(self._layers[name]) for name in full if name in self._layers}
        asked |= {name: other_decays(self._layers[name]) for name in suspects if name in self._layers}
        asked |= {name: Counterfactual("trial", (trial,)) for name, trial in trials.items()}
        if self._kinds(asked) != self._kinds(self._counterfactuals) or not self._sums:
            self._sums = {name: each.changes() for name, each in asked.items()}
            self._begins_at, self._left = begins_at, self._context.config.evidence.batches if asked else 0
        self._counterfactuals = asked
        self._watch()

    def collect(self, replay: Replay | None) -> None:
        """Run the batch of this step again.

        A failure is counted and never raised. After some in a row no more batches are run again, unless other ranks do
        it at the same steps, which may not have failed and would wait for this one.

        Args:
            replay: returns its loss. Without one the model is called as it was called last.
        """
        self._left -= 1
        started = self._context.clock()
        guard = self._context.guards["replay"]
        with guard:
            try:
                self._collect(replay)
            except Exception as error:
                if not self._together():
                    raise
                guard.count(format_error(error), error)
        self._context.charge("replay", self._context.clock() - started)
        self._watch()

    def take(self) -> dict[str, Changes]:
        """Return what was found once all batches are done, and forget it. Without batches nothing could be found."""
        if self._left > 0 and self._context.guards["replay"].open:
            return {}
        done, self._sums, self._counterfactuals, self._left = self._sums, {}, {}, 0
        return done

    def stop(self) -> None:
        """Leave the model."""
        self._recorder.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the sums so far, for a checkpoint."""
        sums, settings = changes_state(self._sums), self._context.config.evidence.model_dump(mode="json")
        return {"replays": {"left": self._left, "begins_at": self._begins_at, "sums": sums, "settings": settings}}

    def load_state_dict(
        self,
        state: Mapping[str, Any],
        suspects: Iterable[str],
        full: Iterable[str],
        trials: Mapping[str, Alternative],
        begins_at: int,
    ) -> None:
        """Go on from `state_dict`, with what was under way then; the arguments are those of `ask`."""
        saved = state["replays"]
        self._counterfactuals, self._sums = {}, {}
        self.ask(suspects, full, trials, begins_at)
        sums = changes_from_state(saved["sums"])
        same_settings = has_settings(saved, self._context.config.evidence)
        if same_settings and sums.keys() == self._sums.keys():
            self._sums, self._left, self._begins_at = sums, saved["left"], saved["begins_at"]
        else:  # taken with a sample that is still to be judged, or asked for by other settings
            self._sums, self._counterfactuals, self._left = {}, {}, 0
        self._watch()

    @staticmethod
    def _kinds(counterfactuals: Mapping[str, Counterfactual]) -> dict[str, str]:
        return {name: each.kind for name, each in counterfactuals.items()}

    def _collect(self, replay: Replay | None) -> None:
        call = self._recorder.take()
        if replay is None and call is None:
            raise CaptureError(
                "no batch could be run again: the model itself was not called in this step; give Monitor.step a "
                "replay=, a function that returns the loss of the batch"
            )
        run = replay if replay is not None else call.run  # type: ignore[union-attr]
        gives_loss, alone = replay is not None, self._alone()
        found = changes_of_batch(self._model, self._counterfactuals, run, gives_loss=gives_loss, alone=alone)
        for name, changes in found:
            sums = self._sums[name]
            if not sums.batches or sums.kind == changes.kind:
                self._sums[name] = add_changes(sums, changes)
            # A loop that gives a loss at some steps only: outputs do not count beside it.
            elif sums.kind in ("outputs", "state_outputs"):
                self._sums[name] = changes

    def _watch(self) -> None:
        if self._left > 0 and self._context.guards["replay"].open:
            self._recorder.attach()
        else:
            self._recorder.detach()
