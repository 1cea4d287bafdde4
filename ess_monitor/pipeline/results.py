"""From a measured sample to its consequences: diagnose, act, count, export. One place, so that all of them agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ess_monitor.diagnosis import Tracker
from ess_monitor.diagnosis.absent_metric import AbsentMetric
from ess_monitor.diagnosis.absent_modulation import AbsentModulation
from ess_monitor.diagnosis.config import contradiction
from ess_monitor.errors import CheckpointError
from ess_monitor.evidence.counterfactual import Alternative
from ess_monitor.evidence.verdict import weigh, weigh_state
from ess_monitor.interventions import Autopilot
from ess_monitor.interventions.alpha import Optimizers
from ess_monitor.interventions.remedy import GradScale
from ess_monitor.pipeline.checkpoint import has_settings
from ess_monitor.pipeline.context import RunContext
from ess_monitor.records import (
    MEASURED,
    Action,
    Condition,
    Evidence,
    Finding,
    Measurement,
    Outcome,
    Reading,
    SampleResult,
    StateEvidence,
)
from ess_monitor.runtime.guard import logger

_KEPT = 1000
"""Findings and actions that are remembered."""


class ResultHandler:
    """Takes the result of each sample to the diagnosis, the autopilot, the counters and the exporters.

    Each of them is guarded on its own: when one fails the others go on.

    Args:
        context: of the run.
        grad_scale: what the loss is multiplied with before backward.
        export: takes each measurement to the sinks.
        obstacles: layers of whose decay batches that are run again can say nothing, and why.
        state_obstacles: the same of the size of their state.
    """

    def __init__(
        self,
        context: RunContext,
        grad_scale: GradScale,
        export: Callable[[Measurement], None],
        obstacles: Mapping[str, str],
        state_obstacles: Mapping[str, str],
    ) -> None:
        config, evidence = context.config.diagnosis, context.config.evidence
        self.readings: dict[str, Reading] = {}
        """Latest reading of every layer."""
        self.findings: tuple[Finding, ...] = ()
        self.actions: tuple[Action, ...] = ()
        self.autopilot = Autopilot(
            context.config.autopilot,
            context.layers,
            retention_below=config.retention_below,
            grad_scale=grad_scale,
            on_failure=context.guards["intervention"].count,
        )
        self._context, self._guards = context, context.guards
        quiet = () if config.judge_uninformative else (layer for layer in context.layers if layer.spec.uninformative)
        self._undiagnosed = frozenset(layer.name for layer in quiet)
        """Layers that are measured and stay of unknown condition, because ESS says little of their kind."""
        examined = context.layer_names if evidence.enabled else ()
        self._tracker = Tracker(
            config,
            examined={name: obstacles.get(name, "") for name in examined},
            examined_states={name: state_obstacles.get(name, "") for name in examined},
            recheck_measurements=evidence.recheck_measurements,
            layers=tuple(name for name in context.layer_names if name not in self._undiagnosed),
        )
        self._absent = AbsentMetric(config)
        modulation = context.config.modulation
        self._without_modulation = AbsentModulation(() if modulation is None else modulation.separators)
        self._is_said_that_layers_take_turns = False
        self._warnings: tuple[str, ...] = ()
        """Those that no measurement has taken to the sinks yet."""
        contradicts = contradiction(config)
        if contradicts:
            self._warn(f"diagnosis: {contradicts}")
        self._export_to_sinks = export

    @property
    def conditions(self) -> dict[str, Condition]:
        """Condition of every layer."""
        known = self._tracker.conditions
        return {name: known.get(name, "unknown") for name in self._context.layer_names}

    @property
    def unknown_reasons(self) -> dict[str, str]:
        """Why the condition of each layer is unknown whose is."""
        known = {**dict.fromkeys(self._undiagnosed, "the ESS of its kind says little"), **self._tracker.unknown_reasons}
        return {name: known.get(name, "not measured yet") for name, c in self.conditions.items() if c == "unknown"}

    def examinations(
        self, step: int, *, resumed: bool = False
    ) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, Alternative], int]:
        """Return what is to be learned from batches that are run again: the arguments of `Replays.ask`.

        Args:
            step: optimizer steps so far.
            resumed: leave out what would begin now. It begins at the next measurement, as in a run that did not stop.
        """
        within = None if resumed else self._context.cadence.interval_steps // 2
        comparisons = self.autopilot.comparisons(step, within)
        delay = max((delay for delay, _ in comparisons.values()), default=0)
        trials = {name: trial for name, (_, trial) in comparisons.items()}
        suspects, full = (
            tuple(name for name in names if name not in trials)
            for names in (self._tracker.suspects, self._tracker.full_suspects)
        )
        return suspects, full, trials, step + 1 + delay

    def handle(self, result: SampleResult, step: int, optimizer: Optimizers, *, may_act: bool) -> None:
        """Draw all consequences of one sample.

        Args:
            result: of the sample. One that was skipped is counted and exported, and changes nothing.
            step: the present one, at which actions are taken.
            optimizer: whose moments are reset with a rescaled parameter.
            may_act: whether interventions are allowed in mode auto.
        """
        with self._guards["measurement"]:
            if result.skipped:
                self._skip(result, may_act)
                return
            self._context.turns.observe(result.step, result.slowness)
            clock, charge = self._context.clock, self._context.charge
            started = clock()
            findings = self._diagnose(result)
            diagnosed = clock()
            charge("diagnose", diagnosed - started)
            actions = self._intervene(result, findings, step, optimizer, may_act)
            intervened = clock()
            charge("intervene", intervened - diagnosed)
            self._prefer()
            self._export(result, findings, actions)
            charge("export", clock() - intervened)

    def report_autopilot(self, actions: tuple[Action, ...] = (), *, may_act: bool = True) -> None:
        """Bring the counters up to date with the autopilot."""
        pilot = self.autopilot
        kinds = [treatment.action for treatment in pilot.active]
        self._context.counters.autopilot(actions, kinds, pilot.budget_remaining, self._is_auto and may_act)

    def report_resumed(self, step: int, *, may_act: bool) -> None:
        """Bring the counters up to date with a state that has been loaded."""
        tracker = self._tracker
        self._context.counters.resumed(step, self.conditions, tracker.evidence, tracker.state_evidence)
        self.report_autopilot(may_act=may_act)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of diagnosis and autopilot, for a checkpoint."""
        return {"autopilot": self.autopilot.state_dict(), "diagnosis": self._tracker.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], names: Mapping[str, str]) -> None:
        """Go on from `state_dict`.

        Args:
            state: of a monitor.
            names: by a layer's name in the state, that in this model. Others are dropped.

        Raises:
            CheckpointError: one of them cannot read its part. Both are left as they were.
        """
        evidence, before = self._context.config.evidence, self._tracker.state_dict()
        judged = {saved: name for saved, name in names.items() if name not in self._undiagnosed}
        self._tracker.load_state_dict(state["diagnosis"], judged)
        try:
            self.autopilot.load_state_dict(state["autopilot"], names)
        except CheckpointError:
            self._tracker.load_state_dict(before)
            raise
        if not has_settings(state["replays"], evidence):
            self._tracker.forget_evidence()  # it was weighed by other thresholds
        for treatment in () if evidence.enabled else self.autopilot.active:
            treatment.trial = None  # nothing is compared any more
        self._prefer()

    def _prefer(self) -> None:
        """Measure those layers first on which something is to be decided."""
        tracker, treated = self._tracker, [treatment.layer.name for treatment in self.autopilot.active]
        self._context.turns.prefer([*treated, *tracker.suspects, *tracker.full_suspects])

    @property
    def _is_auto(self) -> bool:
        return self.autopilot.config.mode == "auto"

    def _skip(self, result: SampleResult, may_act: bool) -> None:
        names = self._context.layer_names
        lost = tuple(Reading(step=result.step, layer=x, status="dropped", message=result.skipped) for x in names)
        self.readings.update({reading.layer: reading for reading in lost})
        self._context.counters.measured("skipped", lost)
        self.report_autopilot(may_act=may_act)
        self._export(SampleResult(result.step, lost), (), ())

    def _diagnose(self, result: SampleResult) -> tuple[Finding, ...]:
        findings: tuple[Finding, ...] = ()
        if self._guards["diagnosis"].open:
            with self._guards["diagnosis"]:
                diagnosed = [reading for reading in result.readings if reading.layer not in self._undiagnosed]
                findings = self._tracker.observe(diagnosed, result.metrics, result.step, self._weigh(result))
                others = self._context.metrics.names
                missing = self._absent.observe(result, known=self._tracker.metric_known, others=others)
                for warning in (*filter(None, [missing]), *self._without_modulation.observe(result.readings)):
                    self._warn(warning)
        self._report_turns(result)
        for reading in result.readings:  # a layer whose turn it was not keeps its last one
            if reading.status != "deferred" or reading.layer not in self.readings:
                self.readings[reading.layer] = reading
        self.findings = (*self.findings, *findings)[-_KEPT:]
        outcome: Outcome = "failed" if result.readings else "skipped"
        if any(reading.status in MEASURED for reading in result.readings):
            outcome = "ok"
        self._context.counters.measured(
            outcome,
            result.readings,
            findings,
            self.conditions,
            self._tracker.evidence,
            self._tracker.state_evidence,
        )
        return findings

    def _weigh(self, result: SampleResult) -> dict[str, Evidence | StateEvidence | str]:
        config, readings = self._context.config.evidence, {reading.layer: reading for reading in result.readings}
        weighed: dict[str, Evidence | StateEvidence | str] = {}
        for layer, sums in result.changes.items():
            reading = readings.get(layer)
            if sums.kind == "trial":
                continue
            if not sums.batches:
                weighed[layer] = (
                    "none of the batches of the last steps could be run again, on any rank; the log has the reason"
                )
            elif sums.kind in ("state_loss", "state_outputs"):
                end = None if reading is None else reading.spectrum_end_ratio
                weighed[layer] = weigh_state(layer, result.step, sums, config, end)
            else:
                far = None if reading is None else reading.far_share_ratio
                weighed[layer] = weigh(layer, result.step, sums, config, far)
        return weighed

    def _intervene(
        self, result: SampleResult, findings: tuple[Finding, ...], step: int, optimizer: Optimizers, may_act: bool
    ) -> tuple[Action, ...]:
        actions: tuple[Action, ...] = ()
        if self._guards["intervention"].open and (may_act or not self._is_auto):
            with self._guards["intervention"]:
                actions = self.autopilot.act(
                    step,
                    result.readings,
                    self.conditions,
                    findings,
                    result.metrics,
                    loss_broken=self.autopilot.config.loss in result.nonfinite,
                    evidence=self._tracker.evidence if self._context.config.evidence.enabled else None,
                    task_solved=self._tracker.task_solved,
                    comparisons={layer: sums for layer, sums in result.changes.items() if sums.kind == "trial"},
                    optimizer=optimizer,
                )
        self.actions = (*self.actions, *actions)[-_KEPT:]
        self.report_autopilot(actions, may_act=may_act)
        return actions

    def _report_turns(self, result: SampleResult) -> None:
        """Say once that not all layers fit into a sample."""
        deferred = sum(reading.status == "deferred" for reading in result.readings)
        turns = self._context.turns
        if self._is_said_that_layers_take_turns or not deferred or turns.limit_seconds is None:
            return
        self._is_said_that_layers_take_turns = True
        self._warn(
            f"runtime: the layers take about {turns.planned_seconds():.0f} s of one core, more than "
            f"sample_seconds={turns.limit_seconds:g}, and take turns: this sample left out {deferred} of "
            f"{len(result.readings)}. Lower capture.samples, capture.heads or positions, or raise sample_seconds, for "
            "more of them in a sample."
        )

    def _warn(self, text: str) -> None:
        self._warnings = (*self._warnings, text)
        logger.warning("ess_monitor: %s", text)

    def _export(self, result: SampleResult, findings: tuple[Finding, ...], actions: tuple[Action, ...]) -> None:
        if not self._guards["export"].open:
            return
        warnings, self._warnings = self._warnings, ()
        with self._guards["export"]:
            self._export_to_sinks(
                Measurement(
                    step=result.step,
                    timestamp_seconds=self._context.wall_clock(),
                    readings=result.readings,
                    conditions=self.conditions,
                    unknown_reasons=self.unknown_reasons,
                    findings=findings,
                    actions=actions,
                    metrics=result.metrics,
                    warnings=warnings,
                    overhead_ratio=self._context.cadence.overhead_ratio,
                    interval_steps=self._context.cadence.interval_steps,
                )
            )
