"""Renders one measurement as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ess_monitor import validation
from ess_monitor.records import (
    CONDITION_INFO,
    Action,
    ActionOutcome,
    Condition,
    LayerInfo,
    Measurement,
    Reading,
    condition_title,
    layer_title,
)

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

_ACTION_STYLES: dict[ActionOutcome, str] = {
    "applied": "bold cyan",
    "dry_run": "cyan",
    "rejected": "yellow",
    "failed": "bold red",
    "rolled_back": "bold red",
    "recovered": "bold green",
    "released": "green",
}
_BAR_CELLS = 10
_NOTHING = "-"
_REASONS = 3
"""Lines on unknown conditions below a table."""


def render_table(
    measurement: Measurement, layers: Sequence[LayerInfo] = (), *, every_n_steps: int = 0, budget_ratio: float = 0.0
) -> Table:
    """Return a table with one row per layer: effective size, capacity, utilization, retention, condition.

    Below it stands when the next sample comes and why, and why conditions are unknown.

    Args:
        measurement: what is shown. A reading that is not ok shows its status in place of numbers.
        layers: sets the order of the rows and adds layers without a reading; other layers follow.
        every_n_steps: the shortest interval between two samples; 0 where it is not known.
        budget_ratio: share of the training time that the monitor may take; 0 where it is not known, 1 for no limit.

    Returns:
        A rich table; print it with `rich.print` or any console.

    Examples:
        >>> from ess_monitor.records import Measurement, Reading
        >>> reading = Reading(step=7, layer="mixer", status="ok", effective_size=3.0, state_capacity=12.0)
        >>> render_table(Measurement(step=7, timestamp_seconds=0.0, readings=(reading,), conditions={})).row_count
        1
    """
    validation.instance("measurement", measurement, Measurement)
    layers = validation.several("layers", layers, LayerInfo, hint="those of RunInfo.layers")
    every_n_steps = validation.whole("every_n_steps", every_n_steps, 0)
    budget_ratio = validation.real("budget_ratio", budget_ratio, low=0)
    from rich import box
    from rich.table import Table

    table = Table(
        title=f"state of the memory at step {measurement.step}",
        caption=plain_text(
            "\n".join((*_when_next(measurement, every_n_steps, budget_ratio), *_why_unknown(measurement)))
        ),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        pad_edge=False,
        show_edge=False,
    )
    table.add_column("layer", overflow="fold")
    table.add_column("ESS", justify="right", no_wrap=True)
    table.add_column("TSS", justify="right", no_wrap=True)
    table.add_column("utilization", no_wrap=True)
    table.add_column("retention", justify="right", no_wrap=True)
    table.add_column("condition", no_wrap=True)
    readings = {reading.layer: reading for reading in measurement.readings}
    for name in dict.fromkeys([*(layer.name for layer in layers), *readings]):
        condition = measurement.conditions.get(name, "unknown")
        shown = plain_text(condition_title(condition), _condition_style(condition))
        table.add_row(plain_text(layer_title(name)), *_cells(readings.get(name)), shown)
    return table


def render_findings(measurement: Measurement) -> Text:
    """Return one line per finding of this measurement."""
    lines = [
        f"step {finding.step}, {layer_title(finding.layer)}: {condition_title(finding.previous)} -> "
        f"{condition_title(finding.condition)}. {finding.reason} {finding.advice}".rstrip()
        for finding in measurement.findings
    ]
    return plain_text("\n".join(lines), "bold")


def render_warning(warning: str) -> Text:
    """Return one warning of this measurement.

    >>> render_warning("metric='loss' with metric_mode='max'").plain
    "warning: metric='loss' with metric_mode='max'"
    """
    return plain_text(f"warning: {warning}", "yellow")


def render_actions(measurement: Measurement) -> Text:
    """Return one line per action of the autopilot in this measurement, colored by its outcome.

    Examples:
        >>> from ess_monitor.records import Action, Measurement
        >>> done = Action(step=7, layer="mixer", action="pull_to_identity", outcome="applied", finding="collapsed",
        ...               message="regularizer attached", strength=0.5, utilization_before=0.12)
        >>> render_actions(
        ...     Measurement(step=7, timestamp_seconds=0.0, readings=(), conditions={}, actions=(done,))
        ... ).plain
        'step 7, mixer: applied pull_to_identity 0.5, utilization 12%: regularizer attached'
    """
    from rich.text import Text

    return Text("\n").join(_action_line(action) for action in measurement.actions)


def utilization_bar(ratio: float) -> str:
    """Return a bar of ten cells and the percentage.

    >>> utilization_bar(0.25)
    '██▌·······  25%'
    >>> utilization_bar(1.7)
    '██████████ 170%'
    """
    halves = round(min(max(ratio, 0.0), 1.0) * 2 * _BAR_CELLS)
    bar = "█" * (halves // 2) + "▌" * (halves % 2)
    return f"{bar:·<{_BAR_CELLS}} {ratio:>4.0%}"


def _when_next(measurement: Measurement, every_n_steps: int, budget_ratio: float) -> list[str]:
    """Say when the next sample comes, why it is not sooner, and what the monitor has cost."""
    when = f"next sample in {measurement.interval_steps} steps"
    cost = f"cost so far: {measurement.overhead_ratio:.2%} of the training time"
    if not 0 < budget_ratio < 1:
        return [when, cost]
    if 0 < every_n_steps < measurement.interval_steps:
        when += f", not {every_n_steps}, to stay within the budget"
    return [when, f"{cost}, the budget is {budget_ratio:.2%}"]


def _why_unknown(measurement: Measurement) -> list[str]:
    """Return a line for each reason for which conditions are unknown, with the layers it holds for; three at most."""
    layers: dict[str, list[str]] = {}
    for layer, reason in measurement.unknown_reasons.items():
        layers.setdefault(reason, []).append(layer_title(layer))
    lines = [
        f"unknown: {reason} ({names[0] if len(names) == 1 else f'{len(names)} layers'})"
        for reason, names in layers.items()
    ]
    return (
        lines
        if len(lines) <= _REASONS
        else [*lines[: _REASONS - 1], f"unknown: {len(lines) - _REASONS + 1} more reasons"]
    )


def _action_line(action: Action) -> Text:
    what = action.action if action.strength is None else f"{action.action} {action.strength:g}"
    before, after = action.utilization_before, action.utilization_after
    sizes = " -> ".join(f"{ratio:.0%}" for ratio in (before, after) if ratio is not None)
    utilization = f", utilization {sizes}" if sizes else ""
    line = f"step {action.step}, {layer_title(action.layer)}: {action.outcome} {what}{utilization}: {action.message}"
    return plain_text(" ".join(line.split()), _ACTION_STYLES[action.outcome])


def _condition_style(condition: Condition) -> str:
    color = CONDITION_INFO[condition].color
    return {"gray": "dim", "red": "bold red"}.get(color, color)


def _cells(reading: Reading | None) -> tuple[str, str, str | Text, str]:
    if reading is None:
        return _NOTHING, _NOTHING, plain_text("not measured", "dim"), _NOTHING
    if reading.status == "deferred":
        return _NOTHING, _NOTHING, plain_text("in a later sample", "dim"), _NOTHING
    capacity, ratio = _number(reading.state_capacity, 1), reading.utilization_ratio
    if reading.status != "ok":
        return _NOTHING, capacity, plain_text(reading.status, "yellow"), _NOTHING
    bar = _NOTHING if ratio is None else utilization_bar(ratio)
    return _number(reading.effective_size, 1), capacity, bar, _number(reading.retention_ratio, 2)


def _number(value: float | None, digits: int) -> str:
    return _NOTHING if value is None else f"{value:.{digits}f}"


def plain_text(text: str, style: str = "") -> Text:
    """Return a text without markup, and without control characters that would steer the terminal."""
    from rich.text import Text

    return Text(
        "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text), style
    )
