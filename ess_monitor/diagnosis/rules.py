"""One reading in its context -> one verdict. Pure functions without memory.

A rule is a function `(reading, utilization, context, config) -> Verdict | None`. `RULES` are tried in order, and the
first verdict counts; where no rule gives one, the layer is healthy. A new rule is one function and one line there.

Collapsed (section 3.2: enough TSS, but ESS fails to increase) is

    without a task metric    utilization < collapsed_below  and  retention < retention_below
    with one                 the metric is unsolved  and
                             (utilization < collapsed_below  or
                              utilization < starved_below  and  retention < retention_below)
    either way               neither utilization nor the metric rises

The first line of a run with a metric asks for a nearly empty memory and for no cause. The second (starved) asks for
less emptiness, because it knows the cause: the decay takes what the features offer. WLA runs that never learn hold
.26-.36 through the first half of their training; most sink below .3 for good only in the second.

Only new values of the metric show that the task stands still: one that is logged once an epoch repeats in between
(`diagnosis.task_metric`). Where there are too few, a layer that looks collapsed is suspected, and none is saturated.

A layer that looks collapsed and still rises gets the verdict healthy, with `suspected` set: the trend forbids saying
more, and the reading counts towards patience. The trend is a mean over many readings already; to ask for `patience`
flat trends in a row would wait twice for the same thing.

Saturated (section 3.2: too little TSS for the task, ESS near TSS) is

    utilization >= saturated_above where the sequence could fill the state  and
        the spectrum of H_i ends at saturated_spectrum_end or above  and
        the task metric is unsolved and does not improve over plateau_window

and is never said without a task metric. A full state is necessary for saturation and not sufficient: linear attention
fills a small state by construction, and a WLA of TSS 4 solved MQAR at utilization 1.0. Whether more memory would help
is a fact about the task that the operator does not show. What a smaller state costs the loss says more. Where it can be
seen (`Context.is_examined`) the rule only proposes: from `full_above` on, after `patience`, where the metric stands
still over trend_window. The evidence decides. An upward trend forbids the finding and does not restart the patience.

A layer whose TSS grows with the position (softmax attention) is not judged: its TSS is not a design choice.

The first of several layers is not called collapsed (`spare_first_layer`). Where another layer would look collapsed,
its verdict is unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ess_monitor import validation
from ess_monitor.diagnosis.config import DiagnosisConfig
from ess_monitor.diagnosis.utilization import attainable_utilization, full_state_utilization
from ess_monitor.records import CONDITION_INFO, Condition, Reading


@dataclass(frozen=True)
class Verdict:
    """Says which condition one reading speaks for, and why."""

    condition: Condition
    reason: str
    """What was seen, against which threshold."""
    advice: str = ""
    """What to do about it; empty for a healthy layer."""
    suspected: Condition | None = None
    """The condition that this reading shows, while an upward trend still forbids calling the layer so."""
    patience: int | None = None
    """Consecutive measurements that must agree before the condition changes; None: `config.patience`."""
    is_full: bool = False
    """Whether the state is full, the task unsolved, and evidence can be had. Such readings count towards the patience
    of a saturation, also while an upward trend still forbids it."""


@dataclass(frozen=True)
class Context:
    """Holds what a single reading does not show. The default is that of the first reading of an only layer."""

    previous: Condition = "unknown"
    """Condition before this reading. It decides which of a hysteresis's two lines applies."""
    utilizations: tuple[float, ...] = ()
    """Utilization (`attainable_utilization`) over the trend window, oldest first, this reading's included."""
    metrics: tuple[float, ...] = ()
    """Last known task metric at each measurement of the longer of trend and plateau window, oldest first. Empty: none
    known, or none asked for (`config.metric` is None): the rules for runs without a task metric apply."""
    new_in_trend: tuple[float, ...] | None = None
    """Values of the metric that were new in the trend window, oldest first; repeated ones are left out. With fewer than
    `config.metric_new_values` the window has been stretched to its utmost, and no trend is known. None: every value of
    `metrics` is new."""
    new_in_plateau: tuple[float, ...] | None = None
    """The same for the plateau window."""
    is_examined: bool = False
    """True where batches are run again with a smaller state before the layer is called saturated."""
    first_of_several: bool = False
    """True for the first layer of a model with more than one."""


