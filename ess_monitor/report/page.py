"""The page of one run, and the templates of both pages."""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ess_monitor import validation
from ess_monitor.records import CONDITIONS, SCHEMA_VERSION, condition_title, layer_title
from ess_monitor.report.components import EVENTS_SHOWN, event_rows, markers, metric_charts, metrics_table, steps_of
from ess_monitor.report.history import RunHistory
from ess_monitor.report.sections.diagnosis import (
    BENCHMARK,
    benchmark_limits,
    detector_facts,
    detector_table,
    was_judged_as_benchmarked,
)
from ess_monitor.report.sections.layers import LayerCard, layer_card
from ess_monitor.report.sections.modulation import modulation_chart, modulation_table
from ess_monitor.report.sections.run_facts import overhead_chart, overhead_facts, overhead_table, run_facts
from ess_monitor.report.sections.utilization import LEVELS, heat_map, ratio_table
from ess_monitor.report.summary import ATTENTION, headline, paragraphs, timeline

LAYERS_OPEN = 16
"""With more layers than this, those without a finding or an action are folded."""


def render_report(history: RunHistory | None = None, *, story: RunHistory | None = None) -> str:
    """Return the page of a run as HTML.

    Args:
        history: what `load_history` read.
        story: the name of `history` in 0.1.

    Returns:
        One whole document; it needs no other file. Names and texts of the run are escaped.

    Example:
        >>> from pathlib import Path
        >>> from ess_monitor.records import LayerInfo, RunInfo
        >>> layer = LayerInfo(name="<script>", module="Mixer", supported=True)
        >>> run = RunInfo(run_name="demo", model="Net", layers=(layer,))
        >>> page = render_report(RunHistory(Path("events.jsonl"), run))
        >>> "&lt;script&gt;" in page, "<script" in page
        (True, False)
    """
    name, given = ("history", history) if story is None else ("story", story)
    run = validation.instance(name, given, RunHistory, hint="load_history(path) reads one")
    scale = steps_of(run)
    events = event_rows(run)
    touched = {event.layer for event in timeline(run)}
    open_layers = [layer for layer in run.layers if layer in touched or len(run.layers) <= LAYERS_OPEN]

    def cards(layers: list[str]) -> list[LayerCard]:
        return [
            layer_card(run, layer, scale, markers([event for event in events if event.layer == layer], scale))
            for layer in layers
        ]

    return render(
        "report.html",
        title=f"{run.info.run_name}: memory report",
        headline=headline(run),
        facts=run_facts(run),
        paragraphs=paragraphs(run),
        utilization=heat_map(run, "utilization_ratio", scale),
        utilization_table=ratio_table(run, "utilization_ratio", "Utilization, 0 to 1"),
        retention=heat_map(run, "retention_ratio", scale),
        retention_table=ratio_table(run, "retention_ratio", "Retention"),
        metrics=metric_charts({"": run}, scale, markers(events, scale)),
        metrics_table=metrics_table(run),
        modulation=modulation_chart(run, scale, markers(events, scale)),
        modulation_table=modulation_table(run),
        open_cards=cards(open_layers),
        folded_cards=cards([layer for layer in run.layers if layer not in open_layers]),
        events=events,
        events_left_out=len(run.findings) + len(run.actions) + run.events_dropped - len(events),
        events_shown=EVENTS_SHOWN,
        detector_facts=detector_facts(run),
        detector_table=detector_table(run),
        spared_layer="" if run.spared_layer is None else layer_title(run.spared_layer),
        benchmark=BENCHMARK if was_judged_as_benchmarked(run.info.diagnosis) else None,
        benchmark_limits=benchmark_limits(run.info.diagnosis),
        overhead_facts=overhead_facts(run),
        overhead_table=overhead_table(run),
        overhead_chart=overhead_chart(run, scale),
    )


def render(template: str, **context: Any) -> str:
    """Fill a template of this room."""
    return _environment().get_template(template).render(**context)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("ess_monitor.report"),
        autoescape=True,
        finalize=_clean,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "levels": range(LEVELS),
        "schema_version": SCHEMA_VERSION,
        "conditions": CONDITIONS,
        "condition_title": condition_title,
        "attention": ATTENTION,
    }
    return environment


def _clean(value: Any) -> Any:
    """Replace control characters, among them those that turn the direction of text.

    Texts of templates and macros are of markupsafe's type and pass as they are.
    """
    if type(value) is not str or value.isprintable():
        return value
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in value)
