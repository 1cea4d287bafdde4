"""Facts of a run and costs of its monitor, as pairs of a name and a value."""

from __future__ import annotations

from datetime import datetime, timezone

from ess_monitor.records import PHASES
from ess_monitor.report.components import Table, steps_of
from ess_monitor.report.figures import Figure, Series, line_figure
from ess_monitor.report.history import RunHistory

Facts = tuple[tuple[str, str], ...]

_LONGEST_SECONDS = 1e10
"""Three hundred years; a longer duration comes from a damaged log."""


def run_facts(history: RunHistory) -> Facts:
    """Return the name, model, times, steps and versions of the run."""
    info, (first, last), count = history.info, history.steps, len(history.measurements)
    return _without_empty(
        ("Run", info.run_name),
        ("Model", info.model),
        ("Status", history.final.status if history.final is not None else "no end in the log"),
        ("Started", _time(history.start_seconds)),
        ("Duration", duration(history.end_seconds - history.start_seconds)),
        ("Resumed before step", ", ".join(map(str, history.resumed_at))),
        ("Layers measured", str(len(history.layers))),
        ("Measurements", str(count) if history.thinned == 1 else f"{count} shown, one in {history.thinned}"),
        ("Steps measured", f"{first} to {last}" if count else "none"),
        ("Strategy", f"{info.strategy}, world size {info.world_size}, precision {info.precision}"),
        ("Versions", ", ".join(f"{name} {value}" for name, value in info.versions.items())),
        ("Event log", history.path.name),
        ("Earlier runs in the log", f"{history.earlier_runs}, not shown here" if history.earlier_runs else ""),
    )


def overhead_facts(history: RunHistory) -> Facts:
    """Return what the monitor cost, against its budget."""
    last = history.measurements[-1] if history.measurements else None
    budget = history.info.overhead_budget_ratio
    steps = history.final.step_seconds if history.final is not None else None
    mean = f"{1e3 * steps.total_seconds / steps.count:.1f} ms" if steps is not None and steps.count else ""
    return _without_empty(
        ("Share of the training time", f"{last.overhead_ratio:.2%}" if last is not None else ""),
        ("Budget", f"{budget:.2%}" if budget else ""),
        ("Steps between samples, at the end", str(last.interval_steps) if last is not None else ""),
        ("Mean time of a training step", mean),
    )


def overhead_table(history: RunHistory) -> Table | None:
    """Return the time of each phase of the monitor; None where the log has no final counters."""
    spent = history.final.overhead_seconds if history.final is not None else {}
    rows = tuple(
        (phase, str(data.count), f"{data.total_seconds:.2f} s", f"{1e3 * data.total_seconds / data.count:.2f} ms")
        for phase in PHASES
        if (data := spent.get(phase)) is not None and data.count
    )
    return Table("Time of the monitor by phase", ("phase", "times", "total", "mean"), rows) if rows else None


def overhead_figure(history: RunHistory) -> Figure | None:
    """Draw the cost up to each measurement, in percent of the training time, and the budget."""
    steps = steps_of(history)
    cost = [(float(each.step), 100 * each.overhead_ratio) for each in history.measurements]
    budget = 100 * history.info.overhead_budget_ratio
    limit = Series("budget", "limit", [(step, budget) for step in steps] if budget and cost else [])
    lines = {"": [Series("cost", "a", cost), limit]}
    return line_figure("Cost of the monitor so far, % of training time", lines, x_range=steps)


def duration(seconds: float) -> str:
    """Format a duration.

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


def _without_empty(*facts: tuple[str, str]) -> Facts:
    return tuple((name, value) for name, value in facts if value)


def _time(seconds: float) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%d %H:%M:%S} UTC" if seconds else "unknown"
    except (OverflowError, ValueError, OSError):
        return "unknown"
