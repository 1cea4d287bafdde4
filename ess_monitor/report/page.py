"""The page of one run."""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ess_monitor import validation
from ess_monitor.records import SCHEMA_VERSION
from ess_monitor.report.components import (
    EVENTS_SHOWN,
    event_rows,
    markers,
    metric_charts,
    metrics_table,
    ratio_table,
    steps_of,
)
from ess_monitor.report.history import RunHistory
from ess_monitor.report.sections.diagnosis import (
    HELD_OUT,
    detector_facts,
    detector_table,
    how_far_it_carries,
    judged_as_measured,
)
from ess_monitor.report.sections.layers import LayerCard, layer_card
from ess_monitor.report.sections.run_facts import overhead_chart, overhead_facts, overhead_table, run_facts
from ess_monitor.report.sections.utilization import LEVELS, heat_map
from ess_monitor.report.summary import headline, layer_title, paragraphs, timeline

LAYERS_OPEN = 16
"""With more layers than this only those with a finding or an action are shown at once; the others are folded away."""


def render_report(story: RunHistory) -> str:
    """The page of a run as HTML.

    Args:
        story: what `load_history` read.

    Returns:
        A whole document that needs nothing beside it. Names and texts of the run are escaped.

    Example:
        >>> from pathlib import Path
        >>> from ess_monitor.records import LayerInfo, RunInfo
        >>> layer = LayerInfo(name="<script>", module="Mixer", supported=True)
        >>> run = RunInfo(run_name="demo", model="Net", layers=(layer,))
        >>> page = render_report(RunHistory(Path("events.jsonl"), run))
        >>> "&lt;script&gt;" in page, "<script" in page
        (True, False)
    """
    validation.instance("story", story, RunHistory, hint="load_history(path) reads one")
    scale = steps_of(story)
    events = event_rows(story)
    marks = markers(events, scale)
    touched = {event.layer for event in timeline(story)}
    first = [layer for layer in story.layers if layer in touched or len(story.layers) <= LAYERS_OPEN]

    def cards(layers: list[str]) -> list[LayerCard]:
        return [
            layer_card(story, layer, scale, markers([event for event in events if event.layer == layer], scale))
            for layer in layers
        ]

    return render(
        "report.html",
        title=f"{story.info.run_name}: memory report",
        headline=headline(story),
        facts=run_facts(story),
        paragraphs=paragraphs(story),
        heat=heat_map(story, "utilization_ratio", scale),
        heat_table=ratio_table(story, "utilization_ratio", "Utilization, 0 to 1"),
        retention=heat_map(story, "retention_ratio", scale),
        retention_table=ratio_table(story, "retention_ratio", "Retention"),
        metrics=metric_charts(story, scale, marks),
        metrics_table=metrics_table(story),
        cards=cards(first),
        folded_cards=cards([layer for layer in story.layers if layer not in first]),
        events=events,
        events_left_out=len(story.findings) + len(story.actions) - len(events),
        events_shown=EVENTS_SHOWN,
        detector=detector_facts(story),
        detector_table=detector_table(story),
        spared_layer="" if story.spared_layer is None else layer_title(story.spared_layer),
        quality=HELD_OUT if judged_as_measured(story.info.diagnosis) else None,
        quality_carries=how_far_it_carries(story.info.diagnosis),
        overhead=overhead_facts(story),
        overhead_table=overhead_table(story),
        overhead_chart=overhead_chart(story, scale),
    )


def render(template: str, **context: Any) -> str:
    """A template of this room, with what every page needs."""
    return _environment().get_template(template).render(levels=range(LEVELS), schema_version=SCHEMA_VERSION, **context)


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("ess_monitor.report"),
        autoescape=True,
        finalize=_clean,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _clean(value: Any) -> Any:
    """Control characters, those that turn the direction of text among them, have no place on a page.

    Texts of templates and macros are of markupsafe's type and pass as they are.
    """
    if type(value) is not str or value.isprintable():
        return value
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in value)
