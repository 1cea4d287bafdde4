"""One reading in its context -> one verdict. Pure functions, no memory of their own.

Collapsed (section 3.2: enough TSS, but ESS fails to increase) is

    without a task metric    utilization < collapsed_below  and  retention < retention_below
    with one                 the metric is unsolved  and
                             (utilization < collapsed_below  or
                              utilization < starved_below  and  retention < retention_below)
    either way               neither utilization nor the metric rises

The first line of a run with a metric asks for a nearly empty memory and for no cause. The second (starved) asks for
less emptiness, because it knows the cause: the decay takes what the features offer. WLA runs that never learn hold
.26-.36 through the first half of their training; most sink below .3 for good only in the second.

A layer that looks collapsed and still rises gets the verdict healthy, with `suspected` set: the trend forbids saying
more, and the reading counts towards patience. The trend is a mean over many readings already; to ask for `patience`
flat trends in a row would wait twice for the same thing.

Saturated (section 3.2: too little TSS for the task, ESS near TSS) is

    utilization >= saturated_above where the sequence could fill the state  and
        the task metric is unsolved and does not improve over plateau_window

and is never said without a task metric. A full state is necessary for saturation and not sufficient: linear attention
fills a small state by construction, and a WLA of TSS 4 solved MQAR at utilization 1.0. Whether more memory would help
is a fact about the task that the operator does not show.

A layer whose TSS grows with the position (softmax attention) is not judged: its TSS is no design choice.

The first of several layers is not called collapsed (`spare_first_layer`). Where another one would look collapsed its
verdict is unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ess_monitor import validation
from ess_monitor.diagnosis.config import DiagnosisConfig
from ess_monitor.records import Condition, Reading, attainable_utilization, full_state_utilization


@dataclass(frozen=True)
class Verdict:
    """What one reading says of its layer."""

    condition: Condition
    reason: str
    """What was seen, against which threshold."""
    advice: str = ""
    """What a person can do about it; empty for a healthy layer."""
    suspected: Condition | None = None
    """The condition that this reading shows and that only a trend upwards forbids to say (yet)."""


@dataclass(frozen=True)
class Context:
    """What a single reading does not show. The default is that of a first reading of a lone layer."""

    previous: Condition = "unknown"
    """Condition before this reading: decides which side of a hysteresis applies."""
    utilizations: tuple[float, ...] = ()
    """Utilization (`attainable_utilization`) over the trend window, oldest first, this reading's included."""
    metrics: tuple[float, ...] = ()
    """Last known task metric at each measurement of the longer of trend and plateau window, oldest first. Empty: none
    known, or none asked for (`config.metric` is None): the rules for runs without a task metric apply."""
    first_of_several: bool = False
    """True for the first layer of a model with more than one."""


def judge(reading: Reading, context: Context, config: DiagnosisConfig) -> Verdict | None:
    """The condition that `reading` speaks for, or None where it speaks for none.

    None is returned for a status other than `ok`, for a layer whose capacity grows with the position, and for a reading
    without sizes. Otherwise exactly one verdict, `healthy` included.

    Example:
        >>> reading = Reading(step=2000, layer="mixer.1", status="ok", length=64, positions=(32,), state_capacity=16,
        ...                   attainable_size=16, effective_size=2.4, utilization_ratio=0.15, retention_ratio=0.54)
        >>> judge(reading, Context(), DiagnosisConfig()).condition
        'collapsed'
        >>> learned = Context(metrics=(0.99,))
        >>> judge(reading, learned, DiagnosisConfig(metric="accuracy", metric_solved=0.9)).condition
        'healthy'
    """
    validation.instance("reading", reading, Reading)
    validation.instance("context", context, Context)
    validation.instance("config", config, DiagnosisConfig)
    utilization = attainable_utilization(reading)
    if utilization is None:
        return None
    if task_solved(context.metrics, config):
        return Verdict(
            "healthy",
            f"utilization {utilization:.2f}, and the task is solved: {config.metric} reached {config.metric_solved:g}",
        )
    return (
        _saturated(reading, context, config)
        or _collapsed(reading, utilization, context, config)
        or Verdict("healthy", _healthy_reason(utilization, context, config))
    )


def task_solved(metrics: Sequence[float], config: DiagnosisConfig) -> bool:
    """Whether one of the last `patience` metric values reached `metric_solved`.

    The best of several, so that a metric which hovers around the line counts as solved.
    """
    if config.metric_solved is None:
        return False
    recent = metrics[-config.patience :]
    if config.metric_mode == "max":
        return any(value >= config.metric_solved for value in recent)
    return any(value <= config.metric_solved for value in recent)


