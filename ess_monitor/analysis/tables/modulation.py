"""Tables of state modulation, and of ESS over the shots in a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ess_monitor.analysis.tables.cells import add_layer, add_without_result
from ess_monitor.exporters.terminal.inspected import cell, plain_table

if TYPE_CHECKING:
    from rich.table import Table

    from ess_monitor.analysis.modulation_results import ModulationAt, ShotsProfile, StateModulation


def state_modulation_table(result: StateModulation, title: str | None = None) -> Table:
    """Return state modulation, with a row for each layer and substitution, and a column for each tolerance."""
    taus = [each.tolerance for each in next((each.modulation for each in result.layers if each.modulation), ())]
    columns = [f"tau {tau:g}" if tau is not None else "entropy" for tau in taus]
    title = title or f"{result.model}: state modulation at {', '.join(map(str, result.separators))}"
    table = plain_table(title, "layer", "in their place", numbers=("separators", *columns))
    for label, layers in (("", result.layers), *((each.label, each.layers) for each in result.substitutions)):
        for layer in layers:
            if layer.status == "ok":
                add_layer(table, layer, label, str(layer.separators), *map(_with_error, layer.modulation))
    caption = (
        "1 - ESS behind a separator / mean ESS at the four positions before, less the same at other tokens: 0 where "
        "separators are tokens like others. With bootstrap errors."
    )
    add_without_result(table, result.layers, result.skipped, caption)
    return table


def _with_error(at: ModulationAt) -> str:
    ratio = cell(at.ratio, ".2f")
    return ratio if at.ratio is None or at.standard_error is None else f"{ratio} ± {at.standard_error:.2f}"


def shots_profile_table(result: ShotsProfile, title: str | None = None) -> Table:
    """Return the ESS at a question, with a row for each layer and number of shots."""
    title = title or f"{result.model}: ESS at a question of {result.question} tokens, tau {result.tolerance:g}"
    table = plain_table(title, "layer", numbers=("shots", "tokens", "ESS", "entropy-ESS"))
    for layer in result.layers:
        for at in layer.at:
            sizes = (cell(at.effective_size, ".3g"), cell(at.entropy_size, ".3g"))
            add_layer(table, layer, str(at.shots), str(at.tokens), *sizes)
    caption = (
        "Means over the tokens of the question and over heads; what follows is the same behind any number of shots."
    )
    add_without_result(table, result.layers, result.skipped, caption)
    return table