Rule = Callable[[Reading, float, Context, DiagnosisConfig], "Verdict | None"]
"""(reading, its attainable utilization, context, config) -> a verdict, or None where the rule does not apply."""


def task_solved(metrics: Sequence[float], config: DiagnosisConfig) -> bool:
    """Return whether one of the last `patience` metric values reached `metric_solved`.

    The best of several, so that a metric which hovers around the line counts as solved.
    """
    if config.metric_solved is None:
        return False
    recent = metrics[-config.patience :]
    if config.metric_mode == "max":
        return any(value >= config.metric_solved for value in recent)
    return any(value <= config.metric_solved for value in recent)


def task_improves(metrics: Sequence[float], config: DiagnosisConfig, window: int | None = None) -> bool:
    """Return whether the metric closed `metric_progress_ratio` of its distance to `metric_solved` over the window.

    The window is the last `config.trend_window` values unless `window` is given.
    """
    recent = metrics[-(config.trend_window if window is None else window) :]
    if config.metric_solved is None or len(recent) < 2:
        return False
    older, newer = _halves(recent)
    closed = newer - older if config.metric_mode == "max" else older - newer
    return closed > config.metric_progress_ratio * abs(config.metric_solved - older)


def task_stands_still(
    metrics: Sequence[float], new: Sequence[float] | None, config: DiagnosisConfig, window: int
) -> bool:
    """Return whether the metric is known not to improve over the window.

    Args:
        metrics: last known value at each measurement.
        new: the new values of the window, or None where every value of `metrics` is new.
        config: thresholds.
        window: measurements.
    """
    if new is None:
        return not task_improves(metrics, config, window)
    return len(new) >= config.metric_new_values and not task_improves(new, config, len(new))


def is_rising(utilizations: Sequence[float], config: DiagnosisConfig) -> bool:
    """Return whether utilization rose by more than `rising_ratio` over the trend window."""
    if len(utilizations) < 2:
        return False
    older, newer = _halves(utilizations)
    return newer > older * (1 + config.rising_ratio)


def solved(reading: Reading, utilization: float, context: Context, config: DiagnosisConfig) -> Verdict | None:
    """Return healthy where the task is solved, however little or much of the memory is in use."""
    # The best of the last new values, too: repeated ones would hide how a metric of epochs hovers.
    if not (task_solved(context.metrics, config) or task_solved(context.new_in_plateau or (), config)):
        return None
    return Verdict(
        "healthy",
        f"utilization {utilization:.2f}, and the task is solved: {config.metric} reached {config.metric_solved:g}",
    )


def saturated(reading: Reading, utilization: float, context: Context, config: DiagnosisConfig) -> Verdict | None:
    """Return saturated where the state is full to the last dimension and the unsolved task stands still."""
    full_utilization = full_state_utilization(reading)
    if not context.metrics or full_utilization is None:
        return None
    # A collapsed layer has to leave its condition first.
    is_examined = context.is_examined and context.previous != "collapsed"
    if context.previous == "saturated":
        bound, stands = config.saturated_recovers_below, True
    else:
        bound, new, window = config.saturated_above, context.new_in_plateau, config.plateau_window
        if is_examined:
            bound, new, window = config.full_above, context.new_in_trend, config.trend_window
        stands = task_stands_still(context.metrics, new, config, window)
    if full_utilization < bound or not (stands or is_examined):
        return None
    facts = f"utilization {full_utilization:.2f} is at or above {bound:g} and {_unsolved(context, config)}"
    end, line = reading.spectrum_end_ratio, config.saturated_spectrum_end
    if end is not None and end < line and context.previous != "saturated":
        return Verdict("healthy", f"{facts}, but the last singular value is {end:.2g} of the largest, below {line:g}")
    if not stands:
        return Verdict("healthy", f"{facts}, and the task may be on its way up", is_full=True)
    return Verdict(
        "saturated",
        facts,
        f"the memory is full: raise the state size (now {reading.state_capacity:g} per channel) "
        "or ask for less to be remembered; no change of the decay adds room",
        patience=None if is_examined else config.saturated_patience,
        is_full=is_examined,
    )


