"""Who decides: from conditions to actions, one layer at a time, up a ladder, within a budget.

The remedy follows the cause. A collapsed layer whose retention is low forgets: one with an alpha is rescaled, one with
a gate is pulled towards the identity. A collapsed layer that would be no fuller without its decay is not helped by
either, and a full layer only by a larger state: both get advice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ess_monitor import validation
from ess_monitor.capture import Layer
from ess_monitor.errors import CheckpointError
from ess_monitor.interventions.alpha import Optimizers
from ess_monitor.interventions.config import AutopilotConfig
from ess_monitor.interventions.treatment import (
    OnFailure,
    Treatment,
    TreatmentState,
    can_be_treated,
    obstacle,
    remedy_of,
)
from ess_monitor.records import Action, ActionOutcome, Condition, Finding, Reading

_STATE_VERSION = 1


class _State(BaseModel):
    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)

    spent: int = Field(ge=0, le=2**63 - 1)
    given_up: list[str]
    told: dict[str, bool]
    treatments: list[TreatmentState]


class Autopilot:
    """Decides and acts at step boundaries. Every change to the model goes through the handles that capture found.

    Args:
        config: mode, ladders, limits.
        layers: the measured layers, in model order.
        retention_below: retention under which the decay is to blame (that of the diagnosis).
        grad_scale: what the loss is multiplied with before backward (loss scale, 1 / accumulation steps).
        on_failure: told when a regularizer fails in a forward or backward pass, in the thread of the pass.
    """

    def __init__(
        self,
        config: AutopilotConfig,
        layers: Sequence[Layer],
        *,
        retention_below: float = 0.75,
        grad_scale: Callable[[], float | torch.Tensor] = lambda: 1.0,
        on_failure: OnFailure = lambda message, error: None,
    ) -> None:
        self.config = validation.instance("config", config, AutopilotConfig)
        layers = validation.several("layers", layers, Layer, hint="find_layers(model)")
        validation.real("retention_below", retention_below, low=0)
        validation.function("grad_scale", grad_scale)
        self._layers = {layer.name: layer for layer in layers}
        self._retention_below = retention_below
        self._grad_scale = grad_scale
        self._on_failure = on_failure
        self._treatments: dict[str, Treatment] = {}
        self._spent = 0
        self._given_up: set[str] = set()
        self._told: dict[str, bool] = {}
        """Layers whose present collapse has been answered with words; True where the decay was to blame."""

    @property
    def budget_remaining(self) -> int:
        """Actions that may still be taken in this run."""
        return max(0, self.config.budget - self._spent)

    @property
    def active(self) -> tuple[Treatment, ...]:
        """Treatments under way."""
        return tuple(self._treatments.values())

    def act(
        self,
        step: int,
        readings: Sequence[Reading],
        conditions: Mapping[str, Condition],
        findings: Sequence[Finding] = (),
        metrics: Mapping[str, float] | None = None,
        *,
        loss_broken: bool = False,
        optimizer: Optimizers = None,
    ) -> tuple[Action, ...]:
        """Answer one measurement.

        Args:
            step: optimizer steps so far.
            readings: this measurement's.
            conditions: of every layer, after the diagnosis.
            findings: changes of condition of this measurement.
            metrics: of the training loop; the loss is looked up by `config.loss`.
            loss_broken: True when the loss was seen not to be finite.
            optimizer: whose moments are reset with a rescaled parameter.
        """
        if self.config.mode == "off":
            return ()
        latest = {r.layer: r for r in readings if r.status == "ok"}
        loss = (metrics or {}).get(self.config.loss)
        loss_broken = loss_broken or (loss is not None and not math.isfinite(loss))
        for name, condition in conditions.items():
            if condition != "collapsed":
                self._told.pop(name, None)
        actions = self._lift_failed(step, latest)
        actions += [
            self._advise_on_saturation(step, f, latest.get(f.layer)) for f in findings if f.condition == "saturated"
        ]
        broken = self._roll_back(step, loss, loss_broken, latest, optimizer)
        if not (broken or loss_broken):
            for name in list(self._treatments):
                actions += self._follow(step, name, conditions.get(name, "unknown"), latest.get(name), loss, optimizer)
            actions += self._begin(step, conditions, latest, findings, loss, optimizer)
        return (*broken, *actions)

    def close(self) -> None:
        """Leave the forward pass of every layer."""
        for treatment in self._treatments.values():
            treatment.lift()

    # -- steps of a treatment -----------------------------------------------------------------------------------------

    def _lift_failed(self, step: int, latest: Mapping[str, Reading]) -> list[Action]:
        """The treatment stays, so that all ranks go on deciding alike: the next rung attaches a new regularizer."""
        actions = []
        for name, treatment in self._treatments.items():
            error = treatment.lift_if_failed()
            if error:
                said = f"the regularizer failed ({error}) and is taken off until the next rung; gradients are unchanged"
                actions.append(self._action(step, treatment, "failed", said, latest.get(name)))
        return actions

    def _roll_back(
        self,
        step: int,
        loss: float | None,
        broken: bool,
        latest: Mapping[str, Reading],
        optimizer: Optimizers,
    ) -> list[Action]:
        actions = []
        for name, treatment in list(self._treatments.items()):
            limit = self._loss_limit(treatment)
            out_of_band = limit is not None and loss is not None and loss > limit
            if not (broken or out_of_band):
                continue
            outcome, done = treatment.take_back(optimizer)
            del self._treatments[name]
            self._given_up.add(name)
            why = "the loss is not finite" if broken else f"the loss of {loss:.4g} passed {limit:.4g}"
            said = f"{why}: {done}, and not tried again"
            actions.append(self._action(step, treatment, outcome, said, latest.get(name)))
        return actions

    def _loss_limit(self, treatment: Treatment) -> float | None:
        """Where the band ends: ratio * start, and as far above a start below zero (a log-likelihood)."""
        ratio, start = self.config.loss_band_ratio, treatment.loss_at_start
        return None if ratio is None or start is None else start + (ratio - 1) * abs(start)

    def _follow(
        self,
        step: int,
        name: str,
        condition: Condition,
        reading: Reading | None,
        loss: float | None,
        optimizer: Optimizers,
    ) -> list[Action]:
        treatment = self._treatments[name]
        if condition == "collapsed" and reading is None:
            return []  # not measured: the last condition says nothing of now
        if condition == "collapsed":
            treatment.recovered_step = None
            if step - treatment.step < self.config.cooldown_steps:
                return []
            return [self._escalate(step, treatment, reading, loss, optimizer)]
        if condition == "unknown":
            return []
        actions = []
        if treatment.recovered_step is None:
            treatment.recovered_step = step
            took = f"recovered {step - treatment.first_step} steps after the treatment began"
            actions.append(self._action(step, treatment, "recovered", took, reading))
        wait, healthy = self.config.release_steps, step - treatment.recovered_step
        if treatment.action == "rescale_alpha":
            if healthy >= (wait or 0):  # a changed alpha stays; only the watch over the loss ends
                del self._treatments[name]
        elif wait is not None and healthy >= wait:
            treatment.lift()
            del self._treatments[name]
            said = f"healthy for {healthy} steps: regularizer taken off"
            actions.append(self._action(step, treatment, "released", said, reading))
        return actions

    def _escalate(
        self,
        step: int,
        treatment: Treatment,
        reading: Reading | None,
        loss: float | None,
        optimizer: Optimizers,
    ) -> Action:
        name = treatment.layer.name
        rungs = self._rungs(treatment.action)
        if treatment.rung + 1 >= len(rungs) or self.budget_remaining == 0:
            why = "the ladder has no further rung" if self.budget_remaining else "the run's budget of actions is spent"
            treatment.lift()
            del self._treatments[name]
            self._given_up.add(name)
            return self._action(
                step, treatment, "failed", f"still collapsed, and {why}: given up, a person must look", reading
            )
        self._spent += 1
        treatment.climb(step, rungs[treatment.rung + 1], loss, optimizer)
        waited = f"still collapsed after {self.config.cooldown_steps} steps: next rung, {treatment.strength:g}"
        return self._action(step, treatment, "applied", waited, reading)

    def _begin(
        self,
        step: int,
        conditions: Mapping[str, Condition],
        latest: Mapping[str, Reading],
        findings: Sequence[Finding],
        loss: float | None,
        optimizer: Optimizers,
    ) -> list[Action]:
        actions = []
        reasons = {finding.layer: finding.reason for finding in findings}
        ill = [name for name in self._layers if conditions.get(name) == "collapsed"]
        for name in reversed(ill):  # the deepest first
            reading = latest.get(name)
            if name in self._treatments or name in self._given_up or reading is None:
                continue
            answered = self._told.get(name)
            if answered is not None and (answered or not self._to_blame(reading)):
                continue  # until the decay comes to blame, words are enough
            if self.config.mode == "auto" and len(self._treatments) >= self.config.max_layers:
                break
            actions.append(self._answer(step, name, reading, reasons.get(name, "collapsed"), loss, optimizer))
        return actions

    def _answer(
        self,
        step: int,
        name: str,
        reading: Reading,
        finding: str,
        loss: float | None,
        optimizer: Optimizers,
    ) -> Action:
        layer, retention = self._layers[name], reading.retention_ratio
        remedy, to_blame = remedy_of(layer), self._to_blame(reading)

        def say(outcome: ActionOutcome, message: str) -> Action:
            self._told[name] = to_blame
            kind = remedy if remedy is not None and outcome == "dry_run" and to_blame else "advise"
            return Action(
                step=step,
                layer=name,
                action=kind,
                outcome=outcome,
                finding=finding,
                message=message,
                strength=self._rungs(kind)[0] if kind != "advise" else None,
                utilization_before=reading.utilization_ratio,
                retention_before=retention,
            )

        if not to_blame:
            kept = "it has no decay" if retention is None else f"retention is {retention:.2f}"
            return say(
                "dry_run",
                f"the decay is not to blame ({kept}), so no intervention would help: look at features, data "
                "(few distinct tokens cap the rank) and position information",
            )
        refusal = obstacle(layer, remedy)
        if remedy is None or refusal:
            return say("rejected", refusal)
        rung = self._rungs(remedy)[0]
        if self.config.mode == "advise":
            return say("dry_run", f"mode auto would apply {remedy} at {rung:g} here")
        if self.budget_remaining == 0:
            return say("rejected", "the run's budget of actions is spent; raise autopilot.budget")
        self._spent += 1
        treatment = Treatment(layer, remedy, finding, reading, self._grad_scale, self._on_failure)
        treatment.start(step, rung, loss, optimizer)
        self._treatments[name] = treatment
        said = f"retention {retention:.2f} is below {self._retention_below:g}: {treatment.description}"
        return self._action(step, treatment, "applied", said, None)

    def _to_blame(self, reading: Reading) -> bool:
        """Whether the decay takes away what the features would keep."""
        return reading.retention_ratio is not None and reading.retention_ratio < self._retention_below

    def _advise_on_saturation(self, step: int, finding: Finding, reading: Reading | None) -> Action:
        capacity = None if reading is None else reading.state_capacity
        target = "more" if capacity is None else f"{2 ** math.ceil(math.log2(2 * capacity)):g} dimensions"
        return Action(
            step=step,
            layer=finding.layer,
            action="advise",
            outcome="dry_run",
            finding=finding.reason,
            message=f"only a larger state helps a full one: train with {target}, and again twice that while it is full "
            "(how much is missing cannot be seen beyond the full state)",
            utilization_before=finding.utilization_ratio,
            retention_before=finding.retention_ratio,
        )

    def _rungs(self, action: str) -> tuple[float, ...]:
        return self.config.alpha_factors if action == "rescale_alpha" else self.config.strengths

    @staticmethod
    def _action(
        step: int, treatment: Treatment, outcome: ActionOutcome, message: str, reading: Reading | None
    ) -> Action:
        return Action(
            step=step,
            layer=treatment.layer.name,
            action=treatment.action,
            outcome=outcome,
            finding=treatment.finding,
            message=message,
            strength=treatment.strength,
            utilization_before=treatment.utilization_before,
            utilization_after=None if reading is None else reading.utilization_ratio,
            retention_before=treatment.retention_before,
            retention_after=None if reading is None else reading.retention_ratio,
        )

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings and tensors: ladder positions, cool-downs, budget, copies for roll-back."""
        return {
            "version": _STATE_VERSION,
            "spent": self._spent,
            "given_up": sorted(self._given_up),
            "told": dict(self._told),
            "treatments": [treatment.state_dict() for treatment in self._treatments.values()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`; active regularizers are attached again.

        In a mode other than auto treatments end here: nothing is attached, and a rescaled alpha stays what it is.

        Raises:
            CheckpointError: another version, or a treated layer that the model does not have in this form. The
                autopilot is left as it was.
        """
        version = state.get("version")
        if not (isinstance(version, int) and version == _STATE_VERSION):
            raise CheckpointError(f"autopilot: state version {_shown(version)}, only {_STATE_VERSION} can be read")
        try:
            parsed = _State.model_validate(dict(state))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise CheckpointError(
                f"autopilot: the state cannot be read ({where:.200}: {first['msg']:.200}); resume without the "
                "monitor's state"
            ) from None
        treatments = parsed.treatments if self.config.mode == "auto" else []
        lost = [t.layer for t in treatments if not can_be_treated(self._layers.get(t.layer), t.action)]
        if lost:
            raise CheckpointError(
                f"autopilot: the state treats {lost} in a way that the measured layers of this model do not allow "
                "(no such layer, or none with that handle); resume with the same layers, or without the monitor's state"
            )
        self.close()
        self._spent = parsed.spent
        self._given_up, self._told = set(parsed.given_up), dict(parsed.told)
        self._treatments = {
            t.layer: Treatment.from_state(self._layers[t.layer], t, self._grad_scale, self._on_failure)
            for t in treatments
        }


def _shown(version: object) -> str:
    plain = version is None or (isinstance(version, int) and abs(version) < 2**63)
    return str(version) if plain else f"of type {type(version).__name__}"
