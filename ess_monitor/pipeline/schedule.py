"""Samples that are judged at a step known beforehand, so that a resumed run and all ranks act at the same steps.

A sample is judged a fixed number of steps after it was taken, and the training waits for its measurement if need be.
Where ranks measure together they agree at that step, and the interval to the next sample is part of what they agree on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ess_monitor.config import MonitorConfig
from ess_monitor.distributed.consensus import ConsensusResult, StoreConsensus
from ess_monitor.distributed.reduction import RankReduction
from ess_monitor.records import Part, Phase, SampleResult
from ess_monitor.runtime import Cadence, Guard


class Source(Protocol):
    """Where samples are measured."""

    def take(self, timeout_seconds: float | None = None) -> SampleResult | None:
        """Wait for the oldest sample, up to a limit; None when nothing is under way."""


@dataclass(frozen=True)
class Skipped:
    """A sample that is not judged on any rank."""

    step: int
    """Step of the sample."""
    reason: str
    """Where it is skipped, and why."""


class Lockstep:
    """The sample that waits for its step.

    Args:
        config: how many steps lie between a sample and its judgment, and which metrics are decided on.
        layers: names of the measured layers.
        cadence: held from a sample to its judgment.
        source: what gives the evidence.
        guards: that of the worker is around the wait for it, that of the agreement counts the samples skipped.
        agreement: the exchange with the other ranks; None where this process decides alone.
        spent: told how long the exchange took.
    """

    def __init__(
        self,
        config: MonitorConfig,
        layers: Sequence[str],
        cadence: Cadence,
        source: Source,
        guards: Mapping[Part, Guard],
        agreement: StoreConsensus | None,
        *,
        spent: Callable[[Phase, float], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._lag = config.autopilot.lag_steps
        self._cadence = cadence
        self._source = source
        self._guards = guards
        self._agreement = agreement
        self._spent, self._clock = spent, clock
        metrics = [name for name in (config.autopilot.loss, config.diagnosis.metric) if name is not None]
        self._ballot = None if agreement is None else RankReduction(layers, metrics, agreement.measuring)
        self._interval = cadence.every_n_steps
        """The last agreed one: all ranks have it, whatever their own costs are."""
        self._judge_at: int | None = None
        self._evidence: SampleResult | None = None
        """The sample that waits for its step, when it was read early for a checkpoint."""

    @property
    def exchanges(self) -> bool:
        """True while this process decides together with others."""
        return self._agreement is not None and not self._agreement.off

    @property
    def measures(self) -> bool:
        """False on a rank that only learns what the others measured."""
        return not self.exchanges or self._agreement is None or self._agreement.measures

    @property
    def may_act(self) -> bool:
        """False once the ranks no longer agree: what one does alone would part their models."""
        return self._agreement is None or not self._agreement.off

    @property
    def waiting(self) -> bool:
        """True from a sample to its judgment."""
        return self._judge_at is not None

    def taken(self, step: int) -> None:
        """A sample was taken after `step` optimizer steps. Nothing else is due until it is judged."""
        self._cadence.hold()
        self._judge_at = step + self._lag

    def due(self, step: int) -> bool:
        """True when the sample is to be judged now."""
        return self._judge_at is not None and step >= self._judge_at

    def read_ahead(self, timeout_seconds: float | None = None) -> None:
        """What is under way goes with the checkpoint."""
        if self._judge_at is not None and self._evidence is None:
            self._evidence = self._read(timeout_seconds)

    def conclude(self) -> SampleResult | Skipped:
        """What is to be judged, the same on all ranks; the next sample is scheduled."""
        assert self._judge_at is not None, "nothing waits to be judged"
        step, evidence = self._judge_at, self._evidence or self._read()
        self._judge_at, self._evidence = None, None
        interval = self._cadence.wanted_steps
        try:
            if self._agreement is None or self._ballot is None or self._agreement.off:
                return evidence
            interval = self._interval
            started = self._clock()
            mine = self._ballot.encode(evidence, self._cadence.wanted_steps) if self._agreement.measures else None
            verdict = self._agreement.exchange(step, mine, self._ballot.reduce)
            # Waiting for others is a cost of the monitor: the budget stretches the interval where ranks come apart.
            self._spent("measure", self._clock() - started)
            if verdict.values is None:
                return Skipped(evidence.step, self._skipped(self._agreement, verdict))
            evidence, interval = self._ballot.decode(evidence, verdict.values)
            self._interval = interval
            return evidence
        finally:
            self._cadence.resume(interval)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        self.read_ahead()
        return {
            "judge_at": self._judge_at,
            "evidence": None if self._evidence is None else self._evidence.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._interval = self._cadence.interval_steps
        self._judge_at = state["judge_at"]
        self._evidence = None if state["evidence"] is None else SampleResult.from_state(state["evidence"])

    def _skipped(self, agreement: StoreConsensus, verdict: ConsensusResult) -> str:
        guard = self._guards["agreement"]
        where = "on all ranks" if verdict.everywhere else f"on rank {agreement.rank} alone, the others may go on"
        reason = f"skipped {where}: {verdict.reason}"
        guard.count(f"a sample is {reason}")
        if agreement.off:
            guard.turn_off(
                f"rank {agreement.rank}: {agreement.reason}. The autopilot does not act any more, and readings are "
                "those of this rank alone. Attach a new monitor on all ranks, or resume from a checkpoint, to turn it "
                "on again."
            )
        return reason

    def _read(self, timeout_seconds: float | None = None) -> SampleResult:
        """Wait for the sample under way. One that is lost becomes evidence without readings."""
        taken_at = max(0, (self._judge_at or 0) - self._lag)
        if self._agreement is None or self._agreement.measures:
            with self._guards["worker"]:
                evidence = self._source.take(timeout_seconds)
                while evidence is not None and evidence.step < taken_at:  # one that was given up, and came after all
                    evidence = self._source.take(timeout_seconds)
                if evidence is not None:
                    return evidence
        return SampleResult(taken_at, ())
