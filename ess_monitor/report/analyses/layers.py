"""The pages of analyses of a model, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeVar

from ess_monitor import validation
from ess_monitor.analysis.results import (
    Compressibility,
    HybridAdvice,
    LayerAdvice,
    LayerCompressibility,
    LayerLengths,
    LayerMinimalState,
    LayerReduction,
    LayerResult,
    LengthProfile,
    MinimalStates,
    Reduction,
)
from ess_monitor.records import LayerInfo, layer_title
from ess_monitor.report.components import Table, cell, depth_figure, present
from ess_monitor.report.figures import Figure, Series, line_figure, share_values
from ess_monitor.report.page import render

ResultT = TypeVar("ResultT", bound=LayerResult)

_LEAST_ERROR = 1e-7
"""Relative errors below this are rounding, and are left out of logarithmic charts."""


def render_minimal_state(result: MinimalStates) -> str:
    """Return the page of `minimal_state` as HTML: a table of all layers, and the error over the size of the state.

    Args:
        result: what `minimal_state` returned.

    Returns:
        One whole document; it needs no other file.

    Examples:
        >>> page = render_minimal_state(MinimalStates(model="Net", layers=()))
        >>> "Net: smallest states" in page, "<script" in page
        (True, False)
    """
    validation.instance("result", result, MinimalStates, hint="minimal_state(model, ...) returns one")
    layers = _measured(result.layers)
    wanted = [state.relative_error for state in layers[0].states] if layers else []
    columns = ("layer", "operator", "TSS", "rank", "mean rank", "causal rank")
    notes = ["State dimensions per head or channel. In brackets: no recurrence with a smaller state does."]
    notes += _messages(layers)
    return render(
        "analysis.html",
        title=f"{result.model}: smallest states",
        lead="The rank is the state that a recurrence needs to do what the layer did on this input. A smaller one "
        "makes an error, given as a share of the layer's outputs.",
        table=Table(
            "Smallest state of every layer",
            (*columns, *(f"for {100 * error:g} % error" for error in wanted)),
            tuple(_sizes(layer) for layer in layers),
        ),
        notes=notes,
        figures_title="Relative error over the size of the state",
        figures=minimal_state_figures(result),
        details=[_errors_table(layer) for layer in layers],
        skipped=without_result(result.layers, result.skipped),
    )


def minimal_state_figures(result: MinimalStates) -> tuple[Figure, ...]:
    """Draw the error over the size of the state, layer by layer."""
    return _sharing(_errors_figure(layer) for layer in _measured(result.layers))


def _measured(layers: Iterable[ResultT]) -> list[ResultT]:
    return [layer for layer in layers if layer.status == "ok"]


def _messages(layers: Iterable[LayerResult]) -> list[str]:
    """Return what else is to be known of the layers that were measured."""
    return [f"{layer_title(layer.layer)}: {layer.message}" for layer in layers if layer.message]


def without_result(layers: Iterable[LayerResult], skipped: Sequence[LayerInfo]) -> Table | None:
    """Return the layers that have no result with the reason; None without any."""
    rows = [(layer_title(layer.layer), f"{layer.status}: {layer.message}") for layer in layers if layer.status != "ok"]
    rows += [(layer_title(info.name), f"skipped: {info.reason}") for info in skipped]
    return Table("Layers without a result", ("layer", "reason"), tuple(rows)) if rows else None


def _capacity(size: float | None, grows: bool) -> str:
    return cell(size) + (" (grows)" if grows else "")


def _sizes(layer: LayerMinimalState) -> tuple[str, ...]:
    states = [f"{'–' if each.size is None else each.size} ({each.at_least})" for each in layer.states]
    ranks = (str(layer.rank), cell(layer.mean_rank), str(layer.causal_rank))
    return (
        layer_title(layer.layer),
        layer.operator,
        _capacity(layer.state_capacity, layer.capacity_grows),
        *ranks,
        *states,
    )


def _sharing(figures: Iterable[Figure | None]) -> tuple[Figure, ...]:
    drawn = present(*figures)
    share_values(drawn)
    return drawn


def _errors_figure(layer: LayerMinimalState) -> Figure | None:
    errors = [(each.size, each.floor, each.error or 0.0) for each in layer.errors]
    return _loss_figure(layer, "relative error", errors, "floor of any recurrence", _LEAST_ERROR)


def _loss_figure(
    layer: LayerResult,
    quantity: str,
    sizes: Sequence[tuple[int, float, float]],
    floor_label: str,
    least: float,
    others: Mapping[str, Sequence[tuple[int, float | None]]] = MappingProxyType({}),
) -> Figure | None:
    """Draw the floor and what a truncation reaches over the size of the state, as far as they are above `least`.

    `others` are more lines, by their labels.
    """
    floor = [(float(size), value) for size, value, _ in sizes if value > least]
    reached = [(float(size), value) for size, _, value in sizes if value > least]
    series = [Series("truncated realization", "a", reached)]
    for kind, (label, pairs) in zip("bcd", others.items(), strict=False):
        shown = [(float(size), value) for size, value in pairs if value is not None and value > least]
        series += [Series(label, kind, shown)] if shown else []
    lines = {quantity: [*series, Series(floor_label, "limit", floor)]}
    ends, title = (0.0, float(max(1, *(size for size, _, _ in sizes)))), layer_title(layer.layer)
    drawn = line_figure(title, lines, x_label="state size", x_range=ends, log_y=True, layer=title)
    return drawn if reached else None


def _errors_table(layer: LayerMinimalState) -> Table:
    rows = tuple((str(each.size), cell(each.floor), cell(each.error)) for each in layer.errors)
    columns = ("state size", "floor of any recurrence", "truncated realization")
    title = layer_title(layer.layer)
    return Table(f"{title}: relative error of the outputs", columns, rows, layer=title)


def render_compressibility(result: Compressibility) -> str:
    """Return the page of `compressibility` as HTML: what each student must lose, layer by layer.

    Args:
        result: what `compressibility` returned.

    Returns:
        One whole document; it needs no other file.

    Examples:
        >>> page = render_compressibility(Compressibility(model="Net", student_states=(4,), layers=()))
        >>> "Net: what a smaller state must lose" in page, "<script" in page
        (True, False)
    """
    validation.instance("result", result, Compressibility, hint="compressibility(model, ...) returns one")
    layers = _measured(result.layers)
    columns = ("layer", "operator", "TSS", *(f"state {state}" for state in result.student_states))
    notes = ["In brackets: the loss of the truncated realization, whose matrices fit this one input."]
    if result.operator_steps is not None:
        notes.append(
            f"Behind the arrow: a student after {result.operator_steps} steps on the operator, and what the layer's "
            f"outputs lose after {result.activation_steps} steps on them. Both are of the input that it was trained on."
        )
    notes += _messages(layers)
    return render(
        "analysis.html",
        title=f"{result.model}: what a smaller state must lose",
        lead="The operator loss, squared and as a share of the teacher's operator, that no student with a state of "
        "this size can avoid on this input.",
        table=Table("Smallest loss of a student", columns, tuple(_losses(layer) for layer in layers)),
        notes=notes,
        figures_title="Operator loss over the state of the student",
        figures=compressibility_figures(result),
        details=[],
        skipped=without_result(result.layers, result.skipped),
    )


def compressibility_figures(result: Compressibility) -> tuple[Figure, ...]:
    """Draw what a student loses over the size of its state, layer by layer."""
    return _sharing(_losses_figure(layer) for layer in _measured(result.layers))


def _losses(layer: LayerCompressibility) -> tuple[str, ...]:
    losses = [each.summary for each in layer.students]
    return (layer_title(layer.layer), layer.operator, _capacity(layer.state_capacity, layer.capacity_grows), *losses)


def _losses_figure(layer: LayerCompressibility) -> Figure | None:
    losses = [(each.state_size, each.floor, each.truncation) for each in layer.students]
    trained = {
        "trained student": [(each.state_size, each.operator_loss) for each in layer.students],
        "outputs of a trained student": [(each.state_size, each.activation_loss) for each in layer.students],
    }
    return _loss_figure(layer, "loss", losses, "floor of any student", _LEAST_ERROR**2, trained)


def render_reduction(result: Reduction) -> str:
    """Return the page of `reduce` as HTML: loss and metrics before and after, and what each layer lost.

    Args:
        result: the numbers that `reduce` returned.

    Returns:
        One whole document; it needs no other file.

    Examples:
        >>> page = render_reduction(Reduction(model="Net", state=4, layers=()))
        >>> "Net: states of 4" in page, "<script" in page
        (True, False)
    """
    validation.instance("result", result, Reduction, hint="reduce(model, ..., state=R) returns one beside the model")
    layers = _measured(result.layers)
    columns = ("layer", "operator", "state", "lost", "floor", "truncation", "how")
    names = dict.fromkeys((*result.before, *result.after))
    numbers = tuple((name, cell(result.before.get(name)), cell(result.after.get(name))) for name in names)
    return render(
        "analysis.html",
        title=f"{result.model}: states of {result.state}",
        lead="What is lost is the squared difference of each layer's operator, as a share of the operator. The floor "
        "is what any recurrence with this state loses on this input; the truncation is fitted to this one input.",
        table=Table("What each layer lost", columns, tuple(_lost(layer) for layer in layers)),
        notes=_messages(layers),
        figures_title="Operator loss over the depth of the model",
        figures=reduction_figures(result),
        details=[Table("Loss and metrics of the model", ("", "before", "after"), numbers)] if numbers else [],
        skipped=without_result(result.layers, result.skipped),
    )


def _lost(layer: LayerReduction) -> tuple[str, ...]:
    losses = [
        f"{100 * value:.2g} %" if value is not None else cell(None)
        for value in (layer.operator_loss, layer.floor, layer.truncation)
    ]
    size = f"{layer.state_before} → {layer.state_after}"
    return (layer_title(layer.layer), layer.operator, size, *losses, layer.method)


def reduction_figures(result: Reduction) -> tuple[Figure, ...]:
    """Draw what each layer lost over the depth of the model."""
    layers = result.layers
    lines = [
        ("smaller layer", "a", [layer.operator_loss for layer in layers]),
        ("floor", "limit", [layer.floor for layer in layers]),
    ]
    return present(depth_figure("Share of the operator", lines))


def render_hybrid_advice(result: HybridAdvice) -> str:
    """Return the page of `hybrid_advice` as HTML: advice for every layer, and what they use over the depth.

    Args:
        result: what `hybrid_advice` returned.

    Returns:
        One whole document; it needs no other file.

    Examples:
        >>> page = render_hybrid_advice(HybridAdvice(model="Net", tolerance=0.1, tolerance_scale="output", layers=()))
        >>> "Net: advice for its layers" in page, "<script" in page
        (True, False)
    """
    validation.instance("result", result, HybridAdvice, hint="hybrid_advice(model, ...) returns one")
    layers = _measured(result.layers)
    columns = ("layer", "mixer", "rank", "ESS", "TSS", "used", "retention", "far share", "advice")
    evidence = tuple((layer_title(layer.layer), "; ".join(layer.evidence)) for layer in layers)
    of = " of each token's output" if result.tolerance_scale == "output" else ""
    return render(
        "analysis.html",
        title=f"{result.model}: advice for its layers",
        lead="Rank 1 uses the smallest share of the state that it could, and so would miss a smaller one least.",
        table=Table(f"Every layer, tau {result.tolerance:g}{of}", columns, tuple(_advice(layer) for layer in layers)),
        notes=result.notes,
        figures_title="Over the depth of the model",
        figures=hybrid_advice_figures(result),
        details=[Table("What the advice rests on", ("layer", "evidence"), evidence)],
        skipped=without_result(result.layers, result.skipped),
    )


def _advice(layer: LayerAdvice) -> tuple[str, ...]:
    sizes = (cell(layer.effective_size), _capacity(layer.state_capacity, layer.capacity_grows))
    ratios = (cell(layer.used_ratio), cell(layer.retention_ratio), cell(layer.far_share_ratio))
    return (layer_title(layer.layer), layer.mixer, str(layer.rank), *sizes, *ratios, layer.advice)


def hybrid_advice_figures(result: HybridAdvice) -> tuple[Figure, ...]:
    """Draw what the layers use over the depth of the model."""
    layers = result.layers
    lines = [
        ("used: ESS / attainable size", "a", [layer.used_ratio for layer in layers]),
        ("retention", "b", [layer.retention_ratio for layer in layers]),
        ("far share", "c", [layer.far_share_ratio for layer in layers]),
    ]
    return present(depth_figure("Shares, 0 to 1", lines))


def render_length_profile(result: LengthProfile) -> str:
    """Return the page of `length_profile` as HTML: ESS and the norm of the product of A, layer by layer.

    Args:
        result: what `length_profile` returned.

    Returns:
        One whole document; it needs no other file.

    Examples:
        >>> page = render_length_profile(
        ...     LengthProfile(model="Net", lengths=(64,), tolerance=1e-3, tolerance_scale="absolute", layers=())
        ... )
        >>> "Net: ESS over the length" in page, "<script" in page
        (True, False)
    """
    validation.instance("result", result, LengthProfile, hint="length_profile(model, ...) returns one")
    layers = _measured(result.layers)
    columns = ("layer", "length", "ESS", "TSS", "ESS without decay", "norm of the product of A", "entropy-ESS")
    of = " of each token's output" if result.tolerance_scale == "output" else ""
    return render(
        "analysis.html",
        title=f"{result.model}: ESS over the length",
        lead="A state that keeps what it is given fills up with the length of the sequence. One that decays forgets: "
        "its ESS falls as the norm of the product of A goes to 0.",
        table=Table(
            f"At the midpoint of the first tokens, tau {result.tolerance:g}{of}",
            columns,
            tuple(row for layer in layers for row in _at_lengths(layer)),
        ),
        notes=_messages(layers),
        figures_title="Over the length of the sequence",
        figures=length_profile_figures(result),
        details=[],
        skipped=without_result(result.layers, result.skipped),
    )


def length_profile_figures(result: LengthProfile) -> tuple[Figure, ...]:
    """Draw the sizes and the norm of the product of A over the length, layer by layer."""
    layers = _measured(result.layers)
    sizes, decays = ([draw(layer) for layer in layers] for draw in (_sizes_over_length, _decay_over_length))
    share_values(decays)
    return present(*(figure for pair in zip(sizes, decays, strict=True) for figure in pair))


def _at_lengths(layer: LayerLengths) -> list[tuple[str, ...]]:
    return [
        (
            layer_title(layer.layer),
            str(at.length),
            cell(at.effective_size),
            _capacity(at.state_capacity, layer.capacity_grows),
            cell(at.undecayed_size),
            cell(at.decay_product_norm),
            cell(at.entropy_size),
        )
        for at in layer.lengths
    ]


def _over_length(layer: LayerLengths, name: str) -> list[tuple[float, float]]:
    return [(float(at.length), value) for at in layer.lengths if (value := getattr(at, name)) is not None]


def _over_lengths(layer: LayerLengths, what: str, lines: list[Series], *, log_y: bool = False) -> Figure | None:
    first, last = float(layer.lengths[0].length), float(layer.lengths[-1].length)
    ends = (first, last) if last > first else (first / 2, 2 * first)
    name = layer_title(layer.layer)
    title = f"{name}: {what}"
    return line_figure(title, {"": lines}, x_label="tokens", x_range=ends, log_x=True, log_y=log_y, layer=name)


def _sizes_over_length(layer: LayerLengths) -> Figure | None:
    series = [Series("ESS", "a", _over_length(layer, "effective_size"))]
    series.append(Series("ESS without decay", "b", _over_length(layer, "undecayed_size")))
    if not layer.capacity_grows:
        series.append(Series("TSS", "limit", _over_length(layer, "state_capacity")))
    return _over_lengths(layer, "ESS", series)


def _decay_over_length(layer: LayerLengths) -> Figure | None:
    norms = [(length, norm) for length, norm in _over_length(layer, "decay_product_norm") if norm > 1e-30]
    return _over_lengths(layer, "norm of the product of A", [Series("norm", "a", norms)], log_y=True)
