"""One layer over a run: its condition, what speaks for another one, and what was asked about it."""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, replace
from typing import Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from ess_monitor.diagnosis.rules import Verdict
from ess_monitor.records import Condition, Evidence, StateEvidence, condition_title, layer_title

logger = logging.getLogger("ess_monitor")

Found = TypeVar("Found", Evidence, StateEvidence)

_Count = Field(default=0, ge=0, le=2**63 - 1)


@dataclass
class Examination(Generic[Found]):
    """One question about a layer, answered by batches that are run again: of its decay, or of the size of its state."""

    found: Found | None = None
    age: int = 0
    """Measurements since the evidence, or since the obstacle."""
    obstacle: str = ""
    """Why there was no answer when it was asked."""

    def take(self, found: Found | str | None, recheck: int) -> None:
        """Note at a measurement what was found, or why nothing was."""
        if self.found is not None or self.obstacle:
            self.age = min(self.age + 1, recheck + 1)
        if isinstance(found, str):
            self.obstacle, self.age = found, 0
        elif found is not None:
            self.found, self.obstacle, self.age = found, "", 0
        elif self.age > recheck:
            self.obstacle = ""


class LayerHistory:
    """Holds condition, streak and window of one layer, and the evidence on it.

    Args:
        window: measurements over which a trend is taken.
    """

    def __init__(self, window: int) -> None:
        self.condition: Condition = "unknown"
        self.candidate: Condition = "unknown"
        self.streak = 0
        self.utilizations: deque[float] = deque(maxlen=window)
        self.decay: Examination[Evidence] = Examination()
        self.state: Examination[StateEvidence] = Examination()
        self.full_streak = 0
        """Readings in a row that were full (`Verdict.is_full`)."""
        self.suspected: Suspicion | None = None
        """What the next reading like the last one completes, if the evidence supports it."""
        self.why_unknown = "not measured yet"
        """What stands in the way of a condition, as long as there is none."""
        self._is_reported = False

    def take_evidence(self, found: Evidence | StateEvidence | str | None, recheck: int) -> None:
        """Note at a measurement what was found on the layer, or why nothing was."""
        is_state = isinstance(found, StateEvidence) or (isinstance(found, str) and self.suspected == "saturated")
        self.decay.take(None if is_state else found, recheck)  # type: ignore[arg-type]
        self.state.take(found if is_state else None, recheck)  # type: ignore[arg-type]

    def weigh_collapse(self, verdict: Verdict, found: Evidence, *, with_metric: bool) -> Verdict:
        """Return what the evidence makes of a verdict of collapsed. The readings so far count for it.

        A task that needs no past at all looks like a silent collapse, also where a metric calls it unsolved: its target
        may be out of reach. Only a treatment on trial tells them apart.
        """
        if found.outcome == "loud":
            return replace(verdict, reason=f"{verdict.reason}; {found.reason}")
        if found.outcome == "by_choice":
            advice = "nothing to do: this task needs little memory, or another layer has it"
            weighed = Verdict("forgets_by_choice", f"{verdict.reason}, but {found.reason}", advice)
        elif found.outcome == "silent":
            advice = "nothing to do if the task needs no past; otherwise "
            advice += (
                "the layer has collapsed: mode auto pulls A towards I on trial, and takes it back if the loss gains "
                "nothing"
                if with_metric
                else "give the diagnosis a task metric: mode auto treats the layer on trial while the task is unsolved"
            )
            weighed = Verdict("unused", f"{verdict.reason}; {found.reason}", advice)
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
            self.candidate, self.streak, self.why_unknown = condition, 0, verdict.reason
            return False
        self.streak = self.streak + 1 if condition == self.candidate else 1
        self.candidate = condition
        self.why_unknown = f"{condition_title(condition)} in {self.streak} of {patience} measurements in a row"
        if self.streak < patience or verdict.suspected is not None:
            return False
        self.condition, self.streak = condition, 0
        return True

    def to_state(self, name: str) -> LayerState:
        """Return all that is needed to go on."""
        return LayerState(
            name=name,
            condition=self.condition,
            candidate=self.candidate,
            streak=self.streak,
            utilizations=list(self.utilizations),
            evidence=self.decay.found,
            evidence_age=self.decay.age,
            obstacle=self.decay.obstacle,
            state_evidence=self.state.found,
            state_evidence_age=self.state.age,
            state_obstacle=self.state.obstacle,
            full_streak=self.full_streak,
            suspected=self.suspected,
        )

    @classmethod
    def from_state(cls, state: LayerState, window: int, name: str) -> LayerHistory:
        """Return the layer as it was, under its present name. Under a smaller window the newest values are kept."""
        layer = cls(window)
        layer.condition, layer.candidate, layer.streak = state.condition, state.candidate, state.streak
        layer.utilizations.extend(state.utilizations)
        found, full = state.evidence, state.state_evidence
        found = None if found is None else found.model_copy(update={"layer": name})
        full = None if full is None else full.model_copy(update={"layer": name})
        layer.decay = Examination(found, state.evidence_age, state.obstacle)
        layer.state = Examination(full, state.state_evidence_age, state.state_obstacle)
        layer.full_streak, layer.suspected = state.full_streak, state.suspected
        return layer


Suspicion = Literal["collapsed", "saturated"]


class LayerState(BaseModel):
    """Validates `LayerHistory.to_state`. What is asked about a layer is absent in states of 0.1."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    condition: Condition
    candidate: Condition
    streak: int = Field(ge=0, le=2**63 - 1)
    utilizations: list[float]
    evidence: Evidence | None = None
    evidence_age: int = _Count
    obstacle: str = ""
    state_evidence: StateEvidence | None = None
    state_evidence_age: int = _Count
    state_obstacle: str = ""
    full_streak: int = _Count
    suspected: Suspicion | None = None
