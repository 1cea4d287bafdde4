"""How the findings of a run were made: samples, thresholds, readings of each layer, and how good the rules are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from ess_monitor.diagnosis.utilization import attainable_utilization, full_state_utilization
from ess_monitor.records import Finding, Measurement, Reading, layer_title
from ess_monitor.report.components import Table, tolerance_title
from ess_monitor.report.history import RunHistory
from ess_monitor.report.labels import number
from ess_monitor.report.sections.run_facts import Facts
from ess_monitor.report.summary import ATTENTION, alarms

BENCHMARKED_SETTINGS: Mapping[str, bool | int | float] = {
    "collapsed_below": 0.3,
    "collapsed_recovers_above": 0.35,
    "starved_below": 0.5,
    "starved_recovers_above": 0.55,
    "retention_below": 0.75,
    "retention_recovers_above": 0.85,
    "saturated_above": 0.97,
    "full_above": 0.92,
    "saturated_spectrum_end": 0.02,
    "saturated_recovers_below": 0.9,
    "patience": 5,
    "saturated_patience": 10,
    "trend_window": 10,
    "plateau_window": 20,
    "rising_ratio": 0.1,
    "spare_first_layer": True,
    "judge_uninformative": False,
    "metric_progress_ratio": 0.1,
    "metric_new_values": 4,
    "metric_constant_after": 40,
}
"""Settings that `BENCHMARK` was measured with. Warm-up and task metric are missing: every user sets them for a run."""

BENCHMARK = Table(
    "The default rules alone, without evidence, on 17 labeled runs that no threshold was chosen with",
    ("the run turned out", "runs", "called collapsed or full", "rightly", "found before 40 % of the training"),
    (
        ("healthy", "8", "0", "–", "–"),
        ("collapsed", "7", "5", "5 (precision 1.00)", "5 of 7"),
        ("too small a state", "2", "0", "–", "0 of 2"),
    ),
)

_NOT_IN_LOG = "not in this log"
_OLD_NAMES = {
    "collapsed_below": "collapsed.upper",
    "collapsed_recovers_above": "collapsed.recovery",
    "saturated_above": "saturated.lower",
    "saturated_recovers_below": "saturated.recovery",
}
"""Setting -> its name in `RunInfo.thresholds`. Logs from before `RunInfo.diagnosis` hold nothing else."""


def detector_facts(history: RunHistory) -> Facts:
    """Return the samples, waiting times, thresholds and findings of the run."""
    settings = _settings(history)
    return (*_samples(history), *_waiting(history, settings), *_thresholds(history, settings), *_findings(history))


def detector_table(history: RunHistory) -> Table | None:
    """Count the judged readings of each layer beyond each threshold, and its findings; None without a reading."""
    if not any(history.ok(layer) for layer in history.layers):
        return None
    tests = _tests(history)
    return Table(
        "Judged readings of each layer by their utilization, and what came of them",
        ("layer", "judged", *tests, "raised", "cleared", "first finding"),
        tuple(_row(history, layer, tests.values()) for layer in history.layers),
    )


def was_judged_as_benchmarked(diagnosis: Mapping[str, object]) -> bool:
    """Return whether a run was judged with `BENCHMARKED_SETTINGS`.

    >>> was_judged_as_benchmarked(dict(BENCHMARKED_SETTINGS))
    True
    >>> was_judged_as_benchmarked({**BENCHMARKED_SETTINGS, "patience": 3})
    False
    """
    return all(name in diagnosis and diagnosis[name] == value for name, value in BENCHMARKED_SETTINGS.items())


def benchmark_limits(diagnosis: Mapping[str, object]) -> str:
    """Say which runs the benchmark covered, and what it does not show of the run at hand."""
    text = (
        "The runs were small recall nets (WLA, GLA, GLA-S6 and linear attention, two layers, sequences of 32 or 64 "
        "tokens), judged with their accuracy as task metric and a warm-up of a seventh of the run. None of the eight "
        "healthy ones was called collapsed or saturated. A false alarm in another model is still possible, and the "
        "figures on saturated states rest on two runs. All figures are those of the rules alone. On other tasks the "
        "rules alone raise false alarms. Where batches can be run again, a layer with a decay is therefore called "
        "collapsed, and a full one saturated, only if the evidence supports it. How good rules and evidence are "
        "together is not shown here."
    )
    if diagnosis.get("metric") is None:
        text += " This run gave the diagnosis no task metric; how good the rules are without one was not measured."
    return text


def _settings(history: RunHistory) -> dict[str, float]:
    """Return the settings of the diagnosis that are numbers and in the log."""
    thresholds = history.info.thresholds
    old = {setting: thresholds[name] for setting, name in _OLD_NAMES.items() if name in thresholds}
    return {**old, **{name: each for name, each in history.info.diagnosis.items() if isinstance(each, int | float)}}


def _has_task(history: RunHistory) -> bool:
    return history.info.diagnosis.get("metric") is not None


def _samples(history: RunHistory) -> Facts:
    judged = sum(any(_judged([each], layer) for layer in history.layers) for each in _after_warmup(history))
    shown = "" if history.thinned == 1 else f" of those shown, every {history.thinned}th"
    if history.final is None:
        return ("Samples judged", f"{judged}{shown}"), ("Samples failed, skipped", "unknown: the log has no end")
    counts = history.final.measurements_total
    return (
        ("Samples measured", f"{counts.get('ok', 0)}, those of the warm-up included"),
        ("Samples judged", f"{judged}{shown}"),
        ("Samples failed", str(counts.get("failed", 0))),
        ("Samples skipped", str(counts.get("skipped", 0))),
    )


def _waiting(history: RunHistory, settings: Mapping[str, float]) -> Facts:
    warmup, patience = (settings.get(name) for name in ("warmup_steps", "patience"))
    diagnosis = history.info.diagnosis
    task = "none" if diagnosis else _NOT_IN_LOG
    if _has_task(history) and "metric_solved" in settings:
        better = "more" if diagnosis.get("metric_mode") == "max" else "less"
        task = f"{diagnosis['metric']}, solved at {number(settings['metric_solved'])} or {better}"
    slow = _shown(settings, "saturated_patience")
    return (
        ("Warm-up", _NOT_IN_LOG if warmup is None else f"{warmup:g} steps, {_share(history, warmup)}"),
        ("Patience", _NOT_IN_LOG if patience is None else f"{patience:g} measurements; {slow} for saturation"),
        ("Task metric", task),
    )


def _thresholds(history: RunHistory, settings: Mapping[str, float]) -> Facts:
    at = {name: _shown(settings, name) for name in BENCHMARKED_SETTINGS}
    low, starved = f"utilization below {at['collapsed_below']}", []
    if _has_task(history):
        decay = f"utilization below {at['starved_below']} at a retention below {at['retention_below']}"
        recovery = f"{at['starved_recovers_above']}, or a retention of {at['retention_recovers_above']}"
        starved = [("Collapsed by its decay", f"{decay}, until {recovery}")]
    elif history.info.diagnosis:
        low += f" at a retention below {at['retention_below']}"
    full = f"utilization {at['saturated_above']} or more"
    return (
        ("Collapsed", f"{low}, until {at['collapsed_recovers_above']}"),
        *starved,
        ("Saturated", f"{full}, until below {at['saturated_recovers_below']}"),
    )


def _findings(history: RunHistory) -> Facts:
    raised = alarms(history)
    first = [("First finding", f"step {raised[0].step}, {_share(history, raised[0].step)}")] if raised else []
    tolerances = sorted({tolerance_title(reading) for layer in history.layers for reading in history.ok(layer)[-1:]})
    return (
        ("Findings raised", str(len(raised))),
        ("Findings cleared", str(sum(map(_clears, history.findings)))),
        ("Findings with evidence", str(sum(each.evidence is not None for each in history.findings))),
        *first,
        ("Actions of the autopilot", str(len(history.actions))),
        ("Tolerance of the ESS (tau)", ", ".join(tolerances) or "unknown"),
    )


def _tests(history: RunHistory) -> dict[str, Callable[[Reading], bool]]:
    """Return a test of a reading for each known threshold, by the title of its column."""
    settings = _settings(history)
    low, retention, full = (settings.get(name) for name in ("collapsed_below", "retention_below", "saturated_above"))
    decay = settings.get("starved_below") if _has_task(history) else low
    tests: dict[str, Callable[[Reading], bool]] = {}
    if low is not None:
        tests[f"below {number(low)}"] = lambda r: _below(attainable_utilization(r), low)
    if decay is not None and retention is not None:
        tests[f"below {number(decay)}, retention below {number(retention)}"] = lambda r: (
            _below(attainable_utilization(r), decay) and _below(r.retention_ratio, retention)
        )
    if full is not None:
        tests[f"{number(full)} or more"] = lambda r: (full_state_utilization(r) or 0.0) >= full
    return tests


def _row(history: RunHistory, layer: str, tests: Iterable[Callable[[Reading], bool]]) -> tuple[str, ...]:
    judged = [] if history.layer(layer).uninformative else _judged(_after_warmup(history), layer)
    raised = alarms(history, layer)
    return (
        layer_title(layer),
        str(len(judged)),
        *(str(sum(map(test, judged))) if judged else "–" for test in tests),
        str(len(raised)),
        str(sum(_clears(finding) for finding in history.findings if finding.layer == layer)),
        f"step {raised[0].step} ({100 * raised[0].step / _last_step(history):.3g} %)" if raised else "–",
    )


def _after_warmup(history: RunHistory) -> list[Measurement]:
    return [each for each in history.measurements if each.step >= history.warmup_steps]


def _judged(measurements: Sequence[Measurement], layer: str) -> list[Reading]:
    readings = (reading for each in measurements for reading in each.readings if reading.layer == layer)
    return [reading for reading in readings if attainable_utilization(reading) is not None]


def _clears(finding: Finding) -> bool:
    return finding.previous in ATTENTION and finding.condition not in ATTENTION


def _below(value: float | None, threshold: float) -> bool:
    return value is not None and value < threshold


def _shown(settings: Mapping[str, float], name: str) -> str:
    return number(settings[name]) if name in settings else "an unknown threshold"


def _share(history: RunHistory, step: float) -> str:
    """Express a step as a share of the run."""
    last, so_far = _last_step(history), "" if history.final is not None else " so far"
    return f"{100 * step / last:.3g} % of the {last} steps{so_far}" if step <= last else "longer than the run"


def _last_step(history: RunHistory) -> int:
    """Return at least 1, because it is a divisor."""
    return max(1, history.steps[1], history.final.last_step if history.final is not None else 0)
