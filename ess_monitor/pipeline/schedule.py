"""When a sample is judged: as soon as it is measured, or at a step that all ranks and a resumed run know beforehand.

In lockstep a sample is judged a fixed number of steps after it was taken, and the training waits for its measurement if
need be. Where ranks measure together they agree at that step, and the interval to the next sample is part of what they
agree on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol

from ess_monitor.distributed import ConsensusResult, RankReduction, StoreConsensus
from ess_monitor.pipeline.checkpoint import result_from_state, result_state
from ess_monitor.pipeline.context import RunContext
from ess_monitor.records import SampleResult


class Source(Protocol):
    """Gives the measured samples: the queue, as a schedule sees it."""

    def __len__(self) -> int:
        """Samples under way."""

    def poll(self) -> list[SampleResult]:
        """Return the samples that are done, without waiting."""

    def drain(self, timeout_seconds: float) -> list[SampleResult]:
        """Wait for every sample under way, and return them."""

    def take(self, timeout_seconds: float | None = None) -> SampleResult | None:
        """Wait for the oldest sample, up to a limit; None when nothing is under way."""


class Schedule(ABC):
    """Decides when a sample is judged, and who takes part in it."""

    @property
    def exchanges(self) -> bool:
        """Whether this process decides together with others: it then takes part in every sample."""
        return False

    @property
    def measures(self) -> bool:
        """Whether this rank measures its own data."""
        return True

    @property
    def needs_every_rank(self) -> bool:
        """Whether every rank takes samples at the same steps, also one whose readings nobody asks for."""
        return False

    @property
    def may_act(self) -> bool:
        """Whether interventions are allowed: not once the ranks no longer agree, since their models would part."""
        return True

    @property
    def waiting(self) -> bool:
        """Whether a sample is still to be judged. No other is taken until then."""
        return False

    def first_step(self, step: int) -> int:
        """Return the lowest step of a sample that may still be judged, after `step` optimizer steps."""
        return step

    @abstractmethod
    def taken(self, step: int) -> None:
        """Note that a sample was taken after `step` optimizer steps."""

    @abstractmethod
    def due(self, step: int) -> bool:
        """Return whether `conclude` is to be called now."""

    @abstractmethod
    def conclude(self) -> list[SampleResult]:
        """Return the samples to be judged now."""

    @abstractmethod
    def flush(self, timeout_seconds: float) -> list[SampleResult]:
        """Wait for what is under way, and return it to be judged."""

    @abstractmethod
    def finish(self, timeout_seconds: float) -> list[SampleResult]:
        """Wait for what is under way when the run ends; return what this run still judges, and not a resumed one."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return the sample that waits, for a checkpoint."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the state of a monitor."""


class Immediate(Schedule):
    """Judges a sample at the first step that finds it measured; nobody waits."""

    def __init__(self, context: RunContext, source: Source) -> None:
        self._cadence, self._worker, self._source = context.cadence, context.guards["worker"], source

    def taken(self, step: int) -> None:
        self._cadence.sampled(step)

    def due(self, step: int) -> bool:
        return len(self._source) > 0 and self._worker.open

    def conclude(self) -> list[SampleResult]:
        return self._source.poll()

    def flush(self, timeout_seconds: float) -> list[SampleResult]:
        return self._source.drain(timeout_seconds)

    def finish(self, timeout_seconds: float) -> list[SampleResult]:
        return self._source.drain(timeout_seconds)

    def state_dict(self) -> dict[str, Any]:
        return {"judge_at": None, "evidence": None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["cadence"]["held"]:  # saved in lockstep: nothing will be judged here that could release the cadence
            self._cadence.resume(self._cadence.interval_steps)


class Lockstep(Schedule):
    """Judges a sample a fixed number of steps after it was taken, and holds the cadence until then.

    Args:
        context: of the run.
        source: gives the measured samples.
        consensus: the exchange with the other ranks; None where this process decides alone.
    """

    def __init__(self, context: RunContext, source: Source, consensus: StoreConsensus | None) -> None:
        config = context.config
        self._context, self._cadence, self._guards = context, context.cadence, context.guards
        self._source, self._consensus = source, consensus
        self._lag_steps = config.autopilot.lag_steps
        metrics = [name for name in (config.autopilot.loss, config.diagnosis.metric) if name is not None]
        ranks = () if consensus is None else consensus.measuring
        tolerances = () if config.modulation is None else config.modulation.tolerances
        self._reduction = RankReduction(context.layer_names, metrics, ranks, tolerances)
        self._interval_steps = self._cadence.every_n_steps
        """The last agreed one: all ranks have it, whatever their own costs are."""
        self._judge_at: int | None = None
        self._result: SampleResult | None = None
        """The sample that waits for its step, when it was read early for a checkpoint."""

    @property
    def exchanges(self) -> bool:
        return self._consensus is not None and not self._consensus.off

    @property
    def measures(self) -> bool:
        return self._consensus is None or self._consensus.off or self._consensus.measures

    @property
    def needs_every_rank(self) -> bool:
        return True

    @property
    def may_act(self) -> bool:
        return self._consensus is None or not self._consensus.off

    @property
    def waiting(self) -> bool:
        return self._judge_at is not None

    def first_step(self, step: int) -> int:
        return step if self._judge_at is None else min(step, max(0, self._judge_at - self._lag_steps))

    def taken(self, step: int) -> None:
        self._cadence.sampled(step)
        self._cadence.hold()
        self._judge_at = step + self._lag_steps

    def due(self, step: int) -> bool:
        return self._judge_at is not None and step >= self._judge_at

    def conclude(self) -> list[SampleResult]:
        """Return the one sample to be judged, the same on all ranks, and schedule the next."""
        # Both are given up first: a signal handler that flushes meanwhile must not judge the sample once more.
        (step, result), (self._judge_at, self._result) = (self._judge_at, self._result), (None, None)
        if step is None:
            return []
        result = result or self._read(step)
        interval_steps = self._cadence.wanted_steps
        try:
            if self._consensus is None or self._consensus.off:
                return [result]
            interval_steps = self._interval_steps
            started = self._context.clock()
            mine = self._reduction.encode(result, self._cadence.wanted_steps) if self._consensus.measures else None
            agreed = self._consensus.exchange(step, mine, self._reduction.reduce)
            # Waiting for others is a cost of the monitor: the budget stretches the interval where ranks come apart.
            self._context.charge("measure", self._context.clock() - started)
            if agreed.values is None:
                return [SampleResult(result.step, (), skipped=self._report_skip(self._consensus, agreed))]
            result, interval_steps = self._reduction.decode(result, agreed.values)
            self._interval_steps = interval_steps
            return [result]
        finally:
            self._cadence.resume(interval_steps)

    def flush(self, timeout_seconds: float) -> list[SampleResult]:
        self._read_ahead(timeout_seconds)
        return self.conclude()

    def finish(self, timeout_seconds: float) -> list[SampleResult]:
        self._read_ahead(timeout_seconds)  # it goes with the checkpoint, and a resumed run judges it at its step
        return []

    def state_dict(self) -> dict[str, Any]:
        self._read_ahead()
        evidence = None if self._result is None else result_state(self._result)
        return {"judge_at": self._judge_at, "evidence": evidence}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._interval_steps = self._cadence.interval_steps
        self._judge_at = state["judge_at"]
        if state["evidence"] is not None:
            self._result = result_from_state(state["evidence"])
            self._judge_at = self._result.step + self._lag_steps  # the lag may be another one now

    def _read_ahead(self, timeout_seconds: float | None = None) -> None:
        if self._judge_at is not None and self._result is None:
            self._result = self._read(self._judge_at, timeout_seconds)

    def _read(self, judge_at: int, timeout_seconds: float | None = None) -> SampleResult:
        """Wait for the sample under way. One that is lost becomes a result without readings."""
        taken_at = max(0, judge_at - self._lag_steps)
        if self.measures:
            with self._guards["worker"]:
                result = self._source.take(timeout_seconds)
                while result is not None and result.step < taken_at:  # one that was given up, and came after all
                    result = self._source.take(timeout_seconds)
                if result is not None:
                    return result
        return SampleResult(taken_at, ())

    def _report_skip(self, consensus: StoreConsensus, agreed: ConsensusResult) -> str:
        guard = self._guards["agreement"]
        where = "on all ranks" if agreed.everywhere else f"on rank {consensus.rank} alone, the others may go on"
        reason = f"skipped {where}: {agreed.reason}"
        guard.count(f"a sample is {reason}")
        if consensus.off:
            guard.turn_off(
                f"rank {consensus.rank}: {consensus.reason}. The autopilot does not act any more, and readings are "
                "those of this rank alone. Attach a new monitor on all ranks, or resume from a checkpoint, to turn it "
                "on again."
            )
        return reason
