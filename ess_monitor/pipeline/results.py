"""From evidence to consequences: diagnose, act, keep count, export. One place, so that all of them agree."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

from ess_monitor.capture import Layer
from ess_monitor.diagnosis import DiagnosisConfig, Tracker
from ess_monitor.exporters import ExporterHub
from ess_monitor.interventions import Autopilot
from ess_monitor.interventions.alpha import Optimizers
from ess_monitor.pipeline.counters import RunCounters
from ess_monitor.records import (
    MEASURED,
    Action,
    Condition,
    Finding,
    Measurement,
    Outcome,
    Part,
    Phase,
    Reading,
    SampleResult,
)
from ess_monitor.runtime import Cadence, Guard

_KEPT = 1000
"""Findings and actions that are remembered."""


def undiagnosed(layers: Iterable[Layer], config: DiagnosisConfig) -> frozenset[str]:
    """Names of the layers of which the diagnosis says nothing, because ESS says little of their kind."""
    if config.judge_uninformative:
        return frozenset()
    return frozenset(layer.name for layer in layers if layer.spec.uninformative)


class ResultHandler:
    """Takes each sampled step's evidence to the diagnosis, the autopilot, the ledger and the exporters.

    Each of them is guarded on its own: when one fails the others go on. Layers in `undiagnosed` are measured and
    exported, and stay of unknown condition.
    """

    def __init__(
        self,
        layers: tuple[str, ...],
        tracker: Tracker,
        autopilot: Autopilot,
        ledger: RunCounters,
        cadence: Cadence,
        guards: Mapping[Part, Guard],
        *,
        undiagnosed: frozenset[str] = frozenset(),
        clock: Callable[[], float] = time.perf_counter,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.hub = ExporterHub(())
        """Where measurements go; replaced when the run starts."""
        self.readings: dict[str, Reading] = {}
        """Latest reading of every layer."""
        self.may_act = True
        """False where the ranks of a distributed run no longer agree; the autopilot of mode auto then does nothing."""
        self.findings: tuple[Finding, ...] = ()
        self.actions: tuple[Action, ...] = ()
        self._layers = layers
        self._undiagnosed = undiagnosed
        self._tracker = tracker
        self._autopilot = autopilot
        self._ledger = ledger
        self._cadence = cadence
        self._guards = guards
        self._clock, self._wall_clock = clock, wall_clock

    @property
    def conditions(self) -> dict[str, Condition]:
        """Condition of every layer."""
        known = self._tracker.conditions
        return {name: known.get(name, "unknown") for name in self._layers}

    def judge(self, evidence: SampleResult, step: int, optimizer: Optimizers) -> None:
        """Everything that follows from one sampled step; `step` is the present one, at which actions are taken."""
        with self._guards["measurement"]:
            started = self._clock()
            findings = self._diagnose(evidence)
            diagnosed = self._clock()
            self.spent("diagnose", diagnosed - started)
            actions = self._intervene(evidence, findings, step, optimizer)
            intervened = self._clock()
            self.spent("intervene", intervened - diagnosed)
            self._export(evidence, findings, actions)
            self.spent("export", self._clock() - intervened)

    def skip(self, step: int, reason: str) -> None:
        """A sample that the ranks did not agree on is counted and shown; `reason` says where and why."""
        with self._guards["measurement"]:
            lost = tuple(Reading(step=step, layer=name, status="dropped", message=reason) for name in self._layers)
            self.readings.update({reading.layer: reading for reading in lost})
            self._ledger.measured("skipped", lost)
            self.report_autopilot()
            self._export(SampleResult(step, lost), (), ())

    def spent(self, phase: Phase, seconds: float) -> None:
        """The monitor itself took this long; where the clock went back, no time at all."""
        seconds = max(0.0, seconds)
        self._ledger.spent(phase, seconds)
        self._cadence.spent(seconds)
        self._ledger.overhead(self._cadence.overhead_ratio, self._cadence.interval_steps)

    def report_autopilot(self, actions: tuple[Action, ...] = ()) -> None:
        """Bring the ledger up to date with the autopilot."""
        pilot = self._autopilot
        kinds = [treatment.action for treatment in pilot.active]
        self._ledger.autopilot(actions, kinds, pilot.budget_remaining, self._is_auto and self.may_act)

    @property
    def _is_auto(self) -> bool:
        return self._autopilot.config.mode == "auto"

    def _diagnose(self, evidence: SampleResult) -> tuple[Finding, ...]:
        findings: tuple[Finding, ...] = ()
        if self._guards["diagnosis"].open:
            with self._guards["diagnosis"]:
                judged = [reading for reading in evidence.readings if reading.layer not in self._undiagnosed]
                findings = self._tracker.observe(judged, evidence.metrics, evidence.step)
        self.readings.update({reading.layer: reading for reading in evidence.readings})
        self.findings = (*self.findings, *findings)[-_KEPT:]
        outcome: Outcome = "failed" if evidence.readings else "skipped"
        if any(reading.status in MEASURED for reading in evidence.readings):
            outcome = "ok"
        self._ledger.measured(outcome, evidence.readings, findings, self.conditions)
        return findings

    def _intervene(
        self, evidence: SampleResult, findings: tuple[Finding, ...], step: int, optimizer: Optimizers
    ) -> tuple[Action, ...]:
        actions: tuple[Action, ...] = ()
        if self._guards["intervention"].open and (self.may_act or not self._is_auto):
            with self._guards["intervention"]:
                actions = self._autopilot.act(
                    step,
                    evidence.readings,
                    self.conditions,
                    findings,
                    evidence.metrics,
                    loss_broken=self._autopilot.config.loss in evidence.nonfinite,
                    optimizer=optimizer,
                )
        self.actions = (*self.actions, *actions)[-_KEPT:]
        self.report_autopilot(actions)
        return actions

    def _export(self, evidence: SampleResult, findings: tuple[Finding, ...], actions: tuple[Action, ...]) -> None:
        if not self._guards["export"].open:
            return
        with self._guards["export"]:
            self.hub.export(
                Measurement(
                    step=evidence.step,
                    timestamp_seconds=self._wall_clock(),
                    readings=evidence.readings,
                    conditions=self.conditions,
                    findings=findings,
                    actions=actions,
                    metrics=evidence.metrics,
                    overhead_ratio=self._cadence.overhead_ratio,
                    interval_steps=self._cadence.interval_steps,
                )
            )
