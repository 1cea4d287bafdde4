"""The page of one run, and what all pages are made with."""

from __future__ import annotations

import hashlib
import json
import re
from base64 import b64encode
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ess_monitor import validation
from ess_monitor.records import CONDITIONS, SCHEMA_VERSION, condition_title, layer_title
from ess_monitor.report.components import EVENTS_SHOWN, event_rows, marks, metrics_figure, metrics_table, steps_of
from ess_monitor.report.figures import Figure
from ess_monitor.report.history import RunHistory
from ess_monitor.report.labels import printable, shared_prefix
from ess_monitor.report.sections.diagnosis import (
    BENCHMARK,
    benchmark_limits,
    detector_facts,
    detector_table,
    was_judged_as_benchmarked,
)
from ess_monitor.report.sections.layers import layer_cards
from ess_monitor.report.sections.modulation import modulation_figure, modulation_table
from ess_monitor.report.sections.run_facts import overhead_facts, overhead_figure, overhead_table, run_facts
from ess_monitor.report.sections.utilization import ratio_figure, ratio_table
from ess_monitor.report.summary import ATTENTION, headline, paragraphs, timeline

_LEAST_SHARED = 24
"""Characters of a value that is worth a reference."""
LAYERS_OPEN = 16
"""With more layers than this, those without a finding or an action are folded."""


def render_report(history: RunHistory | None = None, *, story: RunHistory | None = None) -> str:
    """Return the page of a run as HTML.

    Args:
        history: what `load_history` read.
        story: the name of `history` in 0.1.

    Returns:
        One whole document; it needs no other file. Names and texts of the run are escaped.

    Examples:
        >>> from pathlib import Path
        >>> from ess_monitor.records import LayerInfo, RunInfo
        >>> layer = LayerInfo(name="<script>", module="Mixer", supported=True)
        >>> run = RunInfo(run_name="demo", model="Net", layers=(layer,))
        >>> page = render_report(RunHistory(Path("events.jsonl"), run))
        >>> "&lt;script&gt;" in page, "<script>" in page
        (True, False)
    """
    name, given = ("history", history) if story is None else ("story", story)
    run = validation.instance(name, given, RunHistory, hint="load_history(path) reads one")
    events, cards = event_rows(run), layer_cards(run, event_rows(run))
    touched = {event.layer for event in timeline(run)}
    is_open = {layer: layer in touched or len(run.layers) <= LAYERS_OPEN for layer in cards}
    return render(
        "report.html",
        title=f"{run.info.run_name}: memory report",
        headline=headline(run),
        facts=run_facts(run),
        paragraphs=paragraphs(run),
        prefix=shared_prefix(run.layers),
        utilization=ratio_figure(run, "utilization_ratio", "Utilization of every layer, ESS / TSS"),
        utilization_table=ratio_table(run, "utilization_ratio", "Utilization, 0 to 1"),
        retention=ratio_figure(run, "retention_ratio", "Retention of every layer"),
        retention_table=ratio_table(run, "retention_ratio", "Retention"),
        metrics=metrics_figure({"": run}, steps_of(run), events),
        metrics_table=metrics_table(run),
        modulation=modulation_figure(run, marks(events)),
        modulation_table=modulation_table(run),
        open_cards=[card for layer, card in cards.items() if is_open[layer]],
        folded_cards=[card for layer, card in cards.items() if not is_open[layer]],
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
        overhead_figure=overhead_figure(run),
    )


@dataclass
class _Contents:
    """Collects the headings and figures of a page while its template is filled."""

    headings: list[tuple[str, str]] = field(default_factory=list)
    """Id and text."""
    figures: list[dict[str, Any]] = field(default_factory=list)

    def heading(self, text: str) -> str:
        """Note a heading; return its id."""
        self.headings.append((re.sub(r"[^a-z]+", "-", text.lower()).strip("-"), text))
        return self.headings[-1][0]

    def drawn(self) -> dict[str, list[Any]]:
        """Return the figures for the script of the page."""
        return share_repeated(self.figures)

    def figure(self, figure: Figure) -> int:
        """Note a figure; return its number."""
        parts = {"data": figure.data, "layout": figure.layout, "rows": figure.rows, "orders": figure.orders}
        self.figures.append(parts)
        return len(self.figures) - 1


def share_repeated(figures: Sequence[Any]) -> dict[str, list[Any]]:
    """Store lists and objects that occur again once, so that a page is smaller: neighbors have the same steps and axes.

    Returns:
        `figures`, in which `{"shared": n}` stands for what repeats, and `shared`: these values, which may refer to
        others.

    >>> share_repeated([{"x": [0, 1000, 2000, 3000, 4000, 5000]}, {"x": [0, 1000, 2000, 3000, 4000, 5000]}])
    {'figures': [{'x': {'shared': 0}}, {'x': {'shared': 0}}], 'shared': [[0, 1000, 2000, 3000, 4000, 5000]]}
    """
    counts: Counter[str] = Counter()
    texts: dict[int, str] = {}

    def count(value: Any) -> None:
        if isinstance(value, (dict, list, tuple)):
            text = texts[id(value)] = json.dumps(value, separators=(",", ":"))
            counts[text] += len(text) > _LEAST_SHARED
            if counts[text] < 2:  # what is in a repeated value is stored with it
                count_inside(value)

    def count_inside(value: Any) -> None:
        for each in value.values() if isinstance(value, dict) else value:
            count(each)

    shared: list[Any] = []
    places: dict[str, int] = {}

    def replace(value: Any) -> Any:
        if not isinstance(value, (dict, list, tuple)):
            return value
        text = texts.get(id(value)) or json.dumps(value, separators=(",", ":"))
        if counts[text] > 1:
            if text not in places:
                places[text] = len(shared)
                shared.append(None)
                shared[places[text]] = inside(value)
            return {"shared": places[text]}
        return inside(value)

    def inside(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: replace(each) for key, each in value.items()}
        return [replace(each) for each in value]

    for figure in figures:
        count_inside(figure)
    return {"figures": [inside(figure) for figure in figures], "shared": shared}


def render(template: str, **context: Any) -> str:
    """Fill a template of this package."""
    return _environment().get_template(template).render(contents=_Contents(), **context)


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
    folder = files("ess_monitor.report") / "templates"
    scripts = [Markup((folder / name).read_text(encoding="utf-8")) for name in ("plotly.min.js", "page.js")]
    hashes = [b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.globals |= {
        "schema_version": SCHEMA_VERSION,
        "conditions": CONDITIONS,
        "condition_title": condition_title,
        "attention": ATTENTION,
        "scripts": scripts,
        "script_sources": Markup(" ".join(f"'sha256-{each}'" for each in hashes)),
    }
    return environment


def _clean(value: Any) -> Any:
    """Replace control characters. Texts of templates and macros are of markupsafe's type and pass as they are."""
    return printable(value) if type(value) is str else value
