"""One layer on the page of a run: its charts, and their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ess_monitor.records import Condition, Reading
from ess_monitor.report.components import ROWS_OF_A_TABLE, Table, cell, evenly
from ess_monitor.report.figures import Chart, Marker, Scale, Series, line_chart, number
from ess_monitor.report.history import RunHistory
from ess_monitor.report.sections.spectra import chosen_spectra, spectra_chart, spectra_table
from ess_monitor.report.summary import layer_title

_DASHES = ("a", "b", "c")


@dataclass(frozen=True)
class LayerCard:
    """Everything about one layer."""

    title: str
    subtitle: str
    condition: Condition
    charts: tuple[Chart, ...]
    table: Table
    """The readings as numbers."""
    spectra: Table | None
    """The singular values as numbers; None where the log has none."""


def layer_card(story: RunHistory, layer: str, scale: Scale, marks: Sequence[Marker]) -> LayerCard:
    """Sizes over the steps, the profile over positions, spectra at a few steps, and the numbers of all."""
    info = story.layer(layer)
    last = story.ok(layer)[-1:]
    facts = [info.module, info.operator, *(f"TSS {number(r.state_capacity)}" for r in last if r.state_capacity)]
    spectra = chosen_spectra(story, layer)
    charts = [_sizes(story, layer, scale, marks), _profile(story, layer), spectra_chart(spectra)]
    return LayerCard(
        title=layer_title(layer),
        subtitle=", ".join(filter(None, facts)),
        condition=story.conditions[layer],
        charts=tuple(chart for chart in charts if chart is not None),
        table=_readings_table(story.readings[layer]),
        spectra=spectra_table(spectra),
    )


def _sizes(story: RunHistory, layer: str, scale: Scale, marks: Sequence[Marker]) -> Chart | None:
    lower, upper = story.series(layer, "effective_size_lower"), story.series(layer, "effective_size_upper")
    return line_chart(
        "State dimensions over steps",
        [
            Series("ESS", "a", story.series(layer, "effective_size")),
            Series("entropy-ESS", "b", story.series(layer, "entropy_size")),
            Series("TSS", "limit", story.series(layer, "state_capacity")),
        ],
        scale,
        band=(lower, upper) if len(lower) == len(upper) > 1 else None,
        markers=marks,
    )


def _profile(story: RunHistory, layer: str) -> Chart | None:
    """ESS at each position: first reading, the one at the first finding, and the last."""
    full = [r for r in story.ok(layer) if len(r.per_position) == len(r.positions) > 1]
    if not full:
        return None
    found = [finding.step for finding in story.findings if finding.layer == layer][:1]
    at_finding = [reading for reading in full if found and reading.step <= found[0]][-1:]
    chosen = list({reading.step: reading for reading in (full[0], *at_finding, full[-1])}.values())
    last = full[-1]
    cap = [(float(i), float(min(last.state_capacity or i, i, last.length - i))) for i in last.positions]
    lines = [
        Series(f"step {reading.step}", kind, list(zip(reading.positions, reading.per_position, strict=True)))
        for kind, reading in zip(_DASHES, chosen, strict=False)
    ]
    return line_chart(
        "ESS over positions of the sequence",
        [
            *lines,
            Series("most that is possible there", "limit", cap if last.length else []),
        ],
        Scale(0.0, float(max(last.length, *last.positions))),
        x_label="position",
    )


def _readings_table(readings: Sequence[Reading]) -> Table:
    columns = ("step", "ESS", "lower", "upper", "entropy-ESS", "TSS", "utilization", "retention", "status")
    rows = tuple(
        (
            str(reading.step),
            *(
                cell(value)
                for value in (
                    reading.effective_size,
                    reading.effective_size_lower,
                    reading.effective_size_upper,
                    reading.entropy_size,
                    reading.state_capacity,
                    reading.utilization_ratio,
                    reading.retention_ratio,
                )
            ),
            reading.status,
        )
        for reading in evenly(readings, ROWS_OF_A_TABLE)
    )
    caption = f"{len(rows)} of {len(readings)} readings" if len(rows) < len(readings) else f"All {len(rows)} readings"
    return Table(caption, columns, rows)