def collapsed(reading: Reading, utilization: float, context: Context, config: DiagnosisConfig) -> Verdict | None:
    """Return collapsed where little of the memory is in use for good; unknown or healthy where that may be right."""
    retention = reading.retention_ratio
    was_collapsed = context.previous in ("collapsed", "unused")
    line = config.collapsed_recovers_above if was_collapsed else config.collapsed_below
    starved_line = config.starved_recovers_above if was_collapsed else config.starved_below
    retention_line = config.retention_recovers_above if was_collapsed else config.retention_below
    to_blame = retention is not None and retention < retention_line
    if not context.metrics and not to_blame:
        # Without a task only the decay, where it takes away what the features offer, shows that low use is a fault.
        return None
    starved = bool(context.metrics) and to_blame and utilization >= line
    bound = starved_line if starved else line
    if utilization >= bound:
        return None
    if context.first_of_several and config.spare_first_layer:
        # Not collapsed, because using so little may be right; not healthy, because nothing shows that it is.
        return Verdict(
            "unknown", f"utilization {utilization:.2f} is below {bound:g}, which may be right in a first layer"
        )
    doubt = "" if was_collapsed else _doubt(context, config)
    if doubt:
        # A saturated layer has to leave its condition first: nothing is suspected while a finding stands.
        return Verdict(
            "healthy",
            f"utilization {utilization:.2f} is below {bound:g}, and {doubt}",
            suspected=None if CONDITION_INFO[context.previous].needs_attention else "collapsed",
        )
    facts = [f"utilization {utilization:.2f} is below {bound:g} and not recovering"]
    if retention is None:
        facts.append("there is no decay")
    else:
        facts.append(f"retention is {retention:.2f}" + (f", below {retention_line:g}" if starved else ""))
    if context.metrics:
        facts.append(_unsolved(context, config))
    return Verdict("collapsed", ", ".join(facts), _collapse_advice(to_blame, context, config))


def _doubt(context: Context, config: DiagnosisConfig) -> str:
    """Say why low use may not be for good, or return an empty string."""
    new = context.new_in_trend
    if is_rising(context.utilizations, config):
        return "it or the task is on its way up"
    if not context.metrics or task_stands_still(context.metrics, new, config, config.trend_window):
        return ""
    if new is not None and len(new) < config.metric_new_values:
        return f"{config.metric} has too few new values ({len(new)}) to show that the task stands still"
    return "it or the task is on its way up"


def _collapse_advice(to_blame: bool, context: Context, config: DiagnosisConfig) -> str:
    if to_blame:
        advice = "the decay empties the memory: pull A towards I (A->I regularizer) or raise alpha"
    else:
        advice = (
            "features or data, not the decay, leave the memory unused: look at the position information, the scale of "
            "q and k, the learning rate, and at how many distinct tokens a sequence holds"
        )
    if context.metrics:
        return advice
    if config.metric is None:
        return f"{advice}; give a task metric to the diagnosis to be surer"
    return f"{advice}; {config.metric}, the task metric, is not given: with it the diagnosis is surer"


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
    """Return the means of the older and the newer half."""
    middle = len(values) // 2
    return sum(values[:middle]) / middle, sum(values[middle:]) / (len(values) - middle)


RULES: tuple[Rule, ...] = (solved, saturated, collapsed)
"""The rules in the order in which they are tried."""


def judge(reading: Reading, context: Context, config: DiagnosisConfig, rules: Sequence[Rule] = RULES) -> Verdict | None:
    """Return the condition that `reading` speaks for, or None where it cannot be judged.

    A reading cannot be judged with a status other than `ok`, without sizes, or of a layer whose capacity grows with the
    position. Every other one gets a verdict: that of the first rule that gives one, or healthy.

    Examples:
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
    rules = check_rules(rules)
    utilization = attainable_utilization(reading)
    if utilization is None:
        return None
    verdicts = (rule(reading, utilization, context, config) for rule in rules)
    given = (verdict for verdict in verdicts if verdict is not None)
    return next(given, None) or Verdict("healthy", _healthy_reason(utilization, context, config))


def check_rules(rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """Return the rules as a tuple, or raise `ConfigError` where one is not a function."""
    hint = "(reading, utilization, context, config) -> Verdict or None"
    return tuple(validation.function("rules", rule, hint=hint) for rule in validation.listed("rules", rules, hint=hint))
