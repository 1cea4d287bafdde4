"""How the findings of a run came about: what was judged, by which lines, and what each layer's readings said."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from ess_monitor.records import (
    Condition,
    Finding,
    Measurement,
    Reading,
    attainable_utilization,
    full_state_utilization,
)
from ess_monitor.report.components import Table
from ess_monitor.report.figures import number
from ess_monitor.report.history import RunHistory
from ess_monitor.report.sections.run_facts import Facts
from ess_monitor.report.summary import layer_title

_ILL: tuple[Condition, ...] = ("collapsed", "saturated")
_UNWRITTEN = "not in this log"

_OLD_NAMES = {
    "collapsed_below": "collapsed.upper",
    "collapsed_recovers_above": "collapsed.recovery",
    "saturated_above": "saturated.lower",
    "saturated_recovers_below": "saturated.recovery",
}
"""Setting -> its name in `RunInfo.thresholds`, which is all that a log from before the settings were written holds."""


def detector_facts(story: RunHistory) -> Facts:
    """Samples, waiting times, lines and findings of the run."""
    return (*_samples(story), *_waiting(story), *_lines(story), *_findings(story))


def detector_table(story: RunHistory) -> Table | None:
    """Per layer: on which side of the lines its judged readings lay, and what came of it; None without a reading."""
    if not any(story.ok(layer) for layer in story.layers):
        return None
    sides = _sides(story)
    return Table(
        "Judged readings of each layer by their utilization, and what came of them",
        ("layer", "judged", *(title for title, _ in sides), "raised", "cleared", "first finding"),
        tuple(_row(story, layer, [lies for _, lies in sides]) for layer in story.layers),
    )


def _sides(story: RunHistory) -> list[tuple[str, Callable[[Reading], bool]]]:
    """A column for each line that is known: its title, and whether a reading lies on the wrong side."""
    low, retention, full = (_number(story, n) for n in ("collapsed_below", "retention_below", "saturated_above"))
    decay = _number(story, "starved_below") if _has_task(story) else low
    sides: list[tuple[str, Callable[[Reading], bool]]] = []
    if low is not None:
        sides.append((f"below {number(low)}", lambda r: _below(attainable_utilization(r), low)))
    if decay is not None and retention is not None:
        sides.append(
            (
                f"below {number(decay)}, retention below {number(retention)}",
                lambda r: _below(attainable_utilization(r), decay) and _below(r.retention_ratio, retention),
            )
        )
    if full is not None:
        sides.append((f"{number(full)} or more", lambda r: (full_state_utilization(r) or 0.0) >= full))
    return sides


def _row(story: RunHistory, layer: str, sides: Sequence[Callable[[Reading], bool]]) -> tuple[str, ...]:
    judged = [] if story.layer(layer).uninformative else _judged(_after_warmup(story), layer)
    raised = [finding for finding in story.findings if finding.layer == layer and finding.condition in _ILL]
    cleared = [finding for finding in story.findings if finding.layer == layer and _clears(finding)]
    return (
        layer_title(layer),
        str(len(judged)),
        *(str(_count(map(lies, judged))) if judged else "–" for lies in sides),
        str(len(raised)),
        str(len(cleared)),
        f"step {raised[0].step} ({100 * raised[0].step / _last_step(story):.3g} %)" if raised else "–",
    )


def _samples(story: RunHistory) -> Facts:
    judged = _count(any(_judged([each], layer) for layer in story.layers) for each in _after_warmup(story))
    shown = "" if story.thinned == 1 else f" of those shown, every {story.thinned}th"
    facts = [("Samples judged", f"{judged}{shown}")]
    if story.final is None:
        return (*facts, ("Samples failed, skipped", "unknown: the log has no end"))
    counts = story.final.measurements_total
    facts.insert(0, ("Samples measured", f"{counts.get('ok', 0)}, those of the warm-up included"))
    return (
        *facts,
        ("Samples failed", str(counts.get("failed", 0))),
        ("Samples skipped", str(counts.get("skipped", 0))),
    )


def _waiting(story: RunHistory) -> Facts:
    warmup, patience = _number(story, "warmup_steps"), _number(story, "patience")
    slow, solved = _number(story, "saturated_patience"), _number(story, "metric_solved")
    metric = story.info.diagnosis.get("metric")
    task = "none" if story.info.diagnosis else _UNWRITTEN
    if metric is not None and solved is not None:
        task = f"{metric}, solved at {number(solved)} or {_better(story)}"
    return (
        ("Warm-up", _UNWRITTEN if warmup is None else f"{warmup:g} steps, {_share(story, warmup)}"),
        ("Patience", _UNWRITTEN if patience is None else f"{patience:g} measurements; {_shown(slow)} for saturation"),
        ("Task metric", task),
    )


def _lines(story: RunHistory) -> Facts:
    def line(name: str) -> str:
        return _shown(_number(story, name))

    low, starved = f"utilization below {line('collapsed_below')}", []
    if _has_task(story):
        decay = f"utilization below {line('starved_below')} at a retention below {line('retention_below')}"
        leaves = f"{line('starved_recovers_above')}, or a retention of {line('retention_recovers_above')}"
        starved = [("Collapsed by its decay", f"{decay}, until {leaves}")]
    elif story.info.diagnosis:
        low += f" at a retention below {line('retention_below')}"
    return (
        ("Collapsed", f"{low}, until {line('collapsed_recovers_above')}"),
        *starved,
        ("Saturated", f"utilization {line('saturated_above')} or more, until below {line('saturated_recovers_below')}"),
    )


def _findings(story: RunHistory) -> Facts:
    raised = [finding for finding in story.findings if finding.condition in _ILL]
    first = (("First finding", f"step {raised[0].step}, {_share(story, raised[0].step)}"),) if raised else ()
    taus = sorted({reading.tolerance for layer in story.layers for reading in story.ok(layer)[-1:]})
    return (
        ("Findings raised", str(len(raised))),
        ("Findings cleared", str(_count(_clears(finding) for finding in story.findings))),
        *first,
        ("Actions of the autopilot", str(len(story.actions))),
        ("Tolerance of the ESS (tau)", ", ".join(map(number, taus)) or "unknown"),
    )


def _after_warmup(story: RunHistory) -> list[Measurement]:
    return [each for each in story.measurements if each.step >= story.warmup_steps]


def _judged(measurements: Iterable[Measurement], layer: str) -> list[Reading]:
    readings = (reading for each in measurements for reading in each.readings if reading.layer == layer)
    return [reading for reading in readings if attainable_utilization(reading) is not None]


def _clears(finding: Finding) -> bool:
    return finding.previous in _ILL and finding.condition not in _ILL


def _has_task(story: RunHistory) -> bool:
    return story.info.diagnosis.get("metric") is not None


def _better(story: RunHistory) -> str:
    return "more" if story.info.diagnosis.get("metric_mode") == "max" else "less"


def _number(story: RunHistory, setting: str) -> float | None:
    value = story.info.diagnosis.get(setting, story.info.thresholds.get(_OLD_NAMES.get(setting, "")))
    return value if isinstance(value, int | float) else None


def _shown(value: float | None) -> str:
    return "an unknown line" if value is None else number(value)


def _share(story: RunHistory, step: float) -> str:
    """A step as a share of the run."""
    last, so_far = _last_step(story), "" if story.final is not None else " so far"
    return f"{100 * step / last:.3g} % of the {last} steps{so_far}" if step <= last else "longer than the run"


def _last_step(story: RunHistory) -> int:
    """1 where there is none, so that it can be divided by."""
    return max(1, story.steps[1], story.final.last_step if story.final is not None else 0)


def _below(value: float | None, line: float) -> bool:
    return value is not None and value < line


def _count(items: Iterable[bool]) -> int:
    return sum(map(bool, items))


MEASURED_WITH: Mapping[str, bool | int | float] = {
    "collapsed_below": 0.3,
    "collapsed_recovers_above": 0.35,
    "starved_below": 0.5,
    "starved_recovers_above": 0.55,
    "retention_below": 0.75,
    "retention_recovers_above": 0.85,
    "saturated_above": 0.97,
    "saturated_recovers_below": 0.9,
    "patience": 5,
    "saturated_patience": 10,
    "trend_window": 10,
    "plateau_window": 20,
    "rising_ratio": 0.1,
    "spare_first_layer": True,
    "judge_uninformative": False,
    "metric_progress_ratio": 0.1,
}
"""Settings behind the figures. Warm-up and task metric are missing: those each run is told by its user."""

HELD_OUT = Table(
    "The default rules on 17 labeled runs that no threshold was chosen with",
    ("the run turned out", "runs", "called collapsed or full", "rightly", "found before 40 % of the training"),
    (
        ("healthy", "8", "0", "–", "–"),
        ("collapsed", "7", "5", "5 (precision 1.00)", "5 of 7"),
        ("too small a state", "2", "0", "–", "0 of 2"),
    ),
)


def judged_as_measured(diagnosis: Mapping[str, object]) -> bool:
    """Whether a run was judged by the settings that the figures belong to.

    >>> judged_as_measured(dict(MEASURED_WITH)), judged_as_measured({**MEASURED_WITH, "patience": 3})
    (True, False)
    """
    return all(name in diagnosis and diagnosis[name] == value for name, value in MEASURED_WITH.items())


def how_far_it_carries(diagnosis: Mapping[str, object]) -> str:
    """What the figures say of the run at hand, and what they do not."""
    text = (
        "The runs were small recall nets (WLA, GLA, GLA-S6 and linear attention, two layers, sequences of 32 or 64 "
        "tokens), judged with their accuracy as task metric and a warm-up of a seventh of the run. No healthy one of "
        "the eight was called ill. That does not make a false alarm impossible in another model, and the figures on "
        "full states rest on two runs."
    )
    if diagnosis.get("metric") is None:
        text += " This run gave the diagnosis no task metric; how good the rules are without one was not measured."
    return text
