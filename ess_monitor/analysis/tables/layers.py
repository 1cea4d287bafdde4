"""Tables of what analyses say of each layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ess_monitor.analysis.tables.cells import add_caption, add_layer, add_without_result
from ess_monitor.exporters.terminal.inspected import add_skipped, add_unmeasured, capacity_text, cell, plain_table

if TYPE_CHECKING:
    from rich.table import Table

    from ess_monitor.analysis.results import (
        Compressibility,
        HybridAdvice,
        LayerAdvice,
        LayerStates,
        LengthProfile,
        MinimalStates,
        Reduction,
    )


def minimal_states_table(result: MinimalStates, title: str | None = None) -> Table:
    """Return the smallest states, with a row for each layer."""
    errors = next((layer.states for layer in result.layers if layer.states), ())
    columns = ("TSS", "rank", "mean rank", "causal rank", *(f"for {100 * e.relative_error:g} % error" for e in errors))
    table = plain_table(title or f"{result.model}: smallest states", "layer", "operator", numbers=columns)
    for layer in result.layers:
        if layer.status == "ok":
            ranks = (cell(layer.rank), cell(layer.mean_rank, ".1f"), cell(layer.causal_rank))
            states = (f"{cell(each.size)} ({each.at_least})" for each in layer.states)
            add_layer(table, layer, layer.operator, _capacity(layer), *ranks, *states)
    caption = "State dimensions per head or channel. In brackets: no recurrence with fewer does, whatever it is."
    add_without_result(table, result.layers, result.skipped, caption)
    return table


def compressibility_table(result: Compressibility, title: str | None = None) -> Table:
    """Return what students lose, with a row for each layer and a column for each state size."""
    columns = ("TSS", *(f"state {state}" for state in result.student_states))
    title = title or f"{result.model}: operator loss of a student, at least"
    table = plain_table(title, "layer", "operator", numbers=columns)
    for layer in result.layers:
        if layer.status == "ok":
            add_layer(table, layer, layer.operator, _capacity(layer), *(each.summary for each in layer.students))
    caption = (
        "As a share of the teacher's operator, squared. In brackets: the truncation, whose matrices fit this one input."
    )
    if result.operator_steps is not None:
        caption += (
            f"\nBehind the arrow: a student after {result.operator_steps} steps on the operator, and what the layer's "
            f"outputs lose after {result.activation_steps} steps on them"
        )
    add_without_result(table, result.layers, result.skipped, caption)
    return table


def reduction_table(result: Reduction, title: str | None = None) -> Table:
    """Return what smaller states cost, with a row for each layer."""
    title = title or f"{result.model}: states of {result.state}"
    table = plain_table(title, "layer", "operator", numbers=("state", "lost", "distill-check"))
    table.add_column("kept", overflow="fold")
    settings: dict[str, int | float] = {}
    for layer in result.layers:
        if layer.status == "ok":
            lost, floor, truncation = (
                f"{100 * (value or 0.0):.2g} %" for value in (layer.operator_loss, layer.floor, layer.truncation)
            )
            size = f"{cell(layer.state_before)} → {cell(layer.state_after)}"
            add_layer(table, layer, layer.operator, size, lost, f"{floor} ({truncation})", layer.method)
            settings |= layer.settings
    names = dict.fromkeys((*result.before, *result.after))
    changes = [
        f"{name} {cell(result.before.get(name), '.4g')} → {cell(result.after.get(name), '.4g')}" for name in names
    ]
    lines = [
        "; ".join(changes) or "no targets or labels in the data: give them for loss and accuracy before and after",
        "lost: of the operator, squared, on the calibration data. distill-check: what any recurrence with this state "
        "loses at least, and in brackets its truncation",
    ]
    if settings:
        built = " or ".join(f"{name}={value:g}" for name, value in settings.items())
        lines.append(f"build the model for it with {built}")
    add_without_result(table, result.layers, result.skipped, "\n".join(lines))
    return table


def hybrid_advice_table(result: HybridAdvice, title: str | None = None) -> Table:
    """Return the advice for a hybrid, with a row for each layer."""
    numbers = ("rank", "ESS", "TSS", "used", "retention", "far share")
    table = plain_table(title or f"{result.model}: advice", "layer", "mixer", numbers=numbers)
    table.add_column("advice, and what it rests on", overflow="fold")
    for layer in result.layers:
        if layer.status == "ok":
            ratios = (layer.used_ratio, layer.retention_ratio, layer.far_share_ratio)
            sizes = (cell(layer.rank), cell(layer.effective_size, ".1f"), _capacity(layer))
            words = "\n".join([layer.advice, *(f"- {line}" for line in layer.evidence)])
            add_layer(table, layer, layer.mixer, *sizes, *(cell(value, ".2f") for value in ratios), words)
        else:
            add_unmeasured(table, layer.layer, layer.status, layer.message)
    add_skipped(table, result.skipped)
    add_caption(table, result.notes)
    return table


def length_profile_table(result: LengthProfile, title: str | None = None) -> Table:
    """Return the sizes over the length, with a row for each layer and length."""
    columns = ("length", "ESS", "TSS", "ESS without decay", "norm of A's product", "entropy")
    of = " of each token's output" if result.tolerance_scale == "output" else ""
    table = plain_table(title or f"{result.model}, tau {result.tolerance:g}{of}", "layer", numbers=columns)
    for layer in result.layers:
        for at in layer.lengths:
            capacity = capacity_text(cell(at.state_capacity, ".3g"), grows=layer.capacity_grows)
            numbers = (at.undecayed_size, at.decay_product_norm, at.entropy_size)
            sizes = (cell(at.length), cell(at.effective_size, ".3g"), capacity)
            add_layer(table, layer, *sizes, *(cell(value, ".3g") for value in numbers))
    caption = "At the midpoint of the first tokens of one input; means over samples and heads."
    add_without_result(table, result.layers, result.skipped, caption)
    return table


def _capacity(layer: LayerStates | LayerAdvice) -> str:
    return capacity_text(cell(layer.state_capacity), grows=layer.capacity_grows)
