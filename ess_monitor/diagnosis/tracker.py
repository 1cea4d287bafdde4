"""The conditions of all layers over a run: warm-up, patience, and a state that survives a restart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ess_monitor import validation
from ess_monitor.diagnosis.config import DiagnosisConfig
from ess_monitor.diagnosis.layer_history import Examination, LayerHistory, LayerState, Suspicion
from ess_monitor.diagnosis.rules import RULES, Context, Rule, Verdict, check_rules, judge, task_solved
from ess_monitor.diagnosis.task_metric import TaskMetric, TaskMetricState
from ess_monitor.diagnosis.utilization import attainable_utilization
from ess_monitor.errors import CheckpointError
from ess_monitor.records import CONDITION_INFO, Condition, Evidence, Finding, Reading, StateEvidence

STATE_VERSION = 1
"""Version of `Tracker.state_dict`; raised when its fields change."""


class Tracker:
    """Follows every layer's condition through a run.

    A condition changes when `patience` consecutive readings (`saturated_patience` for saturation) speak for the same
    new one after the warm-up. Of a layer that is measured in every k-th sample only, because layers take turns, its own
    readings count. A reading that only suspects a condition, because the trend still points up, counts
    towards the streak and cannot complete it. Readings that are not `ok`, or that cannot be judged, neither count nor
    break a streak. Memory is bounded: one window of numbers per layer and one for the task metric.

    Every change is a `Finding`, except between `unknown` and `healthy`: a layer that turns out healthy after the
    warm-up, or a first layer that may be right to use little, needs no attention.

    A layer with a decay is called collapsed on evidence only: one reading before the streak is complete it becomes one
    of `suspects`, and the evidence on it decides between collapsed, unused and forgets_by_choice. Where none can be
    had, a task metric that stays unsolved must do; without one nothing is said.

    A layer is called saturated on evidence where it can be had: one of `full_suspects` is examined likewise, and the
    evidence decides between saturated and healthy. Where none can be had, the rule asks for more of the readings.

    Args:
        config: thresholds.
        rules: what is tried on every reading, in order; the first verdict counts. A rule of your own comes before or
            after those in `rules.RULES`.
        examined: layers that need evidence of a collapse, with the reason why none can be had, empty where it can.
        examined_states: layers that are called saturated on evidence, with the same reasons.
        recheck_measurements: measurements after which a layer is asked again, where the evidence did not support the
            rules.
        layers: names of the judged layers in model order. By default the order in which they are seen.

    Examples:
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
        examined_states: Mapping[str, str] | None = None,
        recheck_measurements: int = 20,
        layers: Iterable[str] = (),
    ) -> None:
        self.config = validation.optional("config", config, DiagnosisConfig) or DiagnosisConfig()
        self._rules = check_rules(rules)
        self._examined = _reasons("examined", examined)
        self._examined_states = _reasons("examined_states", examined_states)
        self._recheck = validation.whole("recheck_measurements", recheck_measurements, 1)
        self._names = validation.several("layers", layers, str, hint="names in model order")
        self._layers: dict[str, LayerHistory] = {}
        self._task = TaskMetric(self.config)

    @property
    def conditions(self) -> dict[str, Condition]:
        """Condition of every layer seen so far, in the order in which the layers were first seen."""
        return {name: layer.condition for name, layer in self._layers.items()}

    @property
    def unknown_reasons(self) -> dict[str, str]:
        """Why the condition of each layer is unknown whose is, and until when where that is known."""
        return {name: layer.why_unknown for name, layer in self._layers.items() if layer.condition == "unknown"}

    @property
    def metric_known(self) -> bool:
        """Whether a value of the task metric has been seen."""
        return bool(self._task.known)

    @property
    def suspects(self) -> tuple[str, ...]:
        """Layers that will be called collapsed at the next reading like the last one, if the evidence supports it."""
        return tuple(name for name in self._suspected_of("collapsed") if self._examined.get(name) == "")

    @property
    def full_suspects(self) -> tuple[str, ...]:
        """Layers that will be called saturated at the next reading like the last one, if the evidence supports it."""
        return tuple(name for name in self._suspected_of("saturated") if not self._why_no_state_evidence(name))

    @property
    def task_solved(self) -> bool | None:
        """Whether the task metric says that the task is solved; None where none is known, or was given for long."""
        if task_solved(self._task.known, self.config):
            return True
        return False if self._task.known and not self._task.is_silent else None

    @property
    def evidence(self) -> dict[str, Evidence]:
        """Latest evidence on each layer whose decay has been examined."""
        return {name: layer.decay.found for name, layer in self._layers.items() if layer.decay.found is not None}

    @property
    def state_evidence(self) -> dict[str, StateEvidence]:
        """Latest evidence on each layer the size of whose state has been examined."""
        return {name: layer.state.found for name, layer in self._layers.items() if layer.state.found is not None}

    def observe(
        self,
        readings: Iterable[Reading],
        metrics: Mapping[str, float],
        step: int,
        evidence: Mapping[str, Evidence | StateEvidence | str] | None = None,
    ) -> tuple[Finding, ...]:
        """Judge one measurement, and return the conditions that changed with it.

        Args:
            readings: one per layer, in model order. Without `layers` the first of the first measurement counts as the
                model's first.
            metrics: metrics of the training loop. A value that is absent or not finite leaves the last known one valid.
            step: optimizer step of the measurement.
            evidence: on layers that were suspects; a text says why one could not be examined.
        """
        readings = validation.several("readings", readings, Reading)
        validation.instance("metrics", metrics, Mapping, hint="metric name -> number")
        step = validation.whole("step", step, 0)
        evidence = {} if evidence is None else evidence
        validation.instance("evidence", evidence, Mapping, hint="layer -> evidence, or why there is none")
        for reading in readings:
            layer = self._layers.setdefault(reading.layer, LayerHistory(self.config.trend_window))
            found = evidence.get(reading.layer)
            if reading.status != "deferred" or found is not None:  # ages count measurements of the layer itself
                layer.take_evidence(found, self._recheck)
                layer.suspected = None if reading.status == "deferred" else layer.suspected
        self._task.observe(metrics)
        findings = (self._follow(reading, step) for reading in readings)
        return tuple(finding for finding in findings if finding is not None)

    def forget_evidence(self) -> None:
        """Forget what is known from batches that were run again. Conditions stay, and layers are examined anew."""
        for layer in self._layers.values():
            layer.decay, layer.state = Examination(), Examination()

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

    def load_state_dict(self, state: Mapping[str, Any], names: Mapping[str, str] | None = None) -> None:
        """Go on where `state_dict` was taken.

        Under smaller windows the newest values are kept; values of another metric are dropped.

        Args:
            state: what `state_dict` returned.
            names: by a layer's name in the state, the present one; layers that are not in it are dropped. None: all
                layers are called as they were.

        Raises:
            CheckpointError: not a state of this version. The tracker is left as it was.
        """
        if names is not None:
            hint = "name in the state -> present name, or None"
            validation.several(
                "names", validation.instance("names", names, Mapping, hint=hint).values(), str, hint=hint
            )
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
        names = {layer.name: layer.name for layer in parsed.layers} if names is None else names
        self._layers = {
            names[layer.name]: LayerHistory.from_state(layer, self.config.trend_window, names[layer.name])
            for layer in parsed.layers
            if layer.name in names
        }

    def _metrics_for(self, layer: LayerHistory) -> tuple[float, ...]:
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
            layer.why_unknown = f"warm-up until step {self.config.warmup_steps}"
            return None
        context = Context(
            previous=layer.condition,
            utilizations=tuple(layer.utilizations),
            metrics=self._metrics_for(layer),
            new_in_trend=self._task.new_over(self.config.trend_window),
            new_in_plateau=self._task.new_over(self.config.plateau_window),
            first_of_several=self._is_first_of_several(reading.layer),
            is_examined=not self._why_no_state_evidence(reading.layer),
        )
        verdict = judge(reading, context, self.config, self._rules)
        if verdict is None:
            layer.why_unknown = _why_not_judged(reading)
            return None
        patience = self.config.patience if verdict.patience is None else verdict.patience
        verdict = self._supported(verdict, reading, layer, patience, with_metric=bool(context.metrics))
        previous = layer.condition
        counted = verdict.is_full and verdict.condition == "saturated"  # by `full_streak`
        settles = layer.settles_on(verdict, 1 if counted else patience)
        if not settles or {previous, verdict.condition} <= {"unknown", "healthy"}:
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
            evidence=layer.state.found if verdict.condition == "saturated" else _decay_evidence(layer, verdict),
        )

    def _is_first_of_several(self, name: str) -> bool:
        names = self._names or tuple(self._layers)
        return len(names) > 1 and name == names[0]

    def _suspected_of(self, condition: Suspicion) -> tuple[str, ...]:
        return tuple(name for name, layer in self._layers.items() if layer.suspected == condition)

    def _why_no_state_evidence(self, name: str) -> str:
        """Return why there is no evidence on the size of a layer's state, or an empty string."""
        return self._examined_states.get(name, "none is asked for") or self._layers[name].state.obstacle

    def _supported(
        self, verdict: Verdict, reading: Reading, layer: LayerHistory, patience: int, *, with_metric: bool
    ) -> Verdict:
        """Return the verdict as far as evidence supports it. Only a new collapse or saturation needs any."""
        layer.suspected = None
        layer.full_streak = layer.full_streak + 1 if verdict.is_full else 0
        proposed, name = verdict.suspected or verdict.condition, reading.layer
        if proposed == layer.condition:
            return verdict
        if proposed == "saturated":
            return self._supported_saturation(verdict, name, layer, patience)
        if proposed != "collapsed" or name not in self._examined or reading.retention_ratio is None:
            return verdict
        found = layer.decay.found
        if found is not None and self._holds(layer.decay.age, supports=found.outcome == "loud"):
            return layer.weigh_collapse(verdict, found, with_metric=with_metric)
        why_not = self._examined[name] or layer.decay.obstacle
        if not why_not:
            # One measurement ahead, so that the evidence is there when the streak is complete.
            layer.suspected = "collapsed" if layer.streak_of("collapsed") + 1 >= patience - 1 else None
            return replace(verdict, suspected="collapsed")
        if with_metric:
            return replace(verdict, reason=f"{verdict.reason}; batches could not be run again ({why_not})")
        advice = "Give Monitor.step a replay=, or give the diagnosis a task metric."
        layer.report_doubt(name, verdict.reason, f"there is no evidence: {why_not}", advice)
        return Verdict("unknown", f"{verdict.reason}; without evidence ({why_not}) nothing is said")

    def _supported_saturation(self, verdict: Verdict, name: str, layer: LayerHistory, patience: int) -> Verdict:
        """Return the verdict where the evidence supports it, otherwise healthy. It is asked for while the task stands
        still, one measurement ahead."""
        why_not, found = self._why_no_state_evidence(name), layer.state.found
        if why_not:
            return replace(verdict, reason=f"{verdict.reason}, without evidence ({why_not})")
        if found is None or not self._holds(layer.state.age, supports=found.outcome == "needed"):
            layer.suspected = "saturated" if layer.full_streak >= patience - 1 else None
            return Verdict("healthy", f"{verdict.reason}; what the loss says of a smaller state is not known yet")
        if found.outcome == "spare":
            return Verdict("healthy", f"{verdict.reason}, but {found.reason}")
        if layer.full_streak < patience:
            return Verdict("healthy", verdict.reason)
        return replace(verdict, reason=f"{verdict.reason}; {found.reason}")

    def _holds(self, age: int, *, supports: bool) -> bool:
        """Return whether evidence still counts.

        Where it did not support the rules it is asked for again from time to time. No finding is made on an old one.
        """
        return age <= (min(self.config.patience, self._recheck) if supports else self._recheck)


class TrackerState(BaseModel):
    """Validates `Tracker.state_dict`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    version: int = Field(ge=-(2**63), le=2**63 - 1)
    metric: str | None
    metrics: list[float]
    task: TaskMetricState | None = None
    """None: saved by 0.1."""
    layers: list[LayerState]
    """A list, so that the model order survives writers that sort keys."""


def _why_not_judged(reading: Reading) -> str:
    if reading.status != "ok":
        return f"{reading.status}: {reading.message}" if reading.message else reading.status
    return "a state that grows with the sequence is not judged" if reading.capacity_grows else "its TSS is not known"


def _decay_evidence(layer: LayerHistory, verdict: Verdict) -> Evidence | None:
    return layer.decay.found if verdict.condition in ("collapsed", "unused", "forgets_by_choice") else None


def _reasons(name: str, given: Mapping[str, str] | None) -> dict[str, str]:
    given = {} if given is None else given
    return dict(validation.instance(name, given, Mapping, hint="layer -> why it cannot be examined, or an empty text"))


def _first_problem(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc'])) or 'state'}: {first['msg']}"
    return str(error)
