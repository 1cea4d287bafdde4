"""The thresholds of the diagnosis, and why they are where they are.

There are two kinds. Lines on utilization say what is low and what is full; each has a second value at which a layer
leaves the condition again (hysteresis), so that noise around one line does not turn into a series of findings. Lines on
time (warm-up, patience, trend) say for how long something has to be seen before it counts.

Utilization is here the share of the *attainable* size, `effective_size / attainable_size`. It equals ESS / TSS
wherever the sequence is long enough to fill the state (i >= TSS and length - i >= TSS); where it is not, a short
sequence is not taken for an unused memory. The experiments behind the defaults measured 32 tokens at positions 8,
16 and 24 with TSS 16, which allows two thirds of TSS: their WLA figures (collapsed .14-.16 of TSS, rescued .28-.33)
are divided by that.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import ConfigDict, Field, model_validator

from ess_monitor import validation
from ess_monitor.validation.settings import Settings

_LESS_IS_BETTER = frozenset(
    {"loss", "losses", "error", "errors", "perplexity", "ppl", "wer", "cer", "nll", "mse", "rmse", "mae"}
)
_MORE_IS_BETTER = frozenset({"accuracy", "acc", "f1", "auc", "auroc", "bleu", "r2"})
_TURNED_ROUND = frozenset({"neg", "negative", "minus"})
"""Words behind which less of an error is more of the metric (scikit-learn's neg_log_loss)."""
_WORD = re.compile(r"[A-Z]?[a-z]+\d*|[A-Z]+(?![a-z])\d*")


class DiagnosisConfig(Settings):
    """Sets the thresholds of the diagnosis.

    The defaults are set against false alarms: no layer of a run that learns may be called collapsed. A collapse that is
    reported some hundred steps late has cost little (left alone until step 2000, three of three WLA runs could still be
    rescued).

    Examples:
        >>> config = DiagnosisConfig(metric="accuracy", metric_solved=0.9)
        >>> config.collapsed_below, config.collapsed_recovers_above
        (0.3, 0.35)
    """

    model_config = ConfigDict(allow_inf_nan=False)

    collapsed_below: float = Field(default=0.3, gt=0.0, lt=1.0)
    """Utilization below which a memory counts as little used. Collapsed WLA and GLA runs on MQAR sit at .21-.29,
    rescued ones at .31-.50. Runs that solved the task by themselves can sit at .18-.26: this line alone decides
    nothing."""

    collapsed_recovers_above: float = Field(default=0.35, gt=0.0, lt=1.0)
    """Utilization from which a collapsed layer counts as recovered although the task is not solved: below the rescued
    WLA and GLA runs (.36-.50), and a gap above the highest collapsed one (.29)."""

    starved_below: float = Field(default=0.5, gt=0.0, lt=1.0)
    """Utilization below which a memory is little used when the decay is to blame and the task metric stands still. WLA
    runs that never learn hold .26-.36 through the first half of their training: waiting for .3 found them after 48-73 %
    of it, this line after 33-38 %. Any value from .4 to .6 gives the same findings: what separates is the retention."""

    starved_recovers_above: float = Field(default=0.55, gt=0.0, lt=1.0)
    """Utilization from which such a layer counts as recovered although the decay still takes its share: a tenth above
    the line on which it enters. Most leave through `retention_recovers_above`: rescued layers stay at .31-.50."""

    retention_below: float = Field(default=0.75, gt=0.0, lt=1.0)
    """Retention (ESS against the ESS of the same layer without decay) under which the decay is to blame. Collapsed WLA
    runs scatter over .45-.74 from reading to reading, GLA-S6 stays below .68; a GLA run that solves its task keeps .78
    and more, one that is stuck for another reason .92. At .7 single readings of WLA cross the line; each of them breaks
    a streak and costs 100-200 steps."""

    retention_recovers_above: float = Field(default=0.85, gt=0.0, le=1.0)
    """Retention at which a collapse that was found without a task metric is over. Rescued layers return to .97-1.0."""

    saturated_above: float = Field(default=0.97, gt=0.0, le=1.0)
    """Utilization from which a memory counts as full (section 3.2: utilization near 1). WLA states of 2 and 4 that fail
    MQAR are at 1.0; a state of 8 that solves it stops at .90-.96."""

    full_above: float = Field(default=0.92, gt=0.0, le=1.0)
    """Utilization from which a memory counts as full where batches are run again with a smaller state. The evidence
    decides then, so that the line may be lower than `saturated_above`: linear attention with 16 dimensions that are too
    few for MQAR was at .89 to .96. It is above `saturated_recovers_below`."""

    saturated_spectrum_end: float = Field(default=0.02, ge=0.0, lt=1.0)
    """Last singular value of a full memory, as a share of the largest, from which its last state dimension is in use.
    Saturated layers of the seen half of `benchmarks.saturation` are at .17 to .9, a saturated layer on MQAR at .04;
    states whose last dimension the loss does not need are at .017 to .5: this line alone decides little."""

    saturated_recovers_below: float = Field(default=0.9, gt=0.0, lt=1.0)
    """Utilization below which a saturated layer has room again: the lower end of the state of 8 that solves the
    task."""

    warmup_steps: int = Field(default=1000, ge=0)
    """Optimizer steps before anything is judged: ESS falls at the start of healthy runs and rises only later (appendix
    D.1.5), for up to ten of 70 epochs in the paper: a seventh of the run's length is the choice. The monitor does not
    know the length; 1000 suits 7000 steps and is late for a run of 2000, for which say 285."""

    patience: int = Field(default=5, ge=1, le=10_000)
    """Consecutive measurements that must agree before a condition changes. Five at a cadence of 100 steps are 500: with
    the warm-up a finding comes by step 1500, and intervening at step 2000 still rescued three WLA runs of three. The
    trend need not be flat in all five, only in the last: it is a mean over `trend_window` measurements already."""

    saturated_patience: int = Field(default=10, ge=1, le=10_000)
    """Consecutive measurements that must agree before a layer is called saturated without evidence: twice `patience`. A
    small state is full in every run, so time on the plateau is all there is. The finding is advice and treats nothing:
    late costs little, and a false one makes somebody rebuild a model that was about to learn."""

    trend_window: int = Field(default=10, ge=4, le=10_000)
    """Measurements over which a trend is taken: the mean of the newer half against the mean of the older half. Ten at a
    cadence of 100 steps span 1000, the time a rescued run takes (1000-1500), so that a layer on its way up is seen."""

    plateau_window: int = Field(default=20, ge=4, le=10_000)
    """Measurements over which the task metric must have stood still before a full memory is called saturated without
    evidence; with it `trend_window` is enough. Twice the trend window, so that a run which closes a tenth of its
    distance half as fast still counts as learning (WLA with a state of 2 crept from .16 to .30 in 400 steps on its way
    to .99)."""

    rising_ratio: float = Field(default=0.1, ge=0.0, lt=10.0)
    """Relative rise over the trend window from which utilization is on its way up. State collapse is ESS that *fails to
    increase* (section 3.2), so a rising layer is left alone. A rescue doubles utilization (.15 to .30 of TSS): a tenth
    of that."""

    spare_first_layer: bool = True
    """Never call the first of several measured layers collapsed. It builds previous-token features and has low
    retention in every run, solved or not; regularizing it alone failed on WLA, and regularizing both layers was worse
    than the second alone (appendix D.3). A memory that collapses throughout is still seen in the layers above."""

    judge_uninformative: bool = False
    """Also diagnose layers whose kind makes ESS say little: states of one dimension (RG-LRU, RWKV-4), short filters.
    Their utilization is a property of the kind (1, or the filter's length), not of the training."""

    metric: str | None = None
    """Name, in the metrics of the training loop, of the number that tells whether the task is solved. Utilization does
    not separate collapsed from solved GLA runs (.21-.29 against .18-.26); such a metric does. None: be conservative."""

    metric_mode: Literal["max", "min"] = "max"
    """Whether more of the metric is better (`max`: accuracy) or less (`min`: loss)."""

    metric_solved: float | None = None
    """Value of the metric from which the task counts as solved. Depends on the task: there is no default."""

    metric_progress_ratio: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of the distance to `metric_solved` that the metric must close over the trend window to count as learning.
    On the plateau of MQAR accuracy stays at chance, 1/kv (.25-.28 at kv=4, a twentieth of the distance to .9)."""

    metric_new_values: int = Field(default=4, ge=1, le=10_000)
    """New values of the metric without which nothing is said of its trend: two for each half, so that no half is one
    number. A metric that is logged once an epoch repeats in between; windows reach further back until they hold so
    many."""

    metric_constant_after: int = Field(default=40, ge=1, le=10_000)
    """Measurements after which a metric that repeats one value bit for bit counts as standing still: twice the plateau
    window. A repeated value is more likely an old one (of the last epoch) than a new one that is equal to the last bit;
    longer epochs are waited for in proportion, where the run has shown how long they are."""

    @model_validator(mode="after")
    def _lines_are_in_order(self) -> DiagnosisConfig:
        _require_below(self, "collapsed_below", "collapsed_recovers_above", "the gap is what prevents flapping")
        _require_below(self, "saturated_recovers_below", "saturated_above", "the gap is what prevents flapping")
        _require_below(self, "retention_below", "retention_recovers_above", "the gap is what prevents flapping")
        _require_below(self, "starved_below", "starved_recovers_above", "the gap is what prevents flapping")
        _require_below(self, "saturated_recovers_below", "full_above", "the gap is what prevents flapping")
        _require_below(self, "collapsed_recovers_above", "saturated_above", "no utilization is both low and full")
        _require_below(self, "starved_recovers_above", "saturated_above", "no utilization is both low and full")
        return self

    @model_validator(mode="after")
    def _metric_is_complete(self) -> DiagnosisConfig:
        if self.metric == "":
            raise ValueError("metric='' is empty; give a name from the training loop's metrics, or None for none")
        if self.metric is not None and self.metric_solved is None:
            raise ValueError(
                f"metric={self.metric!r} needs metric_solved, the value from which the task counts as solved; "
                "got metric_solved=None: give a finite number (for an accuracy for example 0.9), or drop metric"
            )
        if self.metric is None and self.metric_solved is not None:
            raise ValueError(
                f"metric_solved={self.metric_solved} without metric; allowed only together: "
                "name the metric it belongs to, or drop metric_solved"
            )
        return self


def thresholds(config: DiagnosisConfig) -> dict[str, float]:
    """Return the lines on utilization as `condition.bound` -> ratio, for dashboards (`RunInfo.thresholds`).

    The lines of a starved layer are left out: they hold only below a retention, which a curve of utilization does not
    show.

    Examples:
        >>> thresholds(DiagnosisConfig())["collapsed.upper"]
        0.3
    """
    validation.instance("config", config, DiagnosisConfig)
    return {
        "collapsed.upper": config.collapsed_below,
        "collapsed.recovery": config.collapsed_recovers_above,
        "saturated.lower": config.saturated_above,
        "saturated.recovery": config.saturated_recovers_below,
    }


def contradiction(config: DiagnosisConfig) -> str:
    """Return why `metric_mode` contradicts the name of the metric, and what to set; an empty string where it does not.

    A name of both kinds (`accuracy_loss`), or of none, contradicts nothing.

    Examples:
        >>> contradiction(DiagnosisConfig(metric="val_loss", metric_solved=0.1))[:61]
        "metric='val_loss' with metric_mode='max': less of it is usual"
        >>> contradiction(DiagnosisConfig(metric="val_loss", metric_solved=0.1, metric_mode="min"))
        ''
    """
    words = {word.lower() for word in _WORD.findall(config.metric or "")}
    words |= {word.rstrip("0123456789") for word in words}  # acc5
    less, more = not words.isdisjoint(_LESS_IS_BETTER), not words.isdisjoint(_MORE_IS_BETTER)
    mode, better = ("min", "less") if less else ("max", "more")
    if less == more or config.metric_mode == mode or not words.isdisjoint(_TURNED_ROUND):
        return ""
    return (
        f"metric={config.metric!r:.200} with metric_mode={config.metric_mode!r}: {better} of it is usually better. A "
        "task that is not solved would count as solved, and none of its layers would be called collapsed; set "
        f'metric_mode="{mode}"'
    )


def _require_below(config: DiagnosisConfig, lower: str, upper: str, why: str) -> None:
    low, high = getattr(config, lower), getattr(config, upper)
    if not low < high:
        raise ValueError(f"{lower}={low} must be below {upper}={high} ({why}); lower {lower} or raise {upper}")
