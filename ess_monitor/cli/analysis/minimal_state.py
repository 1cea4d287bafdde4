"""`ess-monitor minimal-state`: how small the state of every layer can be."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import Annotated

import typer

from ess_monitor.cli.analysis.output import Heads, check_outputs, progress, put_out
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

    check_outputs(html, as_json, checkpoint)
    config = config_of(batch, length, layer, heads=heads)
    errors = tuple(error) if error else (0.1, 0.01)
    with redirect_stdout(sys.stderr):
        model, inputs = loaded(target, kwargs, checkpoint, prefix, kind, batch, length, width, vocab_size, seed)
        result = run_on(model, inputs, analyze, relative_errors=errors, config=config, progress=progress)
    title = f"{result.model}, {kind.value} input {tuple(inputs.shape)}: smallest states"
    page = render_minimal_state(result) if html is not None else None
    put_out(result, page, title, as_json=as_json, html=html)
