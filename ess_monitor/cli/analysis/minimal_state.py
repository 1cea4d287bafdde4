"""`ess-monitor minimal-state`: how small the state of every layer can be."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ess_monitor.cli.analysis.output import Heads, add_without_result, progress, put_out
from ess_monitor.cli.options import (
    AsJson,
    Batch,
    Checkpoint,
    Html,
    Input,
    InputKind,
    Kwargs,
    Layers,
    Length,
    Prefix,
    Seed,
    Target,
    VocabSize,
    Width,
)
from ess_monitor.cli.tables import capacity_text, plain_table
from ess_monitor.records import layer_title

if TYPE_CHECKING:
    from ess_monitor.analysis import LayerMinimalState, MinimalStates

Errors = Annotated[
    list[float] | None, typer.Option("--error", help="Relative error of the outputs; repeatable. Default 0.1 0.01.")
]


def minimal_state(
    target: Target,
    kwargs: Kwargs = None,
    checkpoint: Checkpoint = None,
    prefix: Prefix = "",
    layer: Layers = None,
    kind: Input = InputKind.gaussian,
    batch: Batch = 2,
    heads: Heads = 16,
    length: Length = 128,
    width: Width = None,
    vocab_size: VocabSize = None,
    seed: Seed = 0,
    error: Errors = None,
    as_json: AsJson = False,
    html: Html = None,
) -> None:
    """Show how small the state of every layer can be: exactly (rank), and for an error of its outputs.

    A state of the size shown reproduces what the layer did on this input. It is a realization of that operator, not a
    smaller layer: see `distill-check` for the floor under any smaller layer.
    """
    from ess_monitor.analysis import minimal_state as analyze
    from ess_monitor.cli.measuring import config_of, loaded, run_on
    from ess_monitor.report import render_minimal_state

    config = config_of(batch, length, layer, heads=heads)
    errors = tuple(error) if error else (0.1, 0.01)
    with redirect_stdout(sys.stderr):
        model, inputs = loaded(target, kwargs, checkpoint, prefix, kind, batch, length, width, vocab_size, seed)
        result = run_on(model, inputs, analyze, relative_errors=errors, config=config, progress=progress)
    title = f"{result.model}, {kind.value} input {tuple(inputs.shape)}: smallest states"
    page = render_minimal_state(result) if html is not None else None
    content = result.model_dump(mode="json")
    put_out(content, _table(title, result, errors), page, as_json=as_json, html=html)


def _table(title: str, result: MinimalStates, errors: tuple[float, ...]) -> Table:
    columns = ("TSS", "rank", "mean rank", "causal rank", *(f"for {100 * error:g} % error" for error in errors))
    table = plain_table(title, "layer", "operator", numbers=columns)
    for layer in result.layers:
        if layer.status == "ok":
            table.add_row(layer_title(layer.layer), layer.operator, *_numbers(layer))
    first = "State dimensions per head or channel. In brackets: no recurrence with fewer does, whatever it is."
    add_without_result(table, result.layers, result.skipped, first)
    return table


def _numbers(layer: LayerMinimalState) -> list[str]:
    capacity = capacity_text(f"{layer.state_capacity:g}", grows=layer.capacity_grows)
    states = [f"{'-' if each.size is None else each.size} ({each.at_least})" for each in layer.states]
    return [capacity, str(layer.rank), f"{layer.mean_rank:.1f}", str(layer.causal_rank), *states]
