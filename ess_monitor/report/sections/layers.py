"""The card of one layer: its charts, and their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ess_monitor.records import Condition, Reading, layer_title
from ess_monitor.report.components import ROWS_OF_A_TABLE, Table, cell, evenly, present
from ess_monitor.report.figures import Chart, Marker, Scale, Series, line_chart, log_scale, number
from ess_monitor.report.history import RunHistory
from ess_monitor.report.sections.spectra import chosen_spectra, spectra_chart, spectra_table

_COLUMNS = {
    "ESS": "effective_size",
    "ESS over all positions": "effective_size_between",
    "at least": "effective_size_lower",
    "at most": "effective_size_upper",
    "entropy-ESS": "entropy_size",
    "TSS": "state_capacity",
    "utilization": "utilization_ratio",
    "retention": "retention_ratio",
    "far share": "far_share_ratio",
}
"""Heading -> field of `Reading`."""


@dataclass(frozen=True)
class LayerCard:
    """Everything the page shows of one layer."""

    title: str
    subtitle: str
    condition: Condition
    charts: tuple[Chart, ...]
    readings: Table
    spectra: Table | None
    """The singular values; None where the log has none."""


def layer_card(history: RunHistory, layer: str, scale: Scale, marks: Sequence[Marker]) -> LayerCard:
    """Draw sizes over steps, positions and tolerances, and spectra at a few steps, with the numbers of all."""
    info = history.layer(layer)
    last = history.ok(layer)[-1:]
    facts = [info.module, info.operator, *(f"TSS {number(r.state_capacity)}" for r in last if r.state_capacity)]
    spectra = chosen_spectra(history, layer)
    return LayerCard(
        title=layer_title(layer),
        subtitle=", ".join(filter(None, facts)),
        condition=history.conditions[layer],
        charts=present(
            _sizes(history, layer, scale, marks),
            _positions(history, layer),
            spectra_chart(spectra),
            _tolerances(history, layer),
        ),
        readings=_readings_table(history.readings[layer]),
        spectra=spectra_table(spectra),
    )


def _sizes(history: RunHistory, layer: str, scale: Scale, marks: Sequence[Marker]) -> Chart | None:
    lower, upper = history.series(layer, "effective_size_lower"), history.series(layer, "effective_size_upper")
    return line_chart(
        "State dimensions over steps",
        [
            Series("ESS", "a", history.series(layer, "effective_size")),
            Series("entropy-ESS", "b", history.series(layer, "entropy_size")),
            Series("TSS", "limit", history.series(layer, "state_capacity")),
        ],
        scale,
        band=(lower, upper) if len(lower) == len(upper) > 1 else None,
        markers=marks,
    )


def _positions(history: RunHistory, layer: str) -> Chart | None:
    """Draw the ESS at each position in the first reading, the one at the first finding, and the last."""
    full = [r for r in history.ok(layer) if len(r.per_position) == len(r.positions) > 1]
    if not full:
        return None
    found = [finding.step for finding in history.findings if finding.layer == layer][:1]
    at_finding = [reading for reading in full if found and reading.step <= found[0]][-1:]
    chosen = list({reading.step: reading for reading in (full[0], *at_finding, full[-1])}.values())
    last = full[-1]
    cap = [(float(i), float(min(last.state_capacity or i, i, last.length - i))) for i in last.positions]
    lines = [
        Series(f"step {reading.step}", kind, list(zip(reading.positions, reading.per_position, strict=True)))
        for kind, reading in zip("abc", chosen, strict=False)
    ]
    return line_chart(
        "ESS over positions of the sequence",
        [*lines, Series("largest possible", "limit", cap if last.length else [])],
        Scale(0.0, float(max(last.length, *last.positions))),
        x_label="position",
    )


def _tolerances(history: RunHistory, layer: str) -> Chart | None:
    """Draw the ESS over tau in the first, the middle and the last reading."""
    known = [each for each in history.ok(layer) if sum(tau > 0 for tau, _ in each.effective_size_at) > 1]
    if not known:
        return None
    chosen = {reading.step: reading for reading in (known[0], known[len(known) // 2], known[-1])}
    lines = [
        Series(f"step {step}", kind, [(tau, size) for tau, size in reading.effective_size_at if tau > 0])
        for kind, (step, reading) in zip("abc", chosen.items(), strict=False)
    ]
    axis = log_scale([tau for line in lines for tau, _ in line.pairs])
    return line_chart("ESS over the tolerance", lines, axis, x_label="tau")


def _readings_table(readings: Sequence[Reading]) -> Table:
    rows = tuple(
        (str(reading.step), *(cell(getattr(reading, name)) for name in _COLUMNS.values()), reading.status)
        for reading in evenly(readings, ROWS_OF_A_TABLE)
    )
    caption = f"{len(rows)} of {len(readings)} readings" if len(rows) < len(readings) else f"All {len(rows)} readings"
    return Table(caption, ("step", *_COLUMNS, "status"), rows)