def task_improves(metrics: Sequence[float], config: DiagnosisConfig, window: int | None = None) -> bool:
    """Whether the metric closed `metric_progress_ratio` of its distance to `metric_solved` over the last `window`.

    The window is `config.trend_window` unless said otherwise.
    """
    recent = metrics[-(config.trend_window if window is None else window) :]
    if config.metric_solved is None or len(recent) < 2:
        return False
    older, newer = _halves(recent)
    closed = newer - older if config.metric_mode == "max" else older - newer
    return closed > config.metric_progress_ratio * abs(config.metric_solved - older)


def is_rising(utilizations: Sequence[float], config: DiagnosisConfig) -> bool:
    """Whether utilization rose by more than `rising_ratio` over the trend window."""
    if len(utilizations) < 2:
        return False
    older, newer = _halves(utilizations)
    return newer > older * (1 + config.rising_ratio)


def _saturated(reading: Reading, context: Context, config: DiagnosisConfig) -> Verdict | None:
    if not context.metrics:
        return None
    utilization = full_state_utilization(reading)
    if utilization is None:
        return None
    if context.previous == "saturated":
        seen, bound = utilization >= config.saturated_recovers_below, config.saturated_recovers_below
    else:
        full = utilization >= config.saturated_above
        learns = task_improves(context.metrics, config, config.plateau_window)
        seen, bound = full and not learns, config.saturated_above
    if not seen:
        return None
    return Verdict(
        "saturated",
        f"utilization {utilization:.2f} is at or above {bound:g} and {_unsolved(context, config)}",
        f"the memory is full: raise the state size (now {reading.state_capacity:g} per channel) "
        "or ask for less to be remembered; no change of the decay adds room",
    )


def _collapsed(reading: Reading, utilization: float, context: Context, config: DiagnosisConfig) -> Verdict | None:
    retention = reading.retention_ratio
    collapsed = context.previous == "collapsed"
    line = config.collapsed_recovers_above if collapsed else config.collapsed_below
    starved_line = config.starved_recovers_above if collapsed else config.starved_below
    retention_line = config.retention_recovers_above if collapsed else config.retention_below
    to_blame = retention is not None and retention < retention_line
    if not context.metrics and not to_blame:
        # Without a task the only sign that low use is a fault is that the decay takes away what the features offer.
        return None
    starved = bool(context.metrics) and to_blame and utilization >= line
    bound = starved_line if starved else line
    if utilization >= bound:
        return None
    if context.first_of_several and config.spare_first_layer:
        # Not collapsed, as it may be right to use so little; and not healthy, as nobody has seen that it is.
        return Verdict(
            "unknown", f"utilization {utilization:.2f} is below {bound:g}, which may be right in a first layer"
        )
    if not collapsed and (is_rising(context.utilizations, config) or task_improves(context.metrics, config)):
        # A saturated layer has to leave its condition first: there is no suspicion while there is a finding.
        return Verdict(
            "healthy",
            f"utilization {utilization:.2f} is below {bound:g}, and it or the task is on its way up",
            suspected=None if context.previous == "saturated" else "collapsed",
        )
    facts = [f"utilization {utilization:.2f} is below {bound:g} and not recovering"]
    if retention is None:
        facts.append("there is no decay")
    else:
        facts.append(f"retention is {retention:.2f}" + (f", below {retention_line:g}" if starved else ""))
    if context.metrics:
        facts.append(_unsolved(context, config))
    return Verdict("collapsed", ", ".join(facts), _collapse_advice(to_blame, context))


def _collapse_advice(to_blame: bool, context: Context) -> str:
    if to_blame:
        advice = "the decay empties the memory: pull A towards I (A->I regularizer) or raise alpha"
    else:
        advice = (
            "features or data, not the decay, leave the memory unused: look at the position information, the scale of "
            "q and k, the learning rate, and at how many distinct tokens a sequence holds"
        )
    return advice if context.metrics else f"{advice}; give a task metric to the diagnosis to be surer"


def _healthy_reason(utilization: float, context: Context, config: DiagnosisConfig) -> str:
    if context.previous == "collapsed":
        return (
            f"utilization {utilization:.2f}: above {config.collapsed_recovers_above:g}, or no longer lost to the decay"
        )
    if context.previous == "saturated":
        return f"utilization {utilization:.2f}: below {config.saturated_recovers_below:g}, there is room again"
    return f"utilization {utilization:.2f}: neither lost nor full"


def _unsolved(context: Context, config: DiagnosisConfig) -> str:
    return f"{config.metric} {context.metrics[-1]:.3g} has not reached {config.metric_solved:g}"


def _halves(values: Sequence[float]) -> tuple[float, float]:
    """Means of the older and the newer half."""
    middle = len(values) // 2
    return sum(values[:middle]) / middle, sum(values[middle:]) / (len(values) - middle)
