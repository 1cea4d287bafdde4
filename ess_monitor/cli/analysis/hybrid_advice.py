"""`ess-monitor hybrid-advice`: which layers would not miss a smaller state or another mixer."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import Annotated

import typer

from ess_monitor.cli.analysis.output import check_outputs, progress, put_out
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
    ScaleName,
    Seed,
    Target,
    ToleranceScale,
    VocabSize,
    Width,
)

Tolerance = Annotated[float, typer.Option(help="tau: singular values above it count. 0.1 as in the paper's figure 30.")]


def hybrid_advice(
    target: Target,
    kwargs: Kwargs = None,
    checkpoint: Checkpoint = None,
    prefix: Prefix = "",
    layer: Layers = None,
    kind: Input = InputKind.gaussian,
    batch: Batch = 4,
    length: Length = 128,
    width: Width = None,
    vocab_size: VocabSize = None,
    seed: Seed = 0,
    tolerance: Tolerance = 0.1,
    tolerance_scale: ToleranceScale = ScaleName.output,
    as_json: AsJson = False,
    html: Html = None,
) -> None:
    """Rank the layers of a hybrid by how much of their state they use, with advice and what it rests on.

    Advice, not proof: try a change and compare the loss. It means little without the weights of a trained model.
    """
    from ess_monitor.analysis import hybrid_advice as analyze
    from ess_monitor.cli.measuring import config_of, loaded, run_on
    from ess_monitor.report import render_hybrid_advice

    check_outputs(html, as_json, checkpoint)
    scale = tolerance_scale.value
    config = config_of(batch, length, layer, tolerance=tolerance, tolerance_scale=scale, positions=8)
    with redirect_stdout(sys.stderr):
        model, inputs = loaded(target, kwargs, checkpoint, prefix, kind, batch, length, width, vocab_size, seed)
        result = run_on(model, inputs, analyze, config=config, progress=progress)
    page = render_hybrid_advice(result) if html is not None else None
    title = f"{result.model}, {kind.value} input {tuple(inputs.shape)}: advice"
    put_out(result, page, title, as_json=as_json, html=html)
