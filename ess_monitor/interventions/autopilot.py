"""The autopilot: from conditions to actions, one layer at a time, up a ladder, within a budget.

The remedy follows the cause. A collapsed layer whose retention is low forgets, and gets the first remedy that matches
it; so does an unused one while the task is unsolved, because only a treatment tells it from a collapsed one. A layer
that would be no fuller without its decay is not helped by a remedy, and a full layer only by a larger state: both get
advice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from ess_monitor import validation
from ess_monitor.capture import Layer
from ess_monitor.errors import CheckpointError, format_error
from ess_monitor.interventions.alpha import Optimizers
from ess_monitor.interventions.autopilot_state import STATE_VERSION, AnswerSettings, read_state
from ess_monitor.interventions.config import AutopilotConfig
from ess_monitor.interventions.observation import Observation
from ess_monitor.interventions.probation import Trial
from ess_monitor.interventions.remedies import REMEDIES, check_remedies, choose_remedy
from ess_monitor.interventions.remedy import GradScale, OnFailure, Remedy
from ess_monitor.interventions.treatment import Treatment
from ess_monitor.records import Action, ActionKind, ActionOutcome, Changes, Condition, Evidence, Finding, Reading

GateSwap = Callable[[], AbstractContextManager[object]]
"""Puts the gate from before a treatment in the place of the present one, for the time of a with-block."""


class Autopilot:
    """Decides and acts at step boundaries. Every change to the model goes through the handles that capture found.

    Args:
        config: mode, ladders, limits.
        layers: the measured layers, in model order.
        retention_below: retention under which the decay is to blame (that of the diagnosis).
        grad_scale: what the loss is multiplied with before backward (loss scale, 1 / accumulation steps).
        on_failure: called when a remedy fails in a forward or backward pass, in the thread of the pass, or when it
            cannot be undone.
        remedies: subclasses of `Remedy`, in order of preference.
    """

    def __init__(
        self,
        config: AutopilotConfig,
        layers: Sequence[Layer],
        *,
        retention_below: float = 0.75,
        grad_scale: GradScale = lambda: 1.0,
        on_failure: OnFailure = lambda message, error: None,
        remedies: Sequence[type[Remedy]] = REMEDIES,
    ) -> None:
        self.config = validation.instance("config", config, AutopilotConfig)
        layers = validation.several("layers", layers, Layer, hint="find_layers(model)")
        validation.real("retention_below", retention_below, low=0)
        validation.function("grad_scale", grad_scale)
        self._layers = {layer.name: layer for layer in layers}
        self._remedies: dict[str, type[Remedy]] = {remedy.name: remedy for remedy in check_remedies(remedies)}
        self._retention_below = retention_below
        self._grad_scale = grad_scale
        self._on_failure = on_failure
        self._treatments: dict[str, Treatment] = {}
        self._spent = 0
        self._given_up: set[str] = set()
        self._advised_layers: dict[str, bool] = {}
        """Layers whose present collapse has been answered with advice; True where the decay was to blame."""

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
        evidence: Mapping[str, Evidence] | None = None,
        comparisons: Mapping[str, Changes] | None = None,
        task_solved: bool | None = None,
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
            evidence: on the layers that were examined; mode auto treats a layer on evidence by the loss only, and on
                probation. None: whatever is collapsed is treated, and stays treated.
            comparisons: what was asked for by `comparisons`.
            task_solved: whether the task metric says so; None: it says nothing, and no unused layer is treated.
        """
        if self.config.mode == "off":
            return ()
        usable = {reading.layer: reading for reading in readings if reading.status == "ok"}
        reasons = {finding.layer: finding.reason for finding in findings}
        loss = (metrics or {}).get(self.config.loss)
        seen = Observation(step, usable, conditions, reasons, loss, optimizer, evidence, comparisons or {}, task_solved)
        loss_broken = loss_broken or (loss is not None and not math.isfinite(loss))
        for name in conditions:
            if not seen.is_low(name):
                self._advised_layers.pop(name, None)
        actions = self._detach_failed(seen)
        actions += [_advise_on_saturation(seen, finding) for finding in findings if finding.condition == "saturated"]
        rolled_back = self._roll_back(seen, loss_broken=loss_broken)
        if not (rolled_back or loss_broken):
            for treatment in self.active:
                actions += self._try_out(seen, treatment) or self._follow(seen, treatment)
            actions += self._begin(seen)
        return (*rolled_back, *actions)

    def comparisons(self, step: int, within: int | None) -> dict[str, tuple[int, GateSwap]]:
        """Return the treatments on probation whose gates are to be compared within so many steps; None: are compared.

        Returns:
            By layer: in how many steps, and what puts the gate from before in its place.
        """
        due: dict[str, tuple[int, GateSwap]] = {}
        for name, treatment in self._treatments.items():
            trial, config = treatment.trial, self.config.probation
            delay = None if trial is None else trial.due_in(step - treatment.first_step, config)
            if trial is None or trial.gate is None or delay is None:
                continue
            if not trial.compared or (within is not None and delay <= within):
                trial.begin(config)
                due[name] = (delay, trial.gate.in_place)
        return due

    def close(self) -> None:
        """Leave the forward pass of every layer."""
        for treatment in self._treatments.values():
            treatment.remedy.detach()

    # -- steps of a treatment -----------------------------------------------------------------------------------------

    def _detach_failed(self, seen: Observation) -> list[Action]:
        """Detach remedies that have failed in a pass until the next rung.

        The treatment stays: the other ranks, whose remedy may not have failed, go on with it and must decide alike.
        """
        actions = []
        for name, treatment in self._treatments.items():
            error = treatment.remedy.failure
            if error is not None:
                treatment.remedy.detach()
                message = (
                    f"the {treatment.remedy.subject} failed ({format_error(error)}) and is detached until the next "
                    "rung; gradients are unchanged"
                )
                actions.append(treatment.to_action(seen.step, "failed", message, seen.readings.get(name)))
        return actions

    def _roll_back(self, seen: Observation, *, loss_broken: bool) -> list[Action]:
        actions = []
        for name, treatment in list(self._treatments.items()):
            limit = self._loss_limit(treatment)
            if loss_broken:
                reason = "the loss is not finite"
            elif limit is not None and seen.loss is not None and seen.loss > limit:
                reason = f"the loss of {seen.loss:.4g} passed {limit:.4g}"
            else:
                continue
            outcome, result = treatment.roll_back(seen.optimizer)
            self._end(treatment, give_up=True)
            actions.append(treatment.to_action(seen.step, outcome, f"{reason}: {result}", seen.readings.get(name)))
        return actions

    def _try_out(self, seen: Observation, treatment: Treatment) -> list[Action]:
        """Take a treatment back that costs the loss something, or has gained nothing in time."""
        trial, name = treatment.trial, treatment.layer.name
        if trial is None:
            return []
        if seen.task_solved:
            trial.settle()
        age = seen.step - treatment.first_step
        verdict = trial.judge(age, seen.comparisons.get(name), self.config.probation)
        if verdict not in ("harm", "no_gain"):
            return []
        found = f"{trial.describe()} {age} steps after the treatment began"
        outcome, result = treatment.roll_back(seen.optimizer)
        self._end(treatment, give_up=True)
        return [treatment.to_action(seen.step, outcome, f"{found}: {result}", seen.readings.get(name))]

    def _loss_limit(self, treatment: Treatment) -> float | None:
        """Return where the band ends: ratio * start, and as far above a start below zero (a log-likelihood)."""
        ratio, start = self.config.loss_band_ratio, treatment.loss_at_start
        return None if ratio is None or start is None else start + (ratio - 1) * abs(start)

    def _end(self, treatment: Treatment, *, give_up: bool = False) -> None:
        del self._treatments[treatment.layer.name]
        if give_up:
            self._given_up.add(treatment.layer.name)

    def _follow(self, seen: Observation, treatment: Treatment) -> list[Action]:
        name = treatment.layer.name
        reading = seen.readings.get(name)
        if seen.conditions.get(name, "unknown") == "unknown":
            return []
        if seen.is_low(name):
            if reading is None:
                return []  # the condition is that of an earlier measurement
            treatment.recovered_step = None
            is_due = seen.step - treatment.step >= self.config.cooldown_steps and treatment.has_gained
            return [self._escalate(seen, treatment, reading)] if is_due else []
        actions = []
        if treatment.recovered_step is None:
            treatment.recovered_step = seen.step
            message = f"recovered {seen.step - treatment.first_step} steps after the treatment began"
            actions.append(treatment.to_action(seen.step, "recovered", message, reading))
        if not treatment.has_gained:
            return actions  # ESS alone ends no treatment
        wait, healthy = self.config.release_steps, seen.step - treatment.recovered_step
        if treatment.remedy.is_permanent:
            if healthy >= (wait or 0):
                self._end(treatment)  # the change stays; only the watch over the loss ends
        elif wait is not None and healthy >= wait:
            treatment.remedy.detach()
            self._end(treatment)
            message = f"healthy for {healthy} steps: {treatment.remedy.subject} detached"
            actions.append(treatment.to_action(seen.step, "released", message, reading))
        return actions

    def _escalate(self, seen: Observation, treatment: Treatment, reading: Reading) -> Action:
        ladder, condition = treatment.remedy.strengths(self.config), seen.conditions[treatment.layer.name]
        if treatment.rung + 1 >= len(ladder) or self.budget_remaining == 0:
            reason = "the ladder has no further rung" if self.budget_remaining else "the run's action budget is spent"
            treatment.remedy.detach()
            self._end(treatment, give_up=True)
            message = f"still {condition}, and {reason}: not treated any more, inspect the layer by hand"
            return treatment.to_action(seen.step, "failed", message, reading)
        self._spent += 1
        treatment.climb(seen.step, ladder[treatment.rung + 1], seen.loss, seen.optimizer)
        message = f"still {condition} after {self.config.cooldown_steps} steps: next rung, {treatment.strength:g}"
        return treatment.to_action(seen.step, "applied", message, reading)

    def _begin(self, seen: Observation) -> list[Action]:
        actions = []
        treatable = [name for name in self._layers if seen.is_treatable(name)]
        for name in reversed(treatable):  # the deepest first
            reading = seen.readings.get(name)
            if name in self._treatments or name in self._given_up or reading is None:
                continue
            if name in self._advised_layers and not self._is_outdated(seen, self._advised_layers[name], reading):
                continue  # advice is not repeated
            if self.config.mode == "auto" and len(self._treatments) >= self.config.max_layers:
                break
            actions.append(self._answer(seen, self._layers[name], reading))
        return actions

    def _is_outdated(self, seen: Observation, blamed_before: bool, reading: Reading) -> bool:
        """Return whether the advice on a layer no longer says why it is not treated.

        The decay has become the cause; or it was already, and what kept mode auto from acting (another mode, a spent
        budget, an obstacle) was left behind with the run that was resumed from.
        """
        if not self._to_blame(reading):
            return False
        layer = self._layers[reading.layer]
        remedy = choose_remedy(layer, self._remedies.values())
        may_act = self.config.mode == "auto" and self.budget_remaining > 0 and not seen.why_withheld(layer.name)
        return not blamed_before or (may_act and remedy is not None and not remedy.obstacle(layer))

    def _answer(self, seen: Observation, layer: Layer, reading: Reading) -> Action:
        finding = seen.reasons.get(layer.name, seen.conditions[layer.name])
        to_blame = self._to_blame(reading)

        def advise(
            outcome: ActionOutcome, message: str, kind: ActionKind = "advise", at: float | None = None
        ) -> Action:
            self._advised_layers[layer.name] = to_blame
            return Action(
                step=seen.step,
                layer=layer.name,
                action=kind,
                outcome=outcome,
                finding=finding,
                message=message,
                strength=at,
                utilization_before=reading.utilization_ratio,
                retention_before=reading.retention_ratio,
            )

        if not to_blame:
            retention = reading.retention_ratio
            kept = "it has no decay" if retention is None else f"retention is {retention:.2f}"
            return advise(
                "dry_run",
                f"the decay is not to blame ({kept}), so no intervention would help: look at features, data "
                "(few distinct tokens cap the rank) and position information",
            )
        remedy = choose_remedy(layer, self._remedies.values())
        if remedy is None:
            return advise("rejected", f"{layer.spec.operator} of this layer has no handle on its decay")
        obstacle = remedy.obstacle(layer)
        if obstacle:
            return advise("rejected", obstacle)
        strength = remedy.strengths(self.config)[0]
        withheld = seen.why_withheld(layer.name) if self.config.mode == "auto" else ""
        if self.config.mode == "advise" or withheld:
            message = f"mode auto would apply {remedy.name} at {strength:g} here"
            return advise("dry_run", f"{message}, but {withheld}" if withheld else message, remedy.name, strength)
        if self.budget_remaining == 0:
            return advise("rejected", "the run's action budget is spent; raise autopilot.budget")
        self._spent += 1
        treatment = Treatment(self._make(remedy, layer), finding, reading)
        if seen.evidence is not None:
            treatment.trial = Trial.begin_on(layer, seen.optimizer, is_silent=seen.is_silent(layer.name))
        treatment.start(seen.step, strength, seen.loss, seen.optimizer)
        self._treatments[layer.name] = treatment
        cause = f"retention {reading.retention_ratio:.2f} is below {self._retention_below:g}"
        return treatment.to_action(seen.step, "applied", f"{cause}: {remedy.describe(strength)}")

    def _to_blame(self, reading: Reading) -> bool:
        """Return whether the decay takes away what the features would keep."""
        return reading.retention_ratio is not None and reading.retention_ratio < self._retention_below

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return numbers, strings and tensors: ladder positions, cool-downs, budget, copies for roll-back."""
        return {
            "version": STATE_VERSION,
            "spent": self._spent,
            "given_up": sorted(self._given_up),
            "told": dict(self._advised_layers),
            "settings": AnswerSettings.of(self.config).model_dump(mode="json"),
            "loss": self.config.loss,
            "treatments": [treatment.state_dict() for treatment in self._treatments.values()],
        }

    def load_state_dict(self, state: Mapping[str, Any], names: Mapping[str, str] | None = None) -> None:
        """Go on from `state_dict`; active regularizers are attached again.

        In a mode other than auto treatments end here: nothing is attached, and a rescaled alpha stays what it is.
        Otherwise they take over the present ladder. Advice is forgotten where a setting that it rests on has changed
        since, and a layer that was given up is tried again under another ladder or budget. `names` has the present
        names of the state's layers; others are dropped.

        Raises:
            CheckpointError: another version, or a treated layer that the model does not have in this form. The
                autopilot is left as it was.
        """
        parsed, treated = read_state(state, self._remedies, names)
        if self.config.mode != "auto":
            treated = []
        layers = self._layers
        lost = [t.layer for remedy, t, _ in treated if t.layer not in layers or not remedy.match(layers[t.layer])]
        if lost:
            raise CheckpointError(
                f"autopilot: the state treats {lost} in a way that the measured layers of this model do not allow "
                "(no such layer, or none with that handle); resume with the same layers, or without the monitor's state"
            )
        self.close()
        self._spent = parsed.spent
        settings = AnswerSettings.of(self.config)
        self._given_up, self._advised_layers = parsed.given_up_under(settings), dict(parsed.advised_under(settings))
        self._treatments = {
            t.layer: Treatment.from_state(
                self._make(remedy, layers[t.layer]), parsed.treatment_under(self.config, remedy, t), remedy_state
            )
            for remedy, t, remedy_state in treated
        }

    def _make(self, remedy: type[Remedy], layer: Layer) -> Remedy:
        return remedy(layer, self._grad_scale, self._on_failure)


def _advise_on_saturation(seen: Observation, finding: Finding) -> Action:
    reading = seen.readings.get(finding.layer)
    capacity = None if reading is None else reading.state_capacity
    target = "more" if capacity is None else f"{2 ** math.ceil(math.log2(2 * capacity)):g} dimensions"
    return Action(
        step=seen.step,
        layer=finding.layer,
        action="advise",
        outcome="dry_run",
        finding=finding.reason,
        message=f"only a larger state helps a full one: train with {target}, and double it again while it stays full "
        "(a full state does not show how much is missing)",
        utilization_before=finding.utilization_ratio,
        retention_before=finding.retention_ratio,
    )
