"""The pages of analyses of state modulation, and of shots in a prompt."""

from __future__ import annotations

from collections.abc import Sequence

from ess_monitor import validation
from ess_monitor.analysis.modulation_results import (
    OFFSETS,
    LayerModulation,
    ModulationAt,
    ShotsProfile,
    StateModulation,
)
from ess_monitor.records import layer_title
from ess_monitor.report.analyses.layers import without_result
from ess_monitor.report.components import Table, cell, present
from ess_monitor.report.figures import Figure, Series, line_figure
from ess_monitor.report.page import render


def render_state_modulation(result: StateModulation) -> str:
    """Return the page of `state_modulation` as HTML: a table, and the ESS along the text and around separators.

    Args:
        result: what `state_modulation` returned.

    Returns:
        One whole document; it needs no other file.

    Examples:
        >>> page = render_state_modulation(
        ...     StateModulation(model="Net", separators=(0,), tolerance_scale="absolute", layers=())
        ... )
        >>> "Net: state modulation" in page, "<script" in page
        (True, False)
    """
    validation.instance("result", result, StateModulation, hint="state_modulation(model, tokens, ...) returns one")
    layers = [layer for layer in result.layers if layer.status == "ok"]
    taus = [_title(each) for each in layers[0].modulation] if layers else []
    rows = [
        (layer_title(layer.layer), label, str(layer.separators), str(layer.others), *map(_ratio, layer.modulation))
        for label, some in (("", result.layers), *((each.label, each.layers) for each in result.substitutions))
        for layer in some
        if layer.status == "ok"
    ]
    return render(
        "analysis.html",
        title=f"{result.model}: state modulation",
        lead="By how much of itself the ESS of a layer falls at separators, beyond others: 0 where separators are "
        "tokens like others, 1 where nothing of the state is left.",
        table=Table(
            "At separators, less the same at other tokens, with bootstrap errors",
            ("layer", "in their place", "separators", "other tokens", *taus),
            tuple(rows),
        ),
        notes=[f"{layer_title(layer.layer)}: {layer.message}" for layer in layers if layer.message],
        figures_title="ESS along the first sequence, and around separators",
        figures=state_modulation_figures(result),
        details=[],
        skipped=without_result(result.layers, result.skipped),
    )


def state_modulation_figures(result: StateModulation) -> tuple[Figure, ...]:
    """Draw the ESS along the first sequence and around separators, layer by layer."""
    layers = [layer for layer in result.layers if layer.status == "ok"]
    return present(*(figure for layer in layers for figure in (_along(layer, result.places), _around(layer))))


def _title(at: ModulationAt) -> str:
    return "entropy" if at.tolerance is None else f"tau {at.tolerance:g}"


def _ratio(at: ModulationAt) -> str:
    return cell(at.ratio) if at.standard_error is None else f"{cell(at.ratio)} ± {cell(at.standard_error)}"


def _along(layer: LayerModulation, places: Sequence[int]) -> Figure | None:
    """Draw the ESS at every position of the first sequence; separators are lines from top to bottom."""
    shown = [each for each in layer.modulation if each.tolerance is not None and each.along]
    if not shown:
        return None
    top = max(max(each.along) for each in shown)
    marks = [(float(place), height) for place in places for height in (0.0, top, 0.0)]
    lines = [
        Series(_title(each), kind, [(float(i), size) for i, size in enumerate(each.along, start=1)])
        for kind, each in zip("abcd", shown, strict=False)
    ]
    name, drawn = layer_title(layer.layer), [*lines, Series("separators", "limit", marks)]
    return line_figure(f"{name}: ESS along the text", {"": drawn}, x_label="position", layer=name)


def _around(layer: LayerModulation) -> Figure | None:
    """Draw the mean ESS around separators as a share of that at the first position that is shown."""
    lines = []
    for kind, each in zip("abcd", (at for at in layer.modulation if at.tolerance is not None), strict=False):
        pairs = [(float(offset), size) for offset, size in zip(OFFSETS, each.around, strict=True) if size is not None]
        if pairs and pairs[0][1] > 0:
            lines.append(Series(_title(each), kind, [(offset, size / pairs[0][1]) for offset, size in pairs]))
    name = layer_title(layer.layer)
    title = f"{name}: mean ESS around separators, as a share of that {-OFFSETS[0]} positions before"
    return line_figure(title, {"": lines}, x_label="position", layer=name)


def render_shots_profile(result: ShotsProfile) -> str:
    """Return the page of `shots_profile` as HTML: the ESS at the question, by the number of shots before it.

    Args:
        result: what `shots_profile` returned.

    Returns:
        One whole document; it needs no other file.

    Examples:
        >>> page = render_shots_profile(
        ...     ShotsProfile(model="Net", question=8, tolerance=1e-3, tolerance_scale="absolute", layers=())
        ... )
        >>> "Net: ESS over the number of shots" in page, "<script" in page
        (True, False)
    """
    validation.instance("result", result, ShotsProfile, hint="shots_profile(model, prompts, ...) returns one")
    layers = [layer for layer in result.layers if layer.status == "ok"]
    return render(
        "analysis.html",
        title=f"{result.model}: ESS over the number of shots",
        lead="ESS of every layer at the tokens of one question, behind 0, 1, 2, ... solved examples. What follows is "
        "the same in each, so that what differs is what the examples leave in the state.",
        table=Table(
            f"Means over the {result.question} tokens of the question, tau {result.tolerance:g}",
            ("layer", "shots", "tokens", "ESS", "entropy-ESS"),
            tuple(
                (
                    layer_title(layer.layer),
                    str(at.shots),
                    str(at.tokens),
                    cell(at.effective_size),
                    cell(at.entropy_size),
                )
                for layer in layers
                for at in layer.at
            ),
        ),
        notes=[f"{layer_title(layer.layer)}: {layer.message}" for layer in layers if layer.message],
        figures_title="ESS along the question",
        figures=shots_profile_figures(result),
        details=[],
        skipped=without_result(result.layers, result.skipped),
    )


def shots_profile_figures(result: ShotsProfile) -> tuple[Figure, ...]:
    """Draw the ESS along the question, layer by layer: a line for each of the first numbers of shots, and the last."""
    figures = []
    for layer in (layer for layer in result.layers if layer.status == "ok"):
        shown = layer.at if len(layer.at) <= 4 else (*layer.at[:3], layer.at[-1])
        lines = [
            Series(f"{at.shots} shots", kind, [(float(i), size) for i, size in zip(at.offsets, at.along, strict=True)])
            for kind, at in zip("abcd", shown, strict=False)
        ]
        name = layer_title(layer.layer)
        title, x_label = f"{name}: ESS along the question", "tokens of the question before"
        figures.append(line_figure(title, {"": lines}, x_label=x_label, layer=name))
    return present(*figures)
