"""The conditions of all layers over a run: warm-up, patience, and a state that survives a restart."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ess_monitor import validation
from ess_monitor.diagnosis.config import DiagnosisConfig
from ess_monitor.diagnosis.rules import RULES, Context, Rule, Verdict, check_rules, judge, task_solved
from ess_monitor.diagnosis.task_metric import TaskMetric, TaskMetricState
from ess_monitor.diagnosis.utilization import attainable_utilization
from ess_monitor.errors import CheckpointError
from ess_monitor.records import CONDITION_INFO, Condition, Evidence, Finding, Reading, layer_title

logger = logging.getLogger("ess_monitor")

STATE_VERSION = 1
"""Version of `Tracker.state_dict`; raised when its fields change."""


class Tracker:
    """Follows every layer's condition through a run.

    A condition changes when `patience` consecutive readings (`saturated_patience` for saturation) speak for the same
    new one after the warm-up. A reading that only suspects a condition, because the trend still points up, counts
    towards the streak and cannot complete it. Readings that are not `ok`, or that cannot be judged, neither count nor
    break a streak. Memory is bounded: one window of numbers per layer and one for the task metric.

    Every change is a `Finding`, except between `unknown` and `healthy`: a layer that turns out healthy after the
    warm-up, or a first layer that may be right to use little, needs no attention.

    A layer with a decay is called collapsed on evidence only: one reading before the streak is complete it becomes one
    of `suspects`, and the evidence on it decides between collapsed and forgets_by_choice. Where none can be had, a task
    metric that stays unsolved must do; without one nothing is said.

    Args:
        config: thresholds.
        rules: what is tried on every reading, in order; the first verdict counts. A rule of your own comes before or
            after those in `rules.RULES`.
        examined: layers that need evidence, with the reason why none can be had, empty where it can.
        recheck_measurements: measurements after which a layer that forgets by choice is asked again.

    Example:
        >>> reading = Reading(step=0, layer="mixer", status="ok", length=64, state_capacity=16, attainable_size=16,
        ...                   effective_size=2.4, utilization_ratio=0.15, retention_ratio=0.5)
        >>> tracker = Tracker(DiagnosisConfig(warmup_steps=100, patience=2))
        >>> for step in (0, 100, 200):
        ...     findings = tracker.observe([reading], metrics={}, step=step)
        >>> [finding.condition for finding in findings], tracker.conditions
        (['collapsed'], {'mixer': 'collapsed'})
    """

    def __init__(
        self,
        config: DiagnosisConfig | None = None,
        rules: Sequence[Rule] = RULES,
        *,
        examined: Mapping[str, str] | None = None,
        recheck_measurements: int = 20,
    ) -> None:
        self.config = validation.optional("config", config, DiagnosisConfig) or DiagnosisConfig()
        self._rules = check_rules(rules)
        examined = {} if examined is None else examined
        validation.instance("examined", examined, Mapping, hint="layer -> why it cannot be examined, or an empty text")
        self._examined = dict(examined)
        self._recheck = validation.whole("recheck_measurements", recheck_measurements, 1)
        self._layers: dict[str, _Layer] = {}
        self._task = TaskMetric(self.config)

    @property
    def conditions(self) -> dict[str, Condition]:
        """Condition of every layer seen so far, in the order in which the layers were first seen."""
        return {name: layer.condition for name, layer in self._layers.items()}

    @property
    def metric_known(self) -> bool:
        """Whether a value of the task metric has been seen."""
        return bool(self._task.known)

    @property
    def suspects(self) -> tuple[str, ...]:
        """Layers that will be called collapsed at the next reading like the last one, if the evidence supports it."""
        return tuple(name for name, layer in self._layers.items() if layer.is_suspect)

    @property
    def task_solved(self) -> bool:
        """Whether the task metric says that the task is solved."""
        return task_solved(tuple(self._task.known), self.config)

    @property
    def evidence(self) -> dict[str, Evidence]:
        """Latest evidence on each layer that has been examined."""
        return {name: layer.evidence for name, layer in self._layers.items() if layer.evidence is not None}

    def observe(
        self,
        readings: Iterable[Reading],
        metrics: Mapping[str, float],
        step: int,
        evidence: Mapping[str, Evidence | str] | None = None,
    ) -> tuple[Finding, ...]:
        """Judge one measurement, and return the conditions that changed with it.

        Args:
            readings: one per layer, in model order (the first layer of the first measurement is the model's first).
            metrics: metrics of the training loop. A value that is absent or not finite leaves the last known one valid.
            step: optimizer step of the measurement.
            evidence: on layers that were suspects; a text says why one could not be examined.
        """
        readings = validation.several("readings", readings, Reading)
        validation.instance("metrics", metrics, Mapping, hint="metric name -> number")
        step = validation.whole("step", step, 0)
        evidence = {} if evidence is None else evidence
        validation.instance("evidence", evidence, Mapping, hint="layer -> Evidence, or why there is none")
        for reading in readings:
            layer = self._layers.setdefault(reading.layer, _Layer(self.config.trend_window))
            layer.take_evidence(evidence.get(reading.layer), self._recheck)
        self._task.observe(metrics)
        findings = (self._follow(reading, step) for reading in readings)
        return tuple(finding for finding in findings if finding is not None)

    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to go on exactly here, as JSON-serializable values."""
        state = TrackerState(
            version=STATE_VERSION,
            metric=self.config.metric,
            metrics=list(self._task.known),
            task=self._task.state(),
            layers=[layer.to_state(name) for name, layer in self._layers.items()],
        )
        return state.model_dump(mode="json")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Under smaller windows the newest values are kept; values of another metric are dropped.

        Raises:
            CheckpointError: not a state of this version. The tracker is left as it was.
        """
        try:
            parsed = TrackerState.model_validate(dict(state))
        except (ValidationError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"state of the diagnosis cannot be read: {_first_problem(error)}; allowed is what "
                "Tracker.state_dict() returned; drop the diagnosis state from the checkpoint to start afresh"
            ) from error
        if parsed.version != STATE_VERSION:
            raise CheckpointError(
                f"state of the diagnosis has version={parsed.version}, allowed is {STATE_VERSION}; resume with the "
                "ess_monitor version that wrote it, or drop the diagnosis state from the checkpoint to start afresh"
            )
        same_metric = parsed.metric == self.config.metric
        self._task = (
            TaskMetric.load(self.config, parsed.metrics, parsed.task) if same_metric else TaskMetric(self.config)
        )
        self._layers = {layer.name: _Layer.from_state(layer, self.config.trend_window) for layer in parsed.layers}

    def _metrics_for(self, layer: _Layer) -> tuple[float, ...]:
        """Return the known task metric; none where it has not been given for long.

        A finding stands with the metric that it was made with, and a task that was solved stays solved.
        """
        known = self._task.known
        stands = CONDITION_INFO[layer.condition].needs_attention or task_solved(known, self.config)
        return known if stands or not self._task.is_silent else ()

    def _follow(self, reading: Reading, step: int) -> Finding | None:
        layer = self._layers[reading.layer]
        utilization = attainable_utilization(reading)
        if utilization is not None:
            layer.utilizations.append(utilization)
        if step < self.config.warmup_steps:
            return None
        context = Context(
            previous=layer.condition,
            utilizations=tuple(layer.utilizations),
            metrics=self._metrics_for(layer),
            new_in_trend=self._task.new_over(self.config.trend_window),
            new_in_plateau=self._task.new_over(self.config.plateau_window),
            first_of_several=len(self._layers) > 1 and reading.layer == next(iter(self._layers)),
        )
        verdict = judge(reading, context, self.config, self._rules)
        if verdict is None:
            return None
        patience = self.config.patience if verdict.patience is None else verdict.patience
        verdict = self._supported(verdict, reading, layer, patience, with_metric=bool(context.metrics))
        previous = layer.condition
        if not layer.settles_on(verdict, patience) or {previous, verdict.condition} <= {"unknown", "healthy"}:
            return None
        return Finding(
            step=step,
            layer=reading.layer,
            condition=verdict.condition,
            previous=previous,
            reason=f"{verdict.reason}, for {patience} measurements",
            advice=verdict.advice,
            utilization_ratio=reading.utilization_ratio,
            retention_ratio=reading.retention_ratio,
            metric=context.metrics[-1] if context.metrics else None,
            evidence=layer.evidence if verdict.condition in ("collapsed", "forgets_by_choice") else None,
        )

    def _supported(
        self, verdict: Verdict, reading: Reading, layer: _Layer, patience: int, *, with_metric: bool
    ) -> Verdict:
        """Return the verdict as far as evidence supports it. Only a new collapse of a layer with a decay needs any."""
        layer.is_suspect = False
        proposed, name = verdict.suspected or verdict.condition, reading.layer
        needs_evidence = name in self._examined and reading.retention_ratio is not None
        if proposed != "collapsed" or layer.condition == "collapsed" or not needs_evidence:
            return verdict
        found = layer.evidence
        if found is not None:
            is_collapse = found.outcome in ("loud", "silent")
            # A choice is asked about again from time to time, a collapse is not called on an old suspicion.
            if layer.evidence_age <= (min(self.config.patience, self._recheck) if is_collapse else self._recheck):
                return layer.weighs(name, verdict, found, with_metric=with_metric)
        why_not = self._examined[name] or layer.obstacle
        if not why_not:
            # One measurement ahead, so that the evidence is there when the streak is complete.
            layer.is_suspect = layer.streak_of("collapsed") + 1 >= patience - 1
            return replace(verdict, suspected="collapsed")
        if with_metric:
            return replace(verdict, reason=f"{verdict.reason}; batches could not be run again ({why_not})")
        advice = "Give Monitor.step a replay=, or give the diagnosis a task metric."
        layer.report_doubt(name, verdict.reason, f"there is no evidence: {why_not}", advice)
        return Verdict("unknown", f"{verdict.reason}; without evidence ({why_not}) nothing is said")


class _Layer:
    """Holds condition, streak and window of one layer."""

    def __init__(self, window: int) -> None:
        self.condition: Condition = "unknown"
        self.candidate: Condition = "unknown"
        self.streak = 0
        self.utilizations: deque[float] = deque(maxlen=window)
        self.evidence: Evidence | None = None
        self.evidence_age = 0
        """Measurements since the evidence, or since the obstacle."""
        self.obstacle = ""
        """Why the layer could not be examined when it was asked."""
        self.is_suspect = False
        self._is_reported = False

    def take_evidence(self, found: Evidence | str | None, recheck: int) -> None:
        """Note what was found on the layer, or why nothing was, at a measurement."""
        if self.evidence is not None or self.obstacle:
            self.evidence_age = min(self.evidence_age + 1, recheck + 1)
        if isinstance(found, str):
            self.obstacle, self.evidence_age = found, 0
        elif found is not None:
            self.evidence, self.obstacle, self.evidence_age = found, "", 0
        elif self.evidence_age > recheck:
            self.obstacle = ""

    def weighs(self, name: str, verdict: Verdict, found: Evidence, *, with_metric: bool) -> Verdict:
        """Return what the evidence makes of a verdict of collapsed. The readings so far count for it.

        A task that needs no past at all looks like a silent collapse. Only a task metric tells them apart.
        """
        if found.outcome == "loud" or (found.outcome == "silent" and with_metric):
            return replace(verdict, reason=f"{verdict.reason}; {found.reason}")
        if found.outcome == "by_choice":
            advice = "nothing to do: this task needs little memory, or another layer has it"
            weighed = Verdict("forgets_by_choice", f"{verdict.reason}, but {found.reason}", advice)
        elif found.outcome == "silent":
            why_not = f"{found.reason}, and no task metric says whether the past would help"
            self.report_doubt(name, verdict.reason, why_not, "Give the diagnosis a task metric.")
            weighed = Verdict("unknown", f"{verdict.reason}; {why_not}")
        else:
            weighed = Verdict("unknown", f"{verdict.reason}, but {found.reason}")
        if self.candidate == "collapsed":
            self.candidate = weighed.condition
        return weighed

    def streak_of(self, condition: Condition) -> int:
        """Return how many readings in a row have spoken for a condition that the layer is not in."""
        return self.streak if self.candidate == condition else 0

    def report_doubt(self, name: str, reason: str, why_not: str, next_action: str) -> None:
        """Log once that a layer might have collapsed."""
        if not self._is_reported:
            logger.warning(
                "ess_monitor: layer %s might have collapsed (%s), but it is not called so: %s. %s",
                layer_title(name),
                reason,
                why_not,
                next_action,
            )
        self._is_reported = True

    def settles_on(self, verdict: Verdict, patience: int) -> bool:
        """Count one reading for what it shows, and return whether the layer's condition changes with it."""
        condition = verdict.suspected or verdict.condition
        if condition == self.condition:
            self.candidate, self.streak = condition, 0
            return False
        self.streak = self.streak + 1 if condition == self.candidate else 1
        self.candidate = condition
        if self.streak < patience or verdict.suspected is not None:
            return False
        self.condition, self.streak = condition, 0
        return True

    def to_state(self, name: str) -> _LayerState:
        return _LayerState(
            name=name,
            condition=self.condition,
            candidate=self.candidate,
            streak=self.streak,
            utilizations=list(self.utilizations),
            evidence=self.evidence,
            evidence_age=self.evidence_age,
            obstacle=self.obstacle,
            is_suspect=self.is_suspect,
        )

    @classmethod
    def from_state(cls, state: _LayerState, window: int) -> _Layer:
        layer = cls(window)
        layer.condition, layer.candidate, layer.streak = state.condition, state.candidate, state.streak
        layer.utilizations.extend(state.utilizations)
        layer.evidence, layer.evidence_age = state.evidence, state.evidence_age
        layer.obstacle, layer.is_suspect = state.obstacle, state.is_suspect
        return layer


class _DiagnosisState(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class _LayerState(_DiagnosisState):
    name: str
    condition: Condition
    candidate: Condition
    streak: int = Field(ge=0, le=2**63 - 1)
    utilizations: list[float]
    evidence: Evidence | None = None
    evidence_age: int = Field(default=0, ge=0, le=2**63 - 1)
    obstacle: str = ""
    is_suspect: bool = False


class TrackerState(_DiagnosisState):
    """Validates `Tracker.state_dict`."""

    version: int = Field(ge=-(2**63), le=2**63 - 1)
    metric: str | None
    metrics: list[float]
    task: TaskMetricState | None = None
    """None: saved by 0.1."""
    layers: list[_LayerState]
    """A list, so that the model order survives writers that sort keys."""


def _first_problem(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc'])) or 'state'}: {first['msg']}"
    return str(error)
