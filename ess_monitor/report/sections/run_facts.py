"""What is known of a run, as pairs of a name and a value."""

from __future__ import annotations

from datetime import datetime, timezone

from ess_monitor.records import PHASES
from ess_monitor.report.components import Table
from ess_monitor.report.figures import Chart, Scale, Series, line_chart
from ess_monitor.report.history import RunHistory

Facts = tuple[tuple[str, str], ...]

_LONGEST_SECONDS = 1e10
"""Three hundred years: what is longer was written by no clock."""


def run_facts(story: RunHistory) -> Facts:
    """Who, what, when and how long."""
    info, (first, last) = story.info, story.steps
    status = story.final.status if story.final is not None else "no end in the log"
    facts = [
        ("Run", info.run_name),
        ("Model", info.model),
        ("Status", status),
        ("Started", _time(story.start_seconds)),
        ("Duration", duration(story.end_seconds - story.start_seconds)),
        ("Layers measured", str(len(story.layers))),
        ("Measurements", _measurements(story)),
        ("Steps measured", f"{first} to {last}" if story.measurements else "none"),
        (
            "Strategy",
            f"{info.strategy}, world size {info.world_size}, precision {info.precision}",
        ),
        ("Versions", ", ".join(f"{name} {value}" for name, value in info.versions.items())),
        ("Event log", story.path.name),
    ]
    if story.resumed_at:
        facts.insert(5, ("Resumed before step", ", ".join(map(str, story.resumed_at))))
    if story.earlier_runs:
        facts.append(("Earlier runs in the log", f"{story.earlier_runs}, not shown here"))
    return tuple((name, value) for name, value in facts if value)


def overhead_facts(story: RunHistory) -> Facts:
    """What the monitor cost."""
    facts = []
    if story.measurements:
        facts.append(("Share of the training time", f"{story.measurements[-1].overhead_ratio:.2%}"))
        facts.append(("Steps between samples, at the end", str(story.measurements[-1].interval_steps)))
    if story.info.overhead_budget_ratio:
        facts.insert(min(len(facts), 1), ("Budget", f"{story.info.overhead_budget_ratio:.2%}"))
    if story.final is not None and story.final.step_seconds.count:
        steps = story.final.step_seconds
        facts.append(("Mean time of a training step", f"{1e3 * steps.total_seconds / steps.count:.1f} ms"))
    return tuple(facts)


def overhead_table(story: RunHistory) -> Table | None:
    """Time per phase of the monitor; None where the run left no final counters."""
    if story.final is None:
        return None
    rows = []
    for phase in PHASES:
        spent = story.final.overhead_seconds.get(phase)
        if spent is not None and spent.count:
            mean = 1e3 * spent.total_seconds / spent.count
            rows.append((phase, str(spent.count), f"{spent.total_seconds:.2f} s", f"{mean:.2f} ms"))
    return Table("Time of the monitor by phase", ("phase", "times", "in all", "mean"), tuple(rows)) if rows else None


def overhead_chart(story: RunHistory, scale: Scale) -> Chart | None:
    """The cost so far at each measurement, in percent of the training time, and the budget."""
    cost = [(float(each.step), 100 * each.overhead_ratio) for each in story.measurements]
    budget = 100 * story.info.overhead_budget_ratio
    limit = [(scale.low, budget), (scale.high, budget)] if budget else []
    return line_chart(
        "Cost of the monitor so far, % of training time",
        [Series("cost", "a", cost), Series("budget", "limit", limit)],
        scale,
    )


def duration(seconds: float) -> str:
    """
    >>> duration(42), duration(3700), duration(200000), duration(-1)
    ('42 s', '1 h 01 min', '2 d 7 h', 'unknown')
    """
    if not 0 <= seconds < _LONGEST_SECONDS:
        return "unknown"
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60:02d} min"
    return f"{minutes} min {int(seconds % 60):02d} s" if minutes else f"{seconds:.0f} s"


def _time(seconds: float) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%d %H:%M:%S} UTC" if seconds else "unknown"
    except (OverflowError, ValueError, OSError):
        return "unknown"


def _measurements(story: RunHistory) -> str:
    count = str(len(story.measurements))
    return count if story.thinned == 1 else f"{count} shown, every {story.thinned}th of the run's"
