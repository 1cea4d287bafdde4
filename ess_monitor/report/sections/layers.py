"""The cards of layers: their figures, and the numbers of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ess_monitor.records import Condition, Reading, layer_title
from ess_monitor.report.components import (
    POINTS_OF_A_CARD,
    ROWS_OF_A_TABLE,
    EventRow,
    Table,
    cell,
    detail,
    evenly,
    marks,
    present,
    steps_of,
)
from ess_monitor.report.figures import Figure, Mark, Series, line_figure, share_values
from ess_monitor.report.history import RunHistory
from ess_monitor.report.labels import number
from ess_monitor.report.sections.spectra import chosen_spectra, spectra_figure, spectra_table
from ess_monitor.report.summary import by_attention

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
    figures: tuple[Figure, ...]
    readings: Table
    spectra: Table | None
    """The singular values; None where the log has none."""


def layer_cards(history: RunHistory, events: Sequence[EventRow] = ()) -> dict[str, LayerCard]:
    """Draw sizes over steps, positions and tolerances, and spectra at a few steps, with the numbers of all.

    The layers that need attention come first. Layers of one kind share their axes of sizes, all share that of spectra.
    """
    layers = by_attention(history)
    chosen = {layer: chosen_spectra(history, layer) for layer in layers}
    sizes = {layer: sizes_figure(history, layer, marks(events, layer)) for layer in layers}
    positions = {layer: positions_figure(history, layer) for layer in layers}
    tolerances = {layer: tolerances_figure(history, layer) for layer in layers}
    spectra = {layer: spectra_figure(chosen[layer]) for layer in layers}
    rows = detail(ROWS_OF_A_TABLE, len(layers), least=5)
    share_values(spectra.values())
    for layers_of_kind in by_kind(history):
        share_values(sizes[layer] for layer in layers_of_kind)
        share_values(positions[layer] for layer in layers_of_kind)
        share_values(tolerances[layer] for layer in layers_of_kind)
    return {
        layer: LayerCard(
            title=layer_title(layer),
            subtitle=_subtitle(history, layer),
            condition=history.conditions[layer],
            figures=present(sizes[layer], positions[layer], spectra[layer], tolerances[layer]),
            readings=_readings_table(history.readings[layer], rows),
            spectra=spectra_table(chosen[layer], rows),
        )
        for layer in layers
    }


def by_kind(*runs: RunHistory) -> list[list[str]]:
    """Return the layers of one module, operator and size together."""
    kinds: dict[tuple[str, str, float | None], list[str]] = {}
    for history in runs:
        for layer in history.layers:
            info, last = history.layer(layer), history.ok(layer)[-1:]
            size = None if not last or last[0].capacity_grows else last[0].state_capacity
            kinds.setdefault((info.module, info.operator, size), []).append(layer)
    return list(kinds.values())


def _subtitle(history: RunHistory, layer: str) -> str:
    info, last = history.layer(layer), history.ok(layer)[-1:]
    sizes = [f"TSS {number(reading.state_capacity)}" for reading in last if reading.state_capacity]
    return ", ".join(filter(None, [info.module, info.operator, *sizes]))


def sizes_figure(history: RunHistory, layer: str, events: Sequence[Mark] = ()) -> Figure | None:
    """Draw ESS, with its bounds, entropy-ESS and TSS over the steps."""
    lower, upper = history.series(layer, "effective_size_lower"), history.series(layer, "effective_size_upper")
    return line_figure(
        "State dimensions over steps",
        {
            "": [
                Series("ESS", "a", history.series(layer, "effective_size")),
                Series("entropy-ESS", "b", history.series(layer, "entropy_size")),
                Series("TSS", "limit", history.series(layer, "state_capacity")),
            ]
        },
        x_range=steps_of(history),
        band=(lower, upper) if len(lower) == len(upper) > 1 else None,
        marks=events,
        points=detail(POINTS_OF_A_CARD, len(history.layers), least=40),
    )


def positions_figure(history: RunHistory, layer: str) -> Figure | None:
    """Draw the ESS at each position in the first reading, the one at the first finding, and the last."""
    full = [r for r in history.ok(layer) if len(r.per_position) == len(r.positions) > 1]
    if not full:
        return None
    found = [finding.step for finding in history.findings if finding.layer == layer][:1]
    at_finding = [reading for reading in full if found and reading.step <= found[0]][-1:]
    chosen = list({reading.step: reading for reading in (full[0], *at_finding, full[-1])}.values())
    return positions_over("ESS over positions of the sequence", {f"step {each.step}": each for each in chosen})


def positions_over(title: str, readings: Mapping[str, Reading]) -> Figure | None:
    """Draw the ESS at each position, a line for each label, and the largest ESS that the last reading could have."""
    last = [*readings.values()][-1]
    if len(last.per_position) != len(last.positions) or not last.positions:
        return None
    cap = [(float(i), float(min(last.state_capacity or i, i, last.length - i))) for i in last.positions]
    lines = [
        Series(label, kind, list(zip(reading.positions, reading.per_position, strict=True)))
        for kind, (label, reading) in zip("abc", readings.items(), strict=False)
    ]
    return line_figure(
        title,
        {"": [*lines, Series("largest possible", "limit", cap if last.length else [])]},
        x_label="position",
        x_range=(0.0, float(max(last.length, *last.positions))),
    )


def tolerances_figure(history: RunHistory, layer: str) -> Figure | None:
    """Draw the ESS over tau in the first, the middle and the last reading."""
    known = [each for each in history.ok(layer) if sum(tau > 0 for tau, _ in each.effective_size_at) > 1]
    if not known:
        return None
    chosen = {reading.step: reading for reading in (known[0], known[len(known) // 2], known[-1])}
    lines = [
        Series(f"step {step}", kind, [(tau, size) for tau, size in reading.effective_size_at if tau > 0])
        for kind, (step, reading) in zip("abc", chosen.items(), strict=False)
    ]
    return line_figure("ESS over the tolerance", {"": lines}, x_label="tau", log_x=True)


def _readings_table(readings: Sequence[Reading], most: int) -> Table:
    rows = tuple(
        (str(reading.step), *(cell(getattr(reading, name)) for name in _COLUMNS.values()), reading.status)
        for reading in evenly(readings, most)
    )
    caption = f"{len(rows)} of {len(readings)} readings" if len(rows) < len(readings) else f"All {len(rows)} readings"
    return Table(caption, ("step", *_COLUMNS, "status"), rows)
